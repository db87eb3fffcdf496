"""The NADE emission against enumeration, a naive loop and finite differences; where it refuses; all laws."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch

import dynavae
from dynavae import VRNN, distributions, tree
from dynavae import distributions as D
from dynavae.nn import NADE, to_emission
from dynavae.testing import LAWS, small


def every(d):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=d)))


def nade(*lead, d=6, hidden=5, activation="sigmoid"):
    shared = D.NADEWeights(torch.randn(d, hidden), 2 * torch.randn(d, hidden), activation)
    return D.NADE(torch.randn(*lead, d), torch.randn(*lead, hidden), shared)


def naive(p, x):
    """One frame, coordinate by coordinate, as the equations are written."""
    a, total = p.hidden.clone(), torch.zeros(())
    for i, x_i in enumerate(x):
        prob = torch.sigmoid(p.bias[i] + p.shared.act(a) @ p.shared.V[i])
        total = total + (prob if x_i else 1 - prob).log()
        a = a + x_i * p.shared.W[i]
    return total


@pytest.fixture(params=["sigmoid", "relu"])
def activation(request, float64):
    return request.param


def test_probabilities_of_all_binary_vectors_sum_to_one(activation):
    p = nade(3, 2, activation=activation)
    log_p = p.log_prob(every(6)[:, None, None, :])
    torch.testing.assert_close(log_p.logsumexp(0), torch.zeros(3, 2), rtol=0, atol=1e-12)


def test_log_prob_is_the_naive_loop(activation):
    p = nade(4, activation=activation)
    x = (torch.randn(4, 6) > 0).double()
    expected = torch.stack([naive(D.NADE(p.bias[n], p.hidden[n], p.shared), x[n]) for n in range(4)])
    torch.testing.assert_close(p.log_prob(x), expected, rtol=1e-12, atol=1e-12)


def test_gradients(float64):
    p = nade(3, d=4, hidden=3)
    x = (torch.randn(2, 3, 4) > 0).double()

    def log_prob(b, c, W, V):
        return D.NADE(b, c, D.NADEWeights(W, V)).log_prob(x)

    leaves = [a.clone().requires_grad_() for a in (p.bias, p.hidden, p.shared.W, p.shared.V)]
    assert torch.autograd.gradcheck(log_prob, leaves)
    assert torch.autograd.gradgradcheck(log_prob, leaves)


def test_chunks_change_no_value_and_no_gradient(float64, monkeypatch):
    p, x = nade(7, 3), (torch.randn(2, 7, 1, 6) > 0).double()
    results = []
    for limit in (2**23, 4 * 6 * 5):  # at once; four rows at a time
        monkeypatch.setattr(distributions.nade, "CHUNK", limit)
        leaves = [a.clone().requires_grad_() for a in (p.bias, p.hidden, p.shared.W, p.shared.V)]
        value = D.NADE(*leaves[:2], D.NADEWeights(*leaves[2:])).log_prob(x)
        results.append([value, *torch.autograd.grad(value.sin().sum(), leaves)])
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_a_coordinate_reads_those_before_it_only(float64):
    p = nade(d=5)
    x = (torch.randn(5) > 0).double()
    reads = torch.autograd.functional.jacobian(p.logits, x) != 0
    assert torch.equal(reads, torch.ones(5, 5).tril(-1).bool())


def test_frequencies_of_samples_and_the_mean_against_enumeration(activation, seed):
    """6 standard errors of each of the 64 frequencies; the mean's own error is bounded by its 32 draws."""
    p, runs = nade(activation=activation), 200_000
    noise = torch.randn(runs, 6, generator=torch.Generator().manual_seed(seed))
    x = p.sample(noise)
    code = (x @ 2.0 ** torch.arange(5, -1, -1)).long()
    frequency = torch.bincount(code, minlength=64) / runs
    exact = p.log_prob(every(6)).exp()
    error = (exact * (1 - exact) / runs).sqrt()
    assert ((frequency - exact).abs() <= 6 * error).all()

    marginal = exact @ every(6)
    conditional = p.logits(every(6)).sigmoid()  # what the mean averages: p(x_i = 1 | x_<i)
    spread = (exact @ (conditional - marginal).square()).sqrt()
    assert ((p.mean - marginal).abs() <= 6 * spread / math.sqrt(distributions.nade.DRAWS) + 1e-12).all()
    torch.testing.assert_close(p.stddev, (p.mean * (1 - p.mean)).sqrt())


def test_the_first_mean_is_exact_and_rows_do_not_change_it(float64):
    p = nade(40, 3, d=4, hidden=9000)  # more than one chunk of the mean
    exact = torch.sigmoid(p.bias[..., 0] + p.hidden.sigmoid() @ p.shared.V[0])
    torch.testing.assert_close(p.mean[..., 0], exact)
    one = D.NADE(p.bias[5, 1], p.hidden[5, 1], p.shared)
    torch.testing.assert_close(one.mean, p.mean[5, 1])


