"""Distributions as named tuples of tensors: light enough for the inner loop, stackable along time.

Every distribution factorises over, or lives on, the last axis (`factorised`, `multivariate`, `mixture`, `nade`), or is made
of such ones (`structured`). Its randomness is always standard normal noise given by the caller, so that one block of
noise, drawn before the time loop, decides every sample: `sample(noise)` is a differentiable function of the parameters
where `reparameterized` is true. `log_prob(x, observed)` sums over the observed coordinates only: the exact marginal
(a NADE has none in closed form: of a frame, all or no coordinates are observed).
"""

from __future__ import annotations

from dynavae.distributions.factorised import (
    LOG_2PI,
    Bernoulli,
    Categorical,
    Laplace,
    Normal,
    PowerSpectrum,
    StudentT,
    standard_normal,
    total,
)
from dynavae.distributions.mixture import GaussianMixture, MultivariateMixture
from dynavae.distributions.multivariate import MultivariateNormal
from dynavae.distributions.nade import NADE, NADEWeights
from dynavae.distributions.structured import (
    OWN_AXES,
    REPARAMETERIZED,
    Chain,
    Either,
    Product,
    at,
    completed,
    completed_frames,
    either,
    expand,
    sample_at,
)

__all__ = [
    "LOG_2PI",
    "NADE",
    "OWN_AXES",
    "REPARAMETERIZED",
    "Bernoulli",
    "Categorical",
    "Chain",
    "Either",
    "GaussianMixture",
    "Laplace",
    "MultivariateMixture",
    "MultivariateNormal",
    "NADEWeights",
    "Normal",
    "PowerSpectrum",
    "Product",
    "StudentT",
    "at",
    "completed",
    "completed_frames",
    "either",
    "expand",
    "sample_at",
    "standard_normal",
    "total",
]
