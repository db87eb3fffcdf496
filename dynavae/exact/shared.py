r"""The Kalman filter and smoother of a model that is the same at all steps and for all sequences.

Covariances do not depend on what was observed, only on which coordinates were. So they are computed once for each pattern of
gaps, not for each sequence, and with complete data only until they no longer change (:mod:`dynavae.exact._riccati`). The means
are then linear recurrences with known matrices,

.. math::
    m_{t+1|t} = A (I - K_t C)\, m_{t|t-1} + A K_t y_t + f_{t+1}, \qquad
    m_{t|T} = G_t\, m_{t+1|T} + (m_{t|t} - G_t m_{t+1|t})

which run in blocks (:mod:`dynavae.exact.recurrence`). Nothing loops over all steps. The results are those of the other forms,
to rounding; covariances of sequences that share them are views of one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynavae.exact._algebra import symmetric
from dynavae.exact._results import Filtered, Smoothed
from dynavae.exact._riccati import STEADY, difference, predicted_covariances
from dynavae.exact.joseph import joseph_update, reversed_kernel
from dynavae.exact.linear_gaussian import Emission, LinearGaussian
from dynavae.exact.recurrence import linear_recurrence
from dynavae.exact.scan import associative_scan


def varying(params: LinearGaussian) -> str | None:
    """The name of the first matrix or moment that varies over steps or sequences; offsets may."""
    core = {"m0": 1, "P0": 2, "A": 2, "Q": 2, "C": 2, "R": 2}
    for name, axes in core.items():
        if math.prod(getattr(params, name).shape[:-axes]) > 1:
            return name
    return None


def plain(params: LinearGaussian) -> LinearGaussian:
    """Without leading axes of size 1."""
    cores = {"m0": 1, "P0": 2, "A": 2, "Q": 2, "C": 2, "R": 2}
    return params._replace(**{
        name: getattr(params, name).reshape(getattr(params, name).shape[-axes:]) for name, axes in cores.items()
    })  # fmt: skip


def shared_filter(params: LinearGaussian, emission: Emission, f: Tensor) -> Filtered:
    """Filter; `f` (T, B, z_dim) is what is known of each transition."""
    (T, B, z), p = f.shape, plain(params)
    C, R, of = _patterns(p, emission.observed)
    P = predicted_covariances(p.P0, p.A, p.Q, C, R, T)
    here = (C, R) if C.ndim == 3 else (C[: len(P)], R[: len(P)])
    K, P_f, L = joseph_update(P, *here)
    white = torch.linalg.solve_triangular(L, torch.eye(L.shape[-1]).to(L).expand_as(L), upper=False)
    log_det = L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    F = p.A @ (torch.eye(z, dtype=f.dtype, device=f.device) - K @ here[0])
    # From here on: columns. One group's sequences are the columns of a matrix, or each sequence is a column of its own.
    columns = _Columns(of, B)
    y, offset = columns.split(emission.y), columns.split(f)
    C = C if C.ndim == 3 else columns.gather(C, T)
    C = C if of is None or C.ndim == 4 else C[of]
    K_t, F_t = columns.gather(K, T), columns.gather(F, T)
    first = p.m0.expand(B, z)
    driven = (p.A @ K_t[:-1]) @ y[:-1] + offset[1:]
    start = columns.split(first.unsqueeze(0))
    F_t = torch.cat([F_t[:1], F_t[:-1]])  # the step into t uses the gain of t - 1
    m = linear_recurrence(F_t, torch.cat([start, driven]))
    e = y - C @ m
    log_likelihood = -0.5 * (columns.gather(white, T) @ e).square().sum(-2)
    log_likelihood = log_likelihood - columns.gather(log_det[..., None, None], T).squeeze(-1)
    log_likelihood = columns.join(log_likelihood.unsqueeze(-2)).squeeze(-1)
    log_likelihood = log_likelihood - 0.5 * math.log(2 * math.pi) * emission.seen
    mean = columns.join(m + K_t @ e)
    return Filtered(mean, columns.expand(P_f, T), columns.join(m), columns.expand(P, T), log_likelihood)


def _patterns(p: LinearGaussian, observed: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """C and R of each of U patterns of gaps, (U, ...) or (T, U, ...), and the pattern of each sequence, None for one."""
    T, B, _ = observed.shape
    if observed.all():
        return p.C.unsqueeze(0), p.R.unsqueeze(0), None
    unique, of = torch.unique(observed.transpose(0, 1).flatten(1), dim=0, return_inverse=True)
    seen = unique.unflatten(1, (T, -1)).transpose(0, 1)
    C = torch.where(seen.unsqueeze(-1), p.C, 0.0)
    R = torch.where(seen.unsqueeze(-1) & seen.unsqueeze(-2), p.R, torch.eye(p.R.shape[-1]).to(p.R))
    return C, R, None if len(unique) == 1 else of


class _Columns:
    """(T, B, n) as columns: (T, 1, n, B) if all sequences are in one group, else (T, B, n, 1)."""

    def __init__(self, of: Tensor | None, B: int) -> None:
        self.of, self.B = of, B

    def split(self, a: Tensor) -> Tensor:
        return a.mT.unsqueeze(1) if self.of is None else a.unsqueeze(-1)

    def join(self, a: Tensor) -> Tensor:
        return a.squeeze(1).mT if self.of is None else a.squeeze(-1)

    def gather(self, a: Tensor, T: int) -> Tensor:
        """(N, U, ...) of each step, and, if there are groups, of each sequence; the last is repeated up to T."""
        a = a if self.of is None else a[:, self.of]
        return a if len(a) >= T else torch.cat([a, a[-1:].expand(T - len(a), *a.shape[1:])])

    def expand(self, a: Tensor, T: int) -> Tensor:
        a = self.gather(a, T)
        return a.expand(T, self.B, *a.shape[2:])


def one_for_all(filtered: Filtered) -> bool:
    """Whether the sequences share their covariances."""
    return all(
        P.shape[1] == 1 or P.stride(1) == 0 for P in (filtered.covariance, filtered.predicted_covariance)
    )


def shared_smoother(params: LinearGaussian, filtered: Filtered) -> Smoothed:
    """Smooth what was filtered."""
    T, B, z = filtered.mean.shape
    p = plain(params)
    one = one_for_all(filtered)
    wide = filtered if not one else filtered._replace(
        covariance=filtered.covariance[:, :1], predicted_covariance=filtered.predicted_covariance[:, :1]
    )  # fmt: skip
    m, m_ = (a.mT.unsqueeze(1) if one else a.unsqueeze(-1) for a in (filtered.mean, filtered.predicted_mean))
    N = _distinct(wide.covariance, wide.predicted_covariance)
    # A step more than the distinct ones: the last gain, that of the steady state, is repeated.
    few = wide._replace(
        covariance=wide.covariance[: N + 1], predicted_covariance=wide.predicted_covariance[: N + 1]
    )
    G, V = reversed_kernel(p, few)
    P = _smoothed_covariances(G, V, wide.covariance[-1:], T)
    G = G if len(G) >= T - 1 else torch.cat([G, G[-1:].expand(T - 1 - len(G), *G.shape[1:])])
    added = torch.cat([m[:-1] - G @ m_[1:], m[-1:]])
    mean = linear_recurrence(torch.cat([G, torch.zeros_like(wide.covariance[-1:])]), added, reverse=True)
    cross = P[1:] @ G.mT
    G, P, cross = (a.expand(len(a), B, z, z) for a in (G, P, cross))
    return Smoothed(mean.squeeze(1).mT if one else mean.squeeze(-1), P, G, cross)


def _distinct(*covariances: Tensor) -> int:
    """The number of steps after which nothing changes any more."""
    T = len(covariances[0])
    if T == 1:
        return 1
    changes = torch.stack([(P[1:] != P[:-1]).flatten(1).any(1) for P in covariances]).any(0).nonzero()
    return int(changes[-1]) + 2 if len(changes) else 1


def _smoothed_covariances(G: Tensor, V: Tensor, last: Tensor, T: int) -> Tensor:
    """P_{t|T} of all t from the first N gains and V, of which the last are repeated up to T - 1.

    From the end, too, the covariances reach a steady state: a scan of fewer steps is enough if its middle is constant.
    """
    N, U = len(G), last.shape[1]
    if N == 0:
        return last
    tail = min(2 * N + 16, T - 1 - N)
    while True:
        repeat = (tail, U, *G.shape[2:])
        matrices = torch.cat([G, G[-1:].expand(repeat), torch.zeros_like(last)])
        spreads = torch.cat([V, V[-1:].expand(repeat), last])
        P = associative_scan(
            lambda i, j: (i[0] @ j[0], symmetric(i[0] @ j[1] @ i[0].mT + i[1])), (matrices, spreads), reverse=True
        )[1]
        if N + tail == T - 1:
            return P
        with torch.no_grad():
            if difference(P[N - 1 : N], P[N : N + 1]) <= STEADY * torch.finfo(P.dtype).eps:
                return torch.cat([P[:N], P[N - 1 : N].expand(T - len(P), U, *P.shape[2:]), P[N:]])
        tail = min(4 * tail, T - 1 - N)
