"""dynavae: deep sequential latent-variable models, and their exact relatives, in one engine.

p(x, z) = prod_t p(z_t | x_<t, z_<t) p(x_t | x_<t, z_<=t),   q(z | x) = prod_t q(z_t | z_<t, x_1:T)
"""

from __future__ import annotations

from typing import Any

from dynavae.batch import Sequences
from dynavae.model import SequentialLVM
from dynavae.models import (
    DKF,
    DSAE,
    DVBF,
    GMM,
    HMM,
    KVAE,
    LGSSM,
    MODELS,
    PPCA,
    RVAE,
    SLDS,
    SRNN,
    STORN,
    SVAE,
    VAE,
    VRNN,
    FactorAnalysis,
)
from dynavae.proposals import amortized, bootstrap
from dynavae.resampling import Resampling
from dynavae.scan import scan
from dynavae.tasks import crps, export_step, filter, forecast, generate, impute, reconstruct, score, smooth

__version__ = "0.1.0"

_LAZY = {
    "structural_model": "dynavae.models.structural",
    "fit": "dynavae.training",
    "fit_em": "dynavae.em",
    "load": "dynavae.checkpoint",
}
_MODULES = (
    "catalogue",
    "data",
    "em",
    "exact",
    "linearised",
    "music",
    "report",
    "runs",
    "testing",
    "training",
)


def __getattr__(name: str) -> Any:
    """`fit` needs Lightning, which takes seconds to import: only when asked for."""
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"dynavae.{name}")
    if name in MODELS:  # registered without a line of its own above
        return MODELS[name]
    raise AttributeError(f"module 'dynavae' has no attribute {name!r}")


__all__ = [
    "DKF",
    "DSAE",
    "DVBF",
    "GMM",
    "HMM",
    "KVAE",
    "LGSSM",
    "MODELS",
    "PPCA",
    "RVAE",
    "SLDS",
    "SRNN",
    "STORN",
    "SVAE",
    "VAE",
    "VRNN",
    "FactorAnalysis",
    "Resampling",
    "Sequences",
    "SequentialLVM",
    "amortized",
    "bootstrap",
    "crps",
    "export_step",
    "filter",
    "fit",
    "fit_em",
    "forecast",
    "generate",
    "impute",
    "load",
    "reconstruct",
    "scan",
    "score",
    "smooth",
    "structural_model",
]
