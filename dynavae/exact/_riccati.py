r"""The predicted covariances of a model that does not change, without a loop over time, and their derivative.

Of a constant model with complete data the first :math:`2^k` steps follow by k doublings (each an associative
combination) of predicted covariances, :math:`P \mapsto A (I + P J)^{-1} P A^\top + Q` with
:math:`J = C^\top R^{-1} C`, or of filtered ones where R is (nearly) singular; and once two covariances in a row are
equal to rounding, so are all that follow. With gaps an associative scan does the same for all t. Candidates from either
are put through one step of the Joseph form, all at once: if every one of them leads to the next, to rounding, they are
the solution; if not, the ordinary loop runs.

Reference: Anderson and Moore, Optimal Filtering, 1979, chapter 6 (doubling), and chapter 4 (steady state).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynavae.exact import _native
from dynavae.exact._algebra import congruence, once, ordinary, symmetric
from dynavae.exact.compiled import compiled_covariances
from dynavae.exact.joseph import joseph_gain, joseph_update
from dynavae.exact.recurrence import congruence_recurrence
from dynavae.exact.scan import associative_scan

STEADY = 16.0
"""Covariances closer than this many roundings are equal."""
SCAN = 24
"""More sequences with gaps of their own than this are worth a loop (measured on a 2-core CPU)."""
COMPILED = 3_000_000
"""So many steps times z_dim^3 a loop in machine code may take until doublings are tried."""


class Covariances(NamedTuple):
    """Of the first N steps, all (N, U, ., .): predicted, gain, filtered, and the Cholesky factor of C P C' + R."""

    P: Tensor
    K: Tensor
    P_f: Tensor
    L: Tensor


def covariances(P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor, T: int) -> Covariances:
    """The filter without its means, of the first N <= T steps; all after step N are as that one.

    C and R are (x, z) and (x, x), or with gaps (T, U, x, z) and (T, U, x, x) of U patterns. Differentiable once.
    """
    with torch.inference_mode():
        found = _compiled(P0, A, Q, C, R, T) if C.ndim == 2 else None
        found = _doubled(P0, A, Q, C, R, T) if C.ndim == 2 and found is None else found
    if found is not None:
        found = Covariances(*map(ordinary, found))
    with torch.no_grad():
        found = _scanned(P0, A, Q, C, R) if C.ndim == 4 else found
        found = _loop(P0, A, Q, C, R, T) if found is None else found
    if torch.is_grad_enabled() and any(a.requires_grad for a in (P0, A, Q, C, R)):
        P = _Riccati.apply(P0, A, Q, C, R, remembering(found, A, C, T).P)
        return Covariances(P, *joseph_update(P, C, R))
    return found


def remembering(c: Covariances, A: Tensor, C: Tensor, T: int) -> Covariances:
    """With as many more steps in the steady state as it takes for the derivative to be steady, too."""
    more = _memory(A - A @ (c.K[-1] @ C), T - len(c.P)) if len(c.P) < T else 0
    return Covariances(*(torch.cat([a, a[-1:].expand(more, *a.shape[1:])]) for a in c)) if more else c


@torch.no_grad()
def _memory(F: Tensor, most: int) -> int:
    """Steps until a change is forgotten, and with a steady value its derivative is steady; at most so many."""
    steps = 1
    while steps < most and F.isfinite().all() and F.square().sum((-1, -2)).amax() > torch.finfo(F.dtype).eps:
        F, steps = F @ F, 2 * steps
    return min(steps, most)


def _predict(P: Tensor, A: Tensor, Q: Tensor) -> Tensor:
    return symmetric(congruence(A, P, Q))


def difference(P: Tensor, other: Tensor) -> Tensor:
    """Largest difference in units of the standard deviations, of each of the leading axis."""
    scale = P.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(P.dtype).tiny).sqrt()
    relative = (P - other) / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    return relative.abs().flatten(1).amax(1)


def is_steady(P: Tensor, squared_norm: float) -> bool:
    """Whether the last two of P are equal; looked at if the matrix of so many steps, of this norm, forgets what was."""
    eps = torch.finfo(P.dtype).eps
    return squared_norm <= STEADY**2 * eps and difference(P[-1:], P[-2:-1]).item() <= STEADY * eps


