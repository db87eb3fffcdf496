"""GMM, PPCA and factor analysis: scikit-learn, the dense Gaussian, closed forms, missing values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynavae import GMM, PPCA, FactorAnalysis, Sequences, em, fit, fit_em, forecast, impute, score
from dynavae.nn.estimation import emission_of_states
from dynavae.testing import small

NAN = float("nan")
close = torch.testing.assert_close


@pytest.fixture
def flat():
    """Correlated frames of three groups, (200, 4), in float64."""
    g = np.random.default_rng(0)
    mix = g.normal(size=(4, 4))
    centers = 3 * g.normal(size=(3, 4))
    return centers[g.integers(0, 3, 200)] + g.normal(size=(200, 4)) @ mix


def batch_of(flat):
    return Sequences.from_arrays(flat.reshape(4, 50, -1), dtype=torch.float64)


# --- GMM ------------------------------------------------------------------------------------------------


def sklearn_mixture(model, kind):
    mixture = pytest.importorskip("sklearn.mixture")
    p = emission_of_states(model.p_x, model.states)
    S = (p.scale_tril @ p.scale_tril.mT).detach().numpy()
    S = {"full": S, "diag": S.diagonal(axis1=1, axis2=2), "spherical": S[:, 0, 0], "tied": S[0]}[kind]
    other = mixture.GaussianMixture(model.states, covariance_type=kind, reg_covar=0.0, max_iter=1, tol=0.0)
    other.weights_, other.means_, other.covariances_ = (
        model.log_weights.exp().detach().numpy(),
        p.loc.detach().numpy(),
        S,
    )
    from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky

    other.precisions_cholesky_ = _compute_precision_cholesky(S, kind)
    return other


@pytest.mark.parametrize("kind", ["full", "diag", "spherical", "tied"])
def test_gmm_against_scikit_learn(flat, kind):
    """Log-likelihood and responsibilities at the same parameters, along ten iterates of EM."""
    covariance = "diagonal" if kind == "diag" else kind
    model, batch = small(GMM, x_dim=4, states=3, covariance=covariance, min_scale=1e-6), batch_of(flat)
    for _ in range(10):
        other = sklearn_mixture(model, kind)
        assert em.step(model, [batch]) == pytest.approx(200 * other.score(flat), abs=1e-8)
        responsibilities, log_r = None, other._estimate_log_prob_resp(flat)[1]
        other._m_step(flat, log_r)
        with torch.no_grad():
            responsibilities = model.exact_smooth(batch)[0].flatten(0, 1)
        close(responsibilities, torch.tensor(other.predict_proba(flat)), atol=1e-8, rtol=0)
    model = GMM(x_dim=4, states=3, covariance=covariance, min_scale=1e-6).double()
    fit_em(model, batch, iterations=1000, tolerance=1e-11, starts=3, progress=False)
    there, here = sklearn_mixture(model, kind), -score(model, batch, bound="exact").nats_per_frame
    there._m_step(flat, there._estimate_log_prob_resp(flat)[1])  # where we stop, scikit-learn does not move
    assert there.score(flat) == pytest.approx(here, abs=1e-8)


def test_gmm_leaves_out_what_is_missing(flat):
    """The likelihood is that of the observed block of each Gaussian, and EM finds the mixture through the holes."""
    model = small(GMM, x_dim=4, states=3)
    x = flat.copy()
    x[np.random.default_rng(1).random(x.shape) < 0.3] = NAN
    x[:, 0] = np.where(np.isnan(x).all(1), 0.0, x[:, 0])
    batch = batch_of(x)
    p = model.components
    total = 0.0
    for row in x[:20]:
        seen = np.flatnonzero(~np.isnan(row))
        S = (p.scale_tril @ p.scale_tril.mT)[:, seen][:, :, seen]
        parts = torch.distributions.MultivariateNormal(p.loc[:, seen], S).log_prob(torch.tensor(row[seen]))
        total += float(torch.logsumexp(model.log_weights + parts, 0).detach())
    ours = model.exact_log_likelihood(Sequences.from_arrays(x[None, :20], dtype=torch.float64))
    assert float(ours.detach()) == pytest.approx(total, abs=1e-9)
    values = [em.step(model, [batch]) for _ in range(30)]
    assert np.diff(values).min() > -1e-8


# --- PPCA and factor analysis ---------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [PPCA, FactorAnalysis])
@pytest.mark.parametrize("missing", [False, True])
def test_the_likelihood_is_that_of_the_dense_gaussian(flat, cls, missing):
    model, x = small(cls, x_dim=4, z_dim=2), flat.copy()
    if missing:
        x[np.random.default_rng(1).random(x.shape) < 0.3] = NAN
    S = model.W @ model.W.mT + torch.diag(model.scale**2)
    total = 0.0
    for row in x:
        seen = np.flatnonzero(~np.isnan(row))
        if len(seen):
            dense = torch.distributions.MultivariateNormal(model.mu[seen], S[seen][:, seen])
            total += float(dense.log_prob(torch.tensor(row[seen])).detach())
    assert float(model.exact_log_likelihood(batch_of(x)).sum().detach()) == pytest.approx(total, abs=1e-9)


def test_ppca_against_scikit_learn(flat):
    """The closed form is PCA's noise model; EM starts there and stays; the gradient arrives there."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    pca = decomposition.PCA(2).fit(flat)
    model, batch = PPCA(x_dim=4, z_dim=2).double(), batch_of(flat)
    model.solve(batch)
    n = len(flat)  # scikit-learn divides by n - 1
    S = (model.W @ model.W.mT + torch.diag(model.scale**2)).detach().numpy()
    np.testing.assert_allclose(S * n / (n - 1), pca.get_covariance(), atol=1e-10)
    assert float(model.scale[0].detach()) ** 2 * n / (n - 1) == pytest.approx(pca.noise_variance_, abs=1e-10)
    top = float(model.exact_log_likelihood(batch).sum().detach())
    unbiased = (
        PPCA(x_dim=4, z_dim=2)
        .double()
        .set_moments(model.W * (n / (n - 1)) ** 0.5, model.mu, model.scale[:1] * (n / (n - 1)) ** 0.5)
    )
    assert float(unbiased.exact_log_likelihood(batch).sum().detach()) == pytest.approx(
        n * pca.score(flat), abs=1e-8
    )
    by_em = PPCA(x_dim=4, z_dim=2).double()
    fit_em(by_em, batch, iterations=5, progress=False)
    assert float(by_em.exact_log_likelihood(batch).sum().detach()) == pytest.approx(top, abs=1e-8)
    far = PPCA(x_dim=4, z_dim=2).double()
    fit_em(far, batch, iterations=400, tolerance=None, start=False, progress=False)
    assert float(far.exact_log_likelihood(batch).sum().detach()) == pytest.approx(top, abs=1e-4)
    by_gradient = PPCA(x_dim=4, z_dim=2).double()
    fit(
        by_gradient,
        batch,
        epochs=300,
        lr=0.1,
        lr_schedule="cosine",
        objective="exact",
        calibrate=False,
        progress=False,
    )
    assert float(by_gradient.exact_log_likelihood(batch).sum().detach()) == pytest.approx(top, abs=1e-1)


