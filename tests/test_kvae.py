"""The KVAE: its bound is the Kalman filter's, its gaps are the smoother's, its states those of an exact library."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from dynavae import forecast, generate, impute, objectives, score, smooth
from dynavae.batch import Sequences
from dynavae.distributions import MultivariateNormal, Normal
from dynavae.exact import kalman
from dynavae.models import KVAE
from dynavae.proposals import filtering
from dynavae.scan import scan
from dynavae.testing import small
from dynavae.testing.cases import noise_for

T, B = 9, 3


class Identity(KVAE):
    """a = x: q(a | x) and p(x | a) are the same narrow Gaussian, so their ratio is 1 at every sample."""

    width = 1e-6

    def encoded(self, u):
        _, scale = super().encoded(u)
        return u, torch.full_like(scale, self.width)

    def likelihood(self, present):
        return Normal(present.h[0], torch.full_like(present.h[0], self.width))


def identity(**options):
    return small(Identity, x_dim=2, z_dim=2, state_dim=3, layers=(), **options)


def videos(gaps=False, control_dim=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, 2, generator=g, dtype=torch.float64).cumsum(1)
    observed = torch.ones(B, T, dtype=torch.bool)
    if gaps:
        observed[0, 3:6] = observed[1, 0] = observed[1, 4] = observed[2, 5:] = False
    control = torch.randn(B, T, control_dim, generator=g, dtype=torch.float64) if control_dim else None
    return Sequences.from_arrays(x, observed=observed, control=control)


def extended(model):
    """Offsets, and variances that training has moved."""
    with torch.no_grad():
        for p in (model.b, model.log_Q, model.log_R):
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7), dtype=p.dtype)
    return model


def as_lgssm(model):
    A, C, B_, b = (None if p is None else p[0].detach() for p in (model.A, model.C, model.B, model.b))
    zero = torch.zeros(model.state_dim, dtype=torch.float64)
    return kalman.LinearGaussian(zero, model.P0, A, model.Q.detach(), C, model.R.detach(), B_, b=b)


def time_first(batch):
    control = None if batch.control is None else batch.control.transpose(0, 1)
    return batch.x.transpose(0, 1), batch.observed.transpose(0, 1), control


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("control_dim", [0, 2])
@pytest.mark.parametrize("more", [False, True])
def test_with_one_mixture_and_a_equal_to_x_every_path_weighs_the_kalman_likelihood(gaps, control_dim, more):
    model = identity(mixtures=1, control_dim=control_dim, offsets=more, learn_noise=more)
    model, batch = extended(model) if more else model, videos(gaps, control_dim)
    exact = kalman.kalman_filter(as_lgssm(model), *time_first(batch)).log_likelihood.sum(0)
    run = scan(model, batch, particles=4, noise=noise_for(model, batch, 4))
    log_w = objectives.log_weights(run)
    torch.testing.assert_close(log_w, exact.expand_as(log_w), atol=2e-3, rtol=0)
    if gaps:  # the prior at a gap is a bound too, but a looser one
        loose = objectives.log_weights(
            scan(model, batch, particles=512, propose=filtering, noise=noise_for(model, batch, 512))
        )
        assert (loose.mean(0)[:2] < exact[:2] - 0.1).all()
        torch.testing.assert_close(loose[:, 2], exact[2].expand(512), atol=2e-3, rtol=0)  # no future


def test_imputed_points_have_the_moments_of_the_smoother():
    model, batch = identity(mixtures=1), videos(gaps=True)
    params = as_lgssm(model)
    x, observed, _ = time_first(batch)
    smoothed = kalman.kalman_smoother(params, kalman.kalman_filter(params, x, observed))
    exact = kalman.predictive_observation(params, smoothed.mean, smoothed.covariance)
    filled = impute(model, batch, samples=4000)
    for b, t in ((0, 3), (0, 4), (1, 0), (1, 4), (2, 8)):
        samples = filled.samples[:, b, t]
        error = (exact.covariance[t, b].diagonal() / 4000).sqrt()
        assert ((samples.mean(0) - exact.mean[t, b]).abs() < 5 * error).all()
        torch.testing.assert_close(samples.T.cov(), exact.covariance[t, b], rtol=0.15, atol=0.05)


def test_with_several_mixtures_completions_are_weighed_to_the_exact_posterior():
    """Alpha in a gap comes from predictions; weighed by how paths lead on, their mean is exact all the same."""
    model = identity(mixtures=3)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.A += 0.4 * torch.randn(model.A.shape, generator=g, dtype=model.A.dtype)
        model.C += torch.randn(model.C.shape, generator=g, dtype=model.C.dtype)
        model.to_weights.weight *= 20
        x, observed = generate(model, batch=B, length=T).x, videos(gaps=True).observed
        batch = Sequences.from_arrays(x[:1], observed=observed[:1])
        N, S = 20000, 4000
        by_prior = scan(model, batch, particles=N, propose=filtering, noise=noise_for(model, batch, N))
        bridged = scan(model, batch, particles=S, noise=noise_for(model, batch, S))
    w, v = (objectives.log_weights(run).softmax(0) for run in (by_prior, bridged))
    weighed, plain = (impute(model, batch, samples=S, reweight=r).samples.mean(0) for r in (None, False))
    bias = []
    assert all(1 / (of[:, 0] ** 2).sum() > 1000 for of in (w, v))
    for b, t in ((0, 3), (0, 4), (0, 5)):
        mean = w[:, b] @ by_prior.z[t, :, b]
        variance = w[:, b] @ (by_prior.z[t, :, b] - mean) ** 2
        error = (variance * ((w[:, b] ** 2).sum() + (v[:, b] ** 2).sum() + 1 / S)).sqrt()
        assert ((weighed[b, t] - mean).abs() < 5 * error).all()
        bias.append(((plain[b, t] - mean).abs() / error).max())
    assert max(bias) > 8


def test_the_marginal_equals_the_papers_sampled_state_but_without_its_variance():
    """log p(a, s) - log p(s | a) is log p(a) for every s of the exact smoother."""
    model, batch = small(KVAE), Sequences.from_arrays(torch.randn(2, 7, 4, dtype=torch.float64))
    run = scan(model, batch, noise=noise_for(model, batch, 1))
    a = run.z[:, 0]
    walk = model._walk(a, torch.ones_like(a[..., :1], dtype=torch.bool), None)
    params = walk.dynamics
    filtered = kalman.kalman_filter(params, a)
    torch.testing.assert_close(filtered.log_likelihood, run.log_prior[:, 0])
    noise = torch.randn(
        7, 200, 2, model.state_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    s = kalman.sample_posterior(params, filtered, noise)
    normal = torch.distributions.MultivariateNormal
    into = (params.A[1:].unsqueeze(1) @ s[:-1].unsqueeze(-1)).squeeze(-1)
    joint = normal(params.m0, params.P0).log_prob(s[0]) + normal(into, params.Q).log_prob(s[1:]).sum(0)
    joint = joint + normal((params.C.unsqueeze(1) @ s.unsqueeze(-1)).squeeze(-1), params.R).log_prob(
        a.unsqueeze(1)
    ).sum(0)
    gain = kalman.kalman_smoother(params, filtered).gain
    spread = filtered.covariance[:-1] - gain @ filtered.predicted_covariance[1:] @ gain.mT
    spread = 0.5 * (spread + spread.mT)
    mean = filtered.mean[:-1].unsqueeze(1) + (
        gain.unsqueeze(1) @ (s[1:] - filtered.predicted_mean[1:].unsqueeze(1)).unsqueeze(-1)
    ).squeeze(-1)
    posterior = normal(filtered.mean[-1], filtered.covariance[-1]).log_prob(s[-1])
    posterior = posterior + normal(mean, spread.unsqueeze(1)).log_prob(s[:-1]).sum(0)
    log_p = joint - posterior
    torch.testing.assert_close(log_p, filtered.log_likelihood.sum(0).expand_as(log_p))
    assert joint.std(0).min() > 0.5  # either term alone varies


@pytest.mark.parametrize("more", [False, True])
def test_states_are_those_of_a_hand_written_loop(more):
    """A_t, B_t, C_t, b_t from a_<t; z_t reads u_t; gaps are fed their prediction."""
    model = small(KVAE, control_dim=2, offsets=more, learn_noise=more)
    model = extended(model) if more else model
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    control = torch.randn(1, 5, 2, dtype=torch.float64)
    x[0, 2] = torch.nan
    batch = Sequences.from_arrays(x, control=control)
    states = model.states(batch)
    m, P = torch.zeros(model.state_dim, dtype=torch.float64), model.P0
    memory, a = model.rnn.initial((1,)), model.a_0.unsqueeze(0)
    for t in range(5):
        memory = model.rnn.step(memory, a)
        alpha = model.to_weights(memory[-1][0]).softmax(-1)[0]
        A, B_, C = ((alpha[:, None, None] * p).sum(0) for p in (model.A, model.B, model.C))
        b = alpha @ model.b if more else 0.0
        if t:
            m, P = A @ m + B_ @ control[0, t] + b, A @ P @ A.T + model.Q
        if t == 2:
            a = (C @ m).unsqueeze(0)
        else:
            a = model.q_a(model.encoder(batch.x[:, t])).chunk(2, -1)[0]
            K = P @ C.T @ torch.linalg.inv(C @ P @ C.T + model.R)
            m, P = m + K @ (a[0] - C @ m), P - K @ C @ P
        torch.testing.assert_close(states.weights[0, t], alpha)
        torch.testing.assert_close(states.filtered_mean[0, t], m)
        torch.testing.assert_close(states.filtered_covariance[0, t], P)
        torch.testing.assert_close(states.filtered_a[0, t], C @ m)
    torch.testing.assert_close(states.smoothed_mean[0, -1], m)
    shifted = Sequences.from_arrays(x, control=control.roll(1, 1))
    assert (model.states(shifted).filtered_mean - states.filtered_mean).abs().max() > 1e-3


def test_a_bound_with_gaps_stays_a_bound_whatever_bridges_them():
    """With several mixtures the bridge is a proposal: many paths of it and of the prior agree on p(x)."""
    model = identity()
    x = generate(model, batch=1, length=6, seed=1).x
    x[:, 3:5] = torch.nan
    batch = Sequences.from_arrays(x)
    estimates = []
    for propose in (None, filtering):
        options = {} if propose is None else {"propose": propose}
        run = scan(model, batch, particles=20000, noise=noise_for(model, batch, 20000), **options)
        log_w = objectives.log_weights(run)[:, 0]
        w = (log_w - log_w.max()).exp()
        estimates.append((log_w.max() + w.mean().log(), w.std() / w.mean() / math.sqrt(len(w))))
    (a, ea), (b, eb) = estimates
    assert abs(a - b) < 6 * (ea**2 + eb**2).sqrt() + 1e-3
    assert ea < eb  # and it is the better one


def test_generated_points_follow_the_dynamics_and_forecasts_the_context():
    model = identity(mixtures=1)
    z = generate(model, batch=400, length=6).z
    params = as_lgssm(model)
    mean, P = params.m0, params.P0
    for t in range(6):
        if t:
            P = params.A @ P @ params.A.T + params.Q
        S = params.C @ P @ params.C.T + params.R
        assert ((z[:, t].T.cov() - S).abs() / S.diagonal().max() < 0.35).all()
    batch = videos()
    ahead = forecast(model, batch, horizon=2, context=5, samples=3000)
    f = kalman.kalman_filter(params, batch.x[:, :5].transpose(0, 1))
    moments = kalman.kalman_predict(params, f.mean[-1], f.covariance[-1], 2)
    exact = kalman.predictive_observation(params, moments.mean, moments.covariance)
    error = (exact.covariance.diagonal(dim1=-2, dim2=-1) / 3000).sqrt()
    assert ((ahead.samples.mean(0).transpose(0, 1) - exact.mean).abs() < 5 * error).all()
    assert mean.shape == (3,)


def test_smoothed_paths_and_scores_take_the_bridge_by_default():
    model, batch = identity(mixtures=1), videos(gaps=True)
    exact = kalman.kalman_filter(as_lgssm(model), *time_first(batch)).log_likelihood.sum()
    assert score(model, batch, kl="sample").nats_per_frame == pytest.approx(-float(exact) / (B * T), abs=1e-3)
    assert not smooth(model, batch, samples=10).mean.isnan().any()


@pytest.mark.slow
def test_training_reaches_the_kalman_likelihood_of_the_truth():
    """A point that turns, seen through the identity: dynamics are learnt by the ELBO alone."""
    from dynavae import fit

    turn = math.pi / 8
    A = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    eye = torch.eye(2)
    truth = kalman.LinearGaussian(torch.zeros(2), 20 * eye, A, 0.08 * eye, eye, 0.03 * eye)
    g = torch.Generator().manual_seed(0)
    x = kalman.simulate(
        truth, torch.randn(20, 300, 2, generator=g), torch.randn(20, 300, 2, generator=g)
    ).x.transpose(0, 1)
    torch.manual_seed(0)
    model = Identity(x_dim=2, z_dim=2, state_dim=2, mixtures=1, layers=())
    Identity.width, width = 0.02, Identity.width
    try:
        fit(model, x[:250], epochs=25, lr=0.02, progress=False, calibrate=False, accelerator="cpu")
        got = score(model, x[250:]).nats_per_frame
    finally:
        Identity.width = width
    best = -kalman.kalman_filter(truth, x[250:].transpose(0, 1)).log_likelihood.sum() / (50 * 20)
    assert got - float(best) < 0.1
    assert got > float(best) - 0.02


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"state_dim": 0}, "state_dim of KVAE should be a positive integer; got 0"),
        ({"mixtures": -1}, "mixtures of KVAE should be a positive integer; got -1"),
        ({"a_noise": 0.0}, "a_noise of KVAE is a variance and should be positive; got 0.0"),
        ({"image": (3, 3)}, r"image \(3, 3\) has 9 pixels, but x_dim is 4"),
        ({"image": (4,)}, r"image should be \(height, width\) or \(channels, height, width\)"),
        ({"image": (2, 2), "layers": (6,)}, "needs a multiple of 4 filters"),
        (
            {"image": (2, 2), "layers": (8,), "emission": {"emission": "categorical", "classes": 3}},
            "has no Categorical emission",
        ),
    ],
)
def test_bad_options_are_answered_with_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        KVAE(x_dim=4, **options)


def test_sizes_are_those_of_the_paper():
    model = KVAE(
        1024, 2, 4, image=(32, 32), layers=(32, 32, 32), decoder_layers=(128, 128, 128), emission="bernoulli"
    )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["A"] == (3, 4, 4) and shapes["C"] == (3, 2, 4)
    assert torch.equal(model.A, torch.eye(4).repeat(3, 1, 1))
    assert shapes["rnn.rnn.weight_hh_l0"] == (200, 50) and shapes["to_weights.weight"] == (3, 50)
    assert [m.out_channels for m in model.encoder.net if isinstance(m, nn.Conv2d)] == [32] * 3
    assert [m.out_channels for m in model.p_x.convolutions] == [128] * 3
    assert model.p_x.last.kernel_size == (1, 1)
    run = scan(model, Sequences.from_arrays(np.zeros((1, 3, 1024))))
    assert isinstance(run.q, MultivariateNormal)
    assert float(run.q.stddev.detach().square().max()) <= 0.03  # bounded by R
