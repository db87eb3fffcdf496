r"""Linear-Gaussian emissions that a switch chooses, when what they read from is itself Gaussian.

x_t says of h under switch k no more than a quadratic in h, whose size is that of h however many coordinates x_t has:

.. math::
    \log \mathcal N(x; C_k h + d_k, R_k) = c_k + (h - h^*_k)^\top \eta_k - \tfrac12 (h - h^*_k)^\top J_k (h - h^*_k), \qquad
    J_k = C_k^\top R_k^{-1} C_k

It is written about a point :math:`h^*_k` near its peak, where no large terms cancel. It reads x alone, so it is found for
all frames before any recursion; missing coordinates leave R's block of the observed ones.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynavae.distributions import MultivariateNormal
from dynavae.exact._algebra import matvec, symmetric


class Message(NamedTuple):
    """log p(x_t | h, z_t = k) as a function of h; leading axes (..., S), or (...) of one switch."""

    peak: Tensor  # h* (n,): a point to expand about; any would do
    J: Tensor  # (n, n)
    eta: Tensor  # (n,)
    log_c: Tensor  # (): log p(x_t | h*, z_t)

    def pack(self) -> Tensor:
        """Side by side, (..., n^2 + 2 n + 1)."""
        return torch.cat([self.peak, self.J.flatten(-2), self.eta, self.log_c.unsqueeze(-1)], -1)


def unpack(packed: Tensor) -> Message:
    """The inverse of :meth:`Message.pack`."""
    n = math.isqrt(packed.shape[-1]) - 1
    peak, J, eta, log_c = packed.split([n, n * n, n, 1], -1)
    return Message(peak, J.unflatten(-1, (n, n)), eta, log_c.squeeze(-1))


class Updated(NamedTuple):
    """What a Gaussian belief about h becomes."""

    log_prob: Tensor  # log p(x_t) under the belief before
    before: Tensor  # its mean
    W: Tensor  # (..., n, n)
    v: Tensor  # (..., n, 1)

    @property
    def mean(self) -> Tensor:
        return self.before + (self.W.mT @ self.v).squeeze(-1)

    @property
    def covariance(self) -> Tensor:
        return self.W.mT @ self.W


def update(mean: Tensor, L: Tensor, message: Message) -> Updated:
    r"""Bayes' rule for :math:`h \sim \mathcal N(m, L L^\top)`: one factorisation of :math:`I + L^\top J L = U U^\top`."""
    n = L.shape[-1]
    delta, eta = (mean - message.peak).unsqueeze(-1), message.eta.unsqueeze(-1)
    L = L.expand(*delta.shape[:-2], n, n)
    J_L, J_delta = (message.J @ torch.cat([L, delta], -1)).split([n, 1], -1)
    inner, r = (L.mT @ torch.cat([J_L, eta - J_delta], -1)).split([n, 1], -1)
    U = torch.linalg.cholesky(inner + torch.eye(n, dtype=L.dtype, device=L.device))
    W, v = torch.linalg.solve_triangular(U, torch.cat([L.mT, r], -1), upper=False).split([n, 1], -1)
    at_mean = message.log_c + (delta * (eta - 0.5 * J_delta)).sum((-2, -1))
    log_prob = at_mean + 0.5 * v.square().sum((-2, -1)) - U.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return Updated(log_prob, mean, W, v)