def test_factor_analysis_against_scikit_learn():
    decomposition = pytest.importorskip("sklearn.decomposition")
    g = np.random.default_rng(3)
    x = g.normal(size=(200, 2)) @ g.normal(size=(2, 6)) + g.normal(size=(200, 6)) * [
        1.0,
        0.5,
        0.8,
        0.6,
        1.2,
        0.9,
    ]
    other = decomposition.FactorAnalysis(2, tol=1e-9, max_iter=20_000, svd_method="lapack").fit(x)
    model, batch = FactorAnalysis(x_dim=6, z_dim=2, min_scale=1e-5).double(), batch_of(x)
    model.set_moments(other.components_.T, other.mean_, other.noise_variance_**0.5)
    same = float(model.exact_log_likelihood(batch).sum().detach())
    assert same == pytest.approx(200 * other.score(x), abs=1e-8)
    z = torch.tensor(other.transform(x))
    close(model.exact_smooth(batch)[0].flatten(0, 1).detach(), z, atol=1e-8, rtol=0)
    fit_em(model, batch, iterations=500, tolerance=None, progress=False)
    assert float(model.exact_log_likelihood(batch).sum().detach()) == pytest.approx(same, abs=1e-2)


@pytest.mark.parametrize("cls", [PPCA, FactorAnalysis])
def test_em_sees_through_holes(cls):
    """With 30 % of the values missing, the covariance is found again; columns of a control are regressed out."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(6, 2, generator=g, dtype=torch.float64)
    u = torch.randn(4, 500, 1, generator=g, dtype=torch.float64)
    D = torch.randn(6, 1, generator=g, dtype=torch.float64)
    z = torch.randn(4, 500, 2, generator=g, dtype=torch.float64)
    x = z @ W.mT + u @ D.mT + 0.5 * torch.randn(4, 500, 6, generator=g, dtype=torch.float64) + 2.0
    x[torch.rand(x.shape, generator=g) < 0.3] = NAN
    model = cls(x_dim=6, z_dim=2, control_dim=1).double()
    data = Sequences.from_arrays(x, control=u)
    result = fit_em(model, data, iterations=100, progress=False)
    assert np.diff([row["train/nats_per_frame"] for row in result.history]).max() < 1e-9
    S = model.W @ model.W.mT + torch.diag(model.scale**2)
    true = W @ W.mT + 0.25 * torch.eye(6, dtype=torch.float64)
    assert float(((S - true).norm() / true.norm()).detach()) < 0.1
    close(model.D.detach(), D, atol=0.15, rtol=0)
    close(model.mu.detach(), torch.full((6,), 2.0, dtype=torch.float64), atol=0.2, rtol=0)


@pytest.mark.parametrize("cls", [GMM, PPCA, FactorAnalysis])
def test_tasks_of_models_of_single_frames(cls):
    model = small(cls, x_dim=4)
    x = torch.randn(2, 12, 4, dtype=torch.float64)
    x[0, 3, 1] = x[1, 5] = NAN
    assert not impute(model, x, samples=10).x.isnan().any()
    assert forecast(model, x, horizon=3, samples=5).samples.shape == (5, 2, 3, 4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: GMM(2, states=1), "a mixture needs at least 2 components; got states=1"),
        (
            lambda: GMM(2, covariance="round"),
            "covariance should be one of full, diagonal, spherical, tied; got 'round'",
        ),
        (lambda: GMM(2, min_scale=0.0), "min_scale should be positive; got 0.0"),
        (lambda: PPCA(2, min_scale=-1.0), "min_scale should be positive; got -1.0"),
        (lambda: PPCA(3, 2).set_moments(W=torch.zeros(2, 2)), r"W should have shape \(3, 2\); got \(2, 2\)"),
        (lambda: PPCA(2, 2).solve(torch.randn(1, 9, 2)), "solve needs z_dim below x_dim = 2; got 2"),
        (lambda: PPCA(2, 1).solve([[[1.0, NAN], [1.0, 2.0]]]), "solve needs complete data and no controls"),
    ],
)
def test_what_they_refuse(call, match):
    with pytest.raises(ValueError, match=match):
        call()
