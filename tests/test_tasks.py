"""Tasks as a user calls them: shapes, invariances, refusals, and agreement with what they stand for."""

from __future__ import annotations

import math

import pytest
import torch

import dynavae
from dynavae import LGSSM, RVAE, SRNN, VRNN, Resampling, Sequences, bootstrap
from dynavae.data import SequenceDataset
from dynavae.models import MODELS
from dynavae.tasks import capabilities
from dynavae.testing import small

NAN = float("nan")
NAMES = list(MODELS)


def sequences():
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, 3, generator=generator) for n in (9, 4, 1, 6)]
    xs[0][3:5] = NAN
    xs[1][1, 0] = NAN
    return xs


def model_of(name, **options):
    torch.manual_seed(0)
    return small(MODELS[name], x_dim=3, **options).float()


@pytest.mark.parametrize("name", NAMES)
def test_every_task_of_every_model(name):
    model, data = model_of(name), sequences()
    can = capabilities(model)
    for bound in ("elbo", "iwae", "fivo", "exact"):
        if can[bound]:
            result = dynavae.score(model, data, bound, particles=4)
            assert math.isfinite(result.nats_per_frame)
            assert (result.frames, result.sequences, result.first_frame) == (20, 4, "scored")
        else:
            with pytest.raises(ValueError, match="use bound="):
                dynavae.score(model, data, bound)
    z = model.latent_values(torch.zeros(1, model.z_dim)).shape[-1]
    smoothed = dynavae.smooth(model, data, samples=6)
    assert smoothed.mean.shape == (4, 9, z)
    assert smoothed.mean[1, :4].isfinite().all()
    assert smoothed.mean[1, 4:].isnan().all()
    if can["filter"]:
        assert dynavae.filter(model, data, particles=6).mean.shape == (4, 9, z)
    else:
        with pytest.raises(ValueError, match=r"Use smooth|use smooth"):
            dynavae.filter(model, data)
    for feedback in ("data", "mean", "sample"):
        assert dynavae.reconstruct(model, data, feedback).mean.shape == (4, 9, 3)
    assert dynavae.generate(model, 2, 5).x.isfinite().all()
    future = dynavae.forecast(model, data[:1], horizon=3, samples=5)
    assert future.samples.shape == (5, 1, 3, 3)
    assert future.samples.isfinite().all()
    filled = dynavae.impute(model, data, samples=5)
    assert filled.x[0].isfinite().all()
    assert torch.equal(filled.x[0, :3], data[0][:3])


@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_the_batch_size_or_on_who_is_in_the_batch(name):
    model, data = model_of(name).double(), [x.double() for x in sequences()]
    bounds = ["elbo", "iwae"] + (["fivo"] if model.per_step_likelihood else [])
    for bound in bounds:
        whole = dynavae.score(model, data, bound, particles=40).nats
        single = dynavae.score(model, data, bound, particles=40, batch_size=1).nats
        torch.testing.assert_close(whole, single, rtol=0, atol=1e-9)
    together = dynavae.impute(model, data, samples=3).x
    apart = dynavae.impute(model, data, samples=3, batch_size=1).x
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_forecast_does_not_read_what_comes_after_the_context(name):
    model, x = model_of(name), torch.randn(1, 8, 3)
    other = x.clone()
    other[:, 5:] = 99.0
    a = dynavae.forecast(model, x, horizon=3, context=5, samples=4)
    b = dynavae.forecast(model, other, horizon=3, context=5, samples=4)
    assert torch.equal(a.samples, b.samples)
    assert a.context.tolist() == [5]


def test_forecast_starts_at_each_sequence_s_own_end():
    model = LGSSM(x_dim=1, z_dim=1).set_moments(A=[[1.0]], Q=[[1e-8]], R=[[1e-4]], C=[[1.0]], P0=[[100.0]])
    data = [torch.full((n, 1), float(n)) for n in (3, 7)]
    f = dynavae.forecast(model, data, horizon=2, samples=3)
    assert f.context.tolist() == [3, 7]
    torch.testing.assert_close(f.mean[:, :, 0], torch.tensor([[3.0, 3.0], [7.0, 7.0]]), atol=0.1, rtol=0)


