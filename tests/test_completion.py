"""A frame that was seen in part: what was seen of it says what the rest is, and estimates stay those of what was seen."""

from __future__ import annotations

import math

import pytest
import torch

import dynavae
from dynavae import DKF, GMM, LGSSM, SLDS, VRNN, Sequences, bootstrap, impute, scan
from dynavae import distributions as D
from dynavae.linearised import LinearisedProposal
from dynavae.noise import draw, draw_by_sequence
from dynavae.tasks import latents
from dynavae.tasks.common import noise as noise_by_sequence
from dynavae.tasks.common import trace
from dynavae.testing import law_stream, small
from dynavae.testing.cases import noise_for, observations, sequences

JOINT = ("multivariate_gaussian", {"emission": "gaussian_mixture", "components": 2})
CORRELATED = torch.tensor([[1.0, 0.99], [0.99, 1.0]], dtype=torch.float64)


def half_seen(value: float) -> torch.Tensor:
    """Three frames of two coordinates, the second missing in the middle."""
    x = torch.full((1, 3, 2), value, dtype=torch.float64)
    x[0, 1, 1] = math.nan
    return x


def test_a_normal_given_some_coordinates_is_that_of_the_textbook():
    generator = torch.Generator().manual_seed(0)
    L = torch.randn(5, 4, 4, generator=generator, dtype=torch.float64).tril() + 2 * torch.eye(4)
    loc, x = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    seen = torch.tensor([True, False, True, False])
    S = L @ L.mT
    a, b = seen.nonzero()[:, 0], (~seen).nonzero()[:, 0]
    gain = S[:, b][..., a] @ torch.linalg.inv(S[:, a][..., a])
    mean = loc[:, b] + (gain @ (x - loc)[:, a, None]).squeeze(-1)
    p = D.MultivariateNormal(loc, L)
    filled = D.completed(p, x, seen)
    torch.testing.assert_close(filled[:, b], mean)
    assert torch.equal(filled[:, a], x[:, a])
    drawn = D.completed(p, x, seen, torch.randn(40_000, 5, 4, generator=generator, dtype=torch.float64))
    expected = S[:, b][..., b] - gain @ S[:, a][..., b]
    for row in range(5):
        torch.testing.assert_close(drawn[:, row, b].T.cov(), expected[row], rtol=0.05, atol=0.05)


def test_a_mixture_given_one_coordinate_weighs_its_components():
    p = D.GaussianMixture(
        torch.zeros(2).double(),
        torch.tensor([[-2.0, -2.0], [2.0, 2.0]]).double(),
        torch.full((2, 2), 0.5).double(),
    )
    x, seen = torch.tensor([2.0, 0.0]).double(), torch.tensor([True, False])
    share = 1 / (1 + math.exp(-0.5 * (4 / 0.5) ** 2))
    torch.testing.assert_close(D.completed(p, x, seen)[1].item(), 2 * (2 * share - 1))
    noise = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = D.completed(p, x, seen, noise)
    assert bool((drawn[:, 0] == 2).all())
    assert abs(float(drawn[:, 1].mean()) - 2) < 6 * 0.5 / 4000**0.5


def correlated_mixture() -> GMM:
    """Both components N(0, S): x2 given x1 = 3 is 2.97 +- 0.14."""
    model = GMM(x_dim=2, states=2, covariance="full").double()
    raw, _ = model.emission.raw(torch.zeros(2, 2).double(), CORRELATED.expand(2, 2, 2))
    with torch.no_grad():
        model.p_x.linear.weight.copy_(raw.mT)
        model.p_x.linear.bias.zero_()
    return model


def test_imputation_reads_the_rest_of_the_frame():
    found = impute(correlated_mixture(), half_seen(3.0), samples=4000)
    assert found.x[0, 1, 1].item() == pytest.approx(2.97, abs=1e-9)
    spread = (1 - 0.99**2) ** 0.5
    drawn = found.samples[:, 0, 1, 1]
    assert drawn.mean().item() == pytest.approx(2.97, abs=6 * spread / 4000**0.5)
    assert drawn.std().item() == pytest.approx(spread, rel=0.1)
    assert bool((found.samples[:, 0, 1, 0] == 3).all())


