r"""The log-likelihood of the linear-Gaussian state-space model with a gradient of its own, for training.

The value is that of :func:`~dynavae.exact.kalman.kalman_filter`, and so is the gradient where that is compiled
(:mod:`dynavae.exact.compiled`: small problems, on a CPU with Numba). Else the gradient is the adjoint of the filter written
out, with the covariances shared by sequences that miss the same values: the means need one recursion backward in time, and
so do the covariances, :math:`\Lambda_t = \Phi_t^\top \Lambda_{t+1} \Phi_t + \partial_{P_t}` with
:math:`\Phi_t = A (I - K_t C)`; all else is done for all steps at once, without a factorisation. Everything is computed in
float64.

References: Koopman and Shephard, Exact Score for Time Series Models in State Space Form, 1992. De Jong, Smoothing and
Interpolation with the State-Space Model, 1989.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynavae.exact import forms
from dynavae.exact._algebra import once, symmetric
from dynavae.exact._entry import entry
from dynavae.exact._innovations import adjoints, means, times
from dynavae.exact._patterned import groups
from dynavae.exact._riccati import covariances, remembering
from dynavae.exact.linear_gaussian import LinearGaussian, check_constant, offsets
from dynavae.exact.recurrence import congruence_recurrence, folded, products
from dynavae.exact.shared import Columns, log_density, masked, plain, transfer


@entry(check_constant)
def log_likelihood(
    params: LinearGaussian,
    x: Float[Tensor, "T B x_dim"],
    observed: Bool[Tensor, "T B x_dim"] | None = None,
    control: Float[Tensor, "T B u_dim"] | None = None,
) -> Float[Tensor, " B"]:
    r""":math:`\log p(x)` of what is observed, in nats, differentiable once.

    Args:
        params: the model; the same for all steps and sequences.
        x: observations; NaN is missing.
        observed: False where missing or padded; default: where x is not NaN.
        control: u_t, if the model has B or D; finite everywhere.

    Raises:
        ValueError: for shapes or dtypes that do not fit, parameters that vary, an observed value that is not finite, or a
            covariance of an observation that is not positive definite.

    Example:
        >>> I = torch.eye(1)
        >>> walk = LinearGaussian(m0=torch.zeros(1), P0=I, A=I, Q=I, C=I, R=I)
        >>> log_likelihood(walk, torch.tensor([1.0, float("nan"), 2.0]).reshape(3, 1, 1))
        tensor([-3.3823])
    """
    T, B, _ = x.shape
    observed = ~x.isnan() if observed is None else observed
    f, g = offsets(params, T, B, control)
    p, complete = plain(params), bool(observed.all())
    if forms.choose(p, T, B, 0 if complete else groups(observed)[0].number) == "compiled":
        return forms.run_filter("compiled", params, x, observed, f, g).log_likelihood.sum(0)
    y = x if complete else torch.where(observed, x, 0.0)
    if params.D is not None or params.d is not None:
        y = y - g if complete else torch.where(observed, y - g, 0.0)
    driven = None if params.B is None and params.b is None else f
    tensors: tuple[Tensor | None, ...] = (p.m0, p.P0, p.A, p.Q, p.C, p.R, driven, y)
    if x.device.type != "mps":
        tensors = tuple(None if a is None else a.double() for a in tensors)
    value: Tensor = _LogLikelihood.apply(*tensors, observed)
    return value.to(x.dtype)


class _LogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, m0: Tensor, P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor,
        f: Tensor | None, y: Tensor, observed: Tensor,
    ) -> Tensor:  # fmt: skip
        (T, B, _), (group, seen) = y.shape, groups(observed)
        complete = bool(seen.all())
        of = None if group.number == 1 else torch.arange(B, device=y.device) if group.of is None else group.of
        columns = Columns(of, T, B)
        C, R = (C, R) if complete else masked(C, R, seen)
        c = covariances(P0, A, Q, C, R, T)
        if any(ctx.needs_input_grad[1:6]):
            c = remembering(c, A, C, T)
        V, Omega = transfer(c, A, C)
        start, driven = columns.split(m0.expand(1, B, -1))[0], None if f is None else columns.split(f)
        s, white = means(start, columns.gather(Omega), columns.split(y), driven)
        count = y.shape[-1] if complete else observed.sum(-1).to(y.dtype)
        value = log_density(c, white, columns, count)
        ctx.save_for_backward(A, C, c.P, c.K, c.P_f, V, Omega, s, white, group.valid, seen)
        ctx.columns = columns
        return (value if complete and bool(group.valid.all()) else torch.where(group.valid, value, 0.0)).sum(
            0
        )

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        A, C, P, K, P_f, V, Omega, s, white, valid, seen = ctx.saved_tensors
        columns, N, x = ctx.columns, len(P), white.shape[-2]
        weights = grad * valid
        # Through the means: adjoints of w_t and m_{t+1}, and the derivative of each Omega_t.
        out, first = adjoints(columns.gather(Omega), s, -white * columns.split(weights.unsqueeze(-1)))
        dOmega = columns.totals(products(out, s, N))
        n = columns.totals(folded(columns.of_sequences(weights), N))
        of_B, of_V, of_Phi, of_M = (
            dOmega[..., :x, :-x], dOmega[..., :x, -x:], dOmega[..., x:, :-x], dOmega[..., x:, -x:]
        )  # fmt: skip
        # Omega = [[-V C, V], [A - M C, M]],  M = A K,  K = P C' S^-1,  S^-1 = V' V,  S = C P C' + R.
        M = (K.mT @ A.mT).mT
        of_M = of_M - of_Phi @ C.mT
        of_V = of_V - of_B @ C.mT
        of_K = (of_M.mT @ A).mT @ V.mT @ V
        of_S = -0.5 * V.mT @ (of_V @ V.mT + n * torch.eye(x).to(V)) @ V  # of the density, log |S| too
        of_S = symmetric(of_S - K.mT @ of_K)
        of_P = symmetric(of_K @ C) + C.mT @ of_S @ C
        Lambda = congruence_recurrence((A - M @ C).mT, of_P, reverse=True)
        into = Lambda[1:]  # P_{t+1} = Phi P_t A' + Q, which to first order does not change with K
        into_A = into @ A
        through = M[:-1].mT @ into_A
        dA = _sum(of_Phi) + _sum(of_M @ K.mT) + 2 * _sum(into_A @ P_f[:-1])
        of_C = of_K.mT @ P - M.mT @ of_Phi - V.mT @ of_B + 2 * of_S @ (P @ C.mT).mT
        dC = _sum(of_C) - 2 * _sum(through @ P_f[:-1])
        of_R = torch.cat([of_S[:-1] + through @ K[:-1], of_S[-1:]])
        if C.ndim == 4:
            of_R = of_R * (seen.unsqueeze(-1) & seen.unsqueeze(-2))
        dy = df = None
        if ctx.needs_input_grad[6]:
            df = columns.join(torch.cat([torch.zeros_like(first)[None], out[:-1, ..., x:, :]]))
        if ctx.needs_input_grad[7]:
            dy = columns.join(times(columns.gather(Omega)[..., -x:].mT, out))
        dm0 = columns.join(first[None]).sum((0, 1))
        return dm0, _sum(Lambda[:1]), dA, _sum(into), dC, _sum(of_R), df, dy, None


def _sum(a: Tensor) -> Tensor:
    """Over steps and patterns."""
    return a.sum((0, 1))
