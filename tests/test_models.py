"""Each model is what its paper says: who reads whom, how many parameters, which options."""

from __future__ import annotations

import pytest
import torch

from dynavae import MODELS, Resampling, Sequences, scan
from dynavae.nn import Gaussian
from dynavae.testing import dependency_table, sequences, small

# model: (variant: options), p(z_t | .), p(x_t | .), q(z_t | .), q(w | .)
TABLE = [
    ("VAE", {}, "N(0, I)", "z_t", "x_t", None),
    ("DKF", {}, "z_{t-1}", "z_t", "x_{t:T}, z_{t-1}", None),
    ("DKF", {"inference": "DKS"}, "z_{t-1}", "z_t", "x_{t:T}, z_{t-1}", None),
    ("DKF", {"inference": "ST-L"}, "z_{t-1}", "z_t", "x_{<=t}, z_{t-1}", None),
    ("DKF", {"inference": "ST-LR"}, "z_{t-1}", "z_t", "x_{1:T}, z_{t-1}", None),
    ("DKF", {"inference": "MF-L"}, "z_{t-1}", "z_t", "x_{<=t}", None),
    ("DKF", {"inference": "MF-LR"}, "z_{t-1}", "z_t", "x_{1:T}", None),
    ("DKF", {"aug": True}, "x_{t-1}, z_{t-1}", "x_{t-1}, z_t", "x_{t:T}, z_{t-1}", None),
    ("STORN", {}, "N(0, I)", "x_{<t}, z_{<=t}", "x_{<=t}", None),
    ("STORN", {"reads": "past"}, "N(0, I)", "x_{<t}, z_{<=t}", "x_{<t}", None),
    ("STORN", {"reads": "full"}, "N(0, I)", "x_{<t}, z_{<=t}", "x_{1:T}", None),
    ("VRNN", {}, "x_{<t}, z_{<t}", "x_{<t}, z_{<=t}", "x_{<=t}, z_{<t}", None),
    ("VRNN", {"residual": True}, "x_{<t}, z_{<t}", "x_{<t}, z_{<=t}", "x_{<=t}, z_{<t}", None),
    ("VRNN", {"prior": "standard"}, "N(0, I)", "x_{<t}, z_{<=t}", "x_{<=t}, z_{<t}", None),
    ("SRNN", {}, "x_{<t}, z_{t-1}", "x_{<t}, z_t", "x_{1:T}, z_{t-1}", None),
    ("SRNN", {"residual": False}, "x_{<t}, z_{t-1}", "x_{<t}, z_t", "x_{1:T}, z_{t-1}", None),
    ("SRNN", {"inference": "filter"}, "x_{<t}, z_{t-1}", "x_{<t}, z_t", "x_{<=t}, z_{t-1}", None),
    ("RVAE", {}, "N(0, I)", "z_{<=t}", "x_{t:T}, z_{<t}", None),
    ("RVAE", {"decoder": "noncausal"}, "N(0, I)", "z_{1:T}", "x_{1:T}, z_{<t}", None),
    ("RVAE", {"posterior_layers": (6,)}, "N(0, I)", "z_{<=t}", "x_{t:T}, z_{<t}", None),
    ("DSAE", {}, "z_{<t}", "z_t, w", "x_{1:T}, w", "x_{1:T}"),
    ("LGSSM", {}, "z_{t-1}", "z_t", "x_{t:T}, z_{t-1}", None),
    ("HMM", {}, "z_{t-1}", "z_t", "x_{t:T}, z_{t-1}", None),
    ("GMM", {}, "", "z_t", "x_t", None),
    ("PPCA", {}, "N(0, I)", "z_t", "x_t", None),
    ("FactorAnalysis", {}, "N(0, I)", "z_t", "x_t", None),
]


@pytest.mark.parametrize(("name", "options", "prior", "likelihood", "posterior", "static"), TABLE, ids=str)
def test_dependency_table(name, options, prior, likelihood, posterior, static):
    assert dependency_table(small(MODELS[name], **options)) == (prior, likelihood, posterior, static)


