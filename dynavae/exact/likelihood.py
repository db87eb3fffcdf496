r"""The log-likelihood of the linear-Gaussian state-space model with a gradient of its own, for training.

The value is that of :func:`~dynavae.exact.kalman.kalman_filter`. The gradient is the adjoint recursion of the filter,
written out: with r and N those of the disturbance smoother, the adjoints of the predicted mean and covariance are r and
:math:`\tfrac12 (r r^\top - N)`, so the backward pass has no factorisation, and nothing is kept but what the filter
computes. Covariances are shared by sequences that miss the same values. Values are computed in float64, the
gradient in the type of the parameters.

References: Koopman and Shephard, Exact Score for Time Series Models in State Space Form, 1992. De Jong, Smoothing and
Interpolation with the State-Space Model, 1989.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynavae.exact._entry import entry
from dynavae.exact._patterned import Updated, covariances, groups, innovation, unpacked
from dynavae.exact.linear_gaussian import LinearGaussian, check_constant, offsets
from dynavae.exact.shared import shared_log_likelihood
from dynavae.tree import tree_map


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
    complete, valid = _complete(observed)
    if params.m0.device.type != "mps" and complete:
        wide = tree_map(lambda a: a.double() if a.is_floating_point() else a, (params, x, valid, f, g))
        return shared_log_likelihood(*wide).to(x.dtype)
    y = torch.where(observed, torch.where(observed, x, 0.0) - g, 0.0).double()
    fixed = (a.double() for a in (params.m0, params.P0, params.A, params.Q, params.C, params.R))
    value: Tensor = _LogLikelihood.apply(*fixed, f.double(), y, observed, x.dtype)
    return value.to(x.dtype)


def _complete(observed: Tensor) -> tuple[bool, Tensor | None]:
    """Whether there are no gaps before the ends of sequences, and the frames before the ends (T, B), None for all."""
    some = observed.all(-1)
    if bool(some.all()):
        return True, None
    return not bool((some[1:] & ~some[:-1]).any()) and bool((some == observed.any(-1)).all()), some


class _LogLikelihood(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        m0: Tensor,
        P0: Tensor,
        A: Tensor,
        Q: Tensor,
        C: Tensor,
        R: Tensor,
        f: Tensor,
        y: Tensor,
        observed: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        group, patterns = groups(observed)
        steps = covariances(P0, A, Q, C, R, group, patterns)
        m, means, whites = m0.expand(y.shape[1], -1), [], []
        total = -0.5 * math.log(2 * math.pi) * observed.sum((0, 2)).to(y.dtype)
        for t, s in enumerate(steps):
            valid = group.valid[t]
            white = innovation(s, group, y[t], m)
            total = total - torch.where(valid, 0.5 * white.square().sum(-1) + group.gather(s.log_det), 0.0)
            means.append(m)
            whites.append(torch.where(valid.unsqueeze(-1), white, 0.0))
            if t + 1 < len(steps):
                m = (m + group.apply(s.W.mT, whites[-1])) @ A.mT + f[t + 1]
        # The filter has to be accurate for its covariances to be positive; its adjoint is as accurate as the model.
        narrow = functools.partial(tree_map, lambda a: a.to(dtype) if a.is_floating_point() else a)
        ctx.save_for_backward(*narrow((A, C, R)))
        ctx.run = narrow(tuple(steps)), group, narrow(tuple(means)), narrow(tuple(whites))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        A, C, R = ctx.saved_tensors
        steps, group, means, whites = ctx.run
        T, (rows, z) = len(steps), means[0].shape
        scale = grad.unsqueeze(-1).to(A)
        dA, dQ, dC, dR, dP0 = (torch.zeros_like(a) for a in (A, A, C, R, A))
        df, dy = A.new_zeros(T, rows, z), A.new_zeros(T, rows, len(C))
        # Adjoints of the filtered moments: r of each sequence, N the sum over a group.
        r, N = A.new_zeros(rows, z), A.new_zeros(group.number, z, z)
        for t in range(T - 1, -1, -1):
            s, valid = steps[t], group.valid[t].unsqueeze(-1)
            n = group.total(torch.where(valid, scale, 0.0))[..., None]
            u = group.apply(s.V.mT, torch.where(valid, whites[t] - group.apply(s.W, r), 0.0))
            r = r + group.apply(s.packed.C.mT, u)
            WN = s.W @ N
            U, UN = (s.V.mT @ torch.cat([s.W, WN], -1)).chunk(2, -1)  # U = F^-1 C P
            # dC = sum u z_smoothed' - F^-1 C P (n I - N P_f),  dR = (sum u u' - n F^-1 - F^-1 C P N P C' F^-1) / 2
            observed_C = group.outer(scale * u, means[t] + group.apply(s.P, r)) - n * U + UN @ s.P_f
            observed_R = 0.5 * (group.outer(scale * u, u) - n * (s.V.mT @ s.V) - UN @ U.mT)
            dC.index_add_(0, s.packed.index.flatten(), observed_C.flatten(0, 1))
            _add_blocks(dR, s, observed_R)
            dy[t] = -unpacked(s, group, scale * u, dy[t])
            # From the filtered to the predicted covariance: N <- (I - KC)' N (I - KC) + n C' F^-1 C
            NKC = s.B.mT @ WN
            N = N - NKC - NKC.mT + s.B.mT @ (WN @ s.W.mT + n * torch.eye(s.W.shape[1]).to(A)) @ s.B
            G = 0.5 * (group.outer(scale * r, r) - N)
            df[t] = scale * r
            if t > 0:
                filtered = means[t - 1] + group.apply(steps[t - 1].W.mT, whites[t - 1])
                dQ += G.sum(0)
                dA += df[t].mT @ filtered + 2 * (G @ (A @ steps[t - 1].P_f)).sum(0)
                r, N = r @ A, A.mT @ N @ A
            else:
                dP0 += G.sum(0)
        dm0 = df[0].sum(0)
        df[0] = 0.0  # nothing but m0 enters the first state
        return (*(a.double() for a in (dm0, dP0, dA, dQ, dC, dR, df, dy)), None, None)


def _add_blocks(total: Tensor, step: Updated, blocks: Tensor) -> None:
    """Add each group's (k, k) block, in the places of its observed coordinates."""
    index, mask = step.packed[:2]
    place = index.unsqueeze(-1) * len(total) + index.unsqueeze(-2)
    seen = mask.unsqueeze(-1) * mask.unsqueeze(-2)
    total.view(-1).index_add_(0, place.flatten(), (blocks * seen).flatten())
