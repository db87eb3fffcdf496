"""Kalman recursions against test vectors, the dense joint Gaussian, statsmodels, and their own laws."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynavae.exact import kalman
from dynavae.exact.kalman import LinearGaussian, kalman_filter, kalman_smoother

T, B, Z, X, U = 6, 3, 3, 2, 2
close = torch.testing.assert_close
pytestmark = pytest.mark.usefixtures("with_and_without_numba")


def random_covariance(*shape: int, generator: torch.Generator) -> Tensor:
    root = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return root @ root.mT + 0.3 * torch.eye(shape[-1], dtype=torch.float64)


class Problem(NamedTuple):
    params: LinearGaussian
    x: Tensor
    observed: Tensor
    control: Tensor


def random_problem(seed: int = 0, T: int = T, B: int = B, Z: int = Z, X: int = X, U: int = U) -> Problem:
    """Every way of broadcasting a parameter, full R, controls, missing coordinates, lengths 6, 4, 1, ..."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    params = LinearGaussian(
        m0=normal(B, Z), P0=random_covariance(Z, Z, generator=g), A=0.6 * normal(T, B, Z, Z),
        Q=random_covariance(B, Z, Z, generator=g), C=normal(T, 1, X, Z),
        R=random_covariance(X, X, generator=g), B=normal(Z, U), D=normal(1, B, X, U),
        b=normal(B, Z), d=normal(T, 1, X),
    )  # fmt: skip
    observed = torch.rand(T, B, X, generator=g) < 0.7
    lengths = torch.tensor([T, max(1, T - 2), 1])[torch.arange(B) % 3]
    observed &= (torch.arange(T)[:, None] < lengths)[..., None]
    return Problem(params, normal(T, B, X), observed, normal(T, B, U))


class Dense(NamedTuple):
    """Joint moments of (z_1:T, x_1:T) of one sequence, built without any recursion over covariances."""

    mean: Tensor
    covariance: Tensor
    states: int

    def given(self, x: Tensor, observed: Tensor) -> tuple[Tensor, Tensor, float]:
        """Moments of z_1:T given the observed entries of x, and the log-density of those."""
        kept = self.states + observed.flatten().nonzero().squeeze(-1)
        error = x.flatten()[observed.flatten()] - self.mean[kept]
        S, cross = self.covariance[kept][:, kept], self.covariance[: self.states][:, kept]
        mean = self.mean[: self.states] + cross @ torch.linalg.solve(S, error)
        covariance = self.covariance[: self.states, : self.states] - cross @ torch.linalg.solve(S, cross.mT)
        quadratic = error @ torch.linalg.solve(S, error) + torch.logdet(S)
        return mean, covariance, -0.5 * (len(kept) * math.log(2 * math.pi) + quadratic).item()


def dense_joint(problem: Problem, row: int) -> Dense:
    params, x, _, control = problem
    steps, batch, x_dim = x.shape
    sizes = {"m0": 1, "P0": 2, "A": 2, "Q": 2, "C": 2, "R": 2, "B": 2, "D": 2, "b": 1, "d": 1}
    p = {}
    for name, core in sizes.items():
        value = getattr(params, name)
        if value is not None:
            p[name] = value.expand(steps, batch, *value.shape[value.ndim - core :])[:, row]
    u = control[:, row]
    zero_z, zero_x = torch.zeros_like(p["m0"]), torch.zeros(steps, x_dim, dtype=x.dtype)
    f = torch.einsum("tzu,tu->tz", p["B"], u) + p["b"] if "B" in p else zero_z
    g = torch.einsum("txu,tu->tx", p["D"], u) + p["d"] if "D" in p else zero_x
    blocks = [p["P0"][0], *p["Q"][1:]]
    z_dim = blocks[0].shape[-1]
    # z = G (m0 + eps_1, f_2 + eps_2, ...), G block lower triangular
    G = torch.zeros(steps, z_dim, steps, z_dim, dtype=x.dtype)
    for s in range(steps):
        product = torch.eye(z_dim, dtype=x.dtype)
        for t in range(s, steps):
            product = p["A"][t] @ product if t > s else product
            G[t, :, s] = product
    G = G.reshape(steps * z_dim, steps * z_dim)
    C = torch.block_diag(*p["C"])
    full = torch.cat([G, C @ G])
    mean = full @ torch.cat([p["m0"][0], f[1:].flatten()]) + torch.cat([0 * G[0], g.flatten()])
    covariance = full @ torch.block_diag(*blocks) @ full.mT
    covariance[len(G) :, len(G) :] += torch.block_diag(*p["R"])
    return Dense(mean, covariance, len(G))


