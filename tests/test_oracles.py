"""Every estimator against a model whose likelihood is known: Kalman and HMM, in float64, with computed error bars."""

from __future__ import annotations

import math

import pytest
import torch

import dynavae
from dynavae import LGSSM, Resampling, Sequences
from dynavae import objectives as O
from dynavae.models import HMM
from dynavae.noise import draw
from dynavae.proposals import Bootstrap, amortized
from dynavae.scan import scan

NAN = float("nan")


class DataOnly:
    """q(z_t | z_{t-1}, x_t): the locally optimal proposal, which sees one frame and not the future."""

    needs_prior = True

    def __call__(self, model, past, e, informed):
        from dynavae.distributions import MultivariateNormal
        from dynavae.exact import kalman

        R_inv = torch.linalg.inv(model.parameters_in_moments.R)
        C = model.C
        x = self.x[self.t]
        self.t += 1
        J = (C.mT @ R_inv @ C).expand(x.shape[0], -1, -1)
        h = (x - model.d) @ (R_inv @ C)
        prior = past.prior
        message = kalman.Information(J, h, torch.zeros(x.shape[0], dtype=x.dtype))
        fused = kalman.condition(prior.loc, prior.scale_tril @ prior.scale_tril.mT, message)
        return MultivariateNormal(fused.mean, torch.linalg.cholesky(fused.covariance))

    def __init__(self, x):
        self.x, self.t = x.transpose(0, 1), 0


@pytest.fixture
def lgssm():
    torch.manual_seed(3)
    return LGSSM(x_dim=3, z_dim=2).double()


def ragged(control_dim=0):
    generator = torch.Generator().manual_seed(5)
    xs = [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (7, 4, 1)]
    xs[0][2:4] = NAN
    xs[1][0, 1] = NAN
    xs[1][3] = NAN
    control = [torch.randn(n, control_dim, generator=generator, dtype=torch.float64) for n in (7, 4, 1)]
    return Sequences.from_arrays(xs, control=control if control_dim else None)


@pytest.mark.parametrize("control_dim", [0, 2])
@pytest.mark.parametrize("noise", ["full", "diagonal"])
def test_elbo_under_the_exact_posterior_is_the_kalman_likelihood(control_dim, noise):
    torch.manual_seed(1)
    model = LGSSM(x_dim=3, z_dim=2, control_dim=control_dim, noise=noise).double()
    batch = ragged(control_dim)
    exact = model.exact_log_likelihood(batch)
    for particles in (1, 4):
        run = scan(model, batch, particles=particles)
        assert (O.elbo(run, kl="sample") - exact).abs().max() < 1e-9
        assert (O.iwae(run) - exact).abs().max() < 1e-9
        assert O.log_weights(run).std(0, correction=0).max() < 1e-9


def test_elbo_under_the_exact_posterior_is_the_hmm_likelihood():
    torch.manual_seed(1)
    for emission in ("gaussian", "laplace", "student_t"):
        model = HMM(x_dim=3, states=3, emission=emission).double()
        batch = ragged()
        exact = model.exact_log_likelihood(batch)
        assert (O.elbo(scan(model, batch, particles=3), kl="sample") - exact).abs().max() < 1e-9