def test_it_moves_along_trees():
    p = nade(2)
    stacked = tree.stack([p, p, p])
    assert stacked.bias.shape == (3, 2, 6) and stacked.shared is p.shared
    assert D.expand(p, (4, 2)).hidden.shape == (4, 2, 5)
    assert p.kl(p) is None


def test_missing_frames():
    p, x = nade(2), torch.ones(2, 6)
    observed = torch.tensor([True, False])[:, None].expand(2, 6).clone()
    got = p.log_prob(torch.where(observed, x, torch.nan), observed)
    assert got[1] == 0 and got[0] == p.log_prob(x)[0]
    observed[0, 3] = False
    with pytest.raises(
        ValueError, match=r"A NADE emission .* no closed form\. Let each frame be observed or missing"
    ):
        p.log_prob(x, observed)


# --- in models ----------------------------------------------------------------------------------------


ELSEWHERE = {"chunks", "factorisation", "checkpoint", "copy", "seeds", "representation"}
"""Laws that need no emission of their own in a causal model: they run on the cases of `dynavae.testing`."""


@pytest.mark.parametrize("law", sorted(set(LAWS) - ELSEWHERE))
def test_law(law):
    LAWS[law](partial(small, VRNN, emission={"emission": "nade", "hidden": 5}))


def notes(batch=12, steps=6):
    """Pairs of notes that agree: (a, a, b, b)."""
    return torch.randint(0, 2, (batch, steps, 2)).repeat_interleave(2, -1).float()


def test_it_learns_what_independent_coordinates_cannot(seed):
    """Two fair coins, each shown twice, cost 2 log 2 nats a frame; a Bernoulli that knows nothing pays 4 log 2."""
    x = notes(64, 8)
    torch.manual_seed(seed)
    model = dynavae.VAE(
        x_dim=4, z_dim=1, h_dim=4, emission={"emission": "nade", "hidden": 8, "activation": "relu"}
    )
    dynavae.fit(model, x, epochs=60, batch_size=16, lr=0.02, seed=seed, progress=False)
    coins = 2 * math.log(2)
    assert coins - 0.05 < dynavae.score(model, x).nats_per_frame < coins + 0.1


def test_tasks_fill_whole_frames_and_refuse_parts():
    x = notes()
    x[:, 2] = torch.nan
    model = VRNN(x_dim=4, z_dim=2, h_dim=4, emission="nade")
    assert model.config["emission"] == "nade" and model.emission == NADE(hidden=100, activation="sigmoid")
    dynavae.fit(model, x, epochs=1, hide_rate=0.2, progress=False)
    filled = dynavae.impute(model, x, samples=4)
    assert set(filled.samples.unique().tolist()) <= {0.0, 1.0}
    assert dynavae.forecast(model, x, horizon=2, samples=3).mean.shape == (12, 2, 4)
    x[0, 3, 1] = torch.nan
    part = "has a frame that is observed in part: a NADE emission"
    for ask in (
        lambda: dynavae.score(model, x),
        lambda: dynavae.impute(model, x, samples=2),
        lambda: dynavae.fit(model, x, epochs=1, progress=False),
        lambda: model.stream(batch=12, particles=2).step(x[:, 3]),
    ):
        with pytest.raises(ValueError, match=part):
            ask()
    with pytest.raises(ValueError, match=r"hide=.values. hides single ones"):
        dynavae.fit(model, notes(), epochs=1, hide_rate=0.2, hide="values", progress=False)


def test_the_step_exports_and_gives_nan_for_a_part():
    model = VRNN(x_dim=4, z_dim=2, h_dim=4, emission={"emission": "nade", "hidden": 3}).eval()
    program = dynavae.export_step(model, particles=2).module()
    inputs = dynavae.tasks.step_inputs(model, batch=2, particles=2)
    whole = inputs._replace(x=torch.ones(2, 4), observed=torch.ones(2, 4, dtype=torch.bool))
    assert program(*whole)[0]["log_prob"].isfinite().all()
    part = whole._replace(observed=torch.tensor([[True] * 4, [True, False, True, True]]))
    assert program(*part)[0]["log_prob"].isnan().tolist() == [False, True]


def test_bad_options_and_values():
    with pytest.raises(ValueError, match="at least 1 hidden unit; got hidden=0"):
        NADE(hidden=0)
    with pytest.raises(ValueError, match="activation should be 'sigmoid' or 'relu'; got 'tanh'"):
        NADE(activation="tanh")
    with pytest.raises(ValueError, match="nade emission has no option 'units'; it has: hidden, activation"):
        to_emission({"emission": "nade", "units": 3})
    with pytest.raises(ValueError, match=r"NADE emission: values of x should be 0 or 1; .* with fractions"):
        dynavae.score(VRNN(x_dim=1, z_dim=2, h_dim=4, emission="nade"), torch.full((1, 3, 1), 0.5))
