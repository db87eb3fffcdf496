"""Conjugate families against scipy, derivatives of their normalisers, and posteriors in closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats

from dynavae.exact.conjugate import MNIW, Dirichlet, ExpectedNormal, step

close = torch.testing.assert_close
N, K = 2, 3


def spd(g, size):
    a = torch.randn(size, size, generator=g, dtype=torch.float64)
    return a @ a.mT / size + 0.5 * torch.eye(size, dtype=torch.float64)


def member(seed=0, dof=6.0):
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(N, K, generator=g, dtype=torch.float64)
    return MNIW(mean, spd(g, K), spd(g, N), torch.tensor(dof, dtype=torch.float64))


def draws(q, number=20000, seed=0):
    """Samples of Sigma by scipy, and of A given each."""
    Sigma = stats.invwishart(float(q.dof), q.scale.numpy()).rvs(number, random_state=seed)
    Sigma = torch.as_tensor(Sigma)
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(number, N, K, generator=g, dtype=torch.float64)
    right = torch.linalg.cholesky(torch.linalg.inv(q.rows))
    return q.mean + torch.linalg.cholesky(Sigma) @ noise @ right.mT, Sigma


def log_density(q, A, Sigma):
    """Of an MNIW, by scipy."""
    iw = stats.invwishart(float(q.dof), q.scale.numpy())
    out = []
    for a, s in zip(A, Sigma, strict=True):
        normal = stats.matrix_normal(q.mean.numpy(), s.numpy(), torch.linalg.inv(q.rows).numpy())
        out.append(iw.logpdf(s.numpy()) + normal.logpdf(a.numpy()))
    return torch.tensor(out)


def test_natural_parameters_and_back():
    q = member()
    close(tuple(MNIW.from_natural(*q.natural())), tuple(q))
    d = Dirichlet(torch.tensor([0.5, 2.0]))
    assert Dirichlet.from_natural(*d.natural()) is not d
    close(Dirichlet.from_natural(*d.natural()).counts, d.counts)


def test_expected_parameters_are_means_of_samples():
    """Within 6 standard errors of 20,000 draws."""
    q = member()
    A, Sigma = draws(q)
    precision = torch.linalg.inv(Sigma)
    e = q.expected()
    for each, found in (
        (precision, e.precision),
        (precision @ A, e.linear),
        (A.mT @ precision @ A, e.quadratic),
        (-torch.logdet(Sigma), e.log_det),
    ):
        error = each.std(0) / len(each) ** 0.5
        assert bool(((each.mean(0) - found).abs() < 6 * error).all())


def test_expected_parameters_are_derivatives_of_the_normaliser():
    q = member()

    def log_z(yy, yw, ww, count):
        return MNIW.from_natural(yy, yw, ww, count).log_normaliser()

    grads = torch.autograd.functional.jacobian(log_z, q.natural())
    e = q.expected()
    close(grads[0], -0.5 * e.precision)
    close(grads[1], e.linear)
    close(0.5 * (grads[2] + grads[2].mT), -0.5 * e.quadratic)
    close(grads[3], 0.5 * e.log_det)
    alpha = torch.tensor([0.4, 3.0, 1.5], dtype=torch.float64)
    close(torch.func.grad(lambda a: Dirichlet(a).log_normaliser())(alpha), Dirichlet(alpha).expected())


def test_divergences():
    """That of an MNIW is the mean of log q - log p by scipy; that of a Dirichlet is torch's."""
    q, p = member(), member(1, 4.5)
    A, Sigma = draws(q, 4000)
    each = log_density(q, A, Sigma) - log_density(p, A, Sigma)
    assert abs(float(each.mean() - q.kl(p))) < 6 * float(each.std()) / len(each) ** 0.5
    assert abs(float(q.kl(q))) < 1e-10
    a, b = torch.tensor([0.4, 3.0, 1.5]).double(), torch.tensor([2.0, 1.0, 0.3]).double()
    torch_kl = torch.distributions.kl_divergence(
        torch.distributions.Dirichlet(a), torch.distributions.Dirichlet(b)
    )
    close(Dirichlet(a).kl(Dirichlet(b)), torch_kl)


def regression(count=7, seed=2):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(count, K, generator=g, dtype=torch.float64)
    return w, torch.randn(count, N, generator=g, dtype=torch.float64)


def sums(w, y):
    return y.mT @ y, y.mT @ w, w.mT @ w, torch.tensor(float(len(y)), dtype=torch.float64)


