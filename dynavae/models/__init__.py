"""The registry: one model, one file, one line here."""

from __future__ import annotations

from dynavae.model import SequentialLVM
from dynavae.models.dkf import DKF
from dynavae.models.dsae import DSAE
from dynavae.models.dvbf import DVBF
from dynavae.models.factor_analysis import PPCA, FactorAnalysis
from dynavae.models.gmm import GMM
from dynavae.models.hmm import HMM
from dynavae.models.kvae import KVAE
from dynavae.models.lgssm import LGSSM
from dynavae.models.rvae import RVAE
from dynavae.models.slds import SLDS
from dynavae.models.srnn import SRNN
from dynavae.models.storn import STORN
from dynavae.models.svae import SVAE
from dynavae.models.vae import VAE
from dynavae.models.vrnn import VRNN

MODELS: dict[str, type[SequentialLVM]] = {
    m.__name__: m
    for m in (
        VAE,
        DKF,
        STORN,
        VRNN,
        SRNN,
        RVAE,
        DSAE,
        DVBF,
        KVAE,
        SVAE,
        LGSSM,
        HMM,
        GMM,
        PPCA,
        FactorAnalysis,
        SLDS,
    )
}
"""Every registered model, by name: the laws, the command line and the tables run over it."""

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
]