def _compiled(P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor, T: int) -> Covariances | None:
    """One step after the other in machine code, if that is known to be quick, or comes to a steady state soon."""
    most = min(T, COMPILED // len(A) ** 3)
    if not (most and A.dtype == torch.float64 and _native.applies(A)):
        return None
    tolerance = STEADY * torch.finfo(A.dtype).eps
    found, parts = compiled_covariances(P0, A, Q, C, R, most, tolerance)
    if found < 0 or (found == most and most < T):
        return None
    return Covariances(*(a.unsqueeze(1) for a in parts))


def _doubled(P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor, T: int) -> Covariances | None:
    """By doublings of predicted covariances, or of filtered ones, which take an R without an inverse but more calls."""
    L, info = torch.linalg.cholesky_ex(R)
    if not info:
        white = torch.linalg.solve_triangular(L, C, upper=False)
        P = _doublings(torch.stack([P0, Q]), A, white.mT @ white, T)
        found = _settled(P[: _moving(P) + 1], A, Q, C, R, attempts=3)
        if found is not None:
            return _of_shared(found, T)
    one = _element(torch.stack([torch.zeros_like(A), A]), torch.stack([P0, Q]), C, R)
    if one is None:
        return None
    P = _doublings(one.C, one.A[1], one.J[1], T)
    found = _settled(torch.cat([P0.unsqueeze(0), _predict(P[: _moving(P) + 1], A, Q)])[:T], A, Q, C, R)
    return None if found is None else _of_shared(found, T)


def _of_shared(c: Covariances, T: int) -> Covariances:
    """Of sequences that share them, and without the last, which only shows that nothing changes any more."""
    return Covariances(*(a[: len(a) if len(a) == T else -1].unsqueeze(1) for a in c))


def _doublings(P: Tensor, F: Tensor, J: Tensor, T: int) -> Tensor:
    """The first T covariances, or so many that the last are steady: what m steps do, (F, C, J), takes m of them to m more.

    P is the first of them and, behind it, C: the covariance that started at zero. The same steps make its double of it.
    """
    eye = torch.eye(len(F), dtype=F.dtype, device=F.device)
    while len(P) <= T:
        inverse = torch.linalg.inv_ex(P @ J + eye)[0]
        after = congruence(F, torch.bmm(inverse, P), P[-1])  # the product is symmetric
        moved = inverse[-1] @ F
        F, J, P = F @ moved, torch.addmm(J, moved.mT, J @ F), torch.cat([P[:-1], after])
        if len(P) > 64 and is_steady(P[:-1], F.square().sum().item()):
            break
    return P[:-1][:T]


def _moving(P: Tensor) -> int:
    """The number of steps after which nothing changes any more."""
    moving = (difference(P[1:], P[:-1]) > STEADY * torch.finfo(P.dtype).eps).nonzero()
    return int(moving[-1]) + 2 if len(moving) else 1


def _scanned(P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor) -> Covariances | None:
    if C.shape[1] > SCAN:
        return None
    T = len(C)
    first, later = (
        torch.stack([a, b]).unsqueeze(1)[[0] + [1] * (T - 1)] for a, b in ((torch.zeros_like(A), A), (P0, Q))
    )
    elements = _element(first, later, C, R)
    if elements is None:
        return None
    P = associative_scan(_one_after_another, elements).C
    P = torch.cat([P0.expand(1, *P.shape[1:]), _predict(P[:-1], A, Q)])
    return _settled(P, A, Q, C, R)


class _Steps(NamedTuple):
    """What steps do to covariances: the A, C and J of :class:`dynavae.exact.parallel.Step`."""

    A: Tensor
    C: Tensor
    J: Tensor


def _element(A: Tensor, Q: Tensor, C: Tensor, R: Tensor) -> _Steps | None:
    """Single steps, None if one is singular. The first is an update without a step before: A = 0 and Q = P0."""
    QC = Q @ C.mT
    L, info = torch.linalg.cholesky_ex(symmetric(QC.mT @ C.mT + R))
    if info.any():
        return None
    K, filtered = joseph_gain(Q, QC, C, R, L)
    white = torch.linalg.solve_triangular(L, C @ A, upper=False)
    return _Steps(A - K @ (C @ A), filtered, white.mT @ white)


def _one_after_another(i: _Steps, j: _Steps) -> _Steps:
    n, eye = i.A.shape[-1], torch.eye(i.A.shape[-1], dtype=i.A.dtype, device=i.A.device)
    A, C = torch.linalg.solve(eye + i.C @ j.J, torch.cat([i.A, i.C], -1)).split(n, -1)
    return _Steps(j.A @ A, j.A @ C @ j.A.mT + j.C, A.mT @ j.J @ i.A + i.J)


def _settled(P: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor, attempts: int = 5) -> Covariances | None:
    """Candidates after a few steps of the recursion side by side; None unless each then leads to the next."""
    tolerance = STEADY * torch.finfo(P.dtype).eps
    for attempt in range(attempts):
        PC = P @ C.mT
        S = congruence(C, P, R) if C.ndim == 2 else PC.mT @ C.mT + R
        L, info = torch.linalg.cholesky_ex(symmetric(S))
        if info.any():
            return None
        K, P_f = joseph_gain(P, PC, C, R, L)
        following = _predict(P_f[:-1], A, Q)
        if bool((difference(following, P[1:]) <= (tolerance if attempt == 0 else 4 * tolerance)).all()):
            return Covariances(P, K, P_f, L)
        P = torch.cat([P[:1], following])
    return None


def _loop(P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor, T: int) -> Covariances:
    """One step after the other, until steady."""
    if C.ndim == 4:
        return _with_gaps(P0, A, Q, C, R)
    tolerance, steps, P = STEADY * torch.finfo(A.dtype).eps, [], P0.unsqueeze(0)
    for t in range(T):
        steps.append((P, *joseph_update(P, C, R, t)))
        P = _predict(steps[-1][2], A, Q)
        if t % 8 == 7 and difference(P, steps[-1][0]) <= tolerance:
            break
    return Covariances(*(torch.stack(a) for a in zip(*steps, strict=True)))


def _with_gaps(P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor) -> Covariances:
    """One step after the other, of U patterns at once, with few calls in each step.

    The Joseph form (I - KC) P (I - KC)' + K R K', with D = (I - KC) P, is D - (D C' - K R) K'.
    """
    P, steps, failed = P0.expand(C.shape[1], *P0.shape), [], []
    for C_t, R_t in zip(C.unbind(0), R.unbind(0), strict=True):
        PC = torch.bmm(P, C_t.mT)
        L, info = torch.linalg.cholesky_ex(torch.baddbmm(R_t, C_t, PC))
        K = torch.cholesky_solve(PC.mT, L).mT
        D = torch.baddbmm(P, K, PC.mT, alpha=-1)
        rest = torch.baddbmm(torch.bmm(K, R_t), D, C_t.mT, beta=-1)
        P_f = torch.baddbmm(D, rest, K.mT, alpha=-1)
        steps.append((P, K, P_f, L))
        failed.append(info)
        P = _predict(P_f, A, Q)
    found = Covariances(*(torch.stack(a) for a in zip(*steps, strict=True)))
    wrong = torch.stack(failed).any(1).nonzero()
    if len(wrong):
        t = int(wrong[0])
        joseph_update(found.P[t], C[t], R[t], t)  # says so
    return found._replace(P_f=symmetric(found.P_f))


class _Riccati(torch.autograd.Function):
    """The derivative of the recursion at its solution: one loop of the adjoint, everything else for all t at once."""

    @staticmethod
    def forward(ctx: Any, P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor, solution: Tensor) -> Tensor:
        ctx.save_for_backward(P0, A, C, R, solution)
        return solution.clone()

    @staticmethod
    @once
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
            dC, dR = dC.sum((0, 1)), dR.sum((0, 1))
        return _sum_to(adjoint[0], P0), dA, into.sum((0, 1)), dC, dR, None


def _sum_to(a: Tensor, like: Tensor) -> Tensor:
    return a.sum(0) if like.ndim < a.ndim else a
