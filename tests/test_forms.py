"""The forms of the Kalman filter and smoother against each other and the dense joint Gaussian."""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kalman import Problem, dense_joint, random_problem
from torch import Tensor

from dynavae.exact import _native, _riccati, forms, kalman, recurrence, shared
from dynavae.exact._algebra import Congruence
from dynavae.exact.kalman import LinearGaussian, kalman_filter, kalman_smoother
from dynavae.exact.recurrence import congruence_recurrence, linear_recurrence
from dynavae.exact.scan import associative_scan
from dynavae.tree import tree_map

close = torch.testing.assert_close
numba = pytest.mark.skipif(not _native.installed(), reason="Numba is not installed")
GENERAL = ["joseph", "square_root", "parallel", pytest.param("compiled", marks=numba)]
AUTO = ["auto", "auto without Numba"]
SHARED = ["shared", "shared without Numba"]


def run(problem: Problem, method: str) -> tuple[kalman.Filtered, kalman.Smoothed]:
    without = mock.patch.object(_native, "installed", return_value=False)
    with without if method.endswith("without Numba") else contextlib.nullcontext():
        method = method.split()[0]
        filtered = kalman_filter(*problem, method=method)
        return filtered, kalman_smoother(problem.params, filtered, method=method)


def constant(problem: Problem) -> Problem:
    """The same for all steps and sequences."""
    cores = {name: 1 if name in ("m0", "b", "d") else 2 for name in LinearGaussian._fields}
    values = {
        name: None if value is None else value[(0,) * (value.ndim - cores[name])]
        for name, value in problem.params._asdict().items()
    }
    return problem._replace(params=LinearGaussian(**values))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("T", [1, 2, 3, 4, 7, 16, 33])
def test_scan_of_products(T, reverse):
    """Matrix products do not commute, so the order is tested too; each is what a loop gives."""
    matrices = torch.randn(T, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(T))
    got, count = associative_scan(
        lambda i, j: (j[0] @ i[0], i[1] + j[1]), (matrices, torch.ones(T)), reverse=reverse
    )
    for t in range(T):
        product = torch.eye(3, dtype=torch.float64)
        for matrix in matrices[t:] if reverse else matrices[: t + 1]:
            product = matrix @ product
        close(got[t], product)
        assert count[t] == (T - t if reverse else t + 1)


def test_scan_refuses_elements_of_different_lengths():
    with pytest.raises(ValueError, match=r"one length along time, at least 1; got \[2, 3\]"):
        associative_scan(lambda i, j: i, (torch.zeros(2), torch.zeros(3)))
    with pytest.raises(ValueError, match=r"got \[0\]"):
        associative_scan(torch.add, torch.zeros(0))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("T", "z", "n"), [(1, 2, 3), (5, 3, 1), (60, 2, 2), (60, 7, 3), (50, 3, 400)])
