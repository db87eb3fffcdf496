"""The likelihood with its own gradient, completions and the local-level start, against the Kalman filter and smoother."""

from __future__ import annotations

import math

import pytest
import torch

import dynavae
from dynavae import HMM, LGSSM, Sequences
from dynavae.exact import _native, kalman
from dynavae.exact._patterned import groups
from dynavae.exact.likelihood import log_likelihood
from dynavae.exact.local_level import local_level
from dynavae.exact.simulation import complete
from dynavae.loss import Loss

T, B, Z, X, U = 7, 6, 3, 4, 2
pytestmark = pytest.mark.usefixtures("float64")


def spd(n):
    a = torch.randn(n, n)
    return a @ a.T / n + 0.3 * torch.eye(n)


def parameters():
    values = dict(
        m0=torch.randn(Z), P0=spd(Z), A=0.9 * torch.eye(Z) + 0.2 * torch.randn(Z, Z), Q=spd(Z), C=torch.randn(X, Z),
        R=spd(X), B=torch.randn(Z, U), D=torch.randn(X, U), b=torch.randn(Z), d=torch.randn(X),
    )  # fmt: skip
    return kalman.LinearGaussian(**{name: value.requires_grad_() for name, value in values.items()})


def complete_data():
    return torch.ones(T, B, X, dtype=torch.bool)


def ragged():
    return torch.arange(T)[:, None, None].expand(T, B, X) <= torch.arange(B)[:, None]


def gaps():
    observed = torch.rand(T, B, X) > 0.5
    observed[3] = False
    return observed


def shared_gaps():
    observed = gaps()
    observed[:, 3] = observed[:, 4] = observed[:, 1]
    observed[4:, 4] = False  # a group whose sequences end at different times
    observed[:, 5] = False
    return observed


needs_numba = pytest.mark.skipif(not _native.installed(), reason="Numba is not installed")
MASKS = [complete_data, ragged, gaps, shared_gaps]


def data():
    return torch.randn(T, B, X).requires_grad_(), torch.randn(T, B, U).requires_grad_()


@pytest.mark.parametrize("numba", [False, pytest.param(True, marks=needs_numba)])
@pytest.mark.parametrize("mask", MASKS)
def test_value_and_gradient_are_those_of_the_kalman_filter(mask, numba, monkeypatch):
    monkeypatch.setattr(_native, "installed", lambda: numba)
    params, (x, control), observed, weights = parameters(), data(), mask(), torch.randn(B)
    inputs = [*params, x, control]
    names = [*params._fields, "x", "control"]
    results = []
    for value in (
        kalman.kalman_filter(params, x, observed, control, method="joseph").log_likelihood.sum(0),
        log_likelihood(params, x, observed, control),
    ):
        gradients = torch.autograd.grad((weights * value).sum(), inputs)
        # A covariance is symmetric: only the symmetric part of its gradient means anything.
        results.append(
            [value] + [g + g.T if n in ("P0", "Q", "R") else g for n, g in zip(names, gradients, strict=True)]
        )
    for name, ours, theirs in zip(["value", *names], *reversed(results), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_sequences_that_miss_the_same_share_covariances():
    for mask, number in ((complete_data, 1), (ragged, 1), (shared_gaps, 5)):  # rows 1 and 3 are alike
        group, patterns = groups(mask())
        assert group.number == patterns.shape[1] == number, mask.__name__


@pytest.mark.parametrize("numba", [False, pytest.param(True, marks=needs_numba)])
def test_it_is_accurate_in_float32(numba, monkeypatch):
    monkeypatch.setattr(_native, "installed", lambda: numba)
    params, (x, control), observed = parameters(), data(), gaps()
    single = kalman.LinearGaussian(*(a.detach().float().requires_grad_() for a in params))
    value = log_likelihood(single, x.float(), observed, control.float())
    exact = log_likelihood(params, x, observed, control)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(value.sum(), single), torch.autograd.grad(exact.sum(), params), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("mask", MASKS)
@torch.no_grad()
def test_completions_are_the_posterior(mask, seed):
    """Means are exact; those of 20 000 samples, and their squares, within 6 standard errors of the smoother."""
    params, (x, control), observed, paths = parameters(), data(), mask(), 20_000
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.randn(T, paths, B, n, generator=generator) for n in (Z, X))
    made = complete(params, x, *noise, observed, control)
    smoothed = kalman.kalman_smoother(params, kalman.kalman_filter(params, x, observed, control))
    torch.testing.assert_close(made.z_mean, smoothed.mean, rtol=1e-9, atol=1e-9)
    variance = smoothed.covariance.diagonal(dim1=-2, dim2=-1)
    error = made.z - smoothed.mean.unsqueeze(1)
    assert (error.mean(1).abs() <= 6 * (variance / paths).sqrt()).all()
    assert ((error.square().mean(1) - variance).abs() <= 6 * variance * math.sqrt(2 / paths)).all()
    cross = (error[1:].unsqueeze(-1) * error[:-1].unsqueeze(-2)).mean(1)
    bound = (variance[1:].unsqueeze(-1) * variance[:-1].unsqueeze(-2) * 2 / paths).sqrt()
    assert ((cross - smoothed.cross_covariance).abs() <= 6 * bound).all()
    hidden = ~observed.unsqueeze(1).expand_as(made.x)
    assert torch.equal(made.x[~hidden], x.unsqueeze(1).expand_as(made.x)[~hidden])


