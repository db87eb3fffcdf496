"""Structured mean field of switching dynamics: each factor against enumeration and dense joints."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dynavae.exact import kalman
from dynavae.exact.conjugate import MNIW, ExpectedNormal
from dynavae.exact.switching import (
    Moments,
    SwitchingDynamics,
    _average,
    _backward,
    conditionals,
    log_evidence,
    mean_field,
    moments,
    products,
)

close = torch.testing.assert_close
S, N, R, T = 2, 2, 2, 4


def spd(g, *lead, size=N):
    a = torch.randn(*lead, size, size, generator=g, dtype=torch.float64)
    return a @ a.mT / size + 0.3 * torch.eye(size, dtype=torch.float64)


def case(expected=False, modes=S, seed=0):
    """Dynamics of random modes, node potentials with a missing frame, and regressors (u, 1)."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    if expected:
        first = MNIW(
            rand(modes, N, 1), spd(g, modes, size=1), spd(g, modes), torch.full((modes,), 5.0).double()
        )
        transition = MNIW(
            0.6 * rand(modes, N, N + R),
            spd(g, modes, size=N + R),
            spd(g, modes),
            torch.full((modes,), 6.5).double(),
        )
        first, transition = first.expected(), transition.expected()
    else:
        first = ExpectedNormal.known(rand(modes, N, 1), spd(g, modes))
        transition = ExpectedNormal.known(0.6 * rand(modes, N, N + R), spd(g, modes))
    dynamics = SwitchingDynamics(
        first, transition, rand(modes).log_softmax(-1), rand(modes, modes).log_softmax(-1)
    )
    J, h = rand(T, 1, N).square(), rand(T, 1, N)
    J[1], h[1] = 0.0, 0.0
    u = torch.cat([rand(T, 1, R - 1), torch.ones(T, 1, 1).double()], -1)
    return dynamics, J, h, u


def dense(dynamics, weights, J, h, u):
    """Precision and linear term of the joint of z_1:T under weights (T, S) of the modes."""
    P, lin = torch.zeros(T * N, T * N).double(), torch.zeros(T * N).double()
    for t in range(T):
        now, before = slice(t * N, t * N + N), slice(t * N - N, t * N)
        P[now, now] += torch.diag(J[t])
        lin[now] += h[t]
        e = dynamics.transition if t else dynamics.first
        for k in range(len(weights[t])):
            w = weights[t, k]
            P[now, now] += w * e.precision[k]
            if not t:
                lin[now] += w * e.linear[k, :, 0]
                continue
            P[now, before] -= w * e.linear[k, :, :N]
            P[before, now] -= w * e.linear[k, :, :N].T
            P[before, before] += w * e.quadratic[k, :N, :N]
            lin[now] += w * e.linear[k, :, N:] @ u[t]
            lin[before] -= w * e.quadratic[k, :N, N:] @ u[t]
    return P, lin


def dense_moments(dynamics, weights, J, h, u):
    P, lin = dense(dynamics, weights, J, h, u)
    covariance = torch.linalg.inv(P)
    return covariance @ lin, covariance


@pytest.mark.parametrize("expected", [False, True])
def test_states_are_those_of_the_dense_joint(expected):
    dynamics, J, h, u = case(expected)
    g = torch.Generator().manual_seed(1)
    gamma = torch.randn(T, 1, S, generator=g, dtype=torch.float64).softmax(-1)
    inside = torch.ones(T, 1, dtype=torch.bool)
    messages = _backward(_average(gamma, dynamics.transition, u), J, h, inside)
    q = moments(conditionals(dynamics, gamma, *messages, u))
    mean, covariance = dense_moments(dynamics, gamma[:, 0], J[:, 0], h[:, 0], u[:, 0])
    close(q.mean[:, 0].flatten(), mean)
    for t in range(T):
        now, before = slice(t * N, t * N + N), slice(t * N - N, t * N)
        close(q.covariance[t, 0], covariance[now, now])
        if t:
            close(q.cross[t, 0], covariance[now, before])


