"""Networks shared by the models: perceptrons, memories, heads."""

from dynavae.nn.conv import ConvEmissionHead, ConvEncoder, frame_encoder
from dynavae.nn.emissions import (
    NADE,
    Bernoulli,
    Categorical,
    Emission,
    Gaussian,
    Laplace,
    PowerSpectrum,
    StudentT,
    to_emission,
)
from dynavae.nn.heads import EmissionHead, GaussianHead, ToNormal
from dynavae.nn.joint_emissions import GaussianMixture, MultivariateGaussian
from dynavae.nn.memory import Bidirectional, Empty, Memory
from dynavae.nn.mlp import MLP, SplitMLP

__all__ = [
    "MLP",
    "NADE",
    "Bernoulli",
    "Bidirectional",
    "Categorical",
    "ConvEmissionHead",
    "ConvEncoder",
    "Emission",
    "EmissionHead",
    "Empty",
    "Gaussian",
    "GaussianHead",
    "GaussianMixture",
    "Laplace",
    "Memory",
    "MultivariateGaussian",
    "PowerSpectrum",
    "SplitMLP",
    "StudentT",
    "ToNormal",
    "frame_encoder",
    "to_emission",
]