@torch.no_grad()
def test_what_is_missing_of_a_frame_follows_what_was_seen_of_it(seed):
    """With correlated noise R, and a state that is known, x_2 given x_1 is the regression of the noises."""
    R = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    tiny, eye = 1e-12 * torch.eye(1), torch.eye(1)
    params = kalman.LinearGaussian(torch.zeros(1), tiny, eye, tiny, torch.ones(2, 1), R)
    x, paths = torch.tensor([[[2.0, math.nan]]]), 50_000
    generator = torch.Generator().manual_seed(seed)
    noise = (torch.randn(1, paths, 1, n, generator=generator) for n in (1, 2))
    made = complete(params, x, *noise)
    torch.testing.assert_close(made.x_mean[0, 0], torch.tensor([2.0, 1.6]))
    drawn = made.x[0, :, 0, 1]
    assert abs(float(drawn.mean()) - 1.6) <= 6 * 0.6 / math.sqrt(paths)
    assert abs(float(drawn.var()) - 0.36) <= 6 * 0.36 * math.sqrt(2 / paths)


def test_refusals():
    params, (x, control) = parameters(), data()
    varying = params._replace(A=params.A.expand(T, 1, Z, Z))
    with pytest.raises(ValueError, match=r"params\.A should be the same for all steps and sequences"):
        log_likelihood(varying, x, None, control)
    bad = params._replace(R=-10 * torch.eye(X))
    with pytest.raises(ValueError, match=r"not positive definite at t=0, sequence 0"):
        log_likelihood(bad, x, None, control)
    with pytest.raises(ValueError, match=r"noise_x should have shape \(T, K, B, x_dim\)"):
        complete(params, x, torch.randn(T, 2, B, Z), torch.randn(T, 2, B, Z), None, control)
    with pytest.raises(ValueError, match="as many paths K; got 2 and 3"):
        complete(params, x, torch.randn(T, 2, B, Z), torch.randn(T, 3, B, X), None, control)


# --- in the model -------------------------------------------------------------------------------------


def walks(batch, steps, seed, noise=0.3, memory=0.95):
    """Two levels that move together, a third of its own, seen through noise."""
    generator = torch.Generator().manual_seed(seed)
    shocks = torch.randn(batch, steps, 3, generator=generator) * math.sqrt(1 - memory**2)
    shocks[..., 1] = 0.9 * shocks[..., 0] + math.sqrt(1 - 0.81) * shocks[..., 1]
    z = [torch.randn(batch, 3, generator=generator)]
    for t in range(1, steps):
        z.append(memory * z[-1] + shocks[:, t])
    return torch.stack(z, 1) + noise * torch.randn(batch, steps, 3, generator=generator) + 5


