r"""Posterior samples of states and of missing observations, by the simulation smoother.

Draw :math:`(z^+, x^+)` from the model without its means, and correct it by what the data and it differ in:

.. math:: \tilde z = z^+ + \mathbb{E}[z \mid x_\mathrm{obs}] - \mathbb{E}^0[z^+ \mid x^+_\mathrm{obs}]

is a sample of :math:`p(z_{1:T} \mid x_\mathrm{obs})`, and likewise :math:`\tilde x`, which equals x where it is observed.
Covariances are computed once for every pattern of gaps, whatever the number of paths: a path costs matrix times vector.

Reference: Durbin and Koopman, A Simple and Efficient Simulation Smoother for State Space Time Series Analysis, 2002.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynavae.exact._algebra import cholesky
from dynavae.exact._entry import check_float, check_shape, entry
from dynavae.exact._patterned import Group, Updated, covariances, groups, innovation, unpacked
from dynavae.exact.linear_gaussian import LinearGaussian, check_constant, offsets


class Completed(NamedTuple):
    r"""Result of :func:`complete`: states and observations given what was observed.

    Attributes:
        z_mean: :math:`\mathbb{E}[z_t \mid x_\mathrm{obs}]`.
        x_mean: :math:`\mathbb{E}[x_t \mid x_\mathrm{obs}]`, x itself where it is observed.
        z: K joint samples of all states.
        x: the samples of x that go with them; x itself where it is observed.
    """

    z_mean: Float[Tensor, "T B z_dim"]
    x_mean: Float[Tensor, "T B x_dim"]
    z: Float[Tensor, "T K B z_dim"]
    x: Float[Tensor, "T K B x_dim"]


def _check(
    params: Any, x: Any, noise_z: Any, noise_x: Any, observed: Any = None, control: Any = None
) -> None:
    check_constant(params, x, observed, control)
    T, B, x_dim = x.shape
    for name, noise, size in (("z", noise_z, params.m0.shape[-1]), ("x", noise_x, x_dim)):
        check_float(f"noise_{name}", noise, like=params.m0)
        paths = noise.shape[1] if noise.ndim == 4 else 1
        check_shape(f"noise_{name}", noise, (T, paths, B, size), f"(T, K, B, {name}_dim)")
    if noise_z.shape[1] != noise_x.shape[1]:
        raise ValueError(
            f"noise_z and noise_x should have as many paths K; got {noise_z.shape[1]} and {noise_x.shape[1]}."
        )


@entry(_check)
@torch.no_grad()
def complete(
    params: LinearGaussian,
    x: Float[Tensor, "T B x_dim"],
    noise_z: Float[Tensor, "T K B z_dim"],
    noise_x: Float[Tensor, "T K B x_dim"],
    observed: Bool[Tensor, "T B x_dim"] | None = None,
    control: Float[Tensor, "T B u_dim"] | None = None,
) -> Completed:
    r"""Means and samples of :math:`p(z_{1:T}, x_{1:T} \mid x_\mathrm{obs})`, as a function of normal noise.

    Unlike :func:`~dynavae.exact.kalman.sample_posterior`, which factorises a covariance per frame and sequence, and
    draws states only. All is computed in float64; no gradients.

    Args:
        params: the model; the same for all steps and sequences. P0, Q and R positive definite.
        x: observations; NaN is missing.
        noise_z, noise_x: standard normal draws, K paths of each sequence.
        observed: False where missing or padded; default: where x is not NaN.
        control: u_t, if the model has B or D; finite everywhere.

    Raises:
        ValueError: for shapes or dtypes that do not fit, parameters that vary, or a covariance that is not positive
            definite.

    Example:
        >>> I = torch.eye(1)
        >>> walk = LinearGaussian(m0=torch.zeros(1), P0=I, A=I, Q=I, C=I, R=I)
        >>> x = torch.tensor([1.0, float("nan"), 2.0]).reshape(3, 1, 1)
        >>> complete(walk, x, torch.randn(3, 9, 1, 1), torch.randn(3, 9, 1, 1)).z_mean.flatten()
        tensor([0.7143, 1.1429, 1.5714])
    """
    T, B, _ = x.shape
    observed = ~x.isnan() if observed is None else observed
    f, g = (a.double() for a in offsets(params, T, B, control))
    m0, P0, A, Q, C, R = (a.double() for a in params[:6])
    y = torch.where(observed, torch.where(observed, x, 0.0) - g, 0.0)
    group, patterns = groups(observed)
    steps = covariances(P0, A, Q, C, R, group, patterns)

    # Paths are last: column 0 is the data, the others are draws of the model without its means.
    noise_z, noise_x = (a.double().permute(0, 2, 3, 1) for a in (noise_z, noise_x))
    L0, LQ, LR = (cholesky(a, f"params.{name}") for a, name in ((P0, "P0"), (Q, "Q"), (R, "R")))
    z = [L0 @ noise_z[0]]
    for shock in (LQ @ noise_z[1:]).unbind(0):
        z.append(A @ z[-1] + shock)
    z_drawn = torch.stack(z)
    x_drawn = C @ z_drawn + LR @ noise_x
    columns = torch.cat([y.unsqueeze(-1), torch.where(observed.unsqueeze(-1), x_drawn, 0.0)], -1)
    first = torch.zeros_like(columns[0, :, :1]).expand(-1, len(m0), -1).clone()
    first[..., 0] = m0
    states, noise = _smooth(steps, group, columns, first, f, A)
    fitted = C @ states + R @ noise
    return Completed(
        states[..., 0].to(x.dtype),
        torch.where(observed, x, (fitted[..., 0] + g).to(x.dtype)),
        (z_drawn + states[..., :1] - states[..., 1:]).permute(0, 3, 1, 2).to(x.dtype),
        torch.where(
            observed.unsqueeze(1),
            x.unsqueeze(1),
            (x_drawn + fitted[..., :1] - fitted[..., 1:] + g.unsqueeze(-1)).permute(0, 3, 1, 2).to(x.dtype),
        ),
    )


def _smooth(
    steps: list[Updated], group: Group, y: Tensor, m: Tensor, f: Tensor, A: Tensor
) -> tuple[Tensor, Tensor]:
    """Smoothed states (T, B, z, K) and R^-1 times the smoothed noise (T, B, x, K) of y (T, B, x, K).

    With r the adjoint of the disturbance smoother: z_smoothed = m + P r. Only column 0 has offsets f.
    """
    means, whites = [], []
    for t, s in enumerate(steps):
        white = torch.where(group.valid[t, :, None, None], innovation(s, group, y[t], m), 0.0)
        means.append(m)
        whites.append(white)
        if t + 1 < len(steps):
            m = A @ (m + group.apply(s.W.mT, white))
            m[..., 0] += f[t + 1]
    r = torch.zeros_like(means[-1])
    states, noise = [], []
    for t in range(len(steps) - 1, -1, -1):
        s = steps[t]
        u = torch.where(group.valid[t, :, None, None], whites[t] - group.apply(s.W, r), 0.0)
        u = group.apply(s.V.mT, u)
        r = r + group.apply(s.packed.C.mT, u)
        states.append(means[t] + group.apply(s.P, r))
        noise.append(unpacked(s, group, u, y[t]))
        r = A.mT @ r
    return torch.stack(states[::-1]), torch.stack(noise[::-1])