@pytest.mark.parametrize("expected", [False, True])
def test_modes_are_those_of_an_enumeration(expected):
    """q(s) is proportional to exp E_q(z)[log p(s, z)], and the expectation is right at a state that is known."""
    dynamics, J, h, u = case(expected)
    q = mean_field(J, h, u, dynamics, sweeps=0)
    z = moments(conditionals(dynamics, q.gamma, q.precision, q.linear, u))
    evidence = log_evidence(dynamics, z, u)[:, 0]
    paths = torch.tensor(list(itertools.product(range(S), repeat=T)))
    log_p = dynamics.log_initial[paths[:, 0]] + evidence[range(T), paths].sum(-1)
    for t in range(1, T):
        log_p = log_p + dynamics.log_transition[paths[:, t - 1], paths[:, t]]
    p = log_p.softmax(0)
    after = mean_field(J, h, u, dynamics, sweeps=1)
    for t in range(T):
        share = torch.stack([p[paths[:, t] == k].sum() for k in range(S)])
        close(after.gamma[t, 0], share)
        if t:
            pairs = [
                [p[(paths[:, t - 1] == j) & (paths[:, t] == k)].sum() for k in range(S)] for j in range(S)
            ]
            close(after.xi[t - 1, 0], torch.tensor(pairs).double())


def test_expected_log_densities_are_averages_over_states():
    """Of samples of z, within 6 standard errors; parameters are known here."""
    dynamics, J, h, u = case()
    q = mean_field(J, h, u, dynamics)
    chain = conditionals(dynamics, q.gamma, q.precision, q.linear, u)
    g = torch.Generator().manual_seed(3)
    z = [chain.f[0] + torch.randn(20000, 1, N, generator=g, dtype=torch.float64) @ chain.L[0].mT]
    for t in range(1, T):
        e = torch.randn(20000, 1, N, generator=g, dtype=torch.float64)
        z.append(z[-1] @ chain.F[t].mT + chain.f[t] + e @ chain.L[t].mT)
    z = torch.stack(z).squeeze(2)  # (T, 20000, N)
    fixed = Moments(z, z.new_zeros(*z.shape, N), z.new_zeros(*z.shape, N))
    each = log_evidence(dynamics, fixed, u.expand(-1, 20000, -1))
    found = log_evidence(dynamics, moments(chain), u)
    error = each.std(1) / 20000**0.5
    assert bool(((each.mean(1) - found[:, 0]).abs() < 6 * error).all())
    M = torch.linalg.solve(dynamics.transition.precision, dynamics.transition.linear)
    w = torch.cat([z[0], u[1].expand(20000, -1)], -1)
    p = torch.distributions.MultivariateNormal(w @ M[1].mT, precision_matrix=dynamics.transition.precision[1])
    close(each[1, :, 1], p.log_prob(z[1]))


def bound(dynamics, q, J, h, u):
    """E_q[log p(s, z) psi(z)] + H[q(s)] + H[q(z)], from dense joints."""
    z = moments(conditionals(dynamics, q.gamma, q.precision, q.linear, u))
    gamma, xi = q.gamma[:, 0], q.xi[:, 0]
    value = (gamma * log_evidence(dynamics, z, u)[:, 0]).sum()
    value = value + gamma[0] @ dynamics.log_initial + (xi * dynamics.log_transition).sum()
    zz, *_ = products(z, u)
    value = value - 0.5 * (J[:, 0] * zz[:, 0].diagonal(dim1=-2, dim2=-1)).sum() + (h * z.mean).sum()
    entropy = -(xi * xi.log()).sum() + (gamma[1:-1] * gamma[1:-1].log()).sum()
    P, _ = dense(dynamics, gamma, J[:, 0], h[:, 0], u[:, 0])
    return value + entropy + 0.5 * (T * N * math.log(2 * math.pi * math.e) - torch.logdet(P))