def test_filter_of_a_smoothing_model_with_the_bootstrap_proposal():
    model = SRNN(x_dim=3, z_dim=2, h_dim=4)
    found = dynavae.filter(model, sequences(), particles=8, propose=bootstrap)
    assert found.samples.shape == (8, 4, 9, 2)
    total = found.log_weights.exp().sum(0)
    torch.testing.assert_close(total[0], torch.ones(9))


def test_free_running_differs_from_teacher_forcing_only_for_autoregressive_models():
    x = torch.randn(2, 6, 3)
    for name in NAMES:
        model = model_of(name)
        forced, free = (dynavae.reconstruct(model, x, f, samples=2).mean for f in ("data", "mean"))
        torch.testing.assert_close(forced[:, 0], free[:, 0])
        assert torch.allclose(forced, free, atol=1e-5) != bool(model.autoregressive), name


def test_controls_reach_the_forecast():
    model = LGSSM(x_dim=1, z_dim=1, control_dim=1)
    model.set_moments(A=[[0.0]], B=[[1.0]], Q=[[1e-8]], R=[[1e-6]], C=[[1.0]])
    x, control = torch.zeros(1, 3, 1), torch.zeros(1, 5, 1)
    control[0, 3:, 0] = torch.tensor([4.0, -2.0])
    f = dynavae.forecast(
        model, Sequences.from_arrays(x, control=control[:, :3]), 2, samples=2, control=control
    )
    torch.testing.assert_close(f.mean[0, :, 0], torch.tensor([4.0, -2.0]), atol=0.01, rtol=0)
    with pytest.raises(ValueError, match="needs controls for the future"):
        dynavae.forecast(model, Sequences.from_arrays(x, control=control[:, :3]), 2)
    with pytest.raises(ValueError, match=r"built for control_dim=1; the sequences carry no control"):
        dynavae.score(model, x)


def test_reweighted_smoothing_of_a_causal_model_moves_towards_the_exact_answer():
    """VRNN's q has not seen the future; on a model with a known answer, weights repair the bootstrap."""
    torch.manual_seed(1)
    model = LGSSM(x_dim=1, z_dim=1).double()
    x = dynavae.generate(model, 1, 5, seed=2).x
    exact = dynavae.smooth(model, x)
    runs = Sequences.from_arrays(x.expand(64, -1, -1))
    from dynavae.scan import scan
    from dynavae.tasks.common import along, trace

    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        run = scan(model, runs, particles=256, propose=bootstrap, resample=Resampling(), generator=generator)
        lines = trace(run, torch.rand(256, 64, generator=generator, dtype=torch.float64))
    mean = along(run.z, lines).mean(1)[..., 0]  # (T, 64)
    error = mean.std(1) / 8
    assert ((mean.mean(1) - exact.mean[0, :, 0]).abs() < 6 * error + 10 / 256).all()


def test_score_says_what_it_is():
    data = SequenceDataset([torch.randn(5, 2).numpy(), torch.randn(2, 2).numpy()])
    model = VRNN(x_dim=2, z_dim=2, h_dim=3)
    result = dynavae.score(model, data, "iwae", particles=5)
    record = result.to_dict()
    assert record["data_sha256"] == data.sha256()
    assert (record["bound"], record["particles"], record["average"]) == (
        "iwae",
        5,
        "total nats / total frames",
    )
    assert record["nats_per_frame"] == pytest.approx(-float(result.nats.sum()) / 7)
    by_sequence = -float((result.nats / torch.tensor([5.0, 2.0])).mean())
    assert record["nats_per_frame_by_sequence"] == pytest.approx(by_sequence)
    assert 1 <= record["effective_size"] <= 5
    assert "nats" not in record
    assert "iwae-5" in repr(result)


def test_score_processes_particles_in_passes_without_changing_the_bound():
    """70 particles go in passes of 32, 32 and 6: one bound over all of them, not a mean of three."""
    from dynavae.scan import scan
    from dynavae.tasks import scoring
    from dynavae.tasks.common import noise

    assert scoring.PARTICLES_PER_PASS == 32
    model, data = VRNN(x_dim=3, z_dim=2, h_dim=3).double(), [sequences()[3].double()]
    batch = Sequences.from_arrays(data)
    with torch.no_grad():
        log_w = torch.cat(
            [
                scan(model, batch, particles=k, noise=noise(model, batch, k, 0, [0], block)).log_w.sum(0)
                for block, k in enumerate((32, 32, 6))
            ]
        )
    found = dynavae.score(model, data, "iwae", particles=70)
    torch.testing.assert_close(found.nats, torch.logsumexp(log_w, 0) - math.log(70), rtol=0, atol=1e-10)
    assert model.training  # the mode is restored