# --- numbers of parameters: DVAE review, speech (513 frequencies) and motion (96 coordinates) ----------

SPEECH = dict(x_dim=513, z_dim=16, emission="power_spectrum")
MOTION = dict(x_dim=96, z_dim=10, h_dim=64, emission={"emission": "gaussian", "scale": "fixed"})
PLAIN = dict(residual=False, shared_features=False)
COUNTS = [
    ("VAE", SPEECH, {}, 138_273),
    ("DKF", SPEECH, {}, 516_641),
    ("STORN", SPEECH, {}, 870_113),
    ("VRNN", SPEECH, {}, 480_097),
    ("SRNN", SPEECH, PLAIN, 884_993),
    ("RVAE", SPEECH, {}, 553_121),
    ("RVAE", SPEECH, {"decoder": "noncausal"}, 1_026_849),
    ("RVAE", SPEECH, {"posterior_layers": (128,)}, 581_921),
    ("DSAE", SPEECH, {"w_dim": 16}, 1_650_241),
    ("VAE", MOTION, {"layers": (32,)}, 7_284),
    ("DKF", MOTION, dict(x_layers=(64,), z_layers=(16,), decoder_layers=(32, 64)), 52_856),
    (
        "STORN",
        MOTION,
        dict(x_layers=(64,), z_layers=(32,), posterior_layers=(32,), decoder_layers=()),
        96_500,
    ),
    ("VRNN", MOTION, dict(x_layers=(64,), z_layers=(16, 32)), 61_592),
    (
        "SRNN",
        MOTION,
        dict(
            x_layers=(64,),
            encoder_layers=(64,),
            prior_layers=(32,),
            posterior_layers=(32,),
            decoder_layers=(64,),
            **PLAIN,
        ),
        100_232,
    ),
    ("RVAE", MOTION, {}, 89_204),
    ("RVAE", MOTION, {"decoder": "noncausal"}, 157_556),
    ("DSAE", MOTION, dict(w_dim=10, decoder_layers=(32, 64)), 217_084),
]


@pytest.mark.parametrize(("name", "sizes", "options", "count"), COUNTS, ids=str)
def test_number_of_parameters(name, sizes, options, count):
    model = MODELS[name](**sizes, **options)
    assert sum(p.numel() for p in model.parameters()) == count