@pytest.mark.parametrize("reweight", [False, True])
def test_imputation_of_a_linear_gaussian_model_with_correlated_noise(reweight):
    model = LGSSM(x_dim=2, z_dim=1).double()
    model.set_moments(R=CORRELATED.tolist(), C=[[0.0], [0.0]], d=[0.0, 0.0])
    found = impute(model, half_seen(3.0), samples=2000, reweight=reweight)
    assert found.x[0, 1, 1].item() == pytest.approx(2.97, abs=1e-6)


def test_imputation_of_a_switching_model():
    """C = (2, 2)', little noise: the mean and the samples agree that x2 is about x1."""
    model = SLDS(x_dim=2, states=2, h_dim=1).double()
    with torch.no_grad():
        model.C.fill_(2.0)
        model.d.zero_()
    model.set_moments(R=[[[0.01, 0.0], [0.0, 0.01]]] * 2, Q=[[[1.0]]] * 2)
    x = torch.zeros(1, 3, 2, dtype=torch.float64)
    x[0, 1] = torch.tensor([4.0, math.nan])
    found = impute(model, x, samples=300)
    drawn = found.samples[:, 0, 1, 1]
    assert found.x[0, 1, 1].item() == pytest.approx(3.99, abs=0.05)
    assert found.x[0, 1, 1].item() == pytest.approx(
        drawn.mean().item(), abs=6 * drawn.std().item() / 300**0.5 + 0.02
    )


@pytest.mark.parametrize("emission", JOINT)
def test_a_frame_seen_in_part_weighs_as_its_seen_part(emission):
    """An autoregressive model reads what was drawn in a gap: the estimate of p(x_obs) is that of importance sampling."""
    model = small(VRNN, x_dim=2, z_dim=1, emission=emission)
    with torch.no_grad():
        if emission == "multivariate_gaussian":
            raw, _ = model.emission.raw(torch.zeros(2).double(), CORRELATED)
            model.p_x.linear.weight.mul_(0.1)
            model.p_x.linear.weight[:2].mul_(
                90
            )  # so that x_2 depends on what was missing of x_1, and not on z
            for part in (model.phi_x[0], model.rnn.rnn):
                next(p for name, p in part.named_parameters() if "weight" in name).mul_(3)
            for p in model.phi_z.parameters():
                p.zero_()
        else:  # far apart: which component it was matters
            loc, scale = torch.tensor([[-2.0, -2.0], [2.0, 2.0]]), torch.full((2, 2), 0.5)
            raw = model.emission.raw(torch.zeros(2).double(), loc.double(), scale.double())
            model.p_x.linear.weight.mul_(3)
        model.p_x.linear.bias.copy_(raw)
    x, K = torch.tensor([[[2.0, math.nan], [1.0, 1.0]]], dtype=torch.float64), 40_000
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        batch = Sequences.from_arrays(x)
        run = scan(
            model,
            batch,
            particles=K,
            propose=bootstrap,
            noise=draw(model, 2, K, 1, x=True, generator=generator),
        )
        ours = run.log_w.sum(0).flatten()
        wide = torch.distributions.Normal(torch.tensor(0.0).double(), 3.0)
        missing = 3 * torch.randn(K, generator=generator, dtype=torch.float64)
        whole = x.repeat(K, 1, 1)
        whole[:, 0, 1] = missing
        other = scan(
            model,
            Sequences.from_arrays(whole),
            propose=bootstrap,
            noise=draw(model, 2, 1, K, generator=generator),
        )
        theirs = other.log_w.sum(0).flatten() - wide.log_prob(missing)
    (a, b), scale = (w.exp() for w in (ours, theirs)), ours.mean().exp()
    error = ((a.var() + b.var()) / K).sqrt()
    assert abs(float(a.mean() - b.mean())) < 5 * float(error), (
        float(a.mean() / scale),
        float(b.mean() / scale),
    )


@pytest.mark.parametrize("emission", ["bernoulli", *JOINT])
def test_who_else_is_in_the_batch_does_not_change_the_gradient_in_x(emission):
    """Only what was drawn is cut from the graph; a row that was seen keeps its own x beside one with a gap."""
    model, generator = small(VRNN, emission=emission), torch.Generator().manual_seed(0)
    x = observations(model.emission, (2, 5, 4), generator)
    x[1, 2, 1:] = math.nan
    noise, grads = draw_by_sequence(model, torch.tensor([5, 5]), 3, (1, 2), x=True), []
    for rows in ([0], [0, 1]):
        value = x[rows].clone().requires_grad_()
        run = scan(model, Sequences.from_arrays(value), particles=3, noise=noise.sequences(rows, 5))
        run.log_w.sum((0, 1))[0].backward()
        grads.append(value.grad[0])
    assert float(grads[0].abs().max()) > 0
    torch.testing.assert_close(*grads)