def run(problem: Problem) -> tuple[kalman.Filtered, kalman.Smoothed]:
    filtered = kalman_filter(*problem)
    return filtered, kalman_smoother(problem.params, filtered)


def vector_model() -> tuple[LinearGaussian, Tensor, Tensor]:
    def tensor(*values: float | list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    params = LinearGaussian(
        m0=tensor(0, 1), P0=torch.eye(2, dtype=torch.float64), A=tensor([1, 0.5], [0, 0.9]),
        Q=torch.diag(tensor(0.1, 0.2)), C=tensor([1, 0]), R=tensor([0.3]), B=tensor([0], [0.4]),
    )  # fmt: skip
    x, u = tensor(0.2, 0.9, math.nan, 1.5, 1.1), tensor(0, 1, 0, -1, 0.5)
    return params, x.reshape(5, 1, 1), u.reshape(5, 1, 1)


def test_vector() -> None:
    params, x, u = vector_model()
    filtered = kalman_filter(params, x, control=u)
    smoothed = kalman_smoother(params, filtered)
    tables = [
        (filtered.mean, [0.15384615, 1, 0.81615721, 1.42576419, 1.5290393, 1.28318777, 1.61542289, 0.44152277,
                         1.3422033, 0.31630865]),
        (filtered.covariance.diagonal(dim1=-2, dim2=-1),
         [0.23076923, 1, 0.19781659, 0.78008734, 0.64611354, 0.83187074, 0.24836691, 0.49328152, 0.20130054,
          0.46664779]),
        (smoothed.mean, [0.26808603, 0.66674614, 0.65096305, 0.87101073, 1.05296004, 0.6777403, 1.35832182,
                         0.12923183, 1.3422033, 0.31630865]),
        (smoothed.covariance.diagonal(dim1=-2, dim2=-1),
         [0.16737545, 0.31506056, 0.12831351, 0.24653532, 0.16111288, 0.25070201, 0.13715214, 0.32919481,
          0.20130054, 0.46664779]),
    ]  # fmt: skip
    for got, expected in tables:
        close(got.flatten(), torch.tensor(expected, dtype=torch.float64), atol=6e-9, rtol=0)
    assert filtered.log_likelihood.sum().item() == pytest.approx(-4.451114433893273, abs=1e-13)
    assert filtered.log_likelihood[2].item() == 0.0
    zero = kalman_filter(params, x.nan_to_num(0.0), control=u)
    assert zero.log_likelihood.sum().item() == pytest.approx(-6.185223905417413, abs=1e-13)
    still = torch.zeros(3, 1, 1, dtype=torch.float64)
    ahead = kalman.kalman_predict(params, filtered.mean[-1], filtered.covariance[-1], 3, still)
    future = kalman.predictive_observation(params, *ahead, still)
    expected = torch.tensor([1.50035762, 1.64269652, 1.77080152], dtype=torch.float64)
    close(future.mean.flatten(), expected, atol=6e-9, rtol=0)
    expected = torch.tensor([0.83249706, 1.39006587, 2.19896626], dtype=torch.float64)
    close(future.covariance.flatten(), expected, atol=6e-9, rtol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_against_the_dense_joint(seed: int) -> None:
    problem = random_problem(seed)
    filtered, smoothed = run(problem)
    for row in range(B):
        dense, x, observed = dense_joint(problem, row), problem.x[:, row], problem.observed[:, row]
        mean, covariance, log_p = dense.given(x, observed)
        blocks = covariance.reshape(T, Z, T, Z)
        close(smoothed.mean[:, row].flatten(), mean, atol=1e-9, rtol=1e-9)
        for t in range(T):
            close(smoothed.covariance[t, row], blocks[t, :, t], atol=1e-9, rtol=1e-9)
            if t + 1 < T:
                close(smoothed.cross_covariance[t, row], blocks[t + 1, :, t], atol=1e-9, rtol=1e-9)
            past = observed & (torch.arange(T) <= t)[:, None]
            before = observed & (torch.arange(T) < t)[:, None]
            (m, P, now), (m_, P_, then) = dense.given(x, past), dense.given(x, before)
            close(filtered.mean[t, row], m.reshape(T, Z)[t], atol=1e-9, rtol=1e-9)
            close(filtered.covariance[t, row], P.reshape(T, Z, T, Z)[t, :, t], atol=1e-9, rtol=1e-9)
            close(filtered.predicted_mean[t, row], m_.reshape(T, Z)[t], atol=1e-9, rtol=1e-9)
            close(
                filtered.predicted_covariance[t, row], P_.reshape(T, Z, T, Z)[t, :, t], atol=1e-9, rtol=1e-9
            )
            assert filtered.log_likelihood[t, row].item() == pytest.approx(now - then, abs=1e-9)
        assert filtered.log_likelihood[:, row].sum().item() == pytest.approx(log_p, abs=1e-9)
    assert (filtered.log_likelihood[~problem.observed.any(-1)] == 0).all()


def test_against_statsmodels() -> None:
    from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother

    problem = random_problem(2)
    ours, smoothed = run(problem)
    p = problem.params
    for row in range(B):
        x = problem.x[:, row].masked_fill(~problem.observed[:, row], math.nan)
        theirs = KalmanSmoother(k_endog=X, k_states=Z)
        theirs.bind(x.numpy().copy())
        f = (p.B @ problem.control[:, row, :, None]).squeeze(-1) + p.b[row]
        g = (p.D[0, row] @ problem.control[:, row, :, None]).squeeze(-1) + p.d[:, 0]
        theirs["transition"] = p.A[:, row].roll(-1, 0).permute(1, 2, 0).numpy()  # theirs leads out of t
        theirs["state_intercept"] = f.roll(-1, 0).mT.numpy()
        theirs["selection"], theirs["state_cov"] = torch.eye(Z).double().numpy(), p.Q[row].numpy()
        theirs["design"], theirs["obs_cov"] = p.C[:, 0].permute(1, 2, 0).numpy(), p.R.numpy()
        theirs["obs_intercept"] = g.mT.numpy()
        theirs.initialize_known(p.m0[row].numpy(), p.P0.numpy())
        result = theirs.smooth()
        pairs = [
            (ours.mean, result.filtered_state.T), (smoothed.mean, result.smoothed_state.T),
            (ours.covariance, result.filtered_state_cov.transpose(2, 0, 1)),
            (smoothed.covariance, result.smoothed_state_cov.transpose(2, 0, 1)),
            (ours.log_likelihood, result.llf_obs),
        ]  # fmt: skip
        for got, expected in pairs:
            close(got[:, row], torch.from_numpy(expected.copy()), atol=1e-8, rtol=1e-8)


def test_backward_messages_normalise_fuse_and_give_the_posterior_transition() -> None:
    problem = random_problem(3)
    params, x, observed, control = problem
    filtered, smoothed = run(problem)
    message = kalman.backward_information(params, x, observed, control)
    total = kalman.condition(params.m0, params.P0, kalman.Information(*(part[0] for part in message)))
    close(total.log_normaliser, filtered.log_likelihood.sum(0), atol=1e-9, rtol=0)
    fused = kalman.condition(filtered.predicted_mean, filtered.predicted_covariance, message)
    close(fused.mean, smoothed.mean, atol=1e-9, rtol=1e-9)
    close(fused.covariance, smoothed.covariance, atol=1e-9, rtol=1e-9)
    to_go = filtered.log_likelihood.flip(0).cumsum(0).flip(0)  # log p(x_t:T | x_1:t-1)
    close(fused.log_normaliser, to_go, atol=1e-9, rtol=1e-9)
    t, K = 2, 5
    z = torch.randn(K, B, Z, dtype=torch.float64)
    prior = (params.A[t] @ z.unsqueeze(-1)).squeeze(-1)
    prior = prior + (params.B @ control[t].unsqueeze(-1)).squeeze(-1) + params.b
    step = kalman.condition(prior, params.Q, kalman.Information(*(part[t] for part in message)))
    backward = torch.linalg.solve(smoothed.covariance[t - 1], smoothed.cross_covariance[t - 1].mT).mT
    error = (backward @ (z - smoothed.mean[t - 1]).unsqueeze(-1)).squeeze(-1)
    close(step.mean, smoothed.mean[t] + error, atol=1e-9, rtol=1e-9)
    spread = smoothed.covariance[t] - backward @ smoothed.cross_covariance[t - 1].mT
    close(step.covariance, spread, atol=1e-9, rtol=1e-9)


def test_backward_message_of_nothing_is_exactly_flat() -> None:
    params, x, observed, control = random_problem(4)
    message = kalman.backward_information(params, x, observed, control)
    assert all((part[1:, 2] == 0).all() for part in message)  # sequence 2 has length 1
    x = torch.randn(2000, 1, X)
    eye = torch.eye(Z)
    walk = LinearGaussian(torch.zeros(Z), 20 * eye, eye, 0.01 * eye, torch.ones(X, Z), 0.03 * torch.eye(X))
    long = kalman.backward_information(walk, x)
    assert all(part.isfinite().all() for part in long)
    assert (torch.linalg.eigvalsh(long.J).amin() > -1e-3) and torch.equal(long.J, long.J.mT)


def test_prediction_is_filtering_with_missing_frames_and_chunks_agree() -> None:
    params, x, observed, control = random_problem(5)
    observed = observed.clone()
    observed[3:] = False
    filtered = kalman_filter(params, x, observed, control)

    def crop(frames: slice) -> LinearGaussian:
        return params._replace(A=params.A[frames], C=params.C[frames], d=params.d[frames])

    late = crop(slice(3, None))
    ahead = kalman.kalman_predict(late, filtered.mean[2], filtered.covariance[2], 3, control[3:])
    close(ahead.mean, filtered.mean[3:])
    close(ahead.covariance, filtered.covariance[3:])
    _, x, observed, control = random_problem(5)
    whole = kalman_filter(params, x, observed, control)
    first = kalman_filter(crop(slice(0, 3)), x[:3], observed[:3], control[:3])
    ahead = kalman.kalman_predict(late, first.mean[-1], first.covariance[-1], 3, control[3:])
    start = late._replace(m0=ahead.mean[0], P0=ahead.covariance[0])
    second = kalman_filter(start, x[3:], observed[3:], control[3:])
    for joined, a, b in zip(whole[:5], first[:5], second[:5], strict=True):
        close(torch.cat([a, b]), joined)


def test_posterior_samples_have_the_smoothed_moments() -> None:
    problem = random_problem(6)
    filtered, smoothed = run(problem)
    K = 20_000
    noise = torch.randn(T, K, B, Z, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = kalman.sample_posterior(problem.params, filtered, noise)
    variance = smoothed.covariance.diagonal(dim1=-2, dim2=-1)
    mean_error = (z.mean(1) - smoothed.mean).abs() / (variance / K).sqrt()
    assert mean_error.max() < 6
    deviation = z - smoothed.mean.unsqueeze(1)
    pairs = [
        (deviation, deviation, smoothed.covariance, variance, variance),
        (deviation[1:], deviation[:-1], smoothed.cross_covariance, variance[1:], variance[:-1]),
    ]
    for a, b, expected, var_a, var_b in pairs:
        error = torch.einsum("tkbi,tkbj->tbij", a, b) / K - expected
        bar = ((var_a.unsqueeze(-1) * var_b.unsqueeze(-2) + expected.square()) / K).sqrt()
        assert (error.abs() / bar).max() < 6


def test_simulation_has_the_moments_of_the_dense_joint() -> None:
    problem = random_problem(7)
    K, row = 20_000, 1
    wide = problem.params._replace(
        m0=problem.params.m0[row], A=problem.params.A[:, [row]], Q=problem.params.Q[row],
        D=problem.params.D[:, [row]], b=problem.params.b[row],
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    noise_z, noise_x = (torch.randn(T, K, n, generator=g, dtype=torch.float64) for n in (Z, X))
    z, x = kalman.simulate(wide, noise_z, noise_x, problem.control[:, [row]].expand(T, K, U))
    sample = torch.cat([z.transpose(0, 1).flatten(1), x.transpose(0, 1).flatten(1)], 1)
    dense = dense_joint(problem, row)
    variance = dense.covariance.diagonal()
    assert ((sample.mean(0) - dense.mean).abs() / (variance / K).sqrt()).max() < 6
    bar = ((variance[:, None] * variance + dense.covariance.square()) / (K - 1)).sqrt()
    assert ((sample.T.cov() - dense.covariance).abs() / bar).max() < 6


def test_gradcheck() -> None:
    params, x, observed, control = random_problem(8, T=3, B=2, Z=2, X=2, U=1)

    def everything(x: Tensor, P0: Tensor, Q: Tensor, R: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        names = ("m0", "A", "C", "B", "D", "b", "d")
        free = params._replace(P0=P0 @ P0.mT, Q=Q @ Q.mT, R=R @ R.mT, **dict(zip(names, others, strict=True)))
        filtered = kalman_filter(free, x, observed, control)
        noise = torch.ones(3, 1, 2, 2, dtype=torch.float64)
        return (
            *filtered[:5], *kalman_smoother(free, filtered)[:4], kalman.sample_posterior(free, filtered, noise),
            *kalman.backward_information(free, x, observed, control),
        )  # fmt: skip

    roots = [torch.linalg.cholesky(M) for M in (params.P0, params.Q, params.R)]
    p = params
    inputs = [x, *roots, p.m0, p.A, p.C, p.B, p.D, p.b, p.d]
    assert torch.autograd.gradcheck(everything, [v.detach().clone().requires_grad_() for v in inputs])


def test_unseen_values_change_nothing_and_get_no_gradient() -> None:
    problem = random_problem(9)
    params, x, observed, control = problem
    expected = [*kalman_filter(*problem)[:5], *kalman.backward_information(*problem)]
    for junk in (math.nan, math.inf, 1e30):
        spoiled = x.masked_fill(~observed, junk).requires_grad_()
        A = params.A.clone().requires_grad_()
        free = params._replace(A=A)
        filtered = kalman_filter(free, spoiled, observed, control)
        message = kalman.backward_information(free, spoiled, observed, control)
        for got, value in zip([*filtered[:5], *message], expected, strict=True):
            assert torch.equal(got, value)
        total = (
            kalman_smoother(free, filtered).mean.sum() + filtered.log_likelihood.sum() + message.log_c.sum()
        )
        total.backward()
        assert (spoiled.grad[~observed] == 0).all() and spoiled.grad.isfinite().all()
        assert A.grad.isfinite().all() and (spoiled.grad[observed] != 0).any()
    from_nan = kalman_filter(params, x.masked_fill(~observed, math.nan), control=control)
    close(from_nan.mean, expected[0], rtol=0, atol=0)


def test_rows_of_a_batch_and_padding_do_not_interact() -> None:
    params, x, observed, control = random_problem(10)
    filtered, smoothed = run(Problem(params, x, observed, control))
    for row, length in [(1, 4), (2, 1)]:
        alone = params._replace(
            m0=params.m0[[row]], A=params.A[:length, [row]], Q=params.Q[[row]], C=params.C[:length],
            D=params.D[:, [row]], b=params.b[[row]], d=params.d[:length],
        )  # fmt: skip
        cut = Problem(alone, *(v[:length, [row]] for v in (x, observed, control)))
        filtered_alone, smoothed_alone = run(cut)
        close(filtered_alone.mean, filtered.mean[:length, [row]], rtol=1e-12, atol=1e-12)
        close(filtered_alone.log_likelihood, filtered.log_likelihood[:length, [row]], rtol=1e-12, atol=1e-12)
        close(smoothed_alone.mean, smoothed.mean[:length, [row]], rtol=1e-12, atol=1e-12)
        close(smoothed_alone.covariance, smoothed.covariance[:length, [row]], rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_any_shape_and_mask_against_the_dense_joint(seed: int, T: int, B: int, Z: int, X: int) -> None:
    problem = random_problem(seed, T, B, Z, X)
    filtered, smoothed = run(problem)
    for row in range(B):
        mean, _, log_p = dense_joint(problem, row).given(problem.x[:, row], problem.observed[:, row])
        close(smoothed.mean[:, row].flatten(), mean, atol=1e-8, rtol=1e-8)
        assert filtered.log_likelihood[:, row].sum().item() == pytest.approx(log_p, abs=1e-8)


def test_float32_stays_positive_definite_and_close_to_float64_under_autocast() -> None:
    torch.manual_seed(0)
    eye = torch.eye(4)
    A, C, R = eye + 0.1 * eye.roll(1, 0), eye[:2], 0.03 * eye[:2, :2]
    walk = LinearGaussian(torch.zeros(4), 20 * eye, A, 1e-4 * eye, C, R)
    x = torch.randn(400, 2, 2).cumsum(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        filtered = kalman_filter(walk, x)
        smoothed = kalman_smoother(walk, filtered)
    double = LinearGaussian(*(None if value is None else value.double() for value in walk))
    exact = kalman_filter(double, x.double())
    assert filtered.mean.dtype == torch.float32
    assert torch.linalg.eigvalsh(filtered.covariance).amin() > 0
    assert torch.linalg.eigvalsh(smoothed.covariance).amin() > 0
    close(filtered.log_likelihood.double().sum(0), exact.log_likelihood.sum(0), rtol=1e-3, atol=0)


def test_joseph_form_keeps_what_the_short_form_loses() -> None:
    eye = torch.eye(2)
    vague = LinearGaussian(torch.zeros(2), 1e5 * eye, eye, 1e-4 * eye, eye, 1e-3 * eye)
    filtered = kalman_filter(vague, torch.zeros(3, 1, 2))
    double = LinearGaussian(*(None if value is None else value.double() for value in vague))
    exact = kalman_filter(double, torch.zeros(3, 1, 2, dtype=torch.float64))
    close(filtered.covariance.double(), exact.covariance, rtol=1e-4, atol=1e-12)


def test_errors_say_what_to_do() -> None:
    params, x, observed, control = random_problem(11)
    nan = x.clone()
    nan[2, 1, 0] = math.nan
    everywhere = torch.ones_like(observed)
    cases = [
        (params, x[0], None, control, r"x should have shape \(T, B, x_dim\) = .* T >= 1; got"),
        (params, x.float(), None, control, r"x is torch.float32 on cpu, but .* torch.float64"),
        (params, x, observed[:2], control, r"observed should have shape .* got \(2, 3, 2\)"),
        (params, x, observed.long(), control, "observed should be bool"),
        (params, nan, everywhere, control, "x is nan at t=2, sequence 1, coordinate 0"),
        (params, x, observed, None, r"control \(T, B, u_dim\) = \(6, 3, 2\) is needed"),
        (params, x, observed, control[:1], r"control should have shape .* got \(1, 3, 2\)"),
        (params, x, observed, control / 0, "control has NaN or infinite entries"),
        (params._replace(B=None, D=None), x, observed, control, "params.B and params.D are None"),
        (params._replace(A=params.A[:4]), x, observed, control, r"params.A should have shape .* got \(4, 3"),
        (params._replace(R=-params.R), x, observed, control, r"S_t .* at t=\d, sequence \d"),
        (params._replace(P0=params.P0.half()), x, observed, control, "params.P0 should be float32"),
    ]  # fmt: skip
    for *arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            kalman_filter(*arguments)
    with pytest.raises(TypeError, match="params should be a LinearGaussian; got dict"):
        kalman_filter({}, x)
    filtered = kalman_filter(params, x, observed, control)
    with pytest.raises(TypeError, match="filtered should be the result of kalman_filter; got tuple"):
        kalman_smoother(params, tuple(filtered))
    with pytest.raises(ValueError, match=r"noise should have shape .* got \(6, 3, 3\)"):
        kalman.sample_posterior(params, filtered, torch.zeros(T, B, Z, dtype=torch.float64))
    with pytest.raises(ValueError, match="steps should be at least 1; got 0"):
        kalman.kalman_predict(params, filtered.mean[0], filtered.covariance[0], 0)
    with pytest.raises(ValueError, match=r"mean should have shape \(T, B, z_dim\); got \(3, 3\)"):
        kalman.predictive_observation(params, filtered.mean[0], filtered.covariance[0])
    with pytest.raises(ValueError, match="noise_x should have shape"):
        kalman.simulate(params, torch.zeros(T, B, Z).double(), torch.zeros(T, B, 5).double(), control)
    with pytest.raises(ValueError, match=r"message.h should have last sizes z_dim = 3"):
        message = kalman.Information(params.P0, params.m0[0, :2], params.m0[0, 0])
        kalman.condition(params.m0[0], params.P0, message)