def test_one_step_of_length_one_is_the_posterior_from_anywhere():
    """And the normalisers then give the evidence: a product of Student-t predictions, by scipy."""
    prior, (w, y) = member(), regression()
    posterior = step(member(5, 40.0), prior, sums(w, y))
    # The regression textbook's posterior, written out.
    rows = prior.rows + w.mT @ w
    mean = (prior.mean @ prior.rows + y.mT @ w) @ torch.linalg.inv(rows)
    e, d = y - w @ mean.mT, mean - prior.mean
    close(posterior.rows, rows)
    close(posterior.mean, mean)
    close(posterior.scale, prior.scale + e.mT @ e + d @ prior.rows @ d.mT)
    close(posterior.dof, prior.dof + len(y))
    evidence = posterior.log_normaliser() - prior.log_normaliser() - 0.5 * y.numel() * math.log(2 * math.pi)
    total, q = 0.0, prior
    for i in range(len(y)):
        spread = 1 + w[i] @ torch.linalg.inv(q.rows) @ w[i]
        df = float(q.dof) - N + 1
        shape = (q.scale * spread / df).numpy()
        total += stats.multivariate_t((q.mean @ w[i]).numpy(), shape, df=df).logpdf(y[i].numpy())
        q = step(q, q, sums(w[i : i + 1], y[i : i + 1]))
    assert abs(float(evidence) - total) < 1e-8


def test_the_bound_is_the_evidence_at_the_posterior_and_rises_towards_it():
    prior, (w, y) = member(), regression()
    q = member(5, 40.0)
    posterior = step(q, prior, sums(w, y))
    evidence = posterior.log_normaliser() - prior.log_normaliser() - 0.5 * y.numel() * math.log(2 * math.pi)

    def bound(q):
        yy, yw, ww = (a.unsqueeze(-1) * b.unsqueeze(-2) for a, b in ((y, y), (y, w), (w, w)))
        e = ExpectedNormal(*(part.unsqueeze(0) for part in q.expected()))
        return float(e.log_density(yy, yw, ww).sum() - q.kl(prior))

    values = [bound(q)]
    for _ in range(30):
        q = step(q, prior, sums(w, y), rate=0.3)
        values.append(bound(q))
    assert all(b > a for a, b in itertools.pairwise(values) if b < float(evidence) - 1e-6)
    assert abs(bound(posterior) - float(evidence)) < 1e-8
    assert abs(values[-1] - float(evidence)) < 1e-3


def test_steps_are_natural_gradients():
    """The plain gradient of the bound, times the inverse of the Fisher information (the normaliser's second derivative)."""
    alpha = torch.tensor([0.7, 2.0, 1.4], dtype=torch.float64)
    prior, counts = torch.ones(3, dtype=torch.float64), torch.tensor([3.0, 0.0, 5.0], dtype=torch.float64)

    def bound(a):
        return (counts * Dirichlet(a).expected()).sum() - Dirichlet(a).kl(Dirichlet(prior))

    fisher = torch.func.jacrev(torch.func.grad(lambda a: Dirichlet(a).log_normaliser()))(alpha)
    natural = torch.linalg.solve(fisher, torch.func.grad(bound)(alpha))
    moved = step(Dirichlet(alpha), Dirichlet(prior), (counts,), rate=0.1)
    close(moved.counts, alpha + 0.1 * natural)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: step(Dirichlet(torch.ones(2)), Dirichlet(torch.ones(2)), (torch.ones(2),), 0.0), ValueError,
         r"rate is the length of a natural-gradient step, in \(0, 1\]; got 0.0"),
        (lambda: step(member(), Dirichlet(torch.ones(2)), ()), TypeError, "of one family; got MNIW, Dirichlet"),
        (lambda: Dirichlet.from_natural(torch.tensor([1.0, 0.0])), ValueError, "should be positive; the least is 0.0"),
        (lambda: MNIW.from_natural(-torch.eye(2), torch.zeros(2, 1), torch.eye(1), torch.tensor(4.0)), ValueError,
         "belong to no MNIW density"),
        (lambda: MNIW.from_natural(torch.eye(2), torch.zeros(2, 1), torch.eye(1), torch.tensor(1.0)), ValueError,
         "above n - 1 = 1; got 1.0"),
        (lambda: MNIW.from_natural(torch.eye(2).int(), torch.zeros(2, 1), torch.eye(1), torch.tensor(4.0)), ValueError,
         "yy should be float32 or float64"),
    ],
)  # fmt: skip
def test_what_they_refuse(call, error, match):
    with pytest.raises(error, match=match):
        call()
