r"""Backward messages of the linear-Gaussian state-space model: what the future says about a state.

The message :math:`\beta_t(z) = p(x_{t:T} \mid z_t = z)` includes the emission at t. It is kept in information
form, which represents a flat message (J = 0, nothing observed any more) and a degenerate one (rank of J below
z_dim). Fused with any Gaussian prediction of z_t it gives the exact conditional: with
:math:`N(A z_{t-1} + B u_t + b, Q)` the posterior transition :math:`p(z_t \mid z_{t-1}, x_{t:T})`, with
:math:`N(m_{t|t-1}, P_{t|t-1})` the smoothed marginal, with :math:`N(m_0, P_0)` the likelihood
:math:`p(x_{1:T})`.

Reference: Särkkä and García-Fernández, Temporal Parallelization of Bayesian Smoothers, 2021,
arXiv:1905.13002.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynavae.exact._algebra import cholesky, gaussian_log_density, matvec, per_step, symmetric
from dynavae.exact._entry import check_float, entry
from dynavae.exact.linear_gaussian import LinearGaussian, check_sequence, observed_emission, offsets


class Information(NamedTuple):
    r"""A message :math:`\beta(z) = \exp(-\tfrac12 z^\top J z + h^\top z + \log c)` about a state z.

    Attributes:
        J: precision, symmetric and positive semidefinite.
        h: linear term.
        log_c: log of the constant, in nats.
    """

    J: Float[Tensor, "*batch z_dim z_dim"]
    h: Float[Tensor, "*batch z_dim"]
    log_c: Float[Tensor, "*batch"]


class Conditioned(NamedTuple):
    r"""Result of :func:`condition`: :math:`N(z; m, P)\,\beta(z) = \exp(\log Z)\, N(z; \mu, \Sigma)`.

    Attributes:
        mean: :math:`\mu`.
        covariance: :math:`\Sigma = (P^{-1} + J)^{-1}`.
        log_normaliser: :math:`\log Z = \log \int N(z; m, P)\,\beta(z)\,dz`, in nats.
    """

    mean: Float[Tensor, "*batch z_dim"]
    covariance: Float[Tensor, "*batch z_dim z_dim"]
    log_normaliser: Float[Tensor, "*batch"]


def _emission_information(
    params: LinearGaussian, x: Tensor, observed: Tensor | None, offset: Tensor
) -> Information:
    """p(x_t | z_t) of the observed coordinates as a function of z_t, for all t at once."""
    emission = observed_emission(params, x, observed, offset)
    L = cholesky(emission.R, "R")
    white_C = torch.linalg.solve_triangular(L, emission.C, upper=False)
    white_y = torch.linalg.solve_triangular(L, emission.y.unsqueeze(-1), upper=False).squeeze(-1)
    log_c = gaussian_log_density(emission.y, L, emission.seen)
    return Information(white_C.mT @ white_C, matvec(white_C.mT, white_y), log_c)


def _through_transition(message: Information, A: Tensor, L: Tensor, f: Tensor) -> Information:
    r"""Integrate the next state out: :math:`\int N(z'; A z + f, L L^\top)\, \beta(z')\, dz'` as a message.

    With M = I + L'JL, never singular, and N = M^{-1} L'J, K = L N: the precision about the predicted mean is
    (I - K)'J(I - K) + N'N = (J^{-1} + Q)^{-1}, without either inverse.
    """
    J, h, log_c = message
    eye = torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)
    W = cholesky(eye + symmetric(L.mT @ J @ L), "I + L'JL")
    N = torch.cholesky_solve(L.mT @ J, W)
    keep = eye - L @ N
    J = symmetric(keep.mT @ J @ keep + N.mT @ N)
    white = torch.linalg.solve_triangular(W, matvec(L.mT, h).unsqueeze(-1), upper=False).squeeze(-1)
    log_c = log_c + 0.5 * white.square().sum(-1) - W.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    h = matvec(keep.mT, h)
    Jf = matvec(J, f)
    return Information(
        J=symmetric(A.mT @ J @ A),
        h=matvec(A.mT, h - Jf),
        log_c=log_c + ((h - 0.5 * Jf) * f).sum(-1),
    )


@entry(check_sequence)
def backward_information(
    params: LinearGaussian,
    x: Float[Tensor, "T B x_dim"],
    observed: Bool[Tensor, "T B x_dim"] | None = None,
    control: Float[Tensor, "T B u_dim"] | None = None,
) -> Information:
    r"""Messages :math:`\beta_t(z_t) = p(x_{t:T} \mid z_t)` in information form, for every t and sequence.

    .. math::
        \beta_t(z) = p(x_t \mid z) \int N(z'; A z + B u_{t+1} + b, Q)\, \beta_{t+1}(z')\, dz', \qquad
        \beta_T(z) = p(x_T \mid z)

    over observed coordinates only. Once nothing is observed any more J, h and log_c are exactly 0.

    Args:
        params: the model; Q and R positive definite (P0 and m0 are not used).
        x: observations; NaN is missing.
        observed: False where missing or padded; default: where x is not NaN.
        control: u_t, if the model has B or D; finite everywhere.

    Raises:
        ValueError: for shapes or dtypes that do not fit, an observed value that is not finite, or a Q or R
            that is not positive definite.

    Example:
        >>> I = torch.eye(1)
        >>> walk = LinearGaussian(m0=torch.zeros(1), P0=I, A=I, Q=I, C=I, R=I)
        >>> x = torch.tensor([1.0, 2.0, float("nan")]).reshape(3, 1, 1)
        >>> backward_information(walk, x).J.flatten()
        tensor([1.5000, 1.0000, 0.0000])
    """
    T, B, _ = x.shape
    f, g = offsets(params, T, B, control)
    frames = [
        Information(*frame) for frame in zip(*_emission_information(params, x, observed, g), strict=True)
    ]
    A, L, f_into = per_step(params.A, T), per_step(cholesky(params.Q, "params.Q"), T), f.unbind(0)
    messages = [frames[-1]]
    for t in range(T - 2, -1, -1):
        future = _through_transition(messages[-1], A[t + 1], L[t + 1], f_into[t + 1])
        messages.append(Information(*(now + later for now, later in zip(frames[t], future, strict=True))))
    return Information(*(torch.stack(part) for part in zip(*messages[::-1], strict=True)))


def _check_condition(mean: Any, covariance: Any, message: Any) -> None:
    if not isinstance(message, Information):
        raise TypeError(f"message should be an Information(J, h, log_c); got {type(message).__name__}.")
    check_float("mean", mean)
    for name, value in (("covariance", covariance), ("message.J", message.J), ("message.h", message.h)):
        check_float(name, value, like=mean)
        sizes = value.shape[-1:] if name == "message.h" else value.shape[-2:]
        if any(size != mean.shape[-1] for size in sizes):
            raise ValueError(
                f"{name} should have last sizes z_dim = {mean.shape[-1]}, as mean has; "
                f"got {tuple(value.shape)}."
            )


@entry(_check_condition)
def condition(
    mean: Float[Tensor, "*m z_dim"], covariance: Float[Tensor, "*c z_dim z_dim"], message: Information
) -> Conditioned:
    r"""Fuse a Gaussian prediction N(m, P) of a state with a message about it; leading axes broadcast.

    .. math::
        \Sigma = (P^{-1} + J)^{-1} = L (I + L^\top J L)^{-1} L^\top, \quad P = L L^\top, \qquad
        \mu = m + \Sigma (h - J m)

    Args:
        mean: m, predicted mean, such as A z_{t-1} + B u_t + b with any particle axes in front.
        covariance: P, positive definite.
        message: such as one time step of :func:`backward_information`; J may be singular.

    Raises:
        ValueError: for shapes that do not fit, or a P that is not positive definite.

    Example:
        >>> flat = Information(torch.zeros(1, 1), torch.zeros(1), torch.zeros(()))
        >>> condition(torch.ones(1), 4 * torch.eye(1), flat).covariance
        tensor([[4.]])
    """
    J, h, log_c = message
    L = cholesky(covariance, "covariance")
    eye = torch.eye(J.shape[-1], dtype=J.dtype, device=J.device)
    W = cholesky(eye + symmetric(L.mT @ J @ L), "I + L'JL")
    root = torch.linalg.solve_triangular(W, L.mT, upper=False)  # root' root = (P^-1 + J)^-1
    Jm = matvec(J, mean)
    white = matvec(root, h - Jm)
    log_det = W.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_normaliser = log_c + ((h - 0.5 * Jm) * mean).sum(-1) + 0.5 * white.square().sum(-1) - log_det
    posterior = symmetric(root.mT @ root)
    return Conditioned(mean + matvec(root.mT, white), posterior, log_normaliser)