def test_bad_input_gets_a_sentence():
    model = VRNN(x_dim=3, z_dim=2, h_dim=3)
    x = torch.zeros(2, 5, 3)
    with pytest.raises(ValueError, match="bound should be one of elbo, iwae, fivo, exact; got 'vae'"):
        dynavae.score(model, x, "vae")
    with pytest.raises(ValueError, match="has no exact likelihood"):
        dynavae.score(model, x, "exact")
    with pytest.raises(ValueError, match="built for x_dim=3; the sequences have 4 features"):
        dynavae.score(model, torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match="feedback should be 'data', 'mean' or 'sample'"):
        dynavae.reconstruct(model, x, feedback="teacher")
    with pytest.raises(ValueError, match="context is 9 frames, but a sequence has only 5"):
        dynavae.forecast(model, x, horizon=2, context=9)
    with pytest.raises(ValueError, match="horizon should be at least 1"):
        dynavae.forecast(model, x, horizon=0)
    with pytest.raises(ValueError, match="batch should be at least 1; got 0"):
        dynavae.generate(model, batch=0)
    with pytest.raises(ValueError, match="decodes x_t from z_1:T"):
        dynavae.score(RVAE(x_dim=3, z_dim=2, h_dim=3, decoder="noncausal"), x, "fivo", particles=3)
    binary = VRNN(x_dim=3, z_dim=2, h_dim=3, emission="bernoulli")
    for task in (dynavae.score, dynavae.smooth, dynavae.impute, dynavae.filter, dynavae.reconstruct):
        with pytest.raises(
            ValueError, match="Bernoulli emission: values of x should be from 0 to 1; they go from -2 to"
        ):
            task(binary, x - 2)
    classes = VRNN(x_dim=3, z_dim=2, h_dim=3, emission={"emission": "categorical", "classes": 4})
    with pytest.raises(ValueError, match="class numbers from 0 to 3"):
        dynavae.score(classes, x + 0.5)
    with pytest.raises(ValueError, match=r"x should have shape \(B, T, x_dim\)"):
        dynavae.score(model, torch.zeros(5, 3))


def test_splits_need_a_split_name():
    from dynavae import data

    splits = data.load("jsb")
    model = VRNN(x_dim=88, z_dim=2, h_dim=3, emission="bernoulli")
    with pytest.raises(ValueError, match="which split"):
        dynavae.score(model, splits)
    result = dynavae.score(model, splits, split="test")
    assert (result.frames, result.sequences, result.density) == (4725, 77, "mass")
    assert result.data_sha256 == splits.sha256


def test_the_forecast_of_a_linear_gaussian_model_has_exact_intervals():
    """Quantiles are those of the Kalman prediction, for sequences of different lengths, with controls."""
    from dynavae.exact import kalman

    torch.manual_seed(0)
    model = dynavae.LGSSM(x_dim=2, z_dim=3, control_dim=1)
    x, control = torch.randn(2, 9, 2), torch.randn(2, 14, 1)
    x[0, 3, 1] = float("nan")
    x[1, 7:] = float("nan")
    data = Sequences.from_arrays([x[0], x[1, :7]], control=[control[0, :9], control[1, :7]])
    got = dynavae.forecast(model, data, horizon=4, samples=5, control=control)
    params = model.parameters_in_moments
    for row, length in ((0, 9), (1, 7)):
        seen = x[row, :length].unsqueeze(1)
        filtered = kalman.kalman_filter(params, seen, control=control[row, :length].unsqueeze(1))
        known = control[row, length : length + 4].unsqueeze(1)
        ahead = kalman.kalman_predict(params, filtered.mean[-1], filtered.covariance[-1], 4, known)
        p_x = kalman.predictive_observation(params, *ahead, known)
        deviation = p_x.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        for q, score in ((0.05, -1.6448536), (0.5, 0.0), (0.95, 1.6448536)):
            expected = (p_x.mean + score * deviation)[:, 0]
            torch.testing.assert_close(got.quantile(q)[row], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="a share between 0 and 1; got 1"):
        got.quantile(1.0)