# --- options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_an_unknown_option_is_answered_with_the_nearest(name):
    with pytest.raises(
        TypeError, match=rf"unknown option 'x_dimm' for {name}; did you mean 'x_dim'\? Options: x_dim"
    ):
        MODELS[name](x_dimm=3)
    with pytest.raises(TypeError, match=rf"unknown option 'qqqq' for {name}\. Options: x_dim, "):
        MODELS[name](x_dim=3, qqqq=1)
    with pytest.raises(TypeError, match=rf"{name}: missing a required argument: 'x_dim'\. Options: x_dim"):
        MODELS[name]()
    with pytest.raises(ValueError, match=rf"x_dim of {name} should be a positive integer; got 0"):
        MODELS[name](x_dim=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DKF", {"inference": "ST"}, "inference should be one of ST-R, ST-L, .*; got 'ST'"),
        ("DKF", {"transition": "linear"}, "transition should be 'gated' or 'mlp'; got 'linear'"),
        ("DKF", {"first": "zero"}, "first should be 'transition', 'standard' or 'learned'; got 'zero'"),
        ("STORN", {"reads": "future"}, "reads should be 'past', 'current' or 'full'; got 'future'"),
        ("VRNN", {"prior": "gaussian"}, "prior should be 'learned' or 'standard'; got 'gaussian'"),
        ("SRNN", {"inference": "both"}, "inference should be 'smooth' or 'filter'; got 'both'"),
        ("RVAE", {"decoder": "bi"}, "decoder should be 'causal' or 'noncausal'; got 'bi'"),
        ("DSAE", {"w_dim": 0}, "w_dim of DSAE should be 1 or more"),
        ("LGSSM", {"noise": "none"}, "noise should be 'full' or 'diagonal'; got 'none'"),
        ("HMM", {"states": 1}, "an HMM needs at least 2 states; got 1"),
        ("VRNN", {"z_dim": -1}, "z_dim of VRNN should be a positive integer; got -1"),
        ("VRNN", {"control_dim": -1}, "control_dim and w_dim should be 0 or more; got -1 and 0"),
        ("VRNN", {"memory": "gruu"}, "unknown cell 'gruu' of a memory"),
        (
            "VRNN",
            {"scale": "log"},
            "scale should be one of log_variance, softplus, softplus_variance; got 'log'",
        ),
        ("VRNN", {"x_layers": (0,)}, r"should list positive widths, such as \(256, 128\); got \(0,\)"),
        ("VRNN", {"activation": "tan"}, "unknown activation 'tan'; choose one of clipped_leaky_relu, elu"),
        ("VRNN", {"dropout": 1.5}, r"dropout should be in \[0, 1\); got 1.5"),
        ("VRNN", {"norm": "batch"}, "norm should be None or 'layer'; got 'batch'"),
        ("VAE", {"emission": "poisson"}, "unknown emission 'poisson'; choose one of gaussian, laplace"),
        (
            "VAE",
            {"emission": {"emission": "gaussian", "sigma": 1}},
            "gaussian emission has no option 'sigma'",
        ),
        (
            "VAE",
            {"emission": {"emission": "gaussian", "scale": "none"}},
            "scale should be 'learned', 'shared'",
        ),
        ("VAE", {"emission": {"emission": "gaussian", "value": 0.0}}, "scales are positive; got value=0.0"),
        ("VAE", {"emission": {"emission": "student_t", "df": 2.0}}, "df should be above 2"),
        ("VAE", {"emission": {"emission": "categorical", "classes": 1}}, "at least 2 classes; got 1"),
    ],
)
def test_bad_options_are_answered(name, options, message):
    with pytest.raises(ValueError, match=message):
        MODELS[name](x_dim=4, **options)


def test_config_is_what_was_asked_for():
    model = MODELS["VRNN"](5, z_dim=2, x_layers=(7,), emission=Gaussian(scale="fixed", value=0.1))
    assert model.config["x_dim"] == 5 and model.config["z_dim"] == 2 and model.config["x_layers"] == [7]
    assert model.config["emission"] == {
        "emission": "Gaussian",
        "scale": "fixed",
        "value": 0.1,
        "min_scale": 0.001,
    }
    assert model.config["memory"] == "lstm"


def test_data_that_do_not_fit_are_answered():
    model = small(MODELS["VRNN"], control_dim=2)
    good = sequences(model)
    with pytest.raises(ValueError, match="VRNN was built for x_dim=4; the sequences have 3 features"):
        scan(model, Sequences.from_arrays(torch.zeros(1, 2, 3, dtype=torch.float64)))
    with pytest.raises(ValueError, match="built for control_dim=2; the sequences carry no control"):
        scan(model, Sequences.from_arrays(torch.zeros(1, 2, 4, dtype=torch.float64)))
    with pytest.raises(TypeError, match=r"VRNN has torch.float64 on cpu, the sequences torch.float32"):
        scan(model, good.to(torch.float32))
    with pytest.raises(ValueError, match="feedback should be 'sample' or 'mean'; got 'mode'"):
        scan(model, good, feedback="mode")
    with pytest.raises(ValueError, match="particles should be at least 1; got 0"):
        scan(model, good, particles=0)
    noncausal = small(MODELS["RVAE"], decoder="noncausal")
    with pytest.raises(ValueError, match="RVAE decodes x_t from z_1:T; use independent paths"):
        scan(noncausal, sequences(noncausal), resample=Resampling())
