"""Streams: equal to the batch path frame by frame; states, resets, forecasts, refusals; the exported step."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dynavae
from dynavae import DKF, DSAE, HMM, LGSSM, MODELS, RVAE, SRNN, STORN, VAE, VRNN, Resampling, bootstrap, scan
from dynavae.exact import kalman
from dynavae.noise import Noise, draw
from dynavae.tasks import capabilities, export_step, step_inputs
from dynavae.tasks.common import noise as noise_by_sequence
from dynavae.tasks.streaming import Stream
from dynavae.testing import law_stream, sequences, small
from dynavae.testing.cases import observations
from dynavae.testing.equality import frames
from dynavae.testing.streams import frame_noise, run
from dynavae.tree import leaves

NAN = float("nan")
CAUSAL = {
    "VAE": (VAE, {}),
    "DKF": (DKF, {"inference": "ST-L"}),
    "STORN": (STORN, {}),
    "VRNN": (VRNN, {}),
    "SRNN": (SRNN, {"inference": "filter"}),
}
STREAMS = {  # every registered model that streams, if need be as its causal variant
    name: (cls, cls.causal_variant)
    for name, cls in MODELS.items()
    if capabilities(small(cls, **cls.causal_variant))["stream"]
}
EXACT = [name for name in STREAMS if MODELS[name].exact]
CONTROLLED = {
    name: (cls, {**options, "control_dim": 2, "mask_input": True}) for name, (cls, options) in CAUSAL.items()
}


def causal(name, **options):
    cls, own = CAUSAL[name]
    return small(cls, **own, **options)


def streaming(name, **options):
    cls, own = STREAMS[name]
    return small(cls, **own, **options)


def same(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True)


# --- the numbers of the batch path ----------------------------------------------------------------------


@pytest.mark.parametrize("missing", [False, True], ids=["complete", "gaps"])
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("control", [0, 2])
def test_equals_the_filter_task(name, missing, control):
    model = causal(name, control_dim=control)
    batch = sequences(model, missing=missing)
    expected = dynavae.filter(model, batch, particles=6, seed=3)
    noise = noise_by_sequence(model, batch, 6, 3, [0, 1, 2], x=True, resample=True)
    steps = run(model.stream(3, 6), batch, noise)
    valid = batch.valid.unsqueeze(-1)
    for field in ("mean", "stddev"):
        got = torch.stack([getattr(s, field) for s in steps], 1)
        same(got.masked_fill(~valid, NAN), getattr(expected, field), 1e-10 if field == "mean" else 1e-7)
    got = torch.stack([s.log_weights for s in steps], -1)
    same(got.masked_fill(~valid[..., 0], NAN), expected.log_weights)
    log_prob = torch.stack([s.log_prob for s in steps], 1).masked_fill(~valid[..., 0], 0.0).sum(1)
    same(log_prob, dynavae.score(model, batch, "fivo", particles=6, seed=3).nats)


@pytest.mark.parametrize("name", EXACT)
def test_exact_models_stream_exactly(name):
    model = streaming(name)
    batch = sequences(model, missing=True)
    expected = dynavae.filter(model, batch)
    stream = model.stream(3, particles=5)
    steps = run(stream, batch)
    hidden = ~batch.valid.unsqueeze(-1)
    for field in ("mean", "stddev"):
        got = torch.stack([getattr(s, field) for s in steps], 1)
        same(got.masked_fill(hidden, NAN), getattr(expected, field))
    same(torch.stack([s.log_prob for s in steps]).sum(0), dynavae.score(model, batch, "exact").nats)
    assert steps[0].samples is None and steps[0].log_weights is None


def test_control_of_an_exact_model():
    model = small(LGSSM, control_dim=2)
    batch = sequences(model, (6, 6), missing=True)
    same(torch.stack([s.mean for s in run(model.stream(2), batch)], 1), model.exact_filter(batch)[0])


def test_a_scan_continues_a_stream():
    model = causal("SRNN")
    batch = sequences(model, (7, 7), missing=True)
    noise = draw(model, 7, 3, 2, x=True, resample=True)
    stream = model.stream(2, 3)
    run(stream, frames(batch, 0, 4), noise)
    rest = Noise(noise.z[4:], noise.x[4:], None, noise.resample[4:])
    options = dict(particles=3, resample=Resampling(), carry=True)
    then = scan(model, frames(batch, 4, 7), noise=rest, state=stream.state.model, **options)
    whole = scan(model, batch, noise=noise, **options)
    same(then.z, whole.z[4:])
    same(then.state.h, whole.state.h)


def test_none_is_a_frame_of_nan():
    model = causal("VRNN")
    first, second = model.stream(2, 4), model.stream(2, 4)
    for stream in (first, second):
        stream.step(torch.ones(2, 4))
    a, b = first.step(None), second.step(torch.full((2, 4), NAN))
    for field in ("mean", "stddev", "samples", "log_weights", "log_prob"):
        assert torch.equal(getattr(a, field), getattr(b, field))
    assert bool((a.log_prob == 0).all()) and bool(a.score.isnan().all())


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_model_does_not_judge_a_gap(name):
    stream = streaming(name).stream(3)
    for x in (torch.ones(3, 4), None, torch.tensor([[NAN] * 4, [1.0, NAN, 0.0, NAN], [0.0] * 4])):
        step = stream.step(x)
        nothing = torch.ones(3, dtype=torch.bool) if x is None else x.isnan().all(-1)
        assert torch.equal(step.log_prob == 0, nothing) and torch.equal(step.score.isnan(), nothing)


@pytest.mark.parametrize("name", CAUSAL)
def test_sequences_that_start_at_different_times(name):
    """A row that starts at frame 2, after another sequence, gives what it gives from the start."""
    model = causal(name)
    batch = sequences(model, (6, 6), missing=True)
    noise = draw(model, 6, 4, 2, x=True, resample=True)
    stream, alone = model.stream(2, 4), model.stream(1, 4)
    x = torch.where(batch.observed, batch.x, NAN)
    for t in range(6):
        if t == 2:
            stream.reset(1)
            assert stream.state.frames.tolist() == [2, 0]
        eps = frame_noise(noise, t)
        both = stream.step(x[:, t], noise=eps)
        if t >= 2:
            one = alone.step(x[1:, t], noise=Noise(eps.z[:, 1:], eps.x[:, 1:], None, eps.resample[:, 1:]))
            same(both.mean[1:], one.mean)
            same(both.log_prob[1:], one.log_prob)
            same(both.predicted.mean[1:], one.predicted.mean)


def test_random_numbers_come_from_the_seed():
    model = causal("VRNN")
    a, b, c = (model.stream(1, 4, seed=seed).step(torch.zeros(1, 4)).mean for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_weights_stay_of_order_one():
    """In float32 a running sum over a long stream would lose the digits of the last frame."""
    model = causal("VRNN").float()
    stream = model.stream(1, 8, resampling=Resampling(threshold=0.0))
    for _ in range(200):
        stream.step(torch.zeros(1, 4))
    log_w = stream.state.model.log_w
    same(torch.logsumexp(log_w, 0) - math.log(8), torch.zeros(1), 1e-5)


# --- prediction and score ------------------------------------------------------------------------------


def test_score_is_minus_log_prob_per_observed_value():
    stream = causal("DKF").stream(2, 4)
    step = stream.step([[0.1, 0.2, NAN, 0.4], [0.1, NAN, NAN, NAN]])
    same(step.score, -step.log_prob / torch.tensor([3.0, 1.0]))
    usual, odd = stream.step(torch.zeros(2, 4)), stream.step(torch.full((2, 4), 30.0))
    assert bool((odd.score > usual.score).all())


def test_prediction_of_particles_agrees_with_the_exact_one():
    torch.manual_seed(0)
    model, K = LGSSM(x_dim=2, z_dim=2).double(), 20_000
    exact, particles = model.stream(1), model.stream(1, K, propose=bootstrap)
    for t in range(4):
        x = None if t == 2 else torch.full((1, 2), 0.3 * t)
        a, b = exact.step(x), particles.step(x)
        error = a.predicted.stddev / K**0.5
        assert bool(((a.predicted.mean - b.predicted.mean).abs() < 8 * error).all())
        assert bool(((a.predicted.stddev - b.predicted.stddev).abs() < 8 * error).all())
        assert abs(float(a.log_prob - b.log_prob)) < 0.1
        assert bool(((a.mean - b.mean).abs() < 8 * a.stddev / K**0.5 * 2).all())


def test_quantiles_of_an_exact_prediction():
    torch.manual_seed(0)
    model = LGSSM(x_dim=2, z_dim=2).double()
    p = model.stream(1, particles=40_000).step(torch.zeros(1, 2)).predicted
    for q in (0.05, 0.5, 0.9):
        normal = p.mean + p.stddev * torch.special.ndtri(torch.tensor(q, dtype=torch.float64))
        same(p.quantile(q), normal, 0.05 * float(p.stddev.max()))


def test_moments_of_a_prediction_are_those_of_its_samples():
    for model in (causal("VRNN"), small(HMM)):
        stream = model.stream(2, 500)
        stream.step(torch.zeros(2, 4))
        p = stream.step(torch.ones(2, 4)).predicted
        w, x = p.weights.unsqueeze(-1), p.samples
        same(w.sum(0), torch.ones(2, 1).double())
        mean = (w * x).sum(0)
        error = 8 * p.stddev / (1 / (w**2).sum(0)).sqrt()
        assert bool(((mean - p.mean).abs() < error).all())
        stddev = (w * (x - mean).square()).sum(0).sqrt()
        assert bool(((stddev - p.stddev).abs() < 2 * error).all())
        assert bool((p.quantile(0.1) < p.quantile(0.9)).all())
        assert torch.equal(p.quantile(1.0), x.amax(0)) and torch.equal(p.quantile(0.0), x.amin(0))
    with pytest.raises(ValueError, match=r"a quantile is a share from 0 to 1; got 90"):
        p.quantile(90)


def test_prediction_of_classes():
    model = causal("VRNN", emission={"emission": "categorical", "classes": 3})
    p = model.stream(1, 50).step(torch.zeros(1, 4)).predicted
    share = (p.log_weights.exp()[..., None, None] * p.components.probs).sum(0)
    assert torch.equal(p.mean, share.argmax(-1).double())
    same(p.stddev, 1 - share.amax(-1))


def test_without_prediction_the_rest_is_the_same():
    model = causal("VRNN")
    batch = sequences(model, missing=True)
    noise = draw(model, batch.steps, 4, 3, x=True, resample=True)
    full, lean = (run(model.stream(3, 4, predict=p), batch, noise) for p in (True, False))
    for a, b in zip(full, lean, strict=True):
        assert b.predicted is None
        assert torch.equal(a.mean, b.mean) and torch.equal(a.log_prob, b.log_prob)


# --- forecast ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTROLLED)
def test_forecast_continues_the_particles(name):
    """With equal weights each future is that of one particle: the scan of the context and a gap after it."""
    cls, options = CONTROLLED[name]
    model = small(cls, **options)
    batch = sequences(model, (6, 6), missing=True)
    context, K = frames(batch, 0, 4), 5
    noise = draw(model, 4, K, 2, x=True, resample=True)
    every = Resampling(threshold=1.0)
    stream = model.stream(2, K, resampling=every)
    run(stream, context, noise)
    before = stream.state
    future = stream.forecast(2, K, control=batch.control[:, 4:], seed=9)
    assert all(torch.equal(a, b) for a, b in zip(leaves(before), leaves(stream.state), strict=True))
    assert future.context.tolist() == [4, 4]
    ahead = draw(model, 2, K, 2, x=True, generator=torch.Generator().manual_seed(9))
    both = Noise(
        torch.cat([noise.z, ahead.z]),
        torch.cat([noise.x, ahead.x]),
        None,
        torch.cat([noise.resample, torch.zeros(2, K, 2).double()]),
    )
    hidden = torch.zeros_like(batch.observed)
    hidden[:, 4:] = True
    whole = scan(model, batch.hide(hidden), particles=K, resample=every, draw_x=True, noise=both)
    same(future.samples, whole.x[4:].permute(1, 2, 0, 3))
    same(future.mean, whole.p_x.mean[4:].mean(1).transpose(0, 1))
    same(future.quantile(0.5), future.samples.quantile(0.5, dim=0))


def test_forecast_draws_particles_by_their_weights():
    model = causal("SRNN")
    stream = model.stream(2, 3)
    stream.step(torch.ones(2, 4))
    state = stream.state
    log_w = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf], [-torch.inf, 0.0]]).double()
    stream.state = state._replace(model=state.model._replace(log_w=log_w + math.log(3)))
    paths = stream._paths(7, torch.Generator().manual_seed(0))
    same(paths.h[:, 0], state.model.h[0, 0].expand(7, -1))
    same(paths.h[:, 1], state.model.h[2, 1].expand(7, -1))
    assert stream.forecast(2, samples=7).samples.shape == (7, 2, 2, 4)


def test_forecast_of_an_exact_model():
    torch.manual_seed(0)
    model = LGSSM(x_dim=2, z_dim=2, control_dim=1).double()
    stream = model.stream(1)
    control, S = torch.tensor([[0.5]]), 20_000
    first = stream.forecast(1, S, control=control.unsqueeze(1))  # from the prior: nothing was seen
    params = model.parameters_in_moments
    mean = params.C @ params.m0 + params.D @ torch.tensor([0.5]).double() + params.d
    covariance = params.C @ params.P0 @ params.C.T + params.R
    assert bool(((first.samples.mean((0, 1, 2)) - mean).abs() < 6 * (covariance.diagonal() / S).sqrt()).all())
    for t in range(3):
        stream.step(torch.full((1, 2), float(t)), control)
    m, P, _ = stream.state.model
    u = torch.full((3, 1, 1), 0.2).double()
    ahead = kalman.kalman_predict(params, m, P, 3, u)
    expected = kalman.predictive_observation(params, ahead.mean, ahead.covariance, u)
    got = stream.forecast(3, S, control=u.transpose(0, 1))
    variance = expected.covariance.diagonal(dim1=-2, dim2=-1)[:, 0]
    assert bool(((got.samples.mean(0)[0] - expected.mean[:, 0]).abs() < 6 * (variance / S).sqrt()).all())
    assert bool(((got.samples.var(0)[0] / variance - 1).abs() < 6 * (2 / S) ** 0.5).all())


def test_forecast_of_states():
    model = small(HMM)
    stream = model.stream(2)
    stream.step(torch.zeros(2, 4))
    a, b = stream.forecast(5, 20), stream.forecast(5, 20)
    assert torch.equal(a.samples, b.samples) and a.samples.shape == (20, 2, 5, 4)
    assert not torch.equal(a.samples, stream.forecast(5, 20, seed=1).samples)


# --- state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("gap", [False, True])
def test_save_and_restore(name, gap, tmp_path):
    model = streaming(name)
    stream = model.stream(2, 4)
    stream.step(torch.ones(2, 4))
    if gap:
        stream.step(None)
    kept = stream.state
    torch.save(stream.state_dict(), tmp_path / "state.pt")
    save_file(stream.state_dict(), tmp_path / "state.safetensors")
    after = [stream.step(torch.zeros(2, 4)) for _ in range(3)]

    def check(other):
        for expected in after:
            got = other.step(torch.zeros(2, 4))
            same(got.mean, expected.mean)
            same(got.log_prob, expected.log_prob)
            same(got.predicted.samples, expected.predicted.samples)

    stream.state = kept
    check(stream)
    for tensors in (torch.load(tmp_path / "state.pt"), load_file(tmp_path / "state.safetensors")):
        other = model.stream(2, 4, seed=99)
        other.load_state_dict(tensors)
        assert other.state.frames.tolist() == [1 + gap] * 2
        check(other)


def test_a_state_of_another_stream_is_refused():
    model = causal("VRNN")
    stream = model.stream(2, 4)
    with pytest.raises(ValueError, match=r"another model, batch or number of particles.*\(8, 2, 5\)"):
        stream.state = model.stream(2, 8).state
    with pytest.raises(ValueError, match=r"no state of this stream: it lacks state\.0"):
        stream.load_state_dict({"frames": torch.zeros(2), "generator": torch.zeros(2)})


def test_no_graph_is_kept_unless_asked_for():
    model = causal("VRNN")
    stream = model.stream(1, 4)
    assert not stream.step(torch.zeros(1, 4)).log_prob.requires_grad
    assert not any(a.requires_grad for a in leaves(stream.state))


@pytest.mark.parametrize("name", ["VRNN", "LGSSM"])
def test_gradients_are_those_of_the_whole(name):
    model = causal(name) if name in CAUSAL else small(LGSSM)
    batch = sequences(model, (5, 5), missing=True)
    noise = draw(model, 5, 3, 2, x=True, resample=True)
    stream = model.stream(2, 3, gradients=True, resampling=Resampling(threshold=0.0))
    total = torch.stack([s.log_prob for s in run(stream, batch, noise)]).sum()
    if name == "LGSSM":
        expected = model.exact_log_likelihood(batch).sum()
    else:
        options = dict(particles=3, noise=noise, resample=Resampling(threshold=0.0))
        expected = scan(model, batch, **options).log_evidence.sum()
    parameters = list(model.parameters())
    grads = [torch.autograd.grad(v, parameters, allow_unused=True) for v in (total, expected)]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            same(a, b, 1e-8)
    assert any(a.requires_grad for a in leaves(stream.state))
    stream.detach()
    assert not any(a.requires_grad for a in leaves(stream.state))


def test_dropout_is_off_and_the_mode_is_kept():
    model = causal("VRNN", dropout=0.5)
    expected = model.stream(1, 4).step(torch.ones(1, 4)).log_prob
    model.train()
    assert torch.equal(model.stream(1, 4).step(torch.ones(1, 4)).log_prob, expected)
    assert model.training


# --- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: small(DKF), r"this DKF reads the future of x.*smooth\(.*DKF\(inference='ST-L'\).*bootstrap"),
        (lambda: small(SRNN), r"this SRNN reads the future of x.*SRNN\(inference='filter'\)"),
        (lambda: small(STORN, reads="full"), r"this STORN reads the future of x.*STORN\(reads='current'\)"),
        (lambda: small(RVAE), r"this RVAE reads the future of x.*a causal model, such as VRNN"),
        (lambda: small(RVAE, decoder="noncausal"), r"decodes x_t from z_1:T.*smooth\(.*causal decoder"),
        (lambda: small(DSAE), r"this DSAE infers a latent of the whole sequence.*smooth\(.*window"),
    ],
)
def test_what_cannot_stream_says_why(build, match):
    model = build()
    assert not capabilities(model)["stream"]
    for attempt in (model.stream, lambda: export_step(model)):
        with pytest.raises(ValueError, match=match):
            attempt()


def test_bootstrap_streams_what_reads_the_future():
    for cls in (DKF, SRNN, RVAE):
        assert small(cls).stream(1, 4, propose=bootstrap).step(torch.zeros(1, 4)).mean.isfinite().all()
    for model in (small(DSAE), small(RVAE, decoder="noncausal")):
        with pytest.raises(ValueError, match=r"stream (takes one frame|needs p\(x_t)"):
            model.stream(propose=bootstrap)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m, s: m.stream(0), "batch should be at least 1; got 0"),
        (lambda m, s: m.stream(1, 0), "particles should be at least 1; got 0"),
        (lambda m, s: s.step(torch.zeros(4)), r"x_t should have shape .* \(2, 4\).*got \(4,\)"),
        (lambda m, s: s.step(torch.full((2, 4), math.inf)), "infinite value; pass NaN"),
        (lambda m, s: s.step(None, control=torch.zeros(2, 1)), "VRNN was built without controls"),
        (lambda m, s: s.reset(2), "rows should be among the 2"),
        (lambda m, s: s.forecast(0), "horizon should be at least 1; got 0"),
        (lambda m, s: export_step(m, particles=0), "particles should be at least 1; got 0"),
    ],
)
def test_bad_input(call, match):
    model = causal("VRNN")
    with pytest.raises(ValueError, match=match):
        call(model, model.stream(2, 4))


def test_controls_are_checked():
    stream = causal("VRNN", control_dim=2).stream(1, 4)
    with pytest.raises(ValueError, match=r"VRNN needs its control, of shape \(1, 2\), also at a gap"):
        stream.step(None)
    for control in (torch.zeros(1, 3), torch.full((1, 2), NAN)):
        with pytest.raises(ValueError, match=r"control should be finite, of shape \(1, 2\)"):
            stream.step(None, control)
    with pytest.raises(ValueError, match=r"VRNN needs its control, of shape \(1, 3, 2\)"):
        stream.forecast(3)


def test_repr():
    assert repr(small(VAE).stream(2, 4)) == "Stream(VAE, batch=2, particles=4)"


# --- the law can fail ----------------------------------------------------------------------------------


class Counts(VRNN):
    """Its evidence counts frames from the start of a chunk."""

    def evidence(self, seen):
        return super().evidence(seen) + torch.arange(len(seen.u), dtype=seen.u.dtype).reshape(-1, 1, 1)


class Inexact(LGSSM):
    def exact_step(self, belief, frame):
        now = super().exact_step(belief, frame)
        return now._replace(log_prob=now.log_prob + 1e-3)


class NeverCausal(DKF):
    causal_variant = {"inference": "ST-LR"}  # noqa: RUF012


@pytest.mark.parametrize(
    ("cls", "match"),
    [
        (Counts, r"Counts\(\) breaks 'a stream equals the whole': z "),
        (Inexact, r"Inexact\(\) breaks .* exact log p\(x\)"),
        (NeverCausal, "'ST-LR'} should be causal"),
    ],
)
def test_a_broken_model_is_caught(cls, match):
    with pytest.raises(AssertionError, match=match):
        law_stream(lambda: small(cls))


def test_a_reset_that_forgets_nothing_is_caught(monkeypatch):
    monkeypatch.setattr(Stream, "reset", lambda self, rows=None: None)
    with pytest.raises(AssertionError, match="mean after a reset"):
        law_stream(lambda: small(VRNN))


def test_a_missing_refusal_is_caught(monkeypatch):
    monkeypatch.setattr("dynavae.tasks.streaming.require", lambda model, task: None)
    with pytest.raises(AssertionError, match="a model that cannot stream should refuse"):
        law_stream(lambda: small(DKF))


# --- export --------------------------------------------------------------------------------------------


def compare_exported(model, program, batch, particles, tolerance=1e-10):
    """Six frames, with gaps and a row that starts anew, through both."""

    def same(a, b):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)

    eager, inputs = model.stream(batch, particles, seed=5), step_inputs(model, batch, particles)
    dtype, state = inputs.x.dtype, inputs.state
    normals, data = (torch.Generator().manual_seed(seed) for seed in (5, 6))
    fields = ["mean", "log_prob", "score"] + ([] if model.exact else ["log_weights", "samples"])
    for t in range(6):
        x = observations(model.emission, (batch, model.x_dim), data).to(dtype)
        if t in (2, 4, 5):
            x[torch.rand(x.shape, generator=data) < 0.4] = NAN
        if t == 3:
            x[:] = NAN
        control = (
            torch.randn(batch, model.control_dim, generator=data).to(dtype) if model.control_dim else None
        )
        fresh = torch.arange(batch) == (0 if t == 4 else -1)
        if t == 0:
            fresh[:] = True
        if t == 4:
            eager.reset(0)
        expected = eager.step(x, control)
        noise = torch.randn(inputs.noise.shape, generator=normals, dtype=dtype)
        got, state = program(x.nan_to_num(7.0), ~x.isnan(), fresh, control, noise, state)
        assert set(got) == {*fields, "stddev", "predicted_mean", "predicted_stddev"}
        for field in fields:
            same(got[field], getattr(expected, field))
        same(got["stddev"].square(), expected.stddev.square())
        same(got["predicted_mean"], expected.predicted.mean)
        same(got["predicted_stddev"], expected.predicted.stddev)
        if model.exact:
            for a, b in zip(state, leaves(eager.state.model), strict=True):
                same(a, b)
        assert not any(a.requires_grad for a in (*got.values(), *state))


MORE = {
    "VRNN": {"control_dim": 2},
    "SRNN": {"mask_input": True},
    "KVAE": {"control_dim": 2},
    "SLDS": {"control_dim": 2},
    "LGSSM": {"control_dim": 2},
    "FactorAnalysis": {"control_dim": 2},
}


@pytest.mark.parametrize(
    ("name", "particles"), [(name, K) for name in STREAMS for K in ((1,) if name in EXACT else (1, 4))]
)
def test_exported_step_equals_the_stream(name, particles, tmp_path):
    model = streaming(name, **MORE.get(name, {}))
    torch.export.save(export_step(model, particles), tmp_path / "step.pt2")
    program = torch.export.load(tmp_path / "step.pt2").module()
    for batch in (1, 3, 4, 5):  # the batch is open, and may equal any other size
        compare_exported(model, program, batch, particles)


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name in ("LGSSM", "HMM", "GMM") for variant in MODELS[name].variants],
)
def test_exported_step_of_a_variant_of_an_exact_model(name, variant):
    model = small(MODELS[name], **MODELS[name].variants[variant])
    compare_exported(model, export_step(model).module(), 3, 1)


@pytest.mark.parametrize("emission", ["multivariate_gaussian", "gaussian_mixture"])
def test_exported_step_completes_frames_as_the_stream_does(emission):
    model = small(VRNN, emission=emission)
    compare_exported(model, export_step(model, 3).module(), 4, 3)


@pytest.mark.parametrize("name", EXACT)
def test_exported_step_of_an_exact_model_in_single_precision(name):
    model = streaming(name).float()
    compare_exported(model, export_step(model, 2).module(), 5, 2, tolerance=1e-4)


def test_exported_step_of_a_fixed_batch_without_prediction():
    model = causal("VRNN")
    program = export_step(model, batch=2, predict=False).module()
    out, state = program(*step_inputs(model, 2, predict=False))
    assert set(out) == {"mean", "stddev", "samples", "log_weights", "log_prob", "score"}
    assert len(state) == len(step_inputs(model, 2, predict=False).state)
    assert next(model.parameters()).requires_grad  # the model itself is untouched
    exact = small(LGSSM)
    inputs = step_inputs(exact, 2, predict=False)
    assert inputs.noise.shape == (1, 2, 0)
    out, state = export_step(exact, batch=2, predict=False).module()(*inputs)
    assert set(out) == {"mean", "stddev", "log_prob", "score"}
    assert [a.shape for a in state] == [a.shape for a in inputs.state]


# --- documentation -------------------------------------------------------------------------------------


def test_the_page_on_streaming_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "streaming.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    scope: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "streaming.md", "exec"), scope)
    scores = torch.tensor(scope["scores"])
    assert scores[60:70].isnan().all()  # the gap
    assert int(scores.nan_to_num(-math.inf).argmax()) == 90  # the fault
    assert (tmp_path / "step.pt2").is_file()