def test_local_level_recovers_memory_noise_and_correlation():
    x = walks(40, 200, 0)
    observed = torch.rand(x.shape) > 0.3
    model = local_level(list(zip(x, observed, strict=True)))
    assert abs(float(model.A[0, 0]) - 0.95) < 0.02
    torch.testing.assert_close(model.d, torch.full((3,), 5.0), atol=0.2, rtol=0)
    assert (model.R.diagonal() - 0.09).abs().max() < 0.05
    correlation = model.P0 / torch.outer(model.P0.diagonal().sqrt(), model.P0.diagonal().sqrt())
    assert (
        0.35 < correlation[0, 1] < 0.5 and abs(correlation[0, 2]) < 0.1
    )  # 0.9 seen through noise, shrunk by half


def test_fit_starts_from_local_levels_and_the_exact_objective_improves_on_it():
    x = walks(60, 40, 1).float()
    x[torch.rand(x.shape) < 0.3] = math.nan
    train, valid = x[:40], x[40:]
    torch.set_default_dtype(torch.float32)
    random, level = LGSSM(x_dim=3, z_dim=3), LGSSM(x_dim=3, z_dim=3, start="local_level")
    assert level.calibrate([(x[0].nan_to_num(), ~x[0].isnan())]) and not random.calibrate([])
    untrained = dynavae.score(random, valid, bound="exact").nats_per_frame
    for model in (random, level):
        result = dynavae.fit(model, train, valid, epochs=4, lr=0.01, objective="exact", progress=False)
    begun = result.history[0]["valid/nats_per_frame"]
    found = dynavae.score(level, valid, bound="exact").nats_per_frame
    assert found <= begun < untrained
    assert result.history[0]["train/kl_per_frame"] == 0
    torch.testing.assert_close(found, result.best["valid/nats_per_frame"], rtol=1e-5, atol=1e-5)
    assert found < dynavae.score(random, valid, bound="exact").nats_per_frame


@pytest.mark.parametrize(("cls", "options"), [(LGSSM, {"z_dim": 2}), (HMM, {"states": 3})])
def test_the_exact_objective_is_the_elbo_of_an_exact_model(cls, options):
    model, batch = cls(x_dim=3, **options), Sequences.from_arrays(walks(5, 6, 2), [6, 1, 4, 6, 3])
    exact, sampled = (next(Loss(model, objective=name).parts(batch)) for name in ("exact", "elbo"))
    torch.testing.assert_close(exact.loss, sampled.loss, rtol=1e-9, atol=1e-9)
    for name in ("loss", "nats"):
        assert abs(exact.sums[name] - sampled.sums[name]) < 1e-8
    assert all(g.isfinite().all() for g in torch.autograd.grad(exact.loss, list(model.parameters())))


def test_refusals_of_the_exact_objective():
    model = LGSSM(x_dim=3, z_dim=2)
    with pytest.raises(ValueError, match="objective='exact' is log p"):
        Loss(model, objective="exact", beta=0.5)
    with pytest.raises(ValueError, match="VAE has no exact likelihood"):
        Loss(dynavae.VAE(x_dim=2, z_dim=1), objective="exact")


def test_impute_and_forecast_give_the_exact_mean():
    model = LGSSM(x_dim=3, z_dim=2)
    x = walks(4, 9, 3)
    x[1, 3:6] = math.nan
    x[2, 4, 1] = math.nan
    batch = Sequences.from_arrays(x)
    mean, _ = model.exact_smooth(batch)
    filled = dynavae.impute(model, x, samples=5)
    expected = mean[1, 3:6] @ model.C.T + model.d
    torch.testing.assert_close(filled.x[1, 3:6], expected, rtol=1e-8, atol=1e-8)
    future = dynavae.forecast(model, x, horizon=3, samples=4)
    step = mean[:, -1] @ model.A.T + model.b
    torch.testing.assert_close(future.mean[:, 0], step @ model.C.T + model.d, rtol=1e-8, atol=1e-8)
    assert not filled.samples.isnan().any()


def test_start_refusals():
    with pytest.raises(ValueError, match="start should be 'random', 'data' or 'local_level'; got 'zero'"):
        LGSSM(x_dim=2, z_dim=2, start="zero")
    with pytest.raises(ValueError, match="z_dim should be x_dim = 3; got 2"):
        LGSSM(x_dim=3, z_dim=2, start="local_level")