def test_recurrences_are_loops(T, z, n, reverse):
    """In blocks, by the loop in place and by a scan; with gradients."""
    g = torch.Generator().manual_seed(T)
    F = (torch.randn(T, 2, z, z, generator=g, dtype=torch.float64) / z).requires_grad_()
    v, V = (torch.randn(T, 2, z, m, generator=g, dtype=torch.float64).requires_grad_() for m in (n, z))
    h, P = [v[-1] if reverse else v[0]], [V[-1] if reverse else V[0]]
    for t in range(T - 2, -1, -1) if reverse else range(1, T):
        h.append(F[t] @ h[-1] + v[t])
        P.append(F[t] @ P[-1] @ F[t].mT + V[t])
    step = -1 if reverse else 1
    expected = torch.stack(h[::step]), torch.stack(P[::step])
    got = linear_recurrence(F, v, reverse), congruence_recurrence(F, V, reverse)
    weights = [torch.randn(a.shape, generator=g, dtype=torch.float64) for a in got]
    for ours, theirs in zip(got, expected, strict=True):
        close(ours, theirs)
    found = []
    for pair in (got, expected):
        total = sum((w * a).sum() for w, a in zip(weights, pair, strict=True))
        found.append(torch.autograd.grad(total, [F, v, V], materialize_grads=True))
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("T", "N", "n"), [(60, 1, 2), (90, 7, 1), (90, 30, 3), (40, 5, 400), (10, 4, 2)])
def test_the_last_matrix_is_that_of_all_later_steps(T, N, n, reverse):
    """By powers of it, and by the loop in place; with gradients."""
    g = torch.Generator().manual_seed(T)
    F = (torch.randn(N, 1, 3, 3, generator=g, dtype=torch.float64) / 3).requires_grad_()
    v = torch.randn(T, 1, 3, n, generator=g, dtype=torch.float64).requires_grad_()
    whole = torch.cat([F, F[-1:].expand(T - N, 1, 3, 3)])
    found = []
    for matrices in (F, whole):
        h = linear_recurrence(matrices, v, reverse)
        found.append((h, *torch.autograd.grad(h.square().sum(), [F, v])))
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("T", "z", "n"), [(25, 1, 1), (100, 3, 2), (128, 4, 1), (300, 5, 3)])
def test_doublings_of_a_constant_recurrence_are_its_blocks(T, z, n, reverse):
    g = torch.Generator().manual_seed(T)
    F = 0.97 * torch.linalg.qr(torch.randn(2, z, z, generator=g, dtype=torch.float64))[0]
    v, start = (torch.randn(*axes, 2, z, n, generator=g, dtype=torch.float64) for axes in ((T,), ()))
    got, expected = (
        way(F, v.clone(), start, reverse)
        for way in (recurrence._constant_doubled, recurrence._constant_blocks)
    )
    close(got, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_power_that_overflows_leaves_the_first_steps_alone(reverse):
    """5^512 is infinite, and infinity times the zero before the first step is not a number."""
    h = linear_recurrence(torch.full((1, 1, 1, 1), 5.0), torch.ones(1000, 1, 1, 1), reverse).flatten()
    h = h.flip(0) if reverse else h
    close(h[:6], torch.tensor([1.0, 6.0, 31.0, 156.0, 781.0, 3906.0]))


@pytest.mark.parametrize("z", [1, 4, 6, 7])
def test_a_congruence_as_one_product(z):
    """Of small matrices, and of too large ones as two; twice the same, too."""
    g = torch.Generator().manual_seed(z)
    F, P, V = (torch.randn(*axes, z, z, generator=g, dtype=torch.float64) for axes in ((), (5,), ()))
    P, V = P + P.mT, V + V.mT
    steps = Congruence(F)
    close(steps(P, V), F @ P @ F.mT + V)
    steps.square()
    close(steps(P, V), F @ F @ P @ (F @ F).mT + V)
    close(torch.tensor(steps.squared_norm()), (F @ F).square().sum().float())


def test_a_recurrence_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"F should have shape \(N, ..., z, z\), N <= T, for v"):
        linear_recurrence.__wrapped__(torch.zeros(5, 2, 2), torch.zeros(4, 2, 1))