def test_arguments_by_name():
    p, x = D.MultivariateNormal(torch.zeros(2), torch.eye(2)), torch.tensor([1.0, 0.0])
    seen = torch.tensor([True, False])
    assert p.log_prob(x, observed=seen) == p.log_prob(x, seen)
    assert torch.equal(p.sample(noise=x), x) and torch.equal(p.complete(x, observed=seen, noise=x), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert p.log_prob(x=x.bfloat16(), observed=seen).dtype == torch.float32
        assert float(p.kl(other=p).sum()) == 0


def test_the_last_choice_of_paths_has_a_number_of_its_own(monkeypatch):
    """Each sequence's last frame, where nothing is resampled: the first frame's would choose what it has chosen."""
    seen = []

    def spy(run, uniform):
        seen.append(uniform)
        return trace(run, uniform)

    monkeypatch.setattr(latents, "trace", spy)
    model, batch = small(VRNN), Sequences.from_arrays([torch.randn(n, 4).double() for n in (6, 3)])
    latents.paths(model, batch, 5, 0, [0, 1], reweight=True)
    numbers = torch.special.ndtr(noise_by_sequence(model, batch, 5, 0, [0, 1], resample=True).resample)
    torch.testing.assert_close(seen[0], torch.stack([numbers[5, :, 0], numbers[2, :, 1]], 1))


@pytest.mark.parametrize("task", ["impute", "forecast"])
def test_frames_of_several_axes(task):
    """As pictures: results have x_dim coordinates."""
    x = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, 2, 1] = math.nan
    model = small(VRNN, x_dim=6)
    if task == "impute":
        found, flat = (impute(model, a, samples=3).x for a in (x, x.flatten(2)))
    else:
        found, flat = (dynavae.forecast(model, a, horizon=2, samples=3).mean for a in (x, x.flatten(2)))
    assert torch.equal(found, flat)


@pytest.mark.parametrize("emission", JOINT)
def test_a_stream_completes_frames_as_the_filter_does(emission):
    law_stream(lambda: small(VRNN, emission=emission))


@pytest.mark.parametrize("emission", JOINT)
def test_frames_are_completed_one_by_one_as_all_at_once(emission):
    model = small(DKF, emission=emission)
    batch = sequences(model, missing=True)
    run = scan(model, batch, particles=3, noise=noise_for(model, batch, 3))
    x, seen = (a.transpose(0, 1).unsqueeze(1) for a in (batch.x, batch.observed))
    noise = noise_for(model, batch, 3).x
    for n in (noise, None):
        torch.testing.assert_close(D.completed_frames(run.p_x, x, seen, n), D.completed(run.p_x, x, seen, n))


def test_a_stream_goes_on_without_noise_of_observation():
    """What was seen without noise leaves a belief without spread, from which a forecast is drawn all the same."""
    from dynavae.exact.structural import level, seasonal

    model = dynavae.structural_model(level(), seasonal(4), noise=0.0).double()
    stream = model.stream(batch=1, particles=4)
    stream.step([[1.5]])
    ahead = stream.forecast(3, samples=500)
    assert bool(ahead.samples.isfinite().all())
    whole = dynavae.forecast(model, torch.tensor([[[1.5]]]).double(), horizon=3, samples=500)
    torch.testing.assert_close(
        ahead.samples.mean(0), whole.mean, atol=6 * float(whole.stddev.max()) / 500**0.5, rtol=0
    )


def test_a_linearised_proposal_streams():
    """With a linear model it is the optimal proposal: after one frame every particle has the exact likelihood."""
    model = LGSSM(x_dim=2, z_dim=2).double()
    stream = model.stream(batch=1, particles=7, propose=LinearisedProposal("extended"))
    first = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    now = stream.step(first)
    expected = model.exact_log_likelihood(Sequences.from_arrays(first.unsqueeze(1)))
    torch.testing.assert_close(now.log_prob, expected)
    torch.testing.assert_close(now.log_weights.exp(), torch.full((7, 1), 1 / 7).double())
    assert bool(stream.step([[0.1, math.nan]]).log_prob.isfinite())
    assert float(stream.step(None).log_prob) == 0
