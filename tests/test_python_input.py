"""What a first user passes in Python: refused with a sentence, or taken for what it is."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import dynavae
from dynavae import HMM, LGSSM, VRNN, Sequences, fit, forecast, generate, impute, score, smooth
from dynavae.loss import Loss
from dynavae.testing import small

QUIET = dict(progress=False, accelerator="cpu")


def series(n: int = 4, steps: int = 6, x_dim: int = 2) -> torch.Tensor:
    return torch.randn(n, steps, x_dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("emission", "value", "said"),
    [
        ("bernoulli", 7.0, "values of x_t should be from 0 to 1"),
        ({"emission": "categorical", "classes": 3}, 3.0, "class numbers from 0 to 2"),
        ({"emission": "categorical", "classes": 3}, 1.4, "with fractions"),
        ("power_spectrum", -1.0, "powers, 0 or more"),
    ],
)
def test_a_stream_refuses_what_has_no_probability(emission, value, said):
    stream = small(VRNN, x_dim=2, emission=emission).stream()
    stream.step([[1.0, math.nan]])
    with pytest.raises(ValueError, match=said):
        stream.step([[1.0, value]])
    with pytest.raises(ValueError, match=said):
        stream.step([[math.nan, value]])


def test_what_a_masked_array_masks_is_missing():
    x = series().numpy()
    mask = np.zeros(x.shape, dtype=bool)
    mask[1, 2] = mask[3, 0, 1] = True
    filled, masked = np.where(mask, np.nan, x), np.ma.masked_array(x, mask, fill_value=1e20)
    for ours, theirs in ((masked, filled), (list(masked), list(filled))):
        assert torch.equal(Sequences.from_arrays(ours).observed, Sequences.from_arrays(theirs).observed)
        assert torch.equal(Sequences.from_arrays(ours).x, Sequences.from_arrays(theirs).x)
    model = small(VRNN, x_dim=2)
    ours, theirs = (model.stream(seed=1).step(a[1, 2:3]) for a in (masked, filled))
    assert torch.equal(ours.log_prob, theirs.log_prob) and float(ours.log_prob) == 0


def test_tables_of_pandas():
    pandas = pytest.importorskip("pandas")
    tables = [pandas.DataFrame(a) for a in series().numpy()]
    assert torch.equal(Sequences.from_arrays(tables).x, Sequences.from_arrays(list(series())).x)
    with pytest.raises(TypeError, match=r"got DataFrame. For one sequence pass \[x\]"):
        Sequences.from_arrays(tables[0])


@pytest.mark.parametrize("name", ["catalogue", "data", "em", "exact", "music", "report", "runs", "testing"])
def test_modules_come_with_the_package(name):
    code = f"import dynavae; print(dynavae.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"dynavae.{name}"


@pytest.mark.parametrize(
    "call",
    [
        lambda m, x: forecast(m, x, horizon=2, samples=0),
        lambda m, x: impute(m, x, samples=0),
        lambda m, x: smooth(m, x, samples=-1),
        lambda m, x: dynavae.filter(m, x, particles=0),
        lambda m, x: dynavae.reconstruct(m, x, samples=0),
        lambda m, x: score(m, x, batch_size=-1),
        lambda m, x: generate(m, batch=0),
        lambda m, x: m.stream(particles=0),
    ],
)
@pytest.mark.parametrize("name", ["VRNN", "LGSSM"])
def test_counts_below_one(name, call):
    model = small(dynavae.MODELS[name], x_dim=2)
    if name == "LGSSM" and "filter" in call.__code__.co_names:
        pytest.skip("an exact filter has no particles")
    with pytest.raises(ValueError, match="should be at least 1; got"):
        call(model, series())


def test_controls_that_are_not_known_or_not_wanted():
    model = small(VRNN, x_dim=2, control_dim=1)
    control = torch.zeros(4, 8, 1)
    control[1, 7] = math.nan
    known = Sequences.from_arrays(series(), control=control[:, :6])
    with pytest.raises(ValueError, match="controls are known inputs: fill them"):
        forecast(model, known, horizon=2, control=control)
    with pytest.raises(ValueError, match="controls are known inputs: fill them"):
        generate(model, batch=4, length=8, control=control)
    with pytest.raises(ValueError, match="VRNN was built without controls; got control= of 1"):
        forecast(small(VRNN, x_dim=2), series(), horizon=2, control=torch.zeros(4, 8, 1))


def test_no_row_to_reset():
    stream = small(VRNN, x_dim=2).stream(batch=3)
    stream.step(torch.zeros(3, 2))
    before = stream.state_dict()
    stream.reset([])
    stream.reset(torch.zeros(0, dtype=torch.long))
    assert all(torch.equal(a, before[name]) for name, a in stream.state_dict().items())
    with pytest.raises(ValueError, match="rows should be among the 3 of this stream"):
        stream.reset([3])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(tmp_path):
    model = VRNN(2, 2, 3)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device='cuda' needs a GPU"):
        dynavae.load(tmp_path, device="cuda")
    with pytest.raises(ValueError, match="accelerator='gpu' needs a GPU"):
        fit(model, series(), **{**QUIET, "accelerator": "gpu"})


def test_exact_models_are_fitted_by_their_likelihood():
    assert Loss(LGSSM(2, 2)).objective == Loss(HMM(2, 2)).objective == "exact"
    assert Loss(VRNN(2, 2, 3)).objective == "elbo"
    for asked in ({"kl_warmup": 3}, {"particles": 4}, {"truncate": 5}, {"kl": "sample"}, {"beta": 0.5}):
        assert Loss(LGSSM(2, 2), **asked).objective == "elbo"
    losses = []
    for options in ({}, {"objective": "elbo"}):
        torch.manual_seed(0)
        model = LGSSM(2, 2).double()
        losses.append(fit(model, series().double(), epochs=3, **options, **QUIET).history[-1]["train/loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_run_without_validation_keeps_its_last_weights(tmp_path):
    torch.manual_seed(0)
    result = fit(
        VRNN(2, 2, 3), series(), epochs=2, out_dir=tmp_path / "run", ema=0.5, tensorboard=False, **QUIET
    )
    again = dynavae.load(tmp_path / "run" / "best")
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert result.best["epoch"] == 2
    more = fit(
        VRNN(2, 2, 3),
        series(),
        epochs=3,
        out_dir=tmp_path / "run",
        ema=0.5,
        tensorboard=False,
        resume=True,
        **QUIET,
    )
    again = dynavae.load(tmp_path / "run" / "best")
    assert all(torch.equal(v, again.state_dict()[name]) for name, v in more.model.state_dict().items())


def test_a_coordinate_that_does_not_vary_is_said(caplog):
    x = series(x_dim=3)
    x[..., 1] = 7.0
    fit(VRNN(3, 2, 3), x, epochs=1, **QUIET)
    assert "of x the coordinates 1 hardly vary (standard deviation at most 0.001" in caplog.text
    caplog.clear()
    fit(VRNN(2, 2, 3, emission="bernoulli"), torch.zeros(2, 3, 2), epochs=1, **QUIET)
    assert "hardly vary" not in caplog.text
