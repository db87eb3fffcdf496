"""Heads: from features to distributions. Gaussian heads for latents, emissions for observations."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dynavae import distributions as D
from dynavae.nn.emissions import EMISSIONS, Emission, inverse_softplus, to_emission
from dynavae.nn.joint_emissions import GaussianMixture, MultivariateGaussian

__all__ = [
    "EMISSIONS",
    "MIN_SCALE",
    "Emission",
    "EmissionHead",
    "GaussianHead",
    "GaussianMixture",
    "MultivariateGaussian",
    "ToNormal",
    "inverse_softplus",
    "to_emission",
    "to_scale",
]

MIN_SCALE = 1e-4


def to_scale(raw: Tensor, kind: str, minimum: float = MIN_SCALE) -> Tensor:
    """A positive standard deviation from an unbounded number.

    "log_variance": exp(raw / 2), raw clamped to [-15, 10]; "softplus": softplus(raw) + minimum;
    "softplus_variance": the square root of softplus(raw) + minimum^2.
    """
    if kind == "log_variance":
        return torch.exp(raw.clamp(-15, 10).mul_(0.5))
    if kind == "softplus":
        return softplus(raw) + minimum
    return torch.sqrt(softplus(raw) + minimum**2)


class ToNormal(nn.Module):
    """(mu, r) of 2 z_dim numbers to a diagonal Gaussian; it has no parameters."""

    KINDS: ClassVar = ("log_variance", "softplus", "softplus_variance")

    def __init__(self, scale: str = "log_variance", min_scale: float = MIN_SCALE) -> None:
        super().__init__()
        if scale not in self.KINDS:
            raise ValueError(f"scale should be one of {', '.join(self.KINDS)}; got {scale!r}.")
        self.kind, self.min_scale = scale, min_scale

    def forward(self, raw: Tensor) -> D.Normal:
        loc, r = raw.chunk(2, -1)
        return D.Normal(loc, to_scale(r, self.kind, self.min_scale))


class GaussianHead(nn.Module):
    """One linear layer to a diagonal Gaussian: N(z; mu(h), sigma(h)^2)."""

    def __init__(self, in_dim: int, out_dim: int, scale: str = "log_variance") -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, 2 * out_dim)
        self.to_normal = ToNormal(scale)

    def forward(self, h: Tensor) -> D.Normal:
        return self.to_normal(self.linear(h))


class EmissionHead(nn.Module):
    """p(x_t | features): a linear layer, and what does not depend on the features."""

    def __init__(self, emission: Emission, in_dim: int, x_dim: int) -> None:
        super().__init__()
        self.emission, self.x_dim = emission, x_dim
        self.linear = nn.Linear(in_dim, emission.outputs(x_dim))
        self.extra = nn.ParameterDict({k: nn.Parameter(v) for k, v in emission.extra(x_dim).items()})

    def forward(self, h: Tensor) -> Any:
        return self.emission.distribution(self.linear(h), dict(self.extra.items()))

    @torch.no_grad()
    def start(self, mean: Tensor, stddev: Tensor) -> None:
        """Set the output bias to the marginal of the data: saves the first epochs."""
        bias, extra = self.emission.start(mean, stddev)
        self.linear.bias.copy_(bias)
        for name, value in extra.items():
            self.extra[name].copy_(value)
