r"""The Kalman filter and smoother of a model that is the same at all steps and for all sequences.

Covariances do not depend on what was observed, only on which coordinates were. So they are computed once for each
pattern of gaps, not for each sequence, and with complete data only until they no longer change
(:mod:`dynavae.exact._riccati`). The means are then linear recurrences with known matrices,

.. math::
    m_{t+1|t} = A (I - K_t C)\, m_{t|t-1} + A K_t y_t + f_{t+1}, \qquad
    m_{t|T} = G_t\, m_{t+1|T} + (m_{t|t} - G_t m_{t+1|t})

which run in blocks (:mod:`dynavae.exact.recurrence`). Nothing loops over all steps. The results are those of the
other forms, to rounding; covariances of sequences that share them are views of one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynavae.exact import _native
from dynavae.exact._algebra import Congruence, bare, ordinary, symmetric
from dynavae.exact._innovations import Innovations, times
from dynavae.exact._results import Filtered, Smoothed
from dynavae.exact._riccati import COMPILED, STEADY, Covariances, covariances, difference, is_steady
from dynavae.exact.compiled import compiled_smoothed_covariances
from dynavae.exact.joseph import reversed_kernel
from dynavae.exact.linear_gaussian import LinearGaussian
from dynavae.exact.recurrence import congruence_recurrence, linear_recurrence, solve

CORES = {"m0": 1, "P0": 2, "A": 2, "Q": 2, "C": 2, "R": 2}


def varying(params: LinearGaussian) -> str | None:
    """The name of the first matrix or moment that varies over steps or sequences; offsets may."""
    for name, axes in CORES.items():
        if getattr(params, name).ndim > axes and math.prod(getattr(params, name).shape[:-axes]) > 1:
            return name
    return None


def plain(params: LinearGaussian) -> LinearGaussian:
    """Without leading axes of size 1."""
    return params._replace(**{
        name: getattr(params, name).reshape(getattr(params, name).shape[-axes:])
        for name, axes in CORES.items() if getattr(params, name).ndim > axes
    })  # fmt: skip


def log_density(c: Covariances, white: Tensor, columns: Columns, count: Tensor | int) -> Tensor:
    """log p(x_t | x_1:t-1) of so many coordinates (T, B), from whitened errors."""
    quadratic = white.square().sum(-2).squeeze(1 if columns.of is None else 2)
    log_det = c.L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (quadratic + math.log(2 * math.pi) * count) - columns.expand(log_det)


def shared_filter(
    params: LinearGaussian, x: Tensor, observed: Tensor, f: Tensor | None, g: Tensor | None
) -> Filtered:
    """Filter; f (T, B, z_dim) and g (T, B, x_dim) are what is known of each transition and emission, None for nothing."""
    (T, B, x_dim), params, complete = x.shape, plain(params), bool(observed.all())
    C, R, of, count = params.C, params.R, None, x_dim
    y = x if g is None else x - g
    if not complete:
        seen, of = torch.unique(observed.transpose(0, 1).flatten(1), dim=0, return_inverse=True)
        of = None if len(seen) == 1 else torch.arange(B) if len(seen) == B else of
        seen = observed if len(seen) == B else seen.unflatten(1, (T, x_dim)).transpose(0, 1)
        C, R = masked(C, R, seen)
        y, count = torch.where(observed, y, 0.0), observed.sum(-1).to(x.dtype)
    columns = Columns(of, T, B)
    with bare():
        c = covariances(params.P0, params.A, params.Q, C, R, T)
        V, Omega = transfer(c, params.A, C)
        W = V @ (c.P @ C.mT).mT  # L^-1 C P, so that K e = W' w
    start, driven = columns.split(params.m0.expand(1, B, -1))[0], None if f is None else columns.split(f)
    m, white = Innovations.apply(start, columns.gather(Omega), columns.split(y), driven)
    mean = m + times(columns.gather(W).mT, white)
    return Filtered(
        columns.join(mean), columns.expand(c.P_f), columns.join(m), columns.expand(c.P),
        log_density(c, white, columns, count),
    )  # fmt: skip


def transfer(c: Covariances, A: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """L^-1 and what takes (m_t, y_t) to (w_t, m_{t+1}), see :mod:`dynavae.exact._innovations`."""
    eye = torch.eye(c.L.shape[-1], dtype=A.dtype, device=A.device)
    V = torch.linalg.solve_triangular(c.L, eye.expand_as(c.L), upper=False)
    M = (c.K.mT @ A.mT).mT
    error = torch.cat([-C, eye.expand(*C.shape[:-1], -1)], -1)  # y - C m of (m, y)
    kept = torch.nn.functional.pad(A, (0, len(eye), len(eye), 0))
    return V, torch.cat([V, M], -2) @ error + kept


def masked(C: Tensor, R: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """C and R of patterns of gaps (T, U, x_dim): rows of zeros, and of the identity."""
    eye = torch.eye(R.shape[-1]).to(R)
    both = seen.unsqueeze(-1) & seen.unsqueeze(-2)
    return torch.where(seen.unsqueeze(-1), C, 0.0), torch.where(both, R, eye)


class Columns:
    """(T, B, n) as columns: (T, 1, n, B) if all sequences share their matrices, else (T, B, n, 1).

    `of` says whose matrices a sequence has, None if there is one for all; if there are B, each has its own.
    """

    def __init__(self, of: Tensor | None, T: int, B: int) -> None:
        self.of, self.T, self.B = of, T, B
        self.number = 1 if of is None else int(of.max()) + 1

    def split(self, a: Tensor) -> Tensor:
        return a.mT.contiguous().unsqueeze(1) if self.of is None else a.contiguous().unsqueeze(-1)

    def join(self, a: Tensor) -> Tensor:
        return a.squeeze(1).mT if self.of is None else a.squeeze(-1)

    def of_sequences(self, a: Tensor) -> Tensor:
        """Numbers (T, B) of sequences, summed if they share: (T, 1, 1, 1) or (T, B, 1, 1)."""
        return a.sum(1)[:, None, None, None] if self.of is None else a[..., None, None]

    def totals(self, a: Tensor) -> Tensor:
        """(N, B, ...) of each sequence, summed over those that share: (N, U, ...)."""
        if self.of is None or self.number == self.B:
            return a
        return a.new_zeros(len(a), self.number, *a.shape[2:]).index_add_(1, self.of, a)

    def gather(self, a: Tensor) -> Tensor:
        """(N, U, ...) of each sequence, (N, B, ...), if they do not share."""
        return a if self.of is None or self.number == self.B else a[:, self.of]

    def expand(self, a: Tensor) -> Tensor:
        """(N, U, ...) of each step and sequence: (T, B, ...)."""
        return ordinary(stretched(self.gather(a), len(a) - 1, self.T)).expand(-1, self.B, *a.shape[2:])


def stretched(a: Tensor, t: int, T: int) -> Tensor:
    """What is constant in the middle, with its value at t repeated until there are T."""
    missing = T - len(a)
    if not missing:
        return a
    repeated = a[t : t + 1].expand(missing, *a.shape[1:])
    return torch.cat([a, repeated] if t + 1 == len(a) else [a[: t + 1], repeated, a[t + 1 :]])


def one_for_all(filtered: Filtered) -> bool:
    """Whether the sequences share their covariances."""
    return all(
        P.shape[1] == 1 or P.stride(1) == 0 for P in (filtered.covariance, filtered.predicted_covariance)
    )


def shared_smoother(params: LinearGaussian, filtered: Filtered) -> Smoothed:
    """Smooth what was filtered."""
    T, B, z = filtered.mean.shape
    if T == 1:
        nothing = filtered.covariance[1:]
        return Smoothed(filtered.mean, filtered.covariance, nothing, nothing)
    p, one = plain(params), one_for_all(filtered)
    P_f, P_ = filtered.covariance, filtered.predicted_covariance
    P_f, P_ = (P_f[:, :1], P_[:, :1]) if one else (P_f, P_)
    tracked = torch.is_grad_enabled() and any(a.requires_grad for a in (P_f, P_, p.A, p.Q))
    with bare():
        N = T if tracked else _distinct(P_f, P_)  # the derivative of a steady state is not steady as soon
        N = min(N, T - 1)
        # A step more than the distinct ones: the last gain, that of the steady state, is repeated.
        G, V = reversed_kernel(
            p, filtered._replace(covariance=P_f[: N + 1], predicted_covariance=P_[: N + 1])
        )
        P = _smoothed_covariances(G, V, P_, P_f[-1:], T)  # the first N, and some before the end
        repeated = len(P) - 1 - N
        cross = P[1:] @ stretched(G, N - 1, N + repeated).mT
    m, m_ = (a.mT.unsqueeze(1) if one else a.unsqueeze(-1) for a in (filtered.mean, filtered.predicted_mean))
    driven = torch.cat([m[:-1] - times(G, m_[1:]), m[-1:]])
    mean = (linear_recurrence if torch.is_grad_enabled() else solve)(G, driven, reverse=True)
    P, G, cross = (
        ordinary(stretched(a, N - 1, length)).expand(-1, B, z, z)
        for a, length in ((P, T), (G, T - 1), (cross, T - 1))
    )
    return Smoothed(mean.squeeze(1).mT if one else mean.squeeze(-1), P, G, cross)


def _distinct(P_f: Tensor, P_: Tensor) -> int:
    """The number of steps after which nothing changes any more."""
    changed = (P_f[1:] != P_f[:-1]).logical_or_(P_[1:] != P_[:-1]).flatten(1)
    # Eight flags are read as one number: that is the faster way to find the last.
    words = changed.view(torch.int64) if changed.shape[1] % 8 == 0 else changed.any(1, keepdim=True)
    steps = words.nonzero()
    return int(steps[-1, 0]) + 2 if len(steps) else 1


def _smoothed_covariances(G: Tensor, V: Tensor, P_: Tensor, last: Tensor, T: int) -> Tensor:
    r"""P_{t|T} of the first N steps, of which there are gains, and of as many before the end as differ from that of step N.

    With one gain, m steps further from the end the covariances are :math:`G^m P (G^m)^\top + S_m`, so each doubling of m
    gives as many as there are.
    """
    N, tolerance = len(G), STEADY * torch.finfo(V.dtype).eps
    quick = G.shape[1] == 1 and T * G.shape[-1] ** 3 <= COMPILED and V.dtype == torch.float64
    if quick and not (G.requires_grad or V.requires_grad) and _native.applies(G):
        return compiled_smoothed_covariances(G[:, 0], V[:, 0], last[0, 0], T, tolerance).unsqueeze(1)
    # From the end on, and behind them S_m, of which the same steps make the double.
    P, steps, steady = torch.cat([last, V[-1:]]).squeeze(1), Congruence(G[-1].squeeze(0)), False
    while len(P) < T - N + 2 and not steady:
        P = torch.cat([P[:-1], steps(P, P[-1])])
        steps.square()
        steady = len(P) > 64 and is_steady(P[:-1], steps.squared_norm())
    P = P[:-1][: T - N + 1].flip(0).view(-1, *last.shape[1:])  # of steps N, ..., T, or fewer
    far = steady and G.shape[1] == 1 and not V.requires_grad
    early = _far_from_the_end(G[:-1], V[:-1], P_[:N], P[:1], tolerance) if far else None
    if early is None:
        early = congruence_recurrence(G, torch.cat([V[:-1], P[:1]]), reverse=True)[:-1]
    return torch.cat([early, P])


def _far_from_the_end(G: Tensor, V: Tensor, P_: Tensor, last: Tensor, tolerance: float) -> Tensor | None:
    r"""P_{1|T}, ..., P_{N-1|T} from `last`, P_{N|T}, if what later observations say of the state is the same at all steps.

    That is a precision, :math:`P_{t|T}^{-1} = P_{t|t-1}^{-1} + \Lambda`. These candidates are put through a step of the
    recursion, all at once; None unless each then leads to the one before, to rounding.
    """
    if len(G) < 2:
        return None
    P, P_N = P_[:-1].flatten(0, 1), P_[-1, 0]
    information, _ = torch.linalg.inv_ex(torch.stack([P_N, last[0, 0]]))
    Lambda = symmetric(information[1] - information[0])
    inverse, _ = torch.linalg.inv_ex(P @ Lambda + torch.eye(len(P_N), dtype=P.dtype, device=P.device))
    candidates, G, V, last = torch.bmm(inverse, P), G.flatten(0, 1), V.flatten(0, 1), last[0]
    for _ in range(3):
        found = symmetric(torch.baddbmm(V, torch.bmm(G, torch.cat([candidates[1:], last])), G.mT))
        if bool((difference(found, candidates) <= 4 * tolerance).all()):
            return found.unsqueeze(1)
        candidates = found
    return None
