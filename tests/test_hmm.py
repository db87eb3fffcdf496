"""HMM recursions against the test vector, enumeration of all paths, hmmlearn, and their own laws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynavae.exact import _native, hmm

T, B, S = 5, 3, 3
LENGTHS = torch.tensor([5, 3, 1])
close = torch.testing.assert_close
pytestmark = pytest.mark.usefixtures("with_and_without_numba")


def random_problem(seed: int, T: int = T, B: int = B, S: int = S) -> tuple[Tensor, Tensor, Tensor]:
    """A chain that differs by step and sequence, with structural zeros, and one missing frame."""
    g = torch.Generator().manual_seed(seed)
    initial, transition, emission = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in [(B, S), (T, B, S, S), (T, B, S)]
    )
    if S > 1:
        transition[..., 0, S - 1] = -math.inf
        initial[0, S - 1] = -math.inf
    emission[T // 2, 0] = 0.0
    return initial.log_softmax(-1), transition.log_softmax(-1), emission


def all_paths(
    initial: Tensor, transition: Tensor, emission: Tensor, row: int, length: int
) -> tuple[Tensor, Tensor]:
    """Every path (paths, length) of one sequence and its log joint density (paths,)."""
    paths = list(itertools.product(range(initial.shape[-1]), repeat=length))
    log_joint = [
        initial[row, path[0]]
        + sum(emission[t, row, path[t]] for t in range(length))
        + sum(transition[t, row, path[t - 1], path[t]] for t in range(1, length))
        for path in paths
    ]
    return torch.tensor(paths), torch.stack(log_joint)


def vector_problem() -> tuple[Tensor, Tensor, Tensor]:
    log_initial = torch.tensor([0.6, 0.4], dtype=torch.float64).log()
    log_transition = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64).log()
    rows = torch.tensor([[0.5, 0.4, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64).log()
    return log_initial, log_transition, rows[:, [0, 2, 1, 1, 2]].mT.unsqueeze(1)


def test_vector() -> None:
    problem = vector_problem()
    filtered, smoothed, decoded = hmm.hmm_filter(*problem), hmm.hmm_smoother(*problem), hmm.viterbi(*problem)
    assert filtered.log_likelihood.sum().item() == pytest.approx(-5.494429578811216, abs=1e-13)
    expected = [0.79131789, 0.23764843, 0.33467977, 0.29876387, 0.11170333]
    close(smoothed.log_gamma.exp()[:, 0, 0], torch.tensor(expected, dtype=torch.float64), atol=6e-9, rtol=0)
    expected = [0.88235294, 0.22947368, 0.37980311, 0.46007419, 0.11170333]
    close(
        filtered.log_filtered.exp()[:, 0, 0], torch.tensor(expected, dtype=torch.float64), atol=6e-9, rtol=0
    )
    assert decoded.path.flatten().tolist() == [0, 1, 1, 1, 1]
    assert decoded.log_joint.item() == pytest.approx(-6.506973118778355, abs=1e-13)


@pytest.mark.parametrize("seed", [0, 1])
def test_against_enumeration(seed: int) -> None:
    problem = random_problem(seed)
    _, transition, emission = problem
    filtered, smoothed = hmm.hmm_filter(*problem, LENGTHS), hmm.hmm_smoother(*problem, LENGTHS)
    beta = hmm.backward_messages(transition, emission, LENGTHS)
    decoded = hmm.viterbi(*problem, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        paths, log_joint = all_paths(*problem, row, length)
        posterior = (log_joint - log_joint.logsumexp(0)).exp()
        total = filtered.log_likelihood[:, row].sum()
        close(total, log_joint.logsumexp(0), atol=1e-12, rtol=0)
        for t, k in itertools.product(range(length), range(S)):
            close(smoothed.log_gamma[t, row, k].exp(), posterior[paths[:, t] == k].sum(), atol=1e-12, rtol=0)
            short, log_prefix = all_paths(*problem, row, t + 1)
            share = log_prefix[short[:, t] == k].logsumexp(0) - log_prefix.logsumexp(0)
            close(filtered.log_filtered[t, row, k].exp(), share.exp(), atol=1e-12, rtol=0)
            # beta_t(k) is the likelihood of the rest of the sequence, started in state k
            start = torch.full((1, S), -math.inf, dtype=torch.float64)
            start[0, k] = 0.0
            rest = (start, transition[t:, [row]], emission[t:, [row]], 0, length - t)
            close(beta[t, row, k], all_paths(*rest)[1].logsumexp(0), atol=1e-12, rtol=0)
        for t, j, k in itertools.product(range(1, length), range(S), range(S)):
            pair = posterior[(paths[:, t - 1] == j) & (paths[:, t] == k)].sum()
            close(smoothed.log_xi[t - 1, row, j, k].exp(), pair, atol=1e-12, rtol=0)
        best = log_joint.argmax()
        assert decoded.path[:length, row].tolist() == paths[best].tolist()
        assert (decoded.path[length:, row] == decoded.path[length - 1, row]).all()
        close(decoded.log_joint[row], log_joint[best], atol=1e-12, rtol=0)
        assert (filtered.log_likelihood[length:, row] == 0).all() and (beta[length:, row] == 0).all()
        assert smoothed.log_xi[:, row].exp().sum().item() == pytest.approx(length - 1, abs=1e-12)
    assert (smoothed.log_gamma.exp().sum(-1) - 1).abs().max() < 1e-12


def test_gradient_of_log_likelihood_is_the_expected_statistics() -> None:
    initial, transition, emission = (v.requires_grad_() for v in random_problem(2))
    total = hmm.hmm_filter(initial, transition, emission, LENGTHS).log_likelihood.sum()
    from_initial, from_transition, from_emission = torch.autograd.grad(total, (initial, transition, emission))
    smoothed = hmm.hmm_smoother(initial, transition, emission, LENGTHS)
    valid = (torch.arange(T)[:, None] < LENGTHS).unsqueeze(-1)
    close(from_emission, smoothed.log_gamma.exp() * valid, atol=1e-12, rtol=0)
    close(from_initial, smoothed.log_gamma[0].exp(), atol=1e-12, rtol=0)
    close(from_transition[1:], smoothed.log_xi.exp(), atol=1e-12, rtol=0)
    assert (from_transition[0] == 0).all()


def test_messages_and_filter_give_the_posterior_transition_and_the_likelihood() -> None:
    initial, transition, emission = random_problem(3)
    filtered = hmm.hmm_filter(initial, transition, emission)
    smoothed = hmm.hmm_smoother(initial, transition, emission)
    beta = hmm.backward_messages(transition, emission)
    close((initial + beta[0]).logsumexp(-1), filtered.log_likelihood.sum(0))
    close((filtered.log_predicted + beta).softmax(-1), smoothed.log_gamma.exp())
    step = (transition[2] + beta[2].unsqueeze(-2)).softmax(-1)  # p(s_3 | s_2, x)
    pair = smoothed.log_xi[1].exp()
    close(step * pair.sum(-1, keepdim=True), pair)


def test_against_hmmlearn() -> None:
    from hmmlearn.hmm import CategoricalHMM, GaussianHMM

    rng = np.random.default_rng(0)
    pi, A = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4), size=4)
    lengths = [30, 17]
    categorical, gaussian = CategoricalHMM(4, n_features=5), GaussianHMM(4, covariance_type="diag")
    categorical.emissionprob_ = rng.dirichlet(np.ones(5), size=4)
    gaussian.means_, gaussian.covars_ = rng.normal(size=(4, 2)), rng.uniform(0.2, 1.0, size=(4, 2))
    symbols, vectors = rng.integers(5, size=(47, 1)), rng.normal(size=(47, 2))
    means, scales = torch.from_numpy(gaussian.means_), torch.from_numpy(gaussian._covars_).sqrt()
    normal = torch.distributions.Independent(torch.distributions.Normal(means, scales), 1)
    flat = {
        categorical: torch.from_numpy(np.log(categorical.emissionprob_.T[symbols[:, 0]])),
        gaussian: normal.log_prob(torch.from_numpy(vectors).unsqueeze(1)),
    }
    for theirs, x in [(categorical, symbols), (gaussian, vectors)]:
        theirs.startprob_, theirs.transmat_ = pi, A
        emission = torch.full((30, 2, 4), math.nan, dtype=torch.float64)  # padding is never read
        emission[:, 0], emission[:17, 1] = flat[theirs][:30], flat[theirs][30:]
        ours = (torch.from_numpy(pi).log(), torch.from_numpy(A).log(), emission, torch.tensor(lengths))
        log_p, gamma = theirs.score_samples(x, lengths)
        assert hmm.hmm_filter(*ours).log_likelihood.sum().item() == pytest.approx(log_p, abs=1e-9)
        got = hmm.hmm_smoother(*ours).log_gamma.exp()
        close(torch.cat([got[:, 0], got[:17, 1]]), torch.from_numpy(gamma), atol=1e-9, rtol=0)
        log_joint, path = theirs.decode(x, lengths)
        decoded = hmm.viterbi(*ours)
        assert decoded.log_joint.sum().item() == pytest.approx(log_joint, abs=1e-9)
        assert torch.cat([decoded.path[:, 0], decoded.path[:17, 1]]).tolist() == path.tolist()


def test_posterior_samples_follow_the_smoothed_pairs() -> None:
    initial, transition, emission = random_problem(4)
    filtered = hmm.hmm_filter(initial, transition, emission, LENGTHS)
    smoothed = hmm.hmm_smoother(initial, transition, emission, LENGTHS)
    K = 20_000
    uniform = torch.rand(T, K, B, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = hmm.sample_posterior(transition, filtered, uniform, LENGTHS)
    one_hot = torch.nn.functional.one_hot(s, S).double()
    for row, length in enumerate(LENGTHS.tolist()):
        p = smoothed.log_gamma[:length, row].exp()
        error = (one_hot[:length, :, row].mean(1) - p).abs()
        assert (error <= 6 * (p * (1 - p) / K).clamp(min=0).sqrt() + 1e-12).all()
        p = smoothed.log_xi[: length - 1, row].exp()
        pairs = torch.einsum("tkj,tkl->tjl", one_hot[: length - 1, :, row], one_hot[1:length, :, row]) / K
        assert ((pairs - p).abs() <= 6 * (p * (1 - p) / K).clamp(min=0).sqrt() + 1e-12).all()
        assert (s[length:, :, row] == s[length - 1, :, row]).all()


def test_simulation_follows_the_chain_and_never_enters_an_impossible_state() -> None:
    log_initial = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    log_transition = torch.tensor([[0.9, 0.1, 0], [0, 0.3, 0.7], [0, 0, 1]], dtype=torch.float64).log()
    K, steps = 20_000, 4
    uniform = torch.rand(steps, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uniform[0, 0], uniform[0, 1] = 0.0, 1 - 1e-16
    s = hmm.simulate(log_initial, log_transition, uniform)
    assert s[0, :2].tolist() == [0, 1]
    p = log_initial.exp()
    for t in range(steps):
        share = torch.bincount(s[t], minlength=3).double() / K
        assert ((share - p).abs() <= 6 * (p * (1 - p) / K).sqrt() + 1e-12).all()
        p = p @ log_transition.exp()
    assert (s.diff(dim=0) >= 0).all()


def test_gradcheck() -> None:
    initial, transition, emission = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in [(2,), (2, 2), (4, 2, 2)]
    )
    lengths = torch.tensor([4, 2])

    def everything(initial: Tensor, transition: Tensor, emission: Tensor) -> tuple[Tensor, ...]:
        problem = initial.log_softmax(-1), transition.log_softmax(-1), emission, lengths
        smoothed = hmm.hmm_smoother(*problem)
        xi = smoothed.log_xi.exp()
        return *hmm.hmm_filter(*problem), smoothed.log_gamma, xi, hmm.backward_messages(*problem[1:])

    assert torch.autograd.gradcheck(everything, (initial, transition, emission))


def test_padding_changes_nothing_and_gets_no_gradient() -> None:
    initial, transition, emission = random_problem(5)
    problem = initial, transition, emission
    valid = torch.arange(T)[:, None] < LENGTHS
    expected = hmm.hmm_smoother(*problem, LENGTHS)
    for junk in (math.nan, math.inf, -math.inf):
        spoiled = emission.masked_fill(~valid.unsqueeze(-1), junk).requires_grad_()
        free = transition.clone().requires_grad_()
        smoothed = hmm.hmm_smoother(initial, free, spoiled, LENGTHS)
        total = hmm.hmm_filter(initial, free, spoiled, LENGTHS).log_likelihood
        for got, value in zip(smoothed, expected, strict=True):
            assert torch.equal(got, value)
        total.sum().backward()
        assert (spoiled.grad[~valid] == 0).all() and (spoiled.grad[valid] > -1).all()
        assert free.grad.isfinite().all() and (free.grad[~valid] == 0).all()
        assert torch.equal(
            hmm.viterbi(initial, free, spoiled, LENGTHS).path, hmm.viterbi(*problem, LENGTHS).path
        )
    for row, length in enumerate(LENGTHS.tolist()):  # each sequence alone, without its padding
        alone = initial[[row]], transition[:length, [row]], emission[:length, [row]]
        smoothed = hmm.hmm_smoother(*alone)
        close(smoothed.log_gamma, expected.log_gamma[:length, [row]], atol=1e-12, rtol=0)
        uniform = torch.rand(T, 10, B, dtype=torch.float64)
        together = hmm.sample_posterior(transition, hmm.hmm_filter(*problem, LENGTHS), uniform, LENGTHS)
        separate = hmm.sample_posterior(alone[1], hmm.hmm_filter(*alone), uniform[:length, :, [row]])
        assert torch.equal(together[:length, :, [row]], separate)


def test_impossible_data_have_probability_zero_not_nan() -> None:
    left_right = torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64).log()
    start = torch.tensor([0.0, 1.0], dtype=torch.float64).log()
    emission = torch.zeros(3, 1, 2, dtype=torch.float64)
    emission[1, 0, 1] = -math.inf
    emission.requires_grad_()
    filtered, smoothed = (
        hmm.hmm_filter(start, left_right, emission),
        hmm.hmm_smoother(start, left_right, emission),
    )
    assert filtered.log_likelihood.sum().item() == -math.inf
    assert not any(part.isnan().any() for part in (*filtered, *smoothed))
    with pytest.raises(ValueError, match="sequence 0 has probability 0 from t=1 on"):
        hmm.sample_posterior(left_right, filtered, torch.rand(3, 2, 1))
    with pytest.raises(ValueError, match="log_transition has a row in which every state is impossible"):
        hmm.simulate(start, left_right + start.flip(0), torch.rand(3, 2))
    filtered.log_likelihood[0].sum().backward()
    assert emission.grad.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.data())
def test_any_shape_against_enumeration(seed: int, T: int, B: int, S: int, data: st.DataObject) -> None:
    problem = random_problem(seed, T, B, S)
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, T), min_size=B, max_size=B)))
    filtered, decoded = hmm.hmm_filter(*problem, lengths), hmm.viterbi(*problem, lengths)
    for row, length in enumerate(lengths.tolist()):
        _, log_joint = all_paths(*problem, row, length)
        close(filtered.log_likelihood[:, row].sum(), log_joint.logsumexp(0), atol=1e-11, rtol=0)
        close(decoded.log_joint[row], log_joint.max(), atol=1e-11, rtol=0)


def test_long_sequences_stay_accurate_in_float32() -> None:
    log_initial, log_transition, _ = vector_problem()
    emission = 100 * torch.randn(2000, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = hmm.hmm_smoother(log_initial, log_transition, emission).log_gamma.exp()
    single = hmm.hmm_smoother(log_initial.float(), log_transition.float(), emission.float()).log_gamma.exp()
    assert (single.double() - exact).abs().max() < 1e-3


def test_errors_say_what_to_do() -> None:
    initial, transition, emission = random_problem(6)
    cases = [
        (
            initial,
            transition,
            emission[0],
            None,
            r"log_emission should have shape \(T, B, S\) .* got \(3, 3\)",
        ),
        (initial, transition[:4], emission, None, r"log_transition should have shape .* got \(4, 3, 3, 3\)"),
        (initial[:2], transition, emission, None, r"log_initial should have shape .* got \(2, 3\)"),
        (initial[0, :2], transition[..., :2, :2], emission, None, "S = 3 states .* log_initial has 2"),
        (initial, transition[..., :2, :2], emission, None, r"log_transition should have shape .* got"),
        (initial.float(), transition, emission, None, "log_transition is torch.float64 .* torch.float32"),
        (initial, transition, emission, torch.tensor([5, 3]), r"lengths should have shape \(B,\) = \(3,\)"),
        (
            initial,
            transition,
            emission,
            torch.tensor([5, 3, 0]),
            "lengths should be integers from 1 to T = 5",
        ),
        (initial, transition, emission, torch.tensor([6, 3, 1]), r"got \[6, 3, 1\]"),
        (initial.long(), transition, emission, None, "log_initial should be float32 or float64"),
    ]
    for *arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            hmm.hmm_filter(*arguments)
    with pytest.raises(TypeError, match=r"log_emission should be a torch.Tensor; got ndarray"):
        hmm.viterbi(initial, transition, emission.numpy())
    with pytest.raises(ValueError, match=r"log_transition should have shape"):
        hmm.backward_messages(transition[..., :2], emission)
    filtered = hmm.hmm_filter(initial, transition, emission)
    with pytest.raises(
        ValueError, match=r"uniform should have shape \(T, K, B\) = \(5, samples, 3\); got \(5, 3\)"
    ):
        hmm.sample_posterior(transition, filtered, torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"uniform should hold draws from \[0, 1\)"):
        hmm.sample_posterior(transition, filtered, torch.ones(5, 2, 3))
    with pytest.raises(TypeError, match="filtered should be the result of hmm_filter; got Tensor"):
        hmm.sample_posterior(transition, emission, torch.zeros(5, 2, 3))
    with pytest.raises(ValueError, match=r"uniform should have shape \(T, B\) with T >= 1; got \(3,\)"):
        hmm.simulate(initial, transition, torch.zeros(3))


@pytest.mark.parametrize("spread", [1.0, 1000.0])
@pytest.mark.parametrize("T", [1, 2, 3, 8, 37])
def test_the_forms_are_the_loop(T: int, spread: float, with_and_without_numba: bool) -> None:
    """Values and gradients, with structural zeros, lengths and a missing frame; and odds of exp(1000)."""
    lengths = torch.tensor([T, max(1, T // 2), 1])
    initial, transition, emission = random_problem(3, T)
    leaves = [p.requires_grad_() for p in (initial, (spread * transition).log_softmax(-1), spread * emission)]
    other = "compiled" if with_and_without_numba else "parallel"
    found = []
    for method in ("sequential", other):
        filtered = hmm.hmm_filter(*leaves, lengths, method=method)
        smoothed = hmm.hmm_smoother(*leaves, lengths, method=method)
        total = filtered.log_likelihood.sum() + (smoothed.log_gamma.exp()[..., 0] * torch.arange(3)).sum()
        gradient = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        found.append((*filtered, *smoothed, *gradient))
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        close(b, a, atol=1e-10 * spread, rtol=1e-10, msg=lambda m, i=i: f"result {i}: {m}")


def test_compiled_in_threads_is_compiled_in_one(with_and_without_numba: bool, monkeypatch) -> None:
    if not with_and_without_numba:
        with pytest.raises(ValueError, match=r"method='compiled' needs tensors on a CPU, and Numba"):
            hmm.hmm_filter(*vector_problem(), method="compiled")
        return
    initial, transition, emission = random_problem(4)
    leaves = [p.requires_grad_() for p in (initial[0].clone(), transition[0, 0].clone(), emission)]

    def everything() -> tuple[Tensor, ...]:
        smoothed = hmm.hmm_smoother(*leaves, LENGTHS)
        total = hmm.hmm_filter(*leaves, LENGTHS).log_likelihood.sum() + smoothed.log_gamma.exp()[..., 0].sum()
        return *smoothed, *hmm.viterbi(*leaves, LENGTHS), *torch.autograd.grad(total, leaves)

    alone = everything()
    monkeypatch.setattr(_native, "PART", 1e-3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for ours, theirs in zip(everything(), alone, strict=True):
        close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_the_parallel_scan_of_a_long_sequence_in_float32() -> None:
    g = torch.Generator().manual_seed(0)
    initial, transition = torch.zeros(3).log_softmax(-1), (3 * torch.eye(3)).log_softmax(-1)
    emission = 5 * torch.randn(4000, 1, 3, generator=g)
    double = hmm.hmm_filter(initial.double(), transition.double(), emission.double(), method="sequential")
    single = hmm.hmm_filter(initial, transition, emission, method="parallel")
    assert single.log_likelihood.sum().item() == pytest.approx(double.log_likelihood.sum().item(), rel=1e-5)
    close(single.log_filtered.exp(), double.log_filtered.exp().float(), atol=1e-4, rtol=0)


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(
        ValueError, match="method should be one of auto, sequential, parallel, compiled; got 'fast'"
    ):
        hmm.hmm_filter(*vector_problem(), method="fast")


def test_second_derivatives_are_differences_of_first_ones() -> None:
    problem = [p.double() for p in vector_problem()]

    def total(emission: Tensor) -> Tensor:
        smoothed = hmm.hmm_smoother(*problem[:2], emission)
        return (
            hmm.hmm_filter(*problem[:2], emission).log_likelihood.sum()
            + smoothed.log_gamma.exp()[..., 0].sum()
        )

    assert torch.autograd.gradgradcheck(total, problem[2].requires_grad_())
    hessian = torch.autograd.functional.hessian(total, problem[2])
    assert hessian.abs().max() > 0.1


def test_the_gradient_of_the_best_path_is_its_own() -> None:
    initial, transition, emission = (p.requires_grad_() for p in random_problem(2))
    decoded = hmm.viterbi(initial, transition, emission, LENGTHS)
    from_emission, from_transition = torch.autograd.grad(decoded.log_joint.sum(), (emission, transition))
    valid = torch.arange(T)[:, None] < LENGTHS
    one_hot = torch.nn.functional.one_hot(decoded.path, S) * valid.unsqueeze(-1)
    close(from_emission, one_hot.double())
    assert from_transition.sum().item() == int((LENGTHS - 1).sum())


def test_nan_is_not_impossible() -> None:
    initial, transition, emission = random_problem(2)
    emission[2, 0] = math.nan
    filtered = hmm.hmm_filter(initial, transition, emission)
    assert filtered.log_likelihood[2, 0].isnan() and filtered.log_filtered[3, 0].isnan().all()
    assert filtered.log_likelihood[:, 1].isfinite().all()
    assert hmm.hmm_smoother(initial, transition, emission).log_gamma[1, 0].isnan().all()
    assert hmm.hmm_filter(initial, math.nan * transition, emission).log_likelihood[1].isnan().all()
    emission[2, 0] = math.inf
    assert hmm.hmm_filter(initial, transition, emission).log_likelihood[2, 0].item() == math.inf
