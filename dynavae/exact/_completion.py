"""What a Gaussian vector is, given some of its coordinates: for EM with missing values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynavae.exact._algebra import symmetric


class Completion(NamedTuple):
    r"""The error e ~ N(0, S) given what is observed of it: :math:`\mathcal N(G e_\mathrm{obs}, V)`, per pattern of gaps.

    Attributes:
        of: (N,) pattern of each vector.
        G: (U, n, n); the rows of observed coordinates pick them, columns of missing ones are 0.
        V: (U, n, n), 0 in the rows and columns of observed coordinates.
    """

    of: Tensor
    G: Tensor
    V: Tensor

    def mean(self, error: Tensor) -> Tensor:
        """G e of each vector (N, n), which is 0 where it is missing."""
        if len(self.G) == 1:
            return error @ self.G[0].mT
        return (self.G[self.of] @ error.unsqueeze(-1)).squeeze(-1)

    def covariance(self, weights: Tensor) -> Tensor:
        """The sum of V over vectors, weighted by (N,)."""
        per_pattern = weights.new_zeros(len(self.V)).index_add_(0, self.of, weights)
        return (per_pattern[:, None, None] * self.V).sum(0)


def patterns(observed: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows (U, n) of masks (N, n), and which one each is."""
    if bool(observed.all()):
        return observed[:1], observed.new_zeros(len(observed), dtype=torch.long)
    unique, of = torch.unique(observed, dim=0, return_inverse=True)
    return unique, of


def completion(S: Tensor, masks: Tensor, of: Tensor) -> Completion:
    """Of vectors with covariance S (n, n) that are observed as :func:`patterns` says."""
    eye = torch.eye(len(S), dtype=S.dtype, device=S.device)
    if bool(masks.all()):
        return Completion(of, eye.unsqueeze(0), torch.zeros_like(eye).unsqueeze(0))
    seen = masks.to(S.dtype)
    both = masks.unsqueeze(-1) & masks.unsqueeze(-2)
    block = torch.where(both, S, eye)  # the observed block, and the identity elsewhere
    across = S * seen.unsqueeze(-2)  # columns of what is observed
    G = torch.linalg.solve(block, across.mT).mT * seen.unsqueeze(-2)
    G = torch.where(masks.unsqueeze(-1), eye, G)  # exactly
    V = symmetric(S - G @ S) * (1 - seen).unsqueeze(-1) * (1 - seen).unsqueeze(-2)
    return Completion(of, G, V)


def floored(S: Tensor, floor: float) -> Tensor:
    r"""The covariance nearest in likelihood to S among those with eigenvalues of at least `floor`.

    It maximises :math:`-\log|\Sigma| - \mathrm{tr}(\Sigma^{-1} S)`, so an M-step with it never lowers the likelihood.
    """
    values, vectors = torch.linalg.eigh(symmetric(S))
    if bool((values >= floor).all()):
        return symmetric(S)
    return symmetric((vectors * values.clamp(min=floor).unsqueeze(-2)) @ vectors.mT)
