"""Bounds on models small enough to know the answer, with error bars that are computed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynavae import VAE, Resampling, Sequences, bootstrap, objectives, scan
from dynavae.distributions import Laplace, Normal, standard_normal
from dynavae.model import Evidence, Past, Present, SequentialLVM
from dynavae.testing import LAWS, sequences, small

pytestmark = pytest.mark.usefixtures("float64")

RENYI_AT_1_3 = {-1.0: -1.475258272, 0.0: -1.688012123, 0.5: -1.887736975}


class Chain1D(SequentialLVM):
    """z_t = a z_{t-1} + N(0, 1), x_t = z_t + N(0, 1); q = p(z_t | z_{t-1}, x_t), the optimal filtering proposal."""

    causal = True

    def __init__(self, x_dim: int = 1, a: float = 0.9, optimal: bool = True) -> None:
        super().__init__(x_dim, x_dim)
        self.a = nn.Parameter(torch.tensor(a), requires_grad=False)
        self.optimal = optimal

    def evidence(self, seen: Evidence) -> Tensor:
        return seen.frame.x

    def initial(self, lead: tuple[int, ...]) -> Tensor:
        return self.zeros(lead, self.z_dim)

    def absorb(self, past: Past, z: Tensor) -> Tensor:
        return z

    def prior(self, past: Past) -> Normal:
        return Normal(self.a * past.h, torch.ones_like(past.h))

    def likelihood(self, present: Present) -> Normal:
        return Normal(present.h, torch.ones_like(present.h))

    def posterior(self, past: Past, e: Tensor) -> Normal:
        p = self.prior(past)
        if not self.optimal:
            return p
        return Normal((p.loc + e) / 2, torch.full_like(p.loc, math.sqrt(0.5)))


def renyi_exact(alpha: float, x: float) -> float:
    """Of z ~ N(0, 1), x | z ~ N(z, 1), q = prior."""
    constant = -0.5 * math.log(2 * math.pi)
    if alpha == 1:
        return constant - 0.5 - x**2 / 2
    return constant - math.log(2 - alpha) / (2 * (1 - alpha)) - x**2 / (2 * (2 - alpha))


def conjugate_paths(x: float, particles: int, seed: int, batch: int = 1) -> Any:
    data = Sequences.from_arrays(torch.full((batch, 1, 1), x))
    generator = torch.Generator().manual_seed(seed)
    return scan(Chain1D(a=0.0, optimal=False), data, particles=particles, generator=generator)


@pytest.mark.parametrize(("alpha", "value"), RENYI_AT_1_3.items())
def test_the_closed_form_has_the_known_values(alpha, value):
    assert renyi_exact(alpha, 1.3) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("x", [1.3, -0.4])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.5, 0.9])
def test_renyi_against_the_closed_form(alpha, x, seed):
    particles = 400_000
    paths = conjugate_paths(x, particles, seed)
    power = ((1 - alpha) * objectives.log_weights(paths)[:, 0]).exp()
    error = float(power.std() / power.mean()) / math.sqrt(particles) / (1 - alpha)  # delta method
    assert error < 0.01
    assert abs(float(objectives.renyi(paths, alpha)) - renyi_exact(alpha, x)) <= 6 * error
    if alpha == 0:
        assert float(objectives.iwae(paths)) == pytest.approx(float(objectives.renyi(paths, 0.0)), abs=1e-12)


@pytest.mark.parametrize("x", [1.3, -0.4])
def test_elbo_against_the_closed_form(x, seed):
    paths = conjugate_paths(x, 400_000, seed)
    values = paths.log_likelihood.sum(0)[:, 0]
    error = float(values.std()) / math.sqrt(len(values))
    for kl in ("analytic", "sample"):  # q is the prior: both divergences are zero
        assert abs(float(objectives.elbo(paths, kl=kl)) - renyi_exact(1.0, x)) <= 6 * error


def test_iwae_rises_in_k_towards_the_likelihood(seed):
    means, errors = [], []
    for K in (1, 4, 16, 64):
        values = objectives.iwae(conjugate_paths(1.3, K, seed + K, batch=4000))
        means.append(float(values.mean()))
        errors.append(float(values.std()) / math.sqrt(len(values)))
    exact = renyi_exact(0.0, 1.3)
    for i in range(3):
        assert means[i] < means[i + 1] + 6 * math.hypot(errors[i], errors[i + 1])
    assert means[0] < means[-1] <= exact + 6 * errors[-1]
    assert exact - means[-1] < 0.05


# --- linear Gaussian, T = 50 ------------------------------------------------------------------------


def data_50() -> np.ndarray:
    """The legacy NumPy generator, seed 0; at each t the state noise, then the observation noise."""
    random, z, x = np.random.RandomState(0), 0.0, []
    for _ in range(50):
        z = 0.9 * z + random.randn()
        x.append(z + random.randn())
    return np.array(x)


def exact_log_likelihood(x: np.ndarray) -> float:
    """A scalar Kalman filter."""
    mean, variance, total = 0.0, 1.0, 0.0
    for value in x:
        s = variance + 1
        total -= 0.5 * (math.log(2 * math.pi * s) + (value - mean) ** 2 / s)
        gain = variance / s
        mean, variance = mean + gain * (value - mean), (1 - gain) * variance
        mean, variance = 0.9 * mean, 0.81 * variance + 1
    return total


def bounds_50(
    particles: int, runs: int, seed: int, steps: int = 50, resample: bool = True, **options: Any
) -> Tensor:
    x = torch.as_tensor(data_50()[:steps]).reshape(1, -1, 1).expand(runs, -1, -1)
    scheme = Resampling("multinomial", threshold=0.5) if resample else None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        paths = scan(
            Chain1D(),
            Sequences.from_arrays(x),
            particles=particles,
            resample=scheme,
            generator=generator,
            **options,
        )
        return objectives.fivo(paths) if resample else objectives.iwae(paths)


def test_the_data_and_their_likelihood_are_the_known_ones():
    x = data_50()
    np.testing.assert_allclose(x[:5], [2.16421, 4.807278, 3.200027, 4.558305, 4.546076], atol=1e-6)
    assert x.sum() == pytest.approx(14.811407, abs=1e-6)
    assert exact_log_likelihood(x) == pytest.approx(-95.55, abs=0.005)


KNOWN = {  # mean bounds of an independent implementation over 2000 runs (400 for N = 128), one decimal
    ("prior", 4, False): -332.7,
    ("prior", 4, True): -130.8,
    ("prior", 16, True): -100.7,
    ("prior", 128, True): -96.1,
    ("optimal", 1, True): -104.3,
    ("optimal", 4, False): -100.5,
    ("optimal", 4, True): -98.4,
    ("optimal", 16, False): -98.5,
    ("optimal", 16, True): -96.3,
    ("optimal", 128, True): -95.7,
}


@pytest.mark.parametrize(("setting", "known"), KNOWN.items(), ids=str)
def test_filter_bounds_against_known_means(setting, known, seed):
    proposal, N, resample = setting
    runs, theirs = 400, 400 if N == 128 else 2000
    values = bounds_50(
        N, runs, seed + 1, resample=resample, **({"propose": bootstrap} if proposal == "prior" else {})
    )
    spread = float(values.std())
    error = spread * math.sqrt(1 / runs + 1 / theirs)
    assert abs(float(values.mean()) - known) <= 6 * error + 0.05  # the table has one decimal


@pytest.mark.parametrize("proposal", ["prior", "optimal"])
def test_filter_bounds_are_ordered(proposal, seed):
    options = {"propose": bootstrap} if proposal == "prior" else {}
    exact = exact_log_likelihood(data_50())
    last = None
    for N in (4, 16, 128):
        fivo = bounds_50(N, 200, seed + N, **options)
        iwae = bounds_50(N, 200, seed + N + 1, resample=False, **options)
        error = math.sqrt((float(fivo.var()) + float(iwae.var())) / 200)
        assert float(iwae.mean()) < float(fivo.mean()) + 6 * error
        assert float(fivo.mean()) <= exact + 6 * float(fivo.std()) / math.sqrt(200)
        if last is not None:
            assert float(last.mean()) < float(fivo.mean()) + 6 * math.sqrt(
                float(last.var() + fivo.var()) / 200
            )
        last = fivo


@pytest.mark.parametrize("proposal", ["prior", "optimal"])
@pytest.mark.parametrize("scheme", ["multinomial", "stratified", "systematic"])
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_the_estimate_of_the_likelihood_is_unbiased(proposal, scheme, threshold, seed):
    steps, runs = 5, 20_000
    x = torch.as_tensor(data_50()[:steps]).reshape(1, -1, 1).expand(runs, -1, -1)
    propose = {"propose": bootstrap} if proposal == "prior" else {}
    generator = torch.Generator().manual_seed(seed + 7)
    with torch.no_grad():
        paths = scan(
            Chain1D(),
            Sequences.from_arrays(x),
            particles=16,
            generator=generator,
            resample=Resampling(scheme, threshold),
            **propose,
        )
    ratio = (objectives.fivo(paths) - exact_log_likelihood(data_50()[:steps])).exp()
    error = float(ratio.std()) / math.sqrt(runs)
    assert error < 0.05
    assert abs(float(ratio.mean()) - 1) <= 6 * error


@pytest.mark.parametrize(
    "law", [law for name, law in LAWS.items() if name not in ("gradients", "generation")]
)
def test_the_test_model_keeps_the_laws(law):
    law(lambda: Chain1D().double())


# --- options and errors -------------------------------------------------------------------------------


def paths_of(missing: bool = False, **options: Any) -> Any:
    model = small(VAE)
    return scan(
        model, sequences(model, missing=missing), generator=torch.Generator().manual_seed(0), **options
    )


def test_beta_weighs_the_divergence():
    paths = paths_of(particles=3)
    reconstruction, divergence = objectives.factors(paths)
    torch.testing.assert_close(objectives.elbo(paths, beta=0.3), reconstruction - 0.3 * divergence)
    torch.testing.assert_close(objectives.elbo(paths, beta=0.0), paths.log_likelihood.sum(0).mean(0))


@torch.no_grad()
def test_free_bits_floor_each_coordinate():
    paths = paths_of(particles=3)
    frames = float(paths.valid.sum())
    per_coordinate = paths.kl.sum((0, 2)).mean(0) / frames
    for minimum in (0.0, float(per_coordinate.median()), 100.0):
        total = float(objectives.elbo(paths, free_bits=minimum).sum())
        floor = per_coordinate.clamp(min=minimum) if minimum else per_coordinate
        expected = float(paths.log_likelihood.sum(0).mean(0).sum()) - frames * float(floor.sum())
        assert total == pytest.approx(expected, rel=1e-10)


def test_objectives_are_differentiable():
    for objective in (objectives.elbo, objectives.iwae, lambda p: objectives.renyi(p, 0.5)):
        model = small(VAE)
        paths = scan(model, sequences(model), particles=3)
        objective(paths).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_bad_requests_are_answered():
    with pytest.raises(ValueError, match="kl should be 'analytic' or 'sample'; got 'exact'"):
        objectives.elbo(paths_of(), kl="exact")
    with pytest.raises(ValueError, match=r"fivo needs a resampled trajectory; pass scan\(..., resample="):
        objectives.fivo(paths_of())
    resampled = paths_of(particles=4, resample=Resampling())
    for objective in (objectives.elbo, objectives.iwae, lambda p: objectives.renyi(p, 0.5)):
        with pytest.raises(
            ValueError, match="needs independent paths, but this trajectory was resampled; use fivo"
        ):
            objective(resampled)


class LaplacePosterior(VAE):
    """A posterior of another kind than the prior."""

    mean_field = False

    def posterior(self, past: Past, e: Tensor) -> Any:
        q = super().posterior(past, e)
        return Laplace(q.loc + 0 * past.h, q.scale)

    def prior(self, past: Past) -> Normal:
        return standard_normal(past.h.shape[:-1], self.z_dim, past.h)


@pytest.mark.parametrize("law", [law for name, law in LAWS.items() if name != "factorisation"])
def test_a_posterior_without_closed_form_keeps_the_laws(law):
    law(lambda: small(LaplacePosterior))


def test_an_analytic_kl_that_does_not_exist_is_answered():
    model = small(LaplacePosterior)
    paths = scan(model, sequences(model))
    with pytest.raises(
        ValueError, match=r"no closed-form KL between these distributions; use elbo\(trajectory, kl="
    ):
        objectives.elbo(paths)
    with pytest.raises(ValueError, match="free bits need a closed-form KL"):
        objectives.elbo(paths, kl="sample", free_bits=0.1)
    assert torch.isfinite(objectives.elbo(paths, kl="sample")).all()
