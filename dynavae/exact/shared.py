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
from typing import NamedTuple

import torch
from torch import Tensor

from dynavae.exact._innovations import Innovations
from dynavae.exact._results import Filtered, Smoothed
from dynavae.exact._riccati import STEADY, difference, predicted_covariances
from dynavae.exact.joseph import joseph_update, reversed_kernel
from dynavae.exact.linear_gaussian import LinearGaussian
from dynavae.exact.recurrence import congruence_recurrence, linear_recurrence


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


class _Predicted(NamedTuple):
    """The filter as far as the likelihood needs it. Means and errors are columns."""

    m: Tensor
    e: Tensor
    P: Tensor
    P_f: Tensor
    K: Tensor
    log_likelihood: Tensor
    columns: _Columns


def shared_filter(
    params: LinearGaussian, x: Tensor, observed: Tensor, f: Tensor | None, g: Tensor | None
) -> Filtered:
    """Filter; f (T, B, z_dim) and g (T, B, x_dim) are what is known of each transition and emission, None for nothing."""
    p = _predicted(params, x, observed, f, g)
    mean = p.columns.join(p.m + p.columns.gather(p.K) @ p.e)
    return Filtered(
        mean, p.columns.expand(p.P_f), p.columns.join(p.m), p.columns.expand(p.P), p.log_likelihood
    )


def shared_log_likelihood(
    params: LinearGaussian, x: Tensor, observed: Tensor, f: Tensor | None, g: Tensor | None
) -> Tensor:
    """log p(x) of each sequence, (B,)."""
    return _predicted(params, x, observed, f, g).log_likelihood.sum(0)


def _predicted(
    params: LinearGaussian, x: Tensor, observed: Tensor, f: Tensor | None, g: Tensor | None
) -> _Predicted:
    (T, B, x_dim), p, complete = x.shape, plain(params), bool(observed.all())
    y = x if complete else torch.where(observed, x, 0.0)
    y = y if g is None else y - g
    y = y if complete or g is None else torch.where(observed, y, 0.0)
    C, R, of = _patterns(p, None if complete else observed)
    P = predicted_covariances(p.P0, p.A, p.Q, C, R, T)
    here = (C.unsqueeze(0), R) if C.ndim == 3 else (C[: len(P)], R[: len(P)])
    K, P_f, L = joseph_update(P, *here)
    white = torch.linalg.solve_triangular(L, torch.eye(x_dim).to(L).expand_as(L), upper=False)
    log_det = L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    columns = _Columns(of, T, B)
    M, F = p.A @ K, p.A - p.A @ (K @ here[0])
    # The step into t uses the gain of t - 1.
    M, F = (columns.gather(torch.cat([a[:1], a])[:T]) for a in (M, F))
    start = columns.split(p.m0.expand(1, B, -1))[0]
    driven = None if f is None else columns.split(f)
    m, e, quadratic = Innovations.apply(
        start, F, M, columns.gather(here[0]), columns.gather(white), columns.split(y), driven
    )
    quadratic = quadratic.squeeze(1 if columns.width == 1 else 2)
    log_det = columns.expand(log_det[..., None, None]).squeeze((-1, -2))
    count = x_dim if complete else observed.sum(-1).to(x.dtype)
    log_likelihood = -0.5 * (quadratic + math.log(2 * math.pi) * count) - log_det
    return _Predicted(m, e, P, P_f, K, log_likelihood, columns)


def _patterns(p: LinearGaussian, observed: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """C and R of each of U patterns of gaps, (U, ...) or (T, U, ...), and the pattern of each sequence, None for one."""
    if observed is None:
        return p.C.unsqueeze(0), p.R.unsqueeze(0), None
    unique, of = torch.unique(observed.transpose(0, 1).flatten(1), dim=0, return_inverse=True)
    seen = unique.unflatten(1, (len(observed), -1)).transpose(0, 1)
    C = torch.where(seen.unsqueeze(-1), p.C, 0.0)
    R = torch.where(seen.unsqueeze(-1) & seen.unsqueeze(-2), p.R, torch.eye(p.R.shape[-1]).to(p.R))
    return C, R, None if len(unique) == 1 else of


class _Columns:
    """(T, B, n) as columns: (T, 1, n, B) if all sequences share their matrices, else (T, B, n, 1)."""

    def __init__(self, of: Tensor | None, T: int, B: int) -> None:
        self.of, self.T, self.B, self.width = of, T, B, 1 if of is None else B

    def split(self, a: Tensor) -> Tensor:
        return a.mT.contiguous().unsqueeze(1) if self.of is None else a.contiguous().unsqueeze(-1)

    def join(self, a: Tensor) -> Tensor:
        return a.squeeze(1).mT if self.of is None else a.squeeze(-1)

    def gather(self, a: Tensor) -> Tensor:
        """(N, U, ...) of each step, the last repeated up to T, and of each sequence if they do not share."""
        a = a if self.of is None else a[:, self.of] if a.shape[1] > 1 else a.expand(-1, self.B, -1, -1)
        return a if len(a) == self.T else torch.cat([a, a[-1:].expand(self.T - len(a), *a.shape[1:])])

    def expand(self, a: Tensor) -> Tensor:
        return self.gather(a).expand(-1, self.B, *a.shape[2:])


def one_for_all(filtered: Filtered) -> bool:
    """Whether the sequences share their covariances."""
    return all(
        P.shape[1] == 1 or P.stride(1) == 0 for P in (filtered.covariance, filtered.predicted_covariance)
    )


def shared_smoother(params: LinearGaussian, filtered: Filtered) -> Smoothed:
    """Smooth what was filtered."""
    T, B, z = filtered.mean.shape
    p, one = plain(params), one_for_all(filtered)
    P_f, P_ = filtered.covariance, filtered.predicted_covariance
    P_f, P_ = (P_f[:, :1], P_[:, :1]) if one else (P_f, P_)
    tracked = torch.is_grad_enabled() and any(a.requires_grad for a in (P_f, P_, p.A, p.Q))
    N = T if tracked else _distinct(P_f, P_)  # the derivative of a steady state is not steady as soon
    # A step more than the distinct ones: the last gain, that of the steady state, is repeated.
    G, V = reversed_kernel(p, filtered._replace(covariance=P_f[: N + 1], predicted_covariance=P_[: N + 1]))
    P = _smoothed_covariances(G, V, P_f[-1:], T)
    G = G if len(G) >= T - 1 else torch.cat([G, G[-1:].expand(T - 1 - len(G), *G.shape[1:])])
    m, m_ = (a.mT.unsqueeze(1) if one else a.unsqueeze(-1) for a in (filtered.mean, filtered.predicted_mean))
    added = torch.cat([m[:-1] - G @ m_[1:], m[-1:]])
    mean = linear_recurrence(torch.cat([G, torch.zeros_like(P_f[-1:])]), added, reverse=True)
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
    tail = min(N + 16, T - 1 - N)
    while True:
        repeat = (tail, U, *G.shape[2:])
        matrices = torch.cat([G, G[-1:].expand(repeat), last])  # the last is not read
        spreads = torch.cat([V, V[-1:].expand(repeat), last])
        P = congruence_recurrence(matrices, spreads, reverse=True)
        if N + tail == T - 1:
            return P
        with torch.no_grad():
            if difference(P[N - 1 : N], P[N : N + 1]) <= STEADY * torch.finfo(P.dtype).eps:
                return torch.cat([P[:N], P[N - 1 : N].expand(T - len(P), U, *P.shape[2:]), P[N:]])
        tail = min(4 * tail, T - 1 - N)
