"""Every scheme is unbiased, in range, and due exactly when the effective sample size says so."""

from __future__ import annotations

import math

import pytest
import torch

from dynavae import Resampling
from dynavae.resampling import SCHEMES, log_effective_size

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_expected_offspring_are_k_times_the_weight(scheme, spread, seed):
    generator = torch.Generator().manual_seed(seed + 1)
    K, runs = 7, 20_000
    log_w = spread * torch.randn(K, 1, generator=generator)
    uniform = torch.rand(K, runs, generator=generator)
    ancestors = SCHEMES[scheme](log_w.expand(K, runs), uniform)
    offspring = torch.nn.functional.one_hot(ancestors, K).sum(0).double()  # (runs, K)
    expected = K * torch.softmax(log_w[:, 0], 0)
    # Offspring lie within [floor, ceil] for systematic ones; its variance is that of a coin, and known to be
    # at most the multinomial one for all three: use it, so that a scheme that never varies has an error too.
    error = (expected * (1 - expected / K) / runs).sqrt()
    assert ((offspring.mean(0) - expected).abs() <= 6 * error).all()
    if scheme == "systematic":
        assert (offspring >= expected.floor() - 1e-9).all() and (offspring <= expected.ceil() + 1e-9).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_variance_is_at_most_that_of_multinomial_resampling(scheme):
    generator = torch.Generator().manual_seed(1)
    log_w = torch.randn(5, 1, generator=generator)
    ancestors = SCHEMES[scheme](log_w.expand(5, 20_000), torch.rand(5, 20_000, generator=generator))
    offspring = torch.nn.functional.one_hot(ancestors, 5).sum(0).double()
    w = torch.softmax(log_w[:, 0], 0)
    square = (offspring - 5 * w) ** 2
    error = square.std(0) / math.sqrt(len(square))
    multinomial = 5 * w * (1 - w)
    if scheme == "multinomial":
        assert ((square.mean(0) - multinomial).abs() <= 6 * error).all()
    else:
        assert (square.mean(0) <= multinomial + 6 * error).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_indices_stay_in_range(scheme, dtype):
    """A cumulative sum may end below 1, and a uniform may round to 0 or to 1."""
    K = 1000
    log_w = torch.randn(K, 4, dtype=dtype)
    log_w[:, 1] = -torch.inf
    log_w[3, 1] = 0.0  # one survivor
    log_w[:, 2] = -1e4 * torch.arange(K)
    one = torch.ones((), dtype=dtype)
    for value in (0.0, float(torch.nextafter(one, 0 * one)), 1.0):
        ancestors = SCHEMES[scheme](log_w, torch.full((K, 4), value, dtype=dtype))
        assert ancestors.min() >= 0 and ancestors.max() < K
        assert (ancestors[:, 1] == 3).all() and (ancestors[:, 2] == 0).all()  # never one without weight


def test_equal_weights_keep_every_particle_under_low_variance_schemes():
    uniform = torch.rand(6, 3)
    for scheme in ("stratified", "systematic"):
        kept = SCHEMES[scheme](torch.zeros(6, 3), uniform)
        assert torch.equal(kept, torch.arange(6).unsqueeze(-1).expand(6, 3))


def test_effective_size():
    log_w = torch.tensor([[0.0, 0.0, 5.0], [0.0, -torch.inf, 5.0], [0.0, -torch.inf, 5.0 + math.log(2)]])
    expected = torch.tensor([3.0, 1.0, 16 / 6])
    torch.testing.assert_close(log_effective_size(log_w).exp(), expected)
    assert Resampling(threshold=0.5).due(log_w).tolist() == [False, True, False]
    assert Resampling(threshold=1.0).due(log_w).all() and not Resampling(threshold=0.0).due(log_w).any()


def test_no_gradient_flows_through_ancestors():
    log_w = torch.randn(4, 2, requires_grad=True)
    assert not Resampling().ancestors(log_w, torch.rand(4, 2)).requires_grad


def test_bad_options_are_answered():
    with pytest.raises(
        ValueError, match="unknown resampling scheme 'residual'; choose one of multinomial, strat"
    ):
        Resampling("residual")
    with pytest.raises(
        ValueError, match=r"threshold should be in \[0, 1\], a fraction of the particles; got 2"
    ):
        Resampling(threshold=2)
