"""Distributions against torch.distributions, and their samples against their moments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributions as td

from dynavae import distributions as D
from dynavae import tree

pytestmark = pytest.mark.usefixtures("float64")

CLOSE = dict(rtol=1e-10, atol=1e-10)
SHAPE = (4, 3)


def rand(*shape):
    return torch.randn(shape or SHAPE)


def positive(*shape):
    return rand(*shape).exp() + 0.1


def tril(*lead, dim=3):
    a = torch.randn(*lead, dim, dim)
    return torch.linalg.cholesky(a @ a.mT + torch.eye(dim))


def normal():
    a, b = rand(), positive()
    return D.Normal(a, b), td.Normal(a, b)


def laplace():
    a, b = rand(), positive()
    return D.Laplace(a, b), td.Laplace(a, b)


def student_t():
    a, b, df = rand(), positive(), 4.5 + positive()
    return D.StudentT(a, b, df), td.StudentT(df, a, b)


def bernoulli():
    a = rand()
    return D.Bernoulli(a), td.Bernoulli(logits=a)


def categorical():
    a = rand(*SHAPE, 5)
    return D.Categorical(a), td.Categorical(logits=a)


def power():
    a = rand()
    return D.PowerSpectrum(a), td.Exponential((-a).exp())


def multivariate():
    a, b = rand(), tril(4)
    return D.MultivariateNormal(a, b), td.MultivariateNormal(a, scale_tril=b)


KINDS = [normal, laplace, student_t, bernoulli, categorical, power, multivariate]


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob(kind):
    ours, theirs = kind()
    x = theirs.sample()
    expected = theirs.log_prob(x)
    if kind is power:  # a density of the complex coefficient: |s|^2 carries the Jacobian 1 / pi
        expected = expected - math.log(math.pi)
    if kind is not multivariate:
        expected = expected.sum(-1)
    torch.testing.assert_close(ours.log_prob(x.double()), expected, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_log_prob_of_observed_coordinates(kind):
    ours, theirs = kind()
    x = theirs.sample().double()
    observed = torch.tensor(
        [[True, True, False], [False, True, False], [True, True, True], [False, False, False]]
    )
    got = ours.log_prob(torch.where(observed, x, 0.0), observed)
    assert float(got[3]) == 0
    for i in range(3):
        keep = observed[i].nonzero().flatten().tolist()
        if kind is multivariate:
            block = (ours.scale_tril @ ours.scale_tril.mT)[i][keep][:, keep]
            expected = td.MultivariateNormal(ours.loc[i, keep], block).log_prob(x[i, keep])
        else:
            alone = type(ours)(*(leaf[i : i + 1, keep] for leaf in ours))
            expected = alone.log_prob(x[i : i + 1, keep])[0]
        torch.testing.assert_close(got[i], expected, **CLOSE)


@pytest.mark.parametrize("kind", [k for k in KINDS if k is not categorical])
def test_sampling_moments(kind, seed):
    runs = 200_000
    ours, theirs = kind()
    noise = torch.randn(
        runs, 4, 3 * (2 if kind is student_t else 1), generator=torch.Generator().manual_seed(seed)
    )
    x = ours.sample(noise)
    assert x.shape == (runs, *SHAPE)
    for value, mean in ((x, theirs.mean), ((x - theirs.mean) ** 2, theirs.variance)):
        error = value.std(0) / math.sqrt(runs)
        assert ((value.mean(0) - mean).abs() <= 6 * error).all(), kind.__name__
    torch.testing.assert_close(ours.mean, theirs.mean, **CLOSE)
    torch.testing.assert_close(ours.stddev, theirs.stddev, **CLOSE)


@pytest.mark.parametrize("kind", [normal, laplace, power, student_t])
def test_samples_follow_the_whole_distribution_function(kind, seed):
    """The largest gap to the exact distribution function: sqrt(n) D > 2.5 has probability below 1e-5."""
    runs = 100_000
    ours, theirs = kind()
    noise = torch.randn(
        runs, 4, 3 * (2 if kind is student_t else 1), generator=torch.Generator().manual_seed(seed)
    )
    x = ours.sample(noise).sort(0).values
    ranks = (torch.arange(runs) + 0.5)[:, None, None] / runs
    if kind is student_t:
        scipy_stats = pytest.importorskip("scipy.stats")
        cdf = scipy_stats.t.cdf(x.numpy(), df=ours.df.numpy(), loc=ours.loc.numpy(), scale=ours.scale.numpy())
        cdf = torch.as_tensor(cdf)
    else:
        cdf = theirs.cdf(x)
    assert float((cdf - ranks).abs().max()) * math.sqrt(runs) < 2.5


def test_categorical_frequencies(seed):
    runs = 200_000
    ours, theirs = categorical()
    noise = torch.randn(runs, *SHAPE, generator=torch.Generator().manual_seed(seed))
    codes = ours.one_hot(ours.sample(noise))
    error = (theirs.probs * (1 - theirs.probs) / runs).sqrt()
    assert ((codes.mean(0) - theirs.probs).abs() <= 6 * error).all()
    assert torch.equal(ours.mean, theirs.probs.argmax(-1).double())
    torch.testing.assert_close(ours.stddev, 1 - theirs.probs.amax(-1), **CLOSE)


@pytest.mark.parametrize("gaps", ["none", "blocks", "random", "both"])
def test_factors_shared_by_frames_give_what_each_frame_gives_alone(gaps):
    """A table of Gaussians at many frames: one factorisation per component and pattern of gaps, values and gradients."""
    frames, components, n = (30, 2), 3, 5
    x, loc, L = rand(*frames, 1, n), rand(components, n), tril(components, dim=n).requires_grad_()
    observed = torch.ones(*frames, 1, n, dtype=torch.bool)
    if gaps in ("blocks", "both"):
        observed[3:15, :, :, 1:3] = False
        observed[15:25] = False  # whole frames
    if gaps in ("random", "both"):
        observed &= torch.rand(*frames, 1, n) > 0.2
    mask = None if gaps == "none" else observed
    fast = D.MultivariateNormal(loc, L).log_prob(x, mask)
    each = torch.stack(
        [
            D.MultivariateNormal(loc[k][o], torch.linalg.cholesky((L @ L.mT)[k][o][:, o])).log_prob(
                x[t, b, 0, o]
            )
            for t, b in itertools.product(*map(range, frames))
            for o in [observed[t, b, 0]]
            for k in range(components)
        ]
    ).reshape(*frames, components)
    torch.testing.assert_close(fast, each, **CLOSE)
    torch.testing.assert_close(
        *(torch.autograd.grad(v.square().sum(), L, retain_graph=True)[0].tril() for v in (fast, each)),
        **CLOSE,
    )


@pytest.mark.parametrize("kind", [normal, bernoulli, categorical, multivariate])
def test_kl(kind):
    (q, tq), (p, tp) = kind(), kind()
    got = q.kl(p)
    expected = td.kl_divergence(tq, tp)
    if kind is multivariate:
        got = got.squeeze(-1)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert (got >= 0).all()
    torch.testing.assert_close(q.kl(q), torch.zeros_like(q.kl(q)), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_kl_to_another_kind_has_no_closed_form(kind):
    other = D.Bernoulli(rand()) if kind is not bernoulli else D.Normal(rand(), positive())
    assert kind()[0].kl(other) is None


def test_kl_of_a_class_without_probability_is_finite():
    q = D.Categorical(torch.tensor([[0.0, -torch.inf]]))
    p = D.Categorical(torch.tensor([[0.0, 0.0]]))
    torch.testing.assert_close(q.kl(p), torch.tensor([math.log(2)]))


def test_power_spectrum_has_first_and_second_derivatives():
    y = torch.randn(3, 1, 2, requires_grad=True)
    x = torch.rand(3, 4, 2, requires_grad=True)

    def log_prob(y, x):
        return D.PowerSpectrum(y).log_prob(x)

    assert torch.allclose(log_prob(y, x), (-math.log(math.pi) - y - x * torch.exp(-y)).sum(-1), **CLOSE)
    assert torch.autograd.gradcheck(log_prob, (y, x))
    assert torch.autograd.gradgradcheck(log_prob, (y, x))
    rows = torch.func.vmap(torch.func.grad(lambda y: log_prob(y, x[0, 0]).sum()))(y[:, 0])
    assert torch.allclose(rows, x[0, 0] * torch.exp(-y[:, 0]) - 1, **CLOSE)


def test_power_spectrum_takes_no_logarithm_of_the_data():
    p = D.PowerSpectrum(torch.zeros(3))
    assert float(p.log_prob(torch.zeros(3))) == pytest.approx(-3 * math.log(math.pi))


def test_extreme_noise_gives_finite_samples():
    noise = torch.tensor([[-12.0, 0.0, 12.0]])
    for kind in KINDS:
        ours = tree.tree_map(lambda a: a[:1], kind()[0])
        n = torch.cat([noise, noise.flip(-1)], -1) if kind is student_t else noise
        assert torch.isfinite(ours.sample(n)).all(), kind.__name__


@pytest.mark.parametrize("kind", [normal, laplace, student_t, power, multivariate])
def test_samples_carry_gradients(kind):
    ours = tree.tree_map(lambda a: a.requires_grad_(), kind()[0])
    noise = torch.randn(4, 3 * (2 if kind is student_t else 1))
    for grad in torch.autograd.grad(ours.sample(noise).sum(), list(ours)):
        assert torch.isfinite(grad).all() and (grad != 0).any()
    assert isinstance(ours, D.REPARAMETERIZED)


def test_standard_normal():
    p = D.standard_normal((2, 5), 3, torch.zeros(()))
    assert p.loc.shape == (2, 5, 3) and (p.loc == 0).all() and (p.scale == 1).all()


# --- several latents: Product, Chain, Either ---------------------------------------------------------


def chain():
    W = torch.randn(2, 1)
    steps = [
        lambda: D.Normal(torch.ones(4, 2), torch.full((4, 2), 0.5)),
        lambda a: D.Normal(a @ W, a[..., :1].exp()),
    ]
    return D.Chain(steps, [2, 1]), W


def test_chain_samples_and_scores_each_latent_given_those_before():
    c, W = chain()
    noise = torch.randn(4, 3)
    z, resolved = c.sample_at(noise)
    a, b = z.split((2, 1), -1)
    torch.testing.assert_close(a, 1 + 0.5 * noise[:, :2], **CLOSE)
    torch.testing.assert_close(b, a @ W + a[:, :1].exp() * noise[:, 2:], **CLOSE)
    expected = td.Normal(torch.ones(4, 2), 0.5).log_prob(a).sum(-1)
    expected = expected + td.Normal(a @ W, a[:, :1].exp()).log_prob(b).sum(-1)
    torch.testing.assert_close(resolved.log_prob(z), expected, **CLOSE)
    torch.testing.assert_close(D.at(c, z).log_prob(z), expected, **CLOSE)
    again, _ = D.sample_at(c, noise)
    torch.testing.assert_close(again, z)


def test_product_is_its_parts_side_by_side():
    q = D.Product((normal()[0], bernoulli()[0]), (3, 3))
    p = D.Product((normal()[0], bernoulli()[0]), (3, 3))
    x = torch.cat([rand(), torch.ones(SHAPE)], -1)
    expected = q.parts[0].log_prob(x[..., :3]) + q.parts[1].log_prob(x[..., 3:])
    torch.testing.assert_close(q.log_prob(x), expected)
    observed = torch.arange(6) != 4
    parts = q.parts[0].log_prob(x[..., :3]) + q.parts[1].log_prob(x[..., 3:], observed[3:])
    torch.testing.assert_close(q.log_prob(x, observed.expand(4, 6)), parts)
    torch.testing.assert_close(
        q.kl(p), torch.cat([a.kl(b) for a, b in zip(q.parts, p.parts, strict=True)], -1)
    )
    torch.testing.assert_close(q.kl(q), torch.zeros(4, 6), **CLOSE)
    assert q.mean.shape == q.stddev.shape == q.sample(torch.randn(4, 6)).shape == (4, 6)
    assert q.kl(normal()[0]) is None
    assert D.Product((laplace()[0],), (3,)).kl(D.Product((laplace()[0],), (3,))) is None


def test_either_chooses_row_by_row():
    a, b = normal()[0], laplace()[0]
    mask = torch.tensor([True, False, True, False])
    d = D.either(mask, a, b)
    assert isinstance(d, D.Either)
    x, noise = rand(), rand()
    for name, value in (("mean", d.mean), ("stddev", d.stddev)):
        torch.testing.assert_close(value, torch.where(mask[:, None], getattr(a, name), getattr(b, name)))
    torch.testing.assert_close(d.sample(noise), torch.where(mask[:, None], a.sample(noise), b.sample(noise)))
    torch.testing.assert_close(d.log_prob(x), torch.where(mask, a.log_prob(x), b.log_prob(x)))
    assert d.kl(a) is None


def test_either_of_one_kind_is_plain():
    a, b = normal()[0], normal()[0]
    d = D.either(torch.tensor([True, False, True, False]), a, b)
    assert isinstance(d, D.Normal)
    torch.testing.assert_close(d.loc[1], b.loc[1])
    torch.testing.assert_close(d.loc[0], a.loc[0])
    torch.testing.assert_close(d.kl(d), torch.zeros(SHAPE), **CLOSE)


def test_parameters_are_expanded_to_the_leading_axes():
    p = D.Normal(torch.zeros(4, 3), torch.ones(3))
    lead = (5, 4)
    assert [a.shape for a in D.expand(p, lead)] == [(5, 4, 3)] * 2
    assert D.expand(D.expand(p, lead), lead).loc.shape == (5, 4, 3)
    assert D.expand(D.Normal(torch.zeros(5, 4, 3), torch.tensor(2.0)), lead).scale.shape == (5, 4, 3)
    assert D.expand(D.Categorical(torch.zeros(4, 3, 2)), lead).logits.shape == (5, 4, 3, 2)
    product = D.Product((p, D.Categorical(torch.zeros(4, 1, 2))), (3, 1))
    assert D.expand(product, lead).parts[1].logits.shape == (5, 4, 1, 2)
    wide = D.expand(D.MultivariateNormal(torch.zeros(4, 3), torch.eye(3)), lead)
    assert wide.loc.shape == (5, 4, 3) and wide.scale_tril.shape == (5, 4, 3, 3)
    mixed = D.expand(D.Either(torch.ones(4, dtype=torch.bool), p, D.Bernoulli(torch.zeros(4, 3))), lead)
    assert mixed.mask.shape == lead and mixed.second.logits.shape == (5, 4, 3)
    full = normal()[0]
    assert D.expand(full, (4,)) is full


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_expands(kind):
    ours = kind()[0]
    wide = D.expand(ours, (2, 4))
    x = ours.sample(torch.randn(4, 3 * (2 if kind is student_t else 1)))
    torch.testing.assert_close(wide.log_prob(x), ours.log_prob(x).expand(2, 4), **CLOSE)
