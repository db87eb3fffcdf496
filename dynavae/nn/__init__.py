"""Networks shared by the models: perceptrons, memories, heads."""

from dynavae.nn.heads import (
    Bernoulli,
    Categorical,
    Emission,
    EmissionHead,
    Gaussian,
    GaussianHead,
    Laplace,
    PowerSpectrum,
    StudentT,
    ToNormal,
    to_emission,
)
from dynavae.nn.memory import Bidirectional, Empty, Memory
from dynavae.nn.mlp import MLP, SplitMLP

__all__ = [
    "MLP",
    "Bernoulli",
    "Bidirectional",
    "Categorical",
    "Emission",
    "EmissionHead",
    "Empty",
    "Gaussian",
    "GaussianHead",
    "Laplace",
    "Memory",
    "PowerSpectrum",
    "SplitMLP",
    "StudentT",
    "ToNormal",
    "to_emission",
]