@pytest.mark.parametrize("expected", [False, True])
def test_every_sweep_raises_a_lower_bound(expected):
    dynamics, J, h, u = case(expected)
    values = [float(bound(dynamics, mean_field(J, h, u, dynamics, sweeps=i), J, h, u)) for i in range(1, 9)]
    assert all(b >= a - 1e-10 for a, b in itertools.pairwise(values))
    assert values[-1] > values[0] + 1e-6
    # log Z, by the sum over all paths of modes
    terms = []
    for path in itertools.product(range(S), repeat=T):
        weights = torch.nn.functional.one_hot(torch.tensor(path), S).double()
        P, lin = dense(dynamics, weights, J[:, 0], h[:, 0], u[:, 0])
        rest = (
            0.5 * lin @ torch.linalg.solve(P, lin)
            - 0.5 * torch.logdet(P)
            + 0.5 * T * N * math.log(2 * math.pi)
        )
        for t, k in enumerate(path):
            e = dynamics.transition if t else dynamics.first
            w = u[t, 0] if t else torch.ones(1).double()
            quadratic = e.quadratic[k, N:, N:] if t else e.quadratic[k]
            rest = rest + 0.5 * (e.log_det[k] - N * math.log(2 * math.pi) - w @ quadratic @ w)
            rest = rest + (dynamics.log_transition[path[t - 1], k] if t else dynamics.log_initial[k])
        terms.append(rest)
    log_Z = float(torch.stack(terms).logsumexp(0))
    assert values[-1] < log_Z


def test_one_mode_is_exact():
    dynamics, J, h, u = case(modes=1)
    J, h = J + 0.1, h + 0.1
    q = mean_field(J, h, u, dynamics)
    z = moments(conditionals(dynamics, q.gamma, q.precision, q.linear, u))
    e = dynamics.transition
    M = torch.linalg.solve(e.precision, e.linear)[0]
    P0, Q = (torch.linalg.inv(part.precision[0]) for part in (dynamics.first, e))
    m0 = (P0 @ dynamics.first.linear[0]).squeeze(-1)
    params = kalman.LinearGaussian(
        m0, P0, M[:, :N], Q, torch.eye(N).double(), torch.diag_embed(1 / J), M[:, N:]
    )
    smoothed = kalman.kalman_smoother(params, kalman.kalman_filter(params, h / J, control=u))
    close(z.mean, smoothed.mean)
    close(z.covariance, smoothed.covariance)


def test_what_comes_after_the_end_changes_nothing():
    dynamics, J, h, u = case()
    short = mean_field(J[:3], h[:3], u[:3], dynamics)
    long = mean_field(J, h, u, dynamics, lengths=torch.tensor([3]))
    for a, b in zip(short, long, strict=True):
        close(a, b[: len(a)])


def test_gradients_flow_through_the_sweeps():
    dynamics, J, h, u = case()

    def f(J, h):
        q = mean_field(J, h, u, dynamics, sweeps=2)
        return q.gamma, q.precision, q.linear

    assert torch.autograd.gradcheck(f, (J.clone().requires_grad_(), h.clone().requires_grad_()))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(J=torch.ones(3, 2)), r"J should have shape \(T, B, z_dim\)"),
        (dict(h=torch.ones(1, 1, N).double()), "h should have shape"),
        (dict(u=torch.ones(T, 1, 5).double()), r"u should have shape \(T, B, k - z_dim\) = \(4, 1, 2\)"),
        (dict(lengths=torch.ones(3).long()), r"lengths should have shape \(B,\)"),
        (dict(sweeps=-1), "sweeps should be 0 or more; got -1"),
    ],
)
def test_what_it_refuses(change, match):
    dynamics, J, h, u = case()
    with pytest.raises(ValueError, match=match):
        mean_field(**{**dict(J=J, h=h, u=u, dynamics=dynamics), **change})