@pytest.mark.parametrize("build", [lambda: LGSSM(x_dim=3, z_dim=2), lambda: HMM(x_dim=3, states=3)])
def test_gradient_of_the_sampled_elbo_is_that_of_the_exact_likelihood(build):
    """True for a discrete latent as well: the weight does not depend on which path was drawn."""
    torch.manual_seed(2)
    model, batch = build().double(), ragged()
    exact = torch.autograd.grad(model.exact_log_likelihood(batch).sum(), list(model.parameters()))
    bound = torch.autograd.grad(O.elbo(scan(model, batch), kl="sample").sum(), list(model.parameters()))
    for a, b in zip(exact, bound, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_lgssm_against_statsmodels_with_missing_data(lgssm):
    from statsmodels.tsa.statespace.mlemodel import MLEModel

    batch = ragged()
    p = lgssm.parameters_in_moments
    for row in range(2):
        x = batch.arrays()[row]
        reference = MLEModel(
            x,
            k_states=2,
            initialization="known",
            initial_state=p.m0.detach().numpy(),
            initial_state_cov=p.P0.detach().numpy(),
        )
        ssm = reference.ssm
        ssm["design"], ssm["obs_cov"] = p.C.detach().numpy(), p.R.detach().numpy()
        ssm["transition"], ssm["state_cov"] = p.A.detach().numpy(), p.Q.detach().numpy()
        ssm["selection"] = torch.eye(2, dtype=torch.float64).numpy()
        result = ssm.smooth()
        assert abs(lgssm.exact_log_likelihood(batch[row]).item() - result.llf) < 1e-8
        mean, stddev = lgssm.exact_smooth(batch[row])
        torch.testing.assert_close(
            mean[0], torch.as_tensor(result.smoothed_state.T.copy()), rtol=0, atol=1e-8
        )
        variance = torch.as_tensor(result.smoothed_state_cov.diagonal().copy())
        torch.testing.assert_close(stddev[0] ** 2, variance, rtol=0, atol=1e-8)


def unbiased(estimates, exact):
    """E[exp(estimate - exact)] = 1 within six standard errors, whose size is itself bounded."""
    ratio = (estimates - exact).detach().exp()
    error = float(ratio.std()) / math.sqrt(len(ratio))
    assert error < 0.05, f"the error bar {error:.3f} is too wide to say anything"
    assert abs(float(ratio.mean()) - 1) < 6 * error, f"{ratio.mean():.4f} +- {error:.4f}"


@pytest.mark.parametrize("scheme", ["multinomial", "stratified", "systematic"])
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_fivo_is_unbiased(lgssm, scheme, threshold):
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(1, 6, 3, generator=generator, dtype=torch.float64)
    exact = lgssm.exact_log_likelihood(Sequences.from_arrays(x))
    runs = Sequences.from_arrays(x.expand(3000, -1, -1))
    for propose in (DataOnly(runs.x), Bootstrap()):
        with torch.no_grad():
            run = scan(
                lgssm,
                runs,
                particles=24,
                propose=propose,
                generator=generator,
                resample=Resampling(scheme, threshold),
            )
        if isinstance(propose, Bootstrap):
            assert run.log_evidence.mean() < exact + 6 * run.log_evidence.std() / 3000**0.5
        else:
            unbiased(run.log_evidence, exact)


def test_iwae_is_unbiased_and_bounds_are_ordered(lgssm):
    generator = torch.Generator().manual_seed(13)
    x = torch.randn(1, 5, 3, generator=generator, dtype=torch.float64)
    exact = lgssm.exact_log_likelihood(Sequences.from_arrays(x))
    runs = Sequences.from_arrays(x.expand(3000, -1, -1))
    values = {}
    with torch.no_grad():
        for k in (1, 8, 64):
            run = scan(lgssm, runs, particles=k, propose=DataOnly(runs.x), generator=generator)
            values[k] = O.iwae(run)
    unbiased(values[64], exact)
    for low, high in ((1, 8), (8, 64)):
        gap = values[high].mean() - values[low].mean()
        error = (values[high].var() / 3000 + values[low].var() / 3000).sqrt()
        assert gap > -6 * error
    assert values[64].mean() < exact + 6 * values[64].std() / 3000**0.5


def test_particle_filter_means_converge_to_the_kalman_filter(lgssm):
    batch = Sequences.from_arrays(
        dynavae.generate(lgssm, 1, 6, seed=1).x
    )  # typical data: few particles suffice
    exact = dynavae.filter(lgssm, batch)
    assert exact.exact
    runs = Sequences.from_arrays(batch.x.expand(64, -1, -1))
    found = dynavae.filter(lgssm, runs, particles=400, propose=Bootstrap(), seed=3).mean
    error = found.std(0) / 64**0.5
    # self-normalised weights are biased by O(1/K): allow that beside the error bar
    assert ((found.mean(0) - exact.mean[0]).abs() < 6 * error + 5 / 400).all()


def test_samples_of_the_posterior_have_the_smoother_moments(lgssm):
    batch = ragged()
    mean, stddev = lgssm.exact_smooth(batch)
    with torch.no_grad():
        z = scan(lgssm, batch, particles=20000, generator=torch.Generator().manual_seed(0)).z
    for b, n in enumerate(batch.lengths.tolist()):
        sample = z[:n, :, b]
        error = stddev[b, :n] / 20000**0.5
        assert ((sample.mean(1) - mean[b, :n]).abs() < 6 * error).all()
        assert ((sample.std(1) / stddev[b, :n] - 1).abs() < 6 / math.sqrt(2 * 20000)).all()


def test_forecast_has_the_moments_of_the_kalman_prediction(lgssm):
    from dynavae.exact import kalman

    batch = Sequences.from_arrays(
        torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    )
    f = dynavae.forecast(lgssm, batch, horizon=4, samples=20000)
    p = lgssm.parameters_in_moments
    filtered = kalman.kalman_filter(p, batch.x.transpose(0, 1), batch.observed.transpose(0, 1))
    ahead = kalman.kalman_predict(p, filtered.mean[-1], filtered.covariance[-1], 4)
    expected = kalman.predictive_observation(p, ahead.mean, ahead.covariance)
    stddev = expected.covariance.diagonal(dim1=-2, dim2=-1).sqrt()[:, 0]
    error = stddev / 20000**0.5
    assert ((f.samples[:, 0].mean(0) - expected.mean[:, 0]).abs() < 6 * error).all()
    assert ((f.samples[:, 0].std(0) / stddev - 1).abs() < 6 / math.sqrt(2 * 20000)).all()
    assert ((f.mean[0] - expected.mean[:, 0]).abs() < 6 * error).all()


def test_imputation_has_the_moments_of_the_exact_conditional(lgssm):
    """Against the dense joint Gaussian of all x."""
    x = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x[0, 2] = NAN
    x[0, 3, 1] = NAN
    filled = dynavae.impute(lgssm, x, samples=20000)
    p = lgssm.parameters_in_moments
    mean, cov = _dense_joint(p, 5)
    hidden = x.flatten().isnan()
    A, B = cov[hidden][:, ~hidden], cov[~hidden][:, ~hidden]
    gain = torch.linalg.solve(B, A.mT).mT
    want = mean[hidden] + gain @ (x.flatten()[~hidden] - mean[~hidden])
    spread = (cov[hidden][:, hidden] - gain @ A.mT).diagonal().sqrt()
    draws = filled.samples[:, 0].flatten(1)[:, hidden]
    # a coordinate missing from a half-seen frame is drawn given z, whose law is exact: R is full, so the observed
    # coordinates of that frame inform it beyond z; only wholly missing frames are compared
    whole = torch.tensor([True, True, True, False])
    error = spread / 20000**0.5
    assert ((draws.mean(0) - want).abs() < 6 * error)[whole].all()
    assert ((draws.std(0) / spread - 1).abs() < 6 / math.sqrt(2 * 20000))[whole].all()


def _dense_joint(p, steps):
    """Mean and covariance of x_1:T by unrolling the recursions."""
    z = p.m0.shape[0]
    mean, blocks = [p.m0], {(0, 0): p.P0}
    for t in range(1, steps):
        mean.append(p.A @ mean[-1] + p.b)
        blocks[t, t] = p.A @ blocks[t - 1, t - 1] @ p.A.mT + p.Q
        for s in range(t):
            blocks[t, s] = p.A @ blocks[t - 1, s]
            blocks[s, t] = blocks[t, s].mT
    cov_z = torch.cat([torch.cat([blocks[t, s] for s in range(steps)], 1) for t in range(steps)])
    C = torch.block_diag(*[p.C] * steps)
    R = torch.block_diag(*[p.R] * steps)
    assert cov_z.shape == (steps * z, steps * z)
    mean_x = torch.cat([p.C @ m + p.d for m in mean])
    return mean_x.detach(), (C @ cov_z @ C.mT + R).detach()


def test_a_bound_never_exceeds_the_likelihood_under_a_wrong_posterior(lgssm):
    """ELBO with the prior as q, against Kalman: lower by far more than the error bar."""
    batch = ragged()
    exact = lgssm.exact_log_likelihood(batch)
    with torch.no_grad():
        run = scan(
            lgssm, batch, particles=2000, propose=Bootstrap(), generator=torch.Generator().manual_seed(0)
        )
    elbo, iwae = O.elbo(run, kl="sample"), O.iwae(run)
    assert (elbo < exact).all()
    assert (elbo < iwae).all()


def test_resampling_needs_noise_and_gives_it(lgssm):
    batch = ragged()
    noise = draw(lgssm, 7, 4, 3, resample=True, generator=torch.Generator().manual_seed(0))
    a = scan(lgssm, batch, particles=4, propose=amortized, resample=Resampling(), noise=noise)
    b = scan(lgssm, batch, particles=4, propose=amortized, resample=Resampling(), noise=noise)
    assert torch.equal(a.log_evidence, b.log_evidence)
