"""Extended and unscented filters and smoothers: the Kalman filter on linear functions, and filterpy on others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_forms import constant
from test_kalman import random_problem

from dynavae.exact import kalman
from dynavae.exact.nonlinear import NonlinearGaussian, SigmaPoints, nonlinear_filter, nonlinear_smoother

pytestmark = pytest.mark.usefixtures("float64")
close = torch.testing.assert_close
METHODS = ["extended", "unscented", SigmaPoints(0.5, 2.0, 0.5)]


def pendulum(R: float = 0.1) -> NonlinearGaussian:
    def swing(z, u=None):
        angle, speed = z[..., 0], z[..., 1]
        push = 0.0 if u is None else u[..., 0]
        return torch.stack([angle + 0.05 * speed, speed - 0.05 * 9.8 * torch.sin(angle) + push], -1)

    def look(z, u=None):
        return torch.stack([torch.sin(z[..., 0]), z[..., 0] * z[..., 1]], -1)

    Q = 0.01 * torch.tensor([[0.05**3 / 3, 0.05**2 / 2], [0.05**2 / 2, 0.05]])
    return NonlinearGaussian(torch.tensor([1.5, 0.0]), 0.1 * torch.eye(2), swing, Q, look, R * torch.eye(2))


def observations(T: int = 40, B: int = 2) -> torch.Tensor:
    return torch.randn(T, B, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", METHODS)
def test_linear_functions_give_the_kalman_filter_and_smoother(method):
    """With missing coordinates, lengths, controls, and offsets."""
    params, x, observed, control = constant(random_problem(1))
    model = NonlinearGaussian(
        params.m0, params.P0, lambda z, u: z @ params.A.mT + u @ params.B.mT + params.b, params.Q,
        lambda z, u: z @ params.C.mT + u @ params.D.mT + params.d, params.R,
    )  # fmt: skip
    result = nonlinear_filter(model, x, observed, control, method)
    expected = kalman.kalman_filter(params, x, observed, control, method="joseph")
    for ours, theirs in zip(result.filtered[:5], expected[:5], strict=True):
        close(ours, theirs, rtol=1e-9, atol=1e-9)
    smoothed = kalman.kalman_smoother(params, expected, method="joseph")
    for ours, theirs in zip(nonlinear_smoother(result)[:4], smoothed[:4], strict=True):
        close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_the_linear_model_that_comes_along_has_the_same_filter(method):
    x = observations()
    x[3], x[5, 0, 1], x[7:, 1] = math.nan, math.nan, math.nan
    result = nonlinear_filter(pendulum(), x, method=method)
    again = kalman.kalman_filter(result.params, x, method="joseph")
    for ours, theirs in zip(result.filtered[:5], again[:5], strict=True):
        close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert kalman.sample_posterior(result.params, result.filtered, torch.randn(40, 3, 2, 2)).isfinite().all()


@pytest.mark.parametrize("spread", [(1.0, 0.0, 1.0), (0.5, 2.0, 0.5)])
def test_unscented_is_filterpys(spread):
    filterpy = pytest.importorskip("filterpy.kalman")
    model, x = pendulum(), observations(B=1)
    alpha, beta, kappa = spread

    def plain(g):
        return lambda z, *_: g(torch.from_numpy(z)).numpy()

    points = filterpy.MerweScaledSigmaPoints(2, alpha, beta, kappa)
    theirs = filterpy.UnscentedKalmanFilter(2, 2, 0.05, plain(model.h), plain(model.f), points)
    theirs.x, theirs.P = model.m0.numpy().copy(), model.P0.numpy().copy()
    theirs.Q, theirs.R = model.Q.numpy(), model.R.numpy()
    means, covariances = [], []
    for t in range(len(x)):
        if t:
            theirs.predict()
            # It updates with the points that the transition moved; ours are drawn anew from the prediction, with Q.
        theirs.sigmas_f = points.sigma_points(theirs.x, theirs.P)
        theirs.update(x[t, 0].numpy())
        means.append(theirs.x.copy())
        covariances.append(theirs.P.copy())
    result = nonlinear_filter(model, x, method=SigmaPoints(*spread))
    close(result.filtered.mean[:, 0], torch.from_numpy(np.stack(means)), rtol=1e-9, atol=1e-9)
    close(result.filtered.covariance[:, 0], torch.from_numpy(np.stack(covariances)), rtol=1e-9, atol=1e-9)
    smooth_means, smooth_covariances, _ = theirs.rts_smoother(np.stack(means), np.stack(covariances))
    smoothed = nonlinear_smoother(result)
    close(smoothed.mean[:, 0], torch.from_numpy(smooth_means), rtol=1e-8, atol=1e-8)
    close(smoothed.covariance[:, 0], torch.from_numpy(smooth_covariances), rtol=1e-8, atol=1e-8)


def test_extended_is_filterpys():
    filterpy = pytest.importorskip("filterpy.kalman")
    model, x = pendulum(), observations(B=1)
    theirs = filterpy.ExtendedKalmanFilter(2, 2)
    theirs.x, theirs.P = model.m0.numpy().copy(), model.P0.numpy().copy()
    theirs.R = model.R.numpy()
    means = []
    for t in range(len(x)):
        if t:
            F = torch.func.jacrev(model.f)(torch.from_numpy(theirs.x)).numpy()
            theirs.x = model.f(torch.from_numpy(theirs.x)).numpy()
            theirs.P = F @ theirs.P @ F.T + model.Q.numpy()
        theirs.update(
            x[t, 0].numpy(), lambda z: torch.func.jacrev(model.h)(torch.from_numpy(z)).numpy(),
            lambda z: model.h(torch.from_numpy(z)).numpy(),
        )  # fmt: skip
        means.append(theirs.x.copy())
    result = nonlinear_filter(model, x, method="extended")
    close(result.filtered.mean[:, 0], torch.from_numpy(np.stack(means)), rtol=1e-9, atol=1e-9)
    close(result.filtered.covariance[-1, 0], torch.from_numpy(theirs.P), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS[:2])
def test_what_is_not_observed_enters_nothing_and_gradients_are_right(method):
    x = observations(T=4)
    observed = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(1)) < 0.6
    control = torch.randn(4, 2, 1, generator=torch.Generator().manual_seed(2))
    expected = nonlinear_filter(pendulum(), x, observed, control, method).filtered
    for junk in (math.nan, math.inf, 1e30):
        spoiled = x.masked_fill(~observed, junk).requires_grad_()
        got = nonlinear_filter(pendulum(), spoiled, observed, control, method)
        assert torch.equal(got.filtered.mean, expected.mean)
        (got.filtered.log_likelihood.sum() + nonlinear_smoother(got).mean.sum()).backward()
        assert spoiled.grad.isfinite().all() and (spoiled.grad[~observed] == 0).all()

    def moments(m0, x, control):
        got = nonlinear_filter(pendulum()._replace(m0=m0), x, observed, control, method)
        return got.filtered.mean, got.filtered.log_likelihood, nonlinear_smoother(got).covariance

    inputs = [v.clone().requires_grad_() for v in (pendulum().m0, x, control)]
    assert torch.autograd.gradcheck(moments, inputs)


def test_the_unscented_filter_tracks_a_pendulum_better_than_its_observations():
    """Simulated from the model: the truth lies within the filter's own spread, as often as it says."""
    model = pendulum(R=0.05)
    g = torch.Generator().manual_seed(3)
    z = model.m0 + torch.randn(200, 2, generator=g) @ torch.linalg.cholesky(model.P0).mT
    L, states = torch.linalg.cholesky(model.Q), [z]
    for _ in range(60):
        states.append(model.f(states[-1]) + torch.randn(200, 2, generator=g) @ L.mT)
    z = torch.stack(states)
    x = model.h(z) + 0.05**0.5 * torch.randn(z.shape, generator=g)
    for method in ("unscented", "extended"):
        result = nonlinear_filter(model, x, method=method)
        smoothed = nonlinear_smoother(result)
        for mean, covariance in ((result.filtered.mean, result.filtered.covariance), smoothed[:2]):
            error = (z - mean).unsqueeze(-1)
            distance = (error * torch.linalg.solve(covariance, error)).sum((-1, -2)).mean()
            assert 1.6 < float(distance) < 2.6  # 2 if the Gaussian were exact
        assert (smoothed.mean - z).square().mean() < (result.filtered.mean - z).square().mean()


