r"""The predicted covariances of a model that does not change, without a loop over time, and their derivative.

Of a constant model with complete data the first :math:`2^k` filtering steps follow by k doublings (each an
associative combination), and once two covariances in a row are equal to rounding, so are all that follow. With gaps
an associative scan does the same for all t. Candidates from either are put through one step of the Joseph form, all
at once: if every one of them leads to the next, to rounding, they are the solution; if not, the ordinary loop runs.

Reference: Anderson and Moore, Optimal Filtering, 1979, chapter 6 (doubling), and chapter 4 (steady state).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynavae.exact._algebra import symmetric
from dynavae.exact.joseph import joseph_update
from dynavae.exact.recurrence import congruence_recurrence
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
        P = (
            P
            if len(P) == T
            else torch.cat([P, P[-1:].expand(_memory(P[-1:], A, C, R, T - len(P)), *P.shape[1:])])
        )
        return _Riccati.apply(P0, A, Q, C, R, P)  # type: ignore[no-any-return]
    return P


@torch.no_grad()
def _memory(P: Tensor, A: Tensor, C: Tensor, R: Tensor, most: int) -> int:
    """Steps until a change of P is forgotten, and with a steady value its derivative is steady; at most so many."""
    F = A - A @ joseph_update(P, C, R)[0] @ C
    steps = 1
    while steps < most and F.isfinite().all() and F.square().sum((-1, -2)).amax() > torch.finfo(F.dtype).eps:
        F, steps = F @ F, 2 * steps
    return min(steps, most)


def difference(P: Tensor, other: Tensor) -> Tensor:
    """Largest difference in units of the standard deviations, of each of the leading axis."""
    scale = P.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(P.dtype).tiny).sqrt()
    relative = (P - other) / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    return relative.abs().flatten(1).amax(1)


def _doubled(P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor, T: int) -> Tensor | None:
    """By doublings: what m steps do is known, and the covariances after 1, ..., m of them give m more."""
    first, steps = _element(torch.zeros_like(A), P0, C, R), _element(A, Q, C, R)
    if first is None or steps is None:
        return None
    # Behind those that started at P0 there is one that started from zero, C: the same steps make its double of it.
    P, tolerance = torch.cat([first.C, steps.C]).squeeze(1), STEADY * torch.finfo(A.dtype).eps
    F, J, eye = steps.A[0, 0], steps.J[0, 0], torch.eye(len(A), dtype=A.dtype, device=A.device)
    while len(P) <= T:
        inverse = torch.linalg.inv_ex(eye + P @ J)[0]
        after = ((inverse @ P) @ F.mT).mT @ F.mT + P[-1]  # symmetric
        F, J = F @ (inverse[-1] @ F), (inverse[-1] @ F).mT @ J @ F + J
        P = torch.cat([P[:-1], after])
        if len(P) > 32 and bool(difference(P[-2:-1], P[-3:-2]) <= tolerance):
            break
    P = torch.cat([P0.unsqueeze(0), symmetric((P[:-2] @ A.mT).mT @ A.mT + Q)])[:T].unsqueeze(1)
    P = _settled(P[: _moving(P, tolerance) + 1], A, Q, C, R)
    return None if P is None else P[: _moving(P, tolerance)]


def _moving(P: Tensor, tolerance: float) -> int:
    """The number of steps after which nothing changes any more."""
    moving = (difference(P[1:], P[:-1]) > tolerance).nonzero()
    return int(moving[-1]) + 2 if len(moving) else 1


def _scanned(P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor) -> Tensor | None:
    if C.shape[1] > SCAN:
        return None
    first, steps = _element(torch.zeros_like(A), P0, C[:1], R[:1]), _element(A, Q, C[1:], R[1:])
    if first is None or steps is None:
        return None
    elements = tree_map(lambda a, b: torch.cat([a, b]), first, steps)
    P = associative_scan(_one_after_another, elements).C
    P = torch.cat([P0.expand(1, *P.shape[1:]), symmetric(A @ P[:-1] @ A.mT + Q)])
    return _settled(P, A, Q, C, R)


class _Steps(NamedTuple):
    """What steps do to covariances: the A, C and J of :class:`dynavae.exact.parallel.Step`."""

    A: Tensor
    C: Tensor
    J: Tensor


def _element(A: Tensor, Q: Tensor, C: Tensor, R: Tensor) -> _Steps | None:
    """One step for U patterns, or T of them; None if it is singular. The leading axis is time."""
    C, R = (a if a.ndim == 4 else a.unsqueeze(0) for a in (C, R))
    CQ = C @ Q
    L, info = torch.linalg.cholesky_ex(symmetric(CQ @ C.mT + R))
    if info.any():
        return None
    K = torch.cholesky_solve(CQ, L).mT
    keep = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) - K @ C
    white = torch.linalg.solve_triangular(L, C @ A, upper=False)
    return _Steps(keep @ A, symmetric(keep @ Q @ keep.mT + K @ R @ K.mT), white.mT @ white)


def _one_after_another(i: _Steps, j: _Steps) -> _Steps:
    n, eye = i.A.shape[-1], torch.eye(i.A.shape[-1], dtype=i.A.dtype, device=i.A.device)
    A, C = torch.linalg.solve(eye + i.C @ j.J, torch.cat([i.A, i.C], -1)).split(n, -1)
    return _Steps(j.A @ A, j.A @ C @ j.A.mT + j.C, A.mT @ j.J @ i.A + i.J)


def _settled(P: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor) -> Tensor | None:
    """Candidates after a few steps of the recursion side by side; None unless each then leads to the next."""
    if len(P) == 1:
        return P
    if C.ndim == 4:
        C, R = C[:-1], R[:-1]
    eye = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
    for _ in range(4):
        CP = C @ P[:-1]
        L, info = torch.linalg.cholesky_ex(symmetric(CP @ C.mT + R))
        if info.any() or not P.isfinite().all():
            return None
        K = torch.cholesky_solve(CP, L).mT
        keep = eye - K @ C
        following = symmetric(A @ (keep @ P[:-1] @ keep.mT + K @ R @ K.mT) @ A.mT + Q)
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
        P.append(
            symmetric(A @ joseph_update(P[-1], C[t] if varies else C, R[t] if varies else R, t)[1] @ A.mT + Q)
        )
        if not varies and t % 8 == 7 and difference(P[-1][None], P[-2][None]) <= STEADY * eps:
            break
    return torch.stack(P)


class _Riccati(torch.autograd.Function):
    """The derivative of the recursion at its solution: one loop of the adjoint, everything else for all t at once."""

    @staticmethod
    def forward(ctx: Any, P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor, solution: Tensor) -> Tensor:
        ctx.save_for_backward(P0, A, C, R, solution)
        return solution.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        P0, A, C, R, P = ctx.saved_tensors
        C_, R_ = (a[: len(P)] if a.ndim == 4 else a for a in (C, R))
        K, P_f, _ = joseph_update(P, C_, R_)
        keep = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) - K @ C_
        # Lambda_t = F' Lambda_{t+1} F + what P_t itself was used for.
        adjoint = congruence_recurrence((A @ keep).mT, symmetric(grad), reverse=True)
        # P_f is least for the optimal gain: to first order it does not change with K.
        into, K, keep, P = adjoint[1:], K[:-1], keep[:-1], P[:-1]
        into_A = into @ A
        filtered = A.mT @ into_A
        dA = 2 * (into_A @ P_f[:-1]).sum((0, 1))
        dC, dR = -2 * K.mT @ filtered @ keep @ P, K.mT @ filtered @ K
        if C.ndim == 4:  # the last step leads nowhere
            missing = len(C) - len(dC)
            dC, dR = (torch.cat([a, a.new_zeros(missing, *a.shape[1:])]) for a in (dC, dR))
        else:
            dC, dR = dC.sum(0), dR.sum(0)
        return _sum_to(adjoint[0], P0), dA, into.sum((0, 1)), dC, dR, None


def _sum_to(a: Tensor, like: Tensor) -> Tensor:
    return a.sum(0) if like.ndim < a.ndim else a
