r"""The Kalman filter with its covariances shared by all sequences that miss the same values.

Covariances do not depend on what was observed, only on which coordinates were. Sequences of one pattern of gaps form a
group; frames after the last observed one count as complete, and enter nothing. With complete data there is one group,
whatever the lengths, and the work per sequence is that of the means.

Observed coordinates are packed to the front, so that factors have the size of what is observed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynavae.exact._algebra import symmetric


class Group(NamedTuple):
    """Who shares covariances: U groups of B sequences."""

    of: Tensor | None  # (B,) group of each sequence; None: its own, or there is one
    number: int
    valid: Tensor  # (T, B): not after the last observed frame

    def gather(self, a: Tensor) -> Tensor:
        """(U, ...) to (B, ...), or to (1, ...), which broadcasts."""
        return a if self.of is None else a[self.of]

    def apply(self, matrix: Tensor, vector: Tensor) -> Tensor:
        """Each group's (U, m, n) times its sequences' (B, n) or, for K paths, (B, n, K)."""
        if vector.ndim == 3:
            return self.gather(matrix) @ vector
        if self.number == 1:
            return vector @ matrix[0].mT
        return (self.gather(matrix) @ vector.unsqueeze(-1)).squeeze(-1)

    def outer(self, a: Tensor, b: Tensor) -> Tensor:
        """Sums of a b' over the sequences of each group: (U, m, n)."""
        if self.number == 1:
            return (a.mT @ b).unsqueeze(0)
        products = a.unsqueeze(-1) * b.unsqueeze(-2)
        if self.of is None:
            return products
        return a.new_zeros(self.number, *products.shape[1:]).index_add_(0, self.of, products)

    def total(self, a: Tensor) -> Tensor:
        """Sums of (B, n) over the sequences of each group: (U, n)."""
        if self.number == 1:
            return a.sum(0, keepdim=True)
        return a if self.of is None else a.new_zeros(self.number, a.shape[-1]).index_add_(0, self.of, a)


class Packed(NamedTuple):
    """The observed coordinates of a frame, first k of every group; others have a zero row in C and R = identity."""

    index: Tensor  # (U, k) coordinate
    mask: Tensor  # (U, k) 1.0 where observed
    C: Tensor  # (U, k, z)
    R: Tensor  # (U, k, k)


class Updated(NamedTuple):
    """One step of the filter. L L' = F = C P C' + R."""

    packed: Packed
    P: Tensor  # (U, z, z) predicted
    P_f: Tensor  # (U, z, z) filtered
    log_det: Tensor  # (U,) of L
    V: Tensor  # (U, k, k)  L^-1
    B: Tensor  # (U, k, z)  L^-1 C
    W: Tensor  # (U, k, z)  L^-1 C P, so that K = W'V and P_f = P - W'W


def groups(observed: Tensor) -> tuple[Group, Tensor]:
    """Groups of (T, B, x_dim) masks, and the mask of each group (T, U, x_dim)."""
    T, B, _ = observed.shape
    some = observed.any(-1)
    if bool(observed.all()):
        return Group(None, 1, some), observed[:, :1]
    valid = some.flip(0).cummax(0).values.flip(0)
    pattern = (observed | ~valid.unsqueeze(-1)).transpose(0, 1)
    unique, of = torch.unique(pattern.flatten(1), dim=0, return_inverse=True)
    number = len(unique)
    if number == B:
        return Group(None, B, valid), pattern.transpose(0, 1)
    return Group(None if number == 1 else of, number, valid), unique.unflatten(1, (T, -1)).transpose(0, 1)


def pack(pattern: Tensor, C: Tensor, R: Tensor) -> Packed:
    """The observed coordinates (U, x_dim) of one frame."""
    k = int(pattern.sum(-1).max())
    index = (~pattern).to(torch.uint8).argsort(dim=-1, stable=True)[:, :k]
    mask = torch.gather(pattern, 1, index).to(C.dtype)
    block = R[index.unsqueeze(-1), index.unsqueeze(-2)] * (mask.unsqueeze(-1) * mask.unsqueeze(-2))
    return Packed(index, mask, C[index] * mask.unsqueeze(-1), block + torch.diag_embed(1 - mask))


def update(P: Tensor, packed: Packed, group: Group, t: int) -> Updated:
    """Take in a frame."""
    CP = packed.C @ P
    L, info = torch.linalg.cholesky_ex(symmetric(CP @ packed.C.mT + packed.R))
    if info.any():
        u = int(info.nonzero()[0])
        row = u if group.of is None else int((group.of == u).nonzero()[0])
        raise ValueError(
            f"S_t = C P C' + R is not positive definite at t={t}, sequence {row}. Check that Q, R and P0 are positive "
            "definite; raise their diagonal."
        )
    V = torch.linalg.solve_triangular(L, torch.eye(L.shape[-1]).to(L), upper=False)
    W = V @ CP
    log_det = L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return Updated(packed, P, P - W.mT @ W, log_det, V, V @ packed.C, W)


def innovation(step: Updated, group: Group, y: Tensor, m: Tensor) -> Tensor:
    """L^-1 (y - C m) of the observed coordinates; y (B, x_dim) is 0 elsewhere. Or K paths: (B, x_dim, K), (B, z, K)."""
    index, mask = (group.gather(a).expand(len(y), -1) for a in step.packed[:2])
    if y.ndim == 3:
        index, mask = (a.unsqueeze(-1).expand(-1, -1, y.shape[-1]) for a in (index, mask))
    e = torch.gather(y, 1, index) * mask - group.apply(step.packed.C, m)
    return group.apply(step.V, e)


def unpacked(step: Updated, group: Group, values: Tensor, like: Tensor) -> Tensor:
    """Values (B, k) of the observed coordinates in the places of `like` (B, x_dim), 0 elsewhere; or with K paths."""
    index = group.gather(step.packed.index).expand(len(values), -1)
    if values.ndim == 3:
        index = index.unsqueeze(-1).expand(-1, -1, values.shape[-1])
    return torch.zeros_like(like).scatter_(1, index, values)


def covariances(
    P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor, group: Group, patterns: Tensor
) -> list[Updated]:
    """The filter without its means: one step per frame."""
    P, steps = P0.expand(group.number, -1, -1), []
    for t, pattern in enumerate(patterns.unbind(0)):
        steps.append(update(P, pack(pattern, C, R), group, t))
        P = symmetric(A @ steps[-1].P_f @ A.mT + Q)
    return steps