class SwitchedEmission:
    """The tables C (S, x_dim, n), d (S, x_dim) and the Cholesky factors of R (S, x_dim, x_dim)."""

    def __init__(self, C: Tensor, d: Tensor, L: Tensor) -> None:
        if not torch.is_grad_enabled():  # what is made without a graph has none later
            C, d, L = C.detach(), d.detach(), L.detach()
        self.C, self.d, self.L = C, d, L

    def message(self, x: Tensor, observed: Tensor | None) -> Message:
        """Of frames (..., x_dim) under every switch, (..., S, .)."""
        lead = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        seen = None if observed is None else observed.expand(*lead, -1).reshape(x.shape)
        G, J = self._projected(seen)  # (S, ...), or (frames, S, ...) with gaps
        error = x.unsqueeze(-2) - self.d
        if seen is not None:
            error = torch.where(seen.unsqueeze(-2), error, 0.0)
        with torch.no_grad():
            peak = _peak(J, _project(error, G))
        error = error - _emitted(peak, self.C)
        mask = None if seen is None else seen.unsqueeze(-2)
        log_c = MultivariateNormal(torch.zeros_like(self.d), self.L).log_prob(error, mask)
        J = J.expand(x.shape[0], *J.shape[-3:])
        return Message(*(a.unflatten(0, lead) for a in (peak, J, _project(error, G), log_c)))

    def _projected(self, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """G = R^-1 C with zero rows where x is missing, and J = C'G; frames with the same gaps share a factorisation."""
        traced = torch.compiler.is_compiling()
        if seen is None or (not traced and bool(seen.all())):
            G = torch.cholesky_solve(self.C, self.L)
            return G, symmetric(self.C.mT @ G)
        patterns, of = (seen, None) if traced else torch.unique(seen, dim=0, return_inverse=True)
        both = (patterns.unsqueeze(-1) & patterns.unsqueeze(-2)).unsqueeze(1)
        eye = torch.eye(seen.shape[-1], dtype=self.L.dtype, device=seen.device)
        factor = torch.linalg.cholesky(torch.where(both, self.L @ self.L.mT, eye))
        C = torch.where(patterns[:, None, :, None], self.C, 0.0)
        G = torch.cholesky_solve(C, factor)
        J = symmetric(C.mT @ G)
        return (G, J) if of is None else (G[of], J[of])


class SwitchedNormal(MultivariateNormal):
    r"""p(x_t) when :math:`h \sim \mathcal N(m, L L^\top)` and the switch is known: a Gaussian with covariance C P C' + R.

    Its log-density costs a factorisation in the dimension of h. `loc` and `scale_tril`, which everything else uses, are
    computed when asked for.

    Args:
        m, L: (..., n) and (..., n, n).
        code: (..., S), one-hot.
        known: (..., x_dim), added to x whatever h; None: nothing.
        shared: the tables.
    """

    _fields = ("m", "L", "code", "known", "shared")  # type: ignore[assignment]

    def __new__(
        cls, m: Tensor, L: Tensor, code: Tensor, known: Tensor | None, shared: SwitchedEmission
    ) -> SwitchedNormal:
        return tuple.__new__(cls, (m, L, code, known, shared))

    @property
    def loc(self) -> Tensor:  # type: ignore[override]
        m, _, code, known, shared = self._parts
        loc = matvec(pick(code, shared.C), m) + pick(code, shared.d)
        return loc if known is None else loc + known

    @property
    def scale_tril(self) -> Tensor:  # type: ignore[override]
        _, L, code, _, shared = self._parts
        root = pick(code, shared.C) @ L
        return torch.linalg.cholesky(symmetric(root @ root.mT + pick(code, shared.L @ shared.L.mT)))

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        m, L, code, known, shared = self._parts
        if known is not None:
            x = x - known
        return update(m, L, picked(code, shared.message(x, observed).pack())).log_prob

    @property
    def _parts(self) -> tuple[Any, ...]:
        return tuple(self)


def pick(code: Tensor, table: Tensor) -> Tensor:
    """The row of a table (S, ...) that a one-hot code (..., S) names."""
    flat = code @ table.flatten(1)
    return flat.unflatten(-1, table.shape[1:]) if table.ndim > 2 else flat


def picked(code: Tensor, packed: Tensor) -> Message:
    """The message of the switch that a one-hot code (..., S) names, from those of all (..., S, .)."""
    return unpack(torch.einsum("...s,...sf->...f", code, packed))


def _project(error: Tensor, G: Tensor) -> Tensor:
    """G'e of each frame and switch, (frames, S, n); G (S, x_dim, n) or (frames, S, x_dim, n)."""
    if G.ndim == 4:
        return matvec(G.mT, error)
    return (error.transpose(0, 1) @ G).transpose(0, 1)


def _emitted(h: Tensor, C: Tensor) -> Tensor:
    """C h, (frames, S, x_dim)."""
    return (h.transpose(0, 1) @ C.mT).transpose(0, 1)


def _peak(J: Tensor, projection: Tensor) -> Tensor:
    """Where the quadratic is about greatest, (frames, S, n): with a little added to J, which may be singular."""
    n = J.shape[-1]
    little = 1e-4 * J.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(J.dtype).tiny ** 0.25
    factor = torch.linalg.cholesky(J + little[..., None, None] * torch.eye(n, dtype=J.dtype, device=J.device))
    if J.ndim == 3:
        return torch.cholesky_solve(projection.permute(1, 2, 0), factor).permute(2, 0, 1)
    return torch.cholesky_solve(projection.unsqueeze(-1), factor).squeeze(-1)
