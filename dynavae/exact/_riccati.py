r"""The predicted covariances of a model that does not change, without a loop over time, and their derivative.

Of a constant model with complete data the first :math:`2^k` filtering steps follow by k doublings (each an associative
combination), and once two covariances in a row are equal to rounding, so are all that follow. With gaps an associative scan
does the same for all t. Candidates from either are put through one step of the Joseph form, all at once: if every one of them
leads to the next, to rounding, they are the solution; if not, the ordinary loop runs.

Reference: Anderson and Moore, Optimal Filtering, 1979, chapter 6 (doubling), and chapter 4 (steady state).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynavae.exact._algebra import symmetric
from dynavae.exact.joseph import joseph_update
from dynavae.exact.parallel import Step, in_sequence, step_of
from dynavae.exact.scan import associative_scan
from dynavae.tree import tree_map

STEADY = 16.0
"""Covariances closer than this many roundings are equal."""
SCAN = 24
"""More sequences with gaps of their own than this are worth a loop (measured on a 2-core CPU)."""


def predicted_covariances(P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor, T: int) -> Tensor:
    """P_{t|t-1} of the first N <= T steps (N, U, z, z); all after step N are as that one.

    C and R are (U, x, z) and (U, x, x), or have T in front where gaps vary in time. Differentiable once.
    """
    with torch.no_grad():
        P = _doubled(P0, A, Q, C, R, T) if C.ndim == 3 else _scanned(P0, A, Q, C, R)
        P = _loop(P0, A, Q, C, R, T) if P is None else P
    if any(a.requires_grad for a in (P0, A, Q, C, R)) and torch.is_grad_enabled():
        return _Riccati.apply(P0, A, Q, C, R, P)  # type: ignore[no-any-return]
    return P


def _next(P: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor) -> Tensor:
    """The predicted covariance that follows P."""
    return symmetric(A @ joseph_update(P, C, R)[1] @ A.mT + Q)


def difference(P: Tensor, other: Tensor) -> Tensor:
    """Largest difference in units of the standard deviations, of each of the leading axis."""
    variance = torch.maximum(P.diagonal(dim1=-2, dim2=-1), other.diagonal(dim1=-2, dim2=-1)).clamp(min=0)
    scale = variance.sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    relative = (P - other) / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    return relative.abs().flatten(1).amax(1)


def _doubled(P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor, T: int) -> Tensor | None:
    z, eps = A.shape[-1], torch.finfo(A.dtype).eps
    first = _element(torch.zeros_like(A), P0, C, R)
    one = _element(A, Q, C, R)
    if first is None or one is None:
        return None
    steps, done = one, 1
    while True:
        P = torch.cat([first.C, in_sequence(tree_map(lambda a: a.expand(done, *a.shape[1:]), first), steps).C])
        steady = difference(P[-1:], P[-2:-1]) <= STEADY * eps
        if done >= T - 1 or bool(steady):
            break
        last = tree_map(lambda a: a[-1:].expand(done, *a.shape[1:]), steps)
        steps = tree_map(lambda a, b: torch.cat([a, b]), steps, in_sequence(last, steps))
        done *= 2
    P = torch.cat([P0.expand(1, *P.shape[1:]), symmetric(A @ P[:-1] @ A.mT + Q)])[:T]
    P = _settled(P, A, Q, C, R)
    if P is None:
        return None
    moving = (difference(P[1:], P[:-1]) > STEADY * eps).nonzero()
    N = int(moving[-1]) + 2 if len(moving) else min(2, len(P))
    return P[: min(N, len(P))]


def _scanned(P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor) -> Tensor | None:
    T, U = C.shape[:2]
    if U > SCAN:
        return None
    first, steps = _element(torch.zeros_like(A), P0, C[0], R[0]), _element(A, Q, C[1:], R[1:])
    if first is None or steps is None:
        return None
    elements = tree_map(lambda a, b: torch.cat([a, b]), first, steps)
    P = associative_scan(in_sequence, elements).C
    P = torch.cat([P0.expand(1, *P.shape[1:]), symmetric(A @ P[:-1] @ A.mT + Q)])
    return _settled(P, A, Q, C, R)


def _element(A: Tensor, Q: Tensor, C: Tensor, R: Tensor) -> Step | None:
    """One step without means, for U patterns (and T steps): the leading axis is time."""
    C, R = (a if a.ndim == 4 else a.unsqueeze(0) for a in (C, R))
    lead, z = C.shape[:2], A.shape[-1]
    if torch.linalg.cholesky_ex(symmetric(C @ Q @ C.mT + R)).info.any():
        return None
    zero = A.new_zeros(*lead, z)
    return step_of(A.expand(*lead, z, z), Q.expand(*lead, z, z), zero, C, R, zero.new_zeros(C.shape[:-1]))


def _settled(P: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor) -> Tensor | None:
    """Candidates after a few steps of the recursion side by side; None unless each then leads to the next."""
    if len(P) == 1:
        return P
    varies = C.ndim == 4
    for _ in range(4):
        CP = C @ P
        if not P.isfinite().all() or torch.linalg.cholesky_ex(symmetric(CP @ C.mT + R)).info.any():
            return None
        now = (C[:-1], R[:-1]) if varies else (C, R)
        following = _next(P[:-1], A, Q, *now)
        close = difference(following, P[1:]).amax() <= 4 * STEADY * torch.finfo(P.dtype).eps
        P = torch.cat([P[:1], following])
        if close:
            return P
    return None


def _loop(P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor, T: int) -> Tensor:
    """One step after the other, until steady."""
    varies, eps = C.ndim == 4, torch.finfo(A.dtype).eps
    P = [P0.expand(C.shape[-3], *P0.shape[-2:])]
    for t in range(T - 1):
        P.append(symmetric(A @ joseph_update(P[-1], C[t] if varies else C, R[t] if varies else R, t)[1] @ A.mT + Q))
        if not varies and t % 8 == 7 and difference(P[-1][None], P[-2][None]) <= STEADY * eps:
            break
    return torch.stack(P)


class _Riccati(torch.autograd.Function):
    """The derivative of the recursion at its solution: one loop of the adjoint, everything else for all t at once."""

    @staticmethod
    def forward(
        ctx: Any, P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor, solution: Tensor
    ) -> Tensor:
        ctx.save_for_backward(P0, A, Q, C, R, solution)
        return solution.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        P0, A, Q, C, R, P = ctx.saved_tensors
        now = (C[: len(P)], R[: len(P)]) if C.ndim == 4 else (C, R)
        K, _, _ = joseph_update(P, *now)
        F = A @ (torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) - K @ now[0])
        adjoints = [symmetric(grad[-1])]
        for F_t, direct in zip(reversed(F.unbind(0)[:-1]), reversed(symmetric(grad).unbind(0)[:-1]), strict=True):
            adjoints.append(torch.baddbmm(direct, F_t.mT @ adjoints[-1], F_t))
        adjoint = torch.stack(adjoints[::-1])
        first = adjoint[0].sum_to_size(P0.shape) if P0.ndim == 3 else adjoint[0].sum(0)
        if len(P) == 1:
            return first, *(torch.zeros_like(a) for a in (A, Q, C, R)), None
        with torch.enable_grad():
            free = [a.detach().requires_grad_() for a in (A, Q, C, R)]
            observed = [a[: len(P) - 1] if a.ndim == 4 else a for a in free[2:]]
            following = _next(P[:-1], *free[:2], *observed)
        return first, *torch.autograd.grad(following, free, adjoint[1:]), None