def test_refusals():
    model, x = pendulum(), observations()
    with pytest.raises(TypeError, match="model should be a NonlinearGaussian; got dict"):
        nonlinear_filter({}, x)
    with pytest.raises(ValueError, match="method should be 'extended', 'unscented' or SigmaPoints"):
        nonlinear_filter(model, x, method="cubature")
    with pytest.raises(ValueError, match=r"x should have shape \(T, B, x_dim\)"):
        nonlinear_filter(model, x[0])
    with pytest.raises(ValueError, match=r"model.Q is torch.float32"):
        nonlinear_filter(model._replace(Q=model.Q.float()), x)
    with pytest.raises(ValueError, match=r"observed should be bool"):
        nonlinear_filter(model, x, torch.ones_like(x))
    with pytest.raises(ValueError, match=r"x is inf at t=0, sequence 0, coordinate 0"):
        nonlinear_filter(model, x / 0.0 * torch.sign(x))
    with pytest.raises(ValueError, match=r"control should be finite, of shape"):
        nonlinear_filter(model, x, control=torch.zeros(3, 2, 1))
    with pytest.raises(TypeError, match="result of nonlinear_filter; got Tensor"):
        nonlinear_smoother(x)


@pytest.mark.parametrize("method", ["extended", "unscented"])
def test_the_proposal_is_the_optimal_one_of_a_linear_model(method):
    """At the first frame all weights are log p(x_1); particle filters are unbiased, with less spread than with the prior."""
    from dynavae import LGSSM, Resampling, Sequences, bootstrap, scan
    from dynavae.linearised import LinearisedProposal
    from dynavae.objectives import elbo, fivo

    torch.manual_seed(0)
    model = LGSSM(x_dim=2, z_dim=2, noise="diagonal").double()
    x = torch.randn(3, 12, 2)
    x[0, 4, 0], x[1, 0, 1], x[2, 8:] = math.nan, math.nan, math.nan
    first = Sequences.from_arrays(x[:, :1])
    run = scan(model, first, particles=3, propose=LinearisedProposal(method))
    close(elbo(run, kl="sample"), model.exact_log_likelihood(first), rtol=1e-9, atol=1e-9)
    batch = Sequences.from_arrays(x)
    exact, estimates = model.exact_log_likelihood(batch), {}
    for name, propose in (("linearised", LinearisedProposal(method)), ("bootstrap", bootstrap)):
        runs = [
            fivo(scan(model, batch, particles=100, propose=propose, resample=Resampling())) for _ in range(40)
        ]
        estimates[name] = torch.stack(runs).detach()
    error = (estimates["linearised"] - exact).exp()
    assert ((error.mean(0) - 1).abs() < 6 * error.std(0) / 40**0.5).all()
    assert estimates["linearised"].std(0).mean() < 0.8 * estimates["bootstrap"].std(0).mean()


def test_the_proposal_needs_gaussians():
    from dynavae import VRNN, Sequences, scan
    from dynavae.linearised import LinearisedProposal

    with pytest.raises(ValueError, match="method should be 'extended', 'unscented' or SigmaPoints"):
        LinearisedProposal("tangent")
    model = VRNN(x_dim=2, z_dim=2, h_dim=4, emission="bernoulli").double()
    with pytest.raises(TypeError, match="needs a Gaussian likelihood; got Bernoulli"):
        scan(model, Sequences.from_arrays(torch.zeros(1, 3, 2)), propose=LinearisedProposal())
