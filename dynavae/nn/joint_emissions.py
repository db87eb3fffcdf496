"""Emissions whose coordinates depend on each other within a frame: Gaussians with covariances, and mixtures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dynavae import distributions as D
from dynavae.nn.emissions import EMISSIONS, Emission, inverse_softplus

COVARIANCES = ("full", "diagonal", "spherical", "tied")


@dataclass(frozen=True)
class MultivariateGaussian(Emission):
    """N(x; mu, S) of all coordinates together; mu from the features, S as said.

    Args:
        covariance: "full" (from the features), "diagonal", "spherical" (one variance from the features), or "tied" (a full
            matrix of its own, which reads no features).
        min_scale: floor of the diagonal of the Cholesky factor of S.
    """

    covariance: str = "full"
    min_scale: float = 1e-3

    def __post_init__(self) -> None:
        if self.covariance not in COVARIANCES:
            raise ValueError(
                f"covariance should be one of {', '.join(COVARIANCES)}; got {self.covariance!r}."
            )
        if self.min_scale <= 0:
            raise ValueError(f"min_scale should be positive; got {self.min_scale}.")

    @property
    def closed_form_em(self) -> bool:
        return True

    def outputs(self, x_dim: int) -> int:
        more = {"full": x_dim * (x_dim + 1) // 2, "diagonal": x_dim, "spherical": 1, "tied": 0}
        return x_dim + more[self.covariance]

    def extra(self, x_dim: int) -> dict[str, Tensor]:
        return {"raw_factor": 0.5 * torch.eye(x_dim)} if self.covariance == "tied" else {}

    def distribution(self, raw: Tensor, extra: dict[str, Tensor]) -> D.MultivariateNormal:
        if self.covariance == "tied":
            return D.MultivariateNormal(raw, self._factor(extra["raw_factor"]).expand(*raw.shape, -1))
        n = raw.shape[-1]
        x_dim = {"full": (math.isqrt(9 + 8 * n) - 3) // 2, "diagonal": n // 2, "spherical": n - 1}
        d = x_dim[self.covariance]
        loc, rest = raw[..., :d], raw[..., d:]
        if self.covariance != "full":
            return D.MultivariateNormal(
                loc, torch.diag_embed((softplus(rest) + self.min_scale).expand_as(loc))
            )
        rows, columns = torch.tril_indices(d, d, device=raw.device)
        square = raw.new_zeros(*raw.shape[:-1], d * d)
        square = square.index_copy(-1, rows * d + columns, rest).unflatten(-1, (d, d))
        return D.MultivariateNormal(loc, self._factor(square))

    def _factor(self, square: Tensor) -> Tensor:
        diagonal = softplus(square.diagonal(dim1=-2, dim2=-1)) + self.min_scale
        return square.tril(-1) + torch.diag_embed(diagonal)

    def raw(self, loc: Tensor, S: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What gives these means (..., x_dim) and covariances (..., x_dim, x_dim): the inverse of `distribution`."""
        d = loc.shape[-1]
        L = torch.linalg.cholesky(S)
        diagonal = inverse_softplus((L.diagonal(dim1=-2, dim2=-1) - self.min_scale).clamp(min=1e-12))
        if self.covariance == "diagonal":
            return torch.cat([loc, diagonal], -1), {}
        if self.covariance == "spherical":
            return torch.cat([loc, diagonal[..., :1]], -1), {}
        square = L.tril(-1) + torch.diag_embed(diagonal)
        if self.covariance == "tied":
            return loc, {"raw_factor": square.reshape(-1, d, d)[0]}
        rows, columns = torch.tril_indices(d, d, device=loc.device)
        return torch.cat([loc, square[..., rows, columns]], -1), {}

    def start(self, mean: Tensor, stddev: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        S = torch.diag(stddev.clamp(min=2 * self.min_scale).square())
        if self.covariance == "spherical":
            S = S.diagonal().mean() * torch.eye(len(mean)).to(mean)
        return self.raw(mean, S)


@dataclass(frozen=True)
class GaussianMixture(Emission):
    """A mixture of diagonal Gaussians of all coordinates together; everything from the features.

    Args:
        components: M.
        min_scale: floor of the standard deviations.
    """

    components: int = 2
    min_scale: float = 1e-3
    noise_per_feature: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ValueError(f"a mixture needs at least 1 component; got components={self.components}.")
        if self.min_scale <= 0:
            raise ValueError(f"min_scale should be positive; got {self.min_scale}.")

    @property
    def closed_form_em(self) -> bool:
        return True

    def outputs(self, x_dim: int) -> int:
        return self.components * (1 + 2 * x_dim)

    def distribution(self, raw: Tensor, extra: dict[str, Tensor]) -> D.GaussianMixture:
        M = self.components
        logits, rest = raw[..., :M], raw[..., M:].unflatten(-1, (2, M, -1))
        return D.GaussianMixture(logits, rest[..., 0, :, :], softplus(rest[..., 1, :, :]) + self.min_scale)

    def raw(self, logits: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """What gives this distribution: the inverse of `distribution`."""
        r = inverse_softplus((scale - self.min_scale).clamp(min=1e-12))
        return torch.cat([logits, loc.flatten(-2), r.flatten(-2)], -1)

    def start(self, mean: Tensor, stddev: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Components side by side, from one standard deviation below the mean to one above."""
        steps = torch.linspace(-1, 1, self.components + 2).to(mean)[1:-1].unsqueeze(-1)
        scale = stddev.clamp(min=2 * self.min_scale).expand(self.components, -1)
        return self.raw(mean.new_zeros(self.components), mean + steps * stddev, scale), {}


EMISSIONS["multivariate_gaussian"] = MultivariateGaussian
EMISSIONS["gaussian_mixture"] = GaussianMixture
