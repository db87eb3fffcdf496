"""The Gaussian with a full covariance."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynavae.distributions.factorised import LOG_2PI


class MultivariateNormal(NamedTuple):
    r"""Gaussian with a full covariance :math:`L L^\top`, L lower triangular."""

    loc: Tensor
    scale_tril: Tensor

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def stddev(self) -> Tensor:
        return self.scale_tril.square().sum(-1).sqrt().expand_as(self.loc)

    def sample(self, noise: Tensor) -> Tensor:
        """Of more noise than coordinates (a mixture takes one number more) the first is read."""
        noise = noise[..., : self.loc.shape[-1]]
        return self.loc + (self.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """Of the observed coordinates: the sub-block of the covariance, exactly."""
        difference, factor, constant = x - self.loc, self.scale_tril, x.new_tensor(LOG_2PI * x.shape[-1])
        if observed is not None and not bool(observed.all()):
            eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
            block = observed.unsqueeze(-1) & observed.unsqueeze(-2)
            factor = torch.linalg.cholesky(torch.where(block, factor @ factor.mT, eye))
            difference = torch.where(observed, difference, 0.0)
            constant = LOG_2PI * observed.to(x.dtype).sum(-1)
        whitened = torch.linalg.solve_triangular(factor, difference.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (whitened.square().sum(-1) + constant) - log_det

    def complete(self, x: Tensor, observed: Tensor, noise: Tensor) -> Tensor:
        """A sample given the observed coordinates, which keep their values: a draw, corrected by what it and x differ in."""
        drawn = self.sample(noise)
        covariance = self.scale_tril @ self.scale_tril.mT
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        block = torch.where(observed.unsqueeze(-1) & observed.unsqueeze(-2), covariance, eye)
        difference = torch.where(observed, x - drawn, 0.0).unsqueeze(-1)
        across = torch.where(observed.unsqueeze(-2), covariance, 0.0)
        corrected = drawn + (across @ torch.linalg.solve(block, difference)).squeeze(-1)
        return torch.where(observed, x, corrected)

    def kl(self, other: Any) -> Tensor | None:
        """The whole divergence, as one coordinate."""
        if not isinstance(other, MultivariateNormal):
            return None
        solve = torch.linalg.solve_triangular
        ratio = solve(other.scale_tril, self.scale_tril.expand(*self.loc.shape, -1), upper=False)
        distance = solve(other.scale_tril, (self.loc - other.loc).unsqueeze(-1), upper=False)
        log_ratio = ratio.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        squares = ratio.square().sum((-2, -1)) + distance.square().sum((-2, -1))
        return (0.5 * (squares - self.loc.shape[-1]) - log_ratio).unsqueeze(-1)