@pytest.mark.parametrize("method", GENERAL)
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_every_form_is_the_dense_joint(method, seed, T, B, Z, X):
    """Filter, smoother, lag-one covariances and likelihood to 1e-8, with every kind of parameter, mask and length."""
    problem = random_problem(seed, T, B, Z, X)
    filtered, smoothed = run(problem, method)
    reference = kalman_filter(*problem, method="joseph")
    for name, ours, theirs in zip(kalman.Filtered._fields[:5], filtered, reference, strict=False):
        close(ours, theirs, atol=1e-8, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    for row in range(B):
        dense, x, observed = dense_joint(problem, row), problem.x[:, row], problem.observed[:, row]
        mean, covariance, log_p = dense.given(x, observed)
        blocks = covariance.reshape(T, Z, T, Z)
        close(smoothed.mean[:, row].flatten(), mean, atol=1e-8, rtol=1e-8)
        for t in range(T):
            close(smoothed.covariance[t, row], blocks[t, :, t], atol=1e-8, rtol=1e-8)
            if t + 1 < T:
                close(smoothed.cross_covariance[t, row], blocks[t + 1, :, t], atol=1e-8, rtol=1e-8)
        assert filtered.log_likelihood[:, row].sum().item() == pytest.approx(log_p, abs=1e-8)


def everything(problem: Problem, method: str) -> Tensor:
    """A number that depends on all that is returned, each with its own weight."""
    filtered, smoothed = run(problem, method)
    noise = torch.ones(len(problem.x), 1, *filtered.mean.shape[1:], dtype=torch.float64)
    paths = kalman.sample_posterior(problem.params, filtered, noise)
    g = torch.Generator().manual_seed(0)
    parts = (*filtered[:5], *smoothed[:4], paths)
    return sum((torch.randn(p.shape, generator=g, dtype=p.dtype) * p).sum() for p in parts)


def gradients(problem: Problem, method: str) -> list[Tensor]:
    leaves = [v.detach().clone().requires_grad_() for v in (*problem.params, problem.x, problem.control)]
    params = LinearGaussian(*leaves[:-2])
    total = everything(problem._replace(params=params, x=leaves[-2], control=leaves[-1]), method)
    found = torch.autograd.grad(total, leaves, materialize_grads=True)
    names = [*LinearGaussian._fields, "x", "control"]
    # A covariance is symmetric: only the symmetric part of its gradient means anything.
    return [g + g.mT if name in ("P0", "Q", "R") else g for name, g in zip(names, found, strict=True)]


@pytest.mark.parametrize("method", GENERAL[1:])
@settings(max_examples=12, deadline=None)
@given(st.integers(0, 999), st.integers(1, 7), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_every_form_has_the_gradient_of_the_joseph_form(method, seed, T, B, Z, X):
    problem = random_problem(seed, T, B, Z, X)
    names = [*LinearGaussian._fields, "x", "control"]
    for name, ours, theirs in zip(
        names, gradients(problem, method), gradients(problem, "joseph"), strict=True
    ):
        scale = max(1.0, theirs.abs().max().item())
        close(ours, theirs, atol=1e-8 * scale, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("method", [*SHARED, *GENERAL[3:], *AUTO])
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 999), st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3),
    st.sampled_from(["complete", "lengths", "gaps", "common gaps"]),
)  # fmt: skip
def test_a_constant_model_is_the_same_in_the_shared_form(method, seed, T, B, Z, X, mask):
    """Moments, likelihood and gradients, for sequences that share all, some or none of their gaps."""
    problem = constant(random_problem(seed, T, B, Z, X))
    observed = torch.ones_like(problem.observed)
    if mask == "lengths":
        observed = (torch.arange(T)[:, None] < torch.tensor([T, (T + 1) // 2, T])[torch.arange(B) % 3])[
            ..., None
        ]
        observed = observed.expand(T, B, X).contiguous()
    elif mask == "gaps":
        observed = problem.observed
    elif mask == "common gaps":
        observed = problem.observed[:, :1].expand(T, B, X).contiguous()
    problem = problem._replace(observed=observed)
    scale = 0.9 / torch.linalg.eigvals(problem.params.A).abs().amax().clamp(min=0.9)
    problem = problem._replace(params=problem.params._replace(A=problem.params.A * scale))
    reference = run(problem, "joseph")
    for ours, theirs in zip(run(problem, method), reference, strict=True):
        for name, a, b in zip(type(ours)._fields[:5], ours, theirs, strict=False):
            if a is not None:
                close(a, b, atol=1e-8, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    names = [*LinearGaussian._fields, "x", "control"]
    for name, ours, theirs in zip(
        names, gradients(problem, method), gradients(problem, "joseph"), strict=True
    ):
        size = max(1.0, theirs.abs().max().item())
        close(ours, theirs, atol=1e-8 * size, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("noise", [1.0, 1e-4, 0.0])
@pytest.mark.parametrize(("z", "T"), [(1, 40), (3, 400), (8, 300)])
@pytest.mark.parametrize("method", SHARED)
def test_a_long_constant_model_takes_no_steps(z, T, noise, method, monkeypatch):
    """Covariances by doublings, also of observations without noise; smoothed ones side by side, if they have some."""
    g = torch.Generator().manual_seed(z)
    normal = [torch.randn(*axes, generator=g, dtype=torch.float64) for axes in ((z, z), (1, z), (T, 2, 1))]
    eye, A = torch.eye(z, dtype=torch.float64), 0.9 * torch.linalg.qr(normal[0])[0]
    params = LinearGaussian(m0=eye[0], P0=eye, A=A, Q=eye, C=normal[1], R=noise * eye[:1, :1])
    reference = run(Problem(params, normal[2], None, None), "joseph")
    monkeypatch.setattr(_riccati, "_loop", None)
    if noise == 1.0 and T > 100:
        monkeypatch.setattr(shared, "congruence_recurrence", None)
    for ours, theirs in zip(run(Problem(params, normal[2], None, None), method), reference, strict=True):
        for name, a, b in zip(type(ours)._fields[:5], ours, theirs, strict=False):
            if a is not None:
                close(a, b, atol=1e-10, rtol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("T", [1, 2, 30, 200])
@pytest.mark.parametrize("gaps", [False, True])
def test_what_was_computed_without_a_gradient_can_enter_one(T, gaps):
    """Autograd refuses tensors of inference mode."""
    problem = constant(random_problem(1, T, 3, 2, 2))
    if not gaps:
        problem = problem._replace(observed=torch.ones_like(problem.observed))
    with torch.no_grad():
        results = run(problem, AUTO[1])
    for value in (a for result in results for a in result if isinstance(a, Tensor)):
        assert not value.is_inference()
        factor = torch.ones((), dtype=value.dtype, requires_grad=True)
        (gradient,) = torch.autograd.grad((factor * value).sum(), factor)
        close(gradient, value.sum())


def test_the_derivative_of_a_start_in_the_steady_state():
    """P0 is where the covariances stay, so their values do not move, but their derivatives do."""
    params = constant(random_problem(5, 50, 2, 2, 2)).params._replace(B=None, D=None)
    params = params._replace(A=0.8 * params.A / torch.linalg.eigvals(params.A).abs().amax())
    x = torch.randn(120, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    settled = kalman_filter(params, x, method="joseph").predicted_covariance[-1, 0]
    problem = Problem(params._replace(P0=settled), x, torch.ones_like(x, dtype=torch.bool), None)
    found = []
    for method in (*SHARED, "joseph"):
        free = LinearGaussian(*(None if a is None else a.clone().requires_grad_() for a in problem.params))
        filtered, smoothed = run(problem._replace(params=free), method)
        total = filtered.log_likelihood.sum() + smoothed.covariance.square().sum() + filtered.covariance.sum()
        found.append(torch.autograd.grad(total, [free.P0, free.A, free.Q, free.C, free.R]))
    for ours, theirs in [pair for other in found[:2] for pair in zip(other, found[2], strict=True)]:
        close(ours + ours.mT if ours.shape == ours.mT.shape else ours,
              theirs + theirs.mT if theirs.shape == theirs.mT.shape else theirs, rtol=1e-9, atol=1e-9)  # fmt: skip


@pytest.mark.parametrize("method", GENERAL[1:])
def test_gradcheck(method):
    params, x, observed, control = random_problem(8, T=3, B=2, Z=2, X=2, U=1)
    roots = [torch.linalg.cholesky(M) for M in (params.P0, params.Q, params.R)]

    def moments(x: Tensor, P0: Tensor, Q: Tensor, R: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        names = ("m0", "A", "C", "B", "D", "b", "d")
        free = params._replace(P0=P0 @ P0.mT, Q=Q @ Q.mT, R=R @ R.mT, **dict(zip(names, others, strict=True)))
        filtered, smoothed = run(Problem(free, x, observed, control), method)
        noise = torch.ones(3, 1, 2, 2, dtype=torch.float64)
        return (*filtered[:5], *smoothed[:4], kalman.sample_posterior(free, filtered, noise))

    p = params
    inputs = [x, *roots, p.m0, p.A, p.C, p.B, p.D, p.b, p.d]
    assert torch.autograd.gradcheck(moments, [v.detach().clone().requires_grad_() for v in inputs])


@pytest.mark.parametrize("method", [*AUTO, *GENERAL])
def test_what_is_not_observed_enters_nothing(method):
    problem = random_problem(9)
    expected = everything(problem, method)
    for junk in (math.nan, math.inf, 1e30):
        spoiled = problem._replace(x=problem.x.masked_fill(~problem.observed, junk))
        assert torch.equal(everything(spoiled, method), expected)
        found = gradients(spoiled, method)
        assert all(g.isfinite().all() for g in found)
        assert (found[-2][~problem.observed] == 0).all() and (found[-2][problem.observed] != 0).any()


def singular(T: int = 12, B: int = 2) -> Problem:
    """Noise-free position, a constant that is known, a copy of another state, noise of rank one; R is positive."""
    g = torch.Generator().manual_seed(0)
    A = torch.tensor(
        [[1.0, 0.5, 0, 0, 0], [0, 0.9, 0.1, 0, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0.5]]
    ).double()
    Q = torch.zeros(5, 5, dtype=torch.float64)
    shock = torch.tensor([0.0, 1.0, 0, 0, 0.5], dtype=torch.float64)
    Q += 0.3 * torch.outer(shock, shock)
    P0 = torch.diag(torch.tensor([0.0, 1.0, 0.0, 0.0, 0.25], dtype=torch.float64))
    C = torch.randn(2, 5, generator=g, dtype=torch.float64)
    params = LinearGaussian(torch.zeros(5).double(), P0, A, Q, C, 0.2 * torch.eye(2).double(),
                            B=torch.zeros(5, 1).double())  # fmt: skip
    x = torch.randn(T, B, 2, generator=g, dtype=torch.float64)
    observed = torch.rand(T, B, 2, generator=g) < 0.7
    return Problem(params, x, observed, torch.zeros(T, B, 1, dtype=torch.float64))


@pytest.mark.parametrize("method", [*AUTO, *GENERAL])
def test_singular_covariances(method):
    problem = singular()
    filtered, smoothed = run(problem, method)
    T, B, Z = filtered.mean.shape
    for row in range(B):
        dense = dense_joint(problem._replace(params=problem.params._replace(B=None)), row)
        mean, covariance, log_p = dense.given(problem.x[:, row], problem.observed[:, row])
        blocks = covariance.reshape(T, Z, T, Z)
        close(smoothed.mean[:, row].flatten(), mean, atol=1e-8, rtol=1e-8)
        for t in range(T):
            close(smoothed.covariance[t, row], blocks[t, :, t], atol=1e-8, rtol=1e-8)
            if t + 1 < T:
                close(smoothed.cross_covariance[t, row], blocks[t + 1, :, t], atol=1e-8, rtol=1e-8)
        assert filtered.log_likelihood[:, row].sum().item() == pytest.approx(log_p, abs=1e-8)
    noise = torch.randn(T, 4000, B, Z, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    paths = kalman.sample_posterior(problem.params, filtered, noise)
    variance = smoothed.covariance.diagonal(dim1=-2, dim2=-1)
    assert ((paths.mean(1) - smoothed.mean).abs() <= 6 * (variance / 4000).clamp(min=0).sqrt() + 1e-6).all()
    bar = 6 * variance * (2 / 4000) ** 0.5 + 1e-6
    assert (((paths - smoothed.mean.unsqueeze(1)).square().mean(1) - variance).abs() <= bar).all()


@pytest.mark.parametrize("method", ["auto", *GENERAL])
def test_gradients_with_singular_covariances_are_differences_of_the_dense_likelihood(method):
    problem = singular(T=6, B=1)
    problem = problem._replace(params=problem.params._replace(B=None))

    def log_p(A: Tensor) -> float:
        varied = problem._replace(params=problem.params._replace(A=A))
        return dense_joint(varied, 0).given(problem.x[:, 0], problem.observed[:, 0])[2]

    A = problem.params.A.clone().requires_grad_()
    free = problem.params._replace(A=A)
    filtered = kalman_filter(free, problem.x, problem.observed, method=method)
    smoothed = kalman_smoother(free, filtered, method=method)
    (grad,) = torch.autograd.grad(filtered.log_likelihood.sum(), A, retain_graph=True)
    (other,) = torch.autograd.grad(smoothed.mean.sum() + smoothed.covariance.sum(), A)
    assert other.isfinite().all()
    for i, j in ((0, 1), (1, 1), (3, 1)):
        step = torch.zeros(5, 5, dtype=torch.float64)
        step[i, j] = 1e-5
        difference = (log_p(problem.params.A + step) - log_p(problem.params.A - step)) / 2e-5
        assert grad[i, j].item() == pytest.approx(difference, abs=1e-6, rel=1e-6)


def test_square_root_is_accurate_in_float32_where_the_joseph_form_is_not():
    """Vague start, exact observations, smooth trajectory: covariances of condition 1e12."""
    dt = 0.01
    A = torch.tensor([[1, dt, dt**2 / 2], [0, 1, dt], [0, 0, 1]]).double()
    shape = torch.tensor([dt**2 / 2, dt, 1.0]).double()
    params = LinearGaussian(
        torch.zeros(3).double(), 1e4 * torch.eye(3).double(), A,
        1e-2 * (torch.outer(shape, shape) + 1e-4 * torch.diag(shape**2)),
        torch.tensor([[1.0, 0, 0]]).double(), 1e-8 * torch.eye(1).double(),
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    single = LinearGaussian(*(None if a is None else a.float() for a in params))
    noise = [torch.randn(300, 1, n, dtype=torch.float64, generator=g) for n in (3, 1)]
    x = kalman.simulate(params._replace(P0=torch.eye(3).double()), *noise).x.float()
    double = LinearGaussian(*(None if a is None else a.double() for a in single))
    exact, smooth = run(Problem(double, x.double(), None, None), "square_root")
    filtered, smoothed = run(Problem(single, x, None, None), "square_root")
    assert (filtered.factor.diagonal(dim1=-2, dim2=-1) > 0).all()
    variance = exact.covariance.diagonal(dim1=-2, dim2=-1)
    close(filtered.covariance.diagonal(dim1=-2, dim2=-1).double(), variance, rtol=1e-3, atol=0)
    close(filtered.log_likelihood.sum().double(), exact.log_likelihood.sum(), rtol=1e-3, atol=0)
    sd = smooth.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    close(smoothed.covariance.diagonal(dim1=-2, dim2=-1).double().sqrt(), sd, rtol=1e-2, atol=0)
    with pytest.raises((ValueError, AssertionError)):
        plain = kalman_filter(single, x, method="joseph")
        close(plain.covariance.diagonal(dim1=-2, dim2=-1).double(), variance, rtol=1e-3, atol=0)


def test_refusals():
    params, x, observed, control = random_problem(3)
    with pytest.raises(ValueError, match=r"method should be 'auto' or one of 'joseph', .*; got 'fast'"):
        kalman_filter(params, x, observed, control, method="fast")
    filtered = kalman_filter(params, x, observed, control, method="joseph")
    with pytest.raises(ValueError, match=r"method should be 'auto' or one of"):
        kalman_smoother(params, filtered, method="fast")
    with pytest.raises(ValueError, match=r"smooths factors, which filtered does not have; filter with"):
        kalman_smoother(params, filtered, method="square_root")
    with pytest.raises(ValueError, match=r"params.Q is not positive semidefinite"):
        kalman_filter(params._replace(Q=-params.Q), x, observed, control, method="square_root")
    known = params._replace(R=torch.zeros(2, 2).double(), P0=torch.zeros(3, 3).double())
    with pytest.raises(ValueError, match=r"S_t = C P C' \+ R is singular at t=0, sequence 0"):
        kalman_filter(known, x, torch.ones_like(observed), control, method="square_root")
    fixed = params._replace(R=torch.zeros(2, 2).double(), Q=torch.zeros(3, 3).double())
    with pytest.raises(
        ValueError, match=r"C Q C' \+ R, which the parallel form needs, is not positive definite"
    ):
        kalman_filter(fixed, x, observed, control, method="parallel")
    if _native.installed():
        with pytest.raises(
            ValueError, match=r"S_t = C P C' \+ R is not positive definite at t=0, sequence 1"
        ):
            bad = params._replace(P0=torch.stack([params.P0, -9 * params.P0, params.P0]))
            kalman_filter(bad, x, torch.ones_like(observed), control, method="compiled")
        indefinite = filtered.predicted_covariance.clone()
        indefinite[3, 2] *= -1
        wrong = filtered._replace(predicted_covariance=indefinite)
        with pytest.raises(
            ValueError, match=r"P_\{t\+1\|t\} = .* not positive semidefinite at t=3, sequence 2"
        ):
            kalman_smoother(params, wrong, method="compiled")
    with mock.patch.object(_native, "installed", return_value=False):
        with pytest.raises(ValueError, match=r"method='compiled' needs tensors on a CPU, and Numba \(pip"):
            kalman_filter(params, x, observed, control, method="compiled")
    varied = "but params.m0 is not"
    with pytest.raises(ValueError, match=rf"method='shared' needs a model that is the same .*{varied}"):
        kalman_filter(params, x, observed, control, method="shared")
    with (
        torch.enable_grad(),
        pytest.raises(RuntimeError, match="can be differentiated once only: for second"),
    ):
        m0 = params.m0.clone().requires_grad_()
        P0 = params.P0.clone().requires_grad_()
        total = kalman_filter(
            params._replace(m0=m0, P0=P0), x, observed, control, method="square_root"
        ).mean.sum()
        (first,) = torch.autograd.grad(total, P0, create_graph=True)
        first.sum().backward()


@numba
def test_compiled_computes_in_float64():
    problem = random_problem(4, T=40)
    single = tree_map(lambda a: a.float() if a.is_floating_point() else a, problem)
    exact = run(tree_map(lambda a: a.double() if a.is_floating_point() else a, single), "joseph")
    for ours, theirs in zip(run(single, "compiled"), exact, strict=True):
        assert ours.mean.dtype == torch.float32
        for name, a, b in zip(type(ours)._fields[:4], ours, theirs, strict=False):
            close(a, b.float(), rtol=2e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@numba
@pytest.mark.parametrize("share", [False, True])
def test_compiled_in_threads_is_compiled_in_one(share, monkeypatch):
    """Parameters that sequences share have a gradient from each thread."""
    problem = random_problem(6, T=5, B=5)
    problem = constant(problem) if share else problem
    alone, grads = everything(problem, "compiled"), gradients(problem, "compiled")
    bad = problem.params._replace(P0=torch.stack([problem.params.P0 * sign for sign in (1, 1, -9, 1, -9)]))
    seen = torch.ones_like(problem.observed)
    monkeypatch.setattr(_native, "PART", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    close(everything(problem, "compiled"), alone, rtol=1e-14, atol=0)
    for ours, theirs in zip(gradients(problem, "compiled"), grads, strict=True):
        close(ours, theirs, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="at t=0, sequence 2"):
        kalman_filter(bad, problem.x, seen, problem.control, method="compiled")


def test_the_form_that_auto_takes():
    eye = torch.eye(4)
    walk = LinearGaussian(torch.zeros(4), eye, eye, eye, eye[:2], eye[:2, :2])
    varied = walk._replace(A=eye.expand(1000, 1, 4, 4))
    large = LinearGaussian(*(torch.zeros(41), *[torch.eye(41)] * 5))
    observed = torch.ones(1000, 64, 2, dtype=torch.bool)
    assert forms.patterns(observed) == 0
    observed[900] = False
    assert forms.patterns(observed) == 1
    observed[:500, 7] = observed[3:, 9, 1] = False
    assert forms.patterns(observed) == 3
    with mock.patch.object(_native, "installed", return_value=True):
        assert forms.choose(walk, 1000, 1) == forms.choose(varied, 1000, 64) == "compiled"
        assert [forms.choose(walk, 1000, 64, patterns) for patterns in (0, 3, 64)] == [
            "shared",
            "shared",
            "compiled",
        ]
        assert forms.choose(large, 9, 64, 64) == "joseph"
        assert forms.choose(walk, 9000, 1, 1) == "compiled" and forms.choose(walk, 9000, 1) == "shared"
        with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
            assert forms.choose(walk, 1000, 1) == "shared"
    with mock.patch.object(_native, "installed", return_value=False):
        found = [
            forms.choose(walk, 1000, 1),
            forms.choose(walk, 9, 1),
            forms.choose(varied, 1000, 1),
            forms.choose(varied, 9, 1),
        ]
        assert found == ["shared", "joseph", "parallel", "joseph"]


@pytest.mark.parametrize("method", ["auto", pytest.param("compiled", marks=numba)])
def test_second_derivatives(method):
    """Those of the Joseph form, of the filter and of the smoother, where the first derivative that comes in is constant."""
    problem = random_problem(2, T=4, B=2, Z=2, X=2)

    def hessian(method: str) -> Tensor:
        C = problem.params.C.clone().requires_grad_()
        filtered, smoothed = run(problem._replace(params=problem.params._replace(C=C)), method)
        total = filtered.log_likelihood.sum() + smoothed.mean.sum() + smoothed.covariance.sum()
        (first,) = torch.autograd.grad(total, C, create_graph=True)
        return torch.autograd.grad(first.square().sum(), C)[0]

    close(hessian(method), hessian("joseph"), rtol=1e-8, atol=1e-8)


def test_a_form_that_is_differentiable_once_says_so():
    problem = constant(random_problem(1, T=30))
    A = problem.params.A.clone().requires_grad_()
    total = kalman_filter(
        problem.params._replace(A=A), problem.x, problem.observed, problem.control, method="shared"
    )
    with pytest.raises(RuntimeError, match="give kalman_filter and kalman_smoother method='joseph'"):
        torch.autograd.grad(total.log_likelihood.sum(), A, create_graph=True)


@numba
def test_the_smoother_alone_has_the_partial_derivatives_of_the_joseph_form():
    problem = random_problem(3)
    filtered = kalman_filter(*problem, method="joseph")

    def partial(method: str) -> tuple[Tensor, ...]:
        free = [a.clone().requires_grad_() for a in (problem.params.A, problem.params.Q, *filtered[:4])]
        params = problem.params._replace(A=free[0], Q=free[1])
        smoothed = kalman_smoother(params, kalman.Filtered(*free[2:], filtered.log_likelihood), method=method)
        g = torch.Generator().manual_seed(0)
        total = sum((torch.randn(a.shape, generator=g, dtype=a.dtype) * a).sum() for a in smoothed[:4])
        made = torch.autograd.grad(total, free)
        return tuple(a + a.mT if a.shape[-1] == a.shape[-2] and i != 0 else a for i, a in enumerate(made))

    for i, (ours, theirs) in enumerate(zip(partial("compiled"), partial("joseph"), strict=True)):
        close(ours, theirs, rtol=1e-8, atol=1e-8, msg=lambda text, i=i: f"input {i}: {text}")


def test_the_smoother_refuses_moments_of_other_lengths():
    problem = random_problem(3)
    filtered = kalman_filter(*problem)
    short = filtered._replace(predicted_covariance=filtered.predicted_covariance[:4])
    with pytest.raises(
        ValueError, match=r"filtered.predicted_covariance should have shape \(T, B, z_dim, z_dim\)"
    ):
        kalman_smoother(problem.params, short)


@numba
def test_a_numba_that_does_not_work_is_left_alone():
    from dynavae.exact import _numba

    with (
        mock.patch.object(_numba, "probe", side_effect=OSError("no llvmlite")),
        pytest.warns(UserWarning, match=r"Numba is installed, but does not work \(OSError: no llvmlite\)"),
    ):
        assert not _native.installed.__wrapped__()
    with mock.patch.object(_native.importlib.util, "find_spec", return_value=None):
        assert not _native.installed.__wrapped__()
    made = _numba._dispatcher(lambda a: a + 1)  # has no file to put a cache beside
    assert made(1) == 2


def test_tensors_of_inference_mode_and_transforms():
    problem = random_problem(3)
    with torch.inference_mode():
        observed = problem.observed.clone()
    A = problem.params.A.clone().requires_grad_()

    def total(A: Tensor) -> Tensor:
        params = problem.params._replace(A=A)
        return kalman_filter(params, problem.x, observed, problem.control).log_likelihood.sum()

    (expected,) = torch.autograd.grad(total(A), A)
    close(torch.func.grad(total)(A.detach()), expected, rtol=1e-9, atol=1e-9)
