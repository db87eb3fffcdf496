"""Structural time series against statsmodels, and the classic series they are fitted to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynavae import LGSSM, Sequences, em, fit_em, forecast, structural_model
from dynavae.data import load_classic
from dynavae.exact import kalman
from dynavae.exact.structural import autoregressive, cycle, level, seasonal, structural, trend


def reference(x, initial, exog=None, **spec):
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    model = UnobservedComponents(x, exog=exog, **spec)
    model.ssm.initialize_known(np.zeros(model.k_states), initial * np.eye(model.k_states))
    model.ssm.loglikelihood_burn = 0
    model.ssm.tolerance = 0  # or it stops updating covariances before they are steady, which costs 1e-8
    return model


def walk(n=90, gaps=True, seed=0):
    g = np.random.default_rng(seed)
    x = g.normal(size=n).cumsum() + np.sin(np.arange(n) * 2 * np.pi / 4) + g.normal(size=n)
    if gaps:
        x[20:30] = np.nan
        x[57] = np.nan
    return x


CASES = {
    "level": ([level(0.4)], {"level": "llevel"}, [1.5, 0.4]),
    "trend": ([trend(0.4, 0.03)], {"level": "lltrend"}, [1.5, 0.4, 0.03]),
    "smooth trend": ([trend(0.0, 0.03)], {"level": "strend"}, [1.5, 0.03]),
    "season": ([level(0.4), seasonal(4, 0.02)], {"level": "llevel", "seasonal": 4}, [1.5, 0.4, 0.02]),
    "fixed season": (
        [level(0.4), seasonal(4, 0.0)],
        {"level": "llevel", "seasonal": 4, "stochastic_seasonal": False},
        [1.5, 0.4],
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gaps", [False, True])
def test_the_likelihood_is_that_of_statsmodels(name, gaps):
    """Also the smoothed states; singular Q, large initial variance."""
    components, spec, variances = CASES[name]
    x = walk(gaps=gaps)
    other = reference(x, 1e3, **spec)
    params = structural(*components, noise=variances[0], initial_variance=1e3)
    series = torch.tensor(x).reshape(-1, 1, 1)
    filtered = kalman.kalman_filter(params, series)
    assert float(filtered.log_likelihood.sum()) == pytest.approx(other.loglike(variances), abs=1e-8)
    smoothed = kalman.kalman_smoother(params, filtered)
    np.testing.assert_allclose(
        smoothed.mean[:, 0].numpy(), other.smooth(variances).smoothed_state.T, atol=1e-6
    )


def test_a_regression_on_a_control():
    x, u = walk(), (np.arange(90) > 60).astype(float)[:, None]
    other = reference(x, 1e3, exog=u, level="llevel")
    params = structural(level(0.4), noise=1.5, regression=[-2.0], initial_variance=1e3)
    control = torch.tensor(u).unsqueeze(1)
    ours = kalman.kalman_filter(
        params, torch.tensor(x).reshape(-1, 1, 1), control=control
    ).log_likelihood.sum()
    assert float(ours) == pytest.approx(other.loglike([1.5, 0.4, -2.0]), abs=1e-8)


def test_em_arrives_at_the_maximum_of_statsmodels():
    nile = load_classic("nile").x / 100
    other = reference(nile[0, :, 0].numpy(), 1e4, level="llevel")
    best = other.fit(disp=0)
    model = structural_model(level(), initial_variance=1e4, start=0.5).double()
    fit_em(model, nile, iterations=400, tolerance=1e-8, progress=False)
    p = model.parameters_in_moments
    ours = float(model.exact_log_likelihood(Sequences.from_arrays(nile)).detach())
    assert ours == pytest.approx(best.llf, abs=1e-3)
    assert ours <= best.llf + 1e-4
    assert [p.R.item(), p.Q.item()] == pytest.approx(best.params, rel=0.03)
    assert p.A.item() == 1.0 and p.C.item() == 1.0


POLISHED = {
    "nile": (lambda: load_classic("nile").x / 100, [level()], {"level": "llevel"}, 1e4, 0.5),
    "trend": (lambda: torch.tensor(walk()).reshape(1, -1, 1), [trend()], {"level": "lltrend"}, 1e4, 0.5),
    "co2": (
        lambda: load_classic("co2").x - 330, [trend(), seasonal(12)], {"level": "lltrend", "seasonal": 12}, 1e4, 0.05
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [n if n != "co2" else pytest.param(n, marks=pytest.mark.slow) for n in POLISHED]
)
def test_em_and_polish_arrive_at_the_maximum_of_statsmodels(name):
    """Where EM crawls, too: the likelihood is at most 1e-4 nats below the other's."""
    series, components, spec, initial, start = POLISHED[name]
    x = series()
    best = reference(x[0, :, 0].numpy(), initial, **spec).fit(disp=0, maxiter=2000, method="lbfgs").llf
    model = structural_model(*components, initial_variance=initial, start=start).double()
    data = Sequences.from_arrays(x)
    fit_em(model, data, iterations=20, tolerance=None, progress=False)
    with torch.no_grad():
        by_em = float(model.exact_log_likelihood(data))
    found = em.polish(model, data)
    assert found == pytest.approx(float(model.exact_log_likelihood(data).detach()), abs=1e-9)
    assert found > by_em
    assert found >= best - 1e-4


def test_polish_is_an_option_of_fit_em_and_refuses():
    x = torch.tensor(walk()).reshape(1, -1, 1)
    plain, polished = (structural_model(level(), start=0.5).double() for _ in range(2))
    fit_em(plain, x, iterations=3, progress=False)
    fit_em(polished, x, iterations=3, polish=20, progress=False)
    values = [float(m.exact_log_likelihood(Sequences.from_arrays(x)).detach()) for m in (plain, polished)]
    assert values[1] > values[0]
    with pytest.raises(ValueError, match=r"polish climbs the likelihood of train alone"):
        fit_em(plain, x, x, polish=5, progress=False)
    with pytest.raises(ValueError, match=r"iterations should be at least 1; got 0"):
        em.polish(plain, x, 0)
    with pytest.raises(ValueError, match=r"all parameters of this LGSSM are held"):
        em.polish(structural_model(level(0.1), noise=1.0).double(), x)


def test_the_model_is_that_of_its_components():
    """The floor of variances that are 0 costs less than 1e-6 nats."""
    x = torch.tensor(walk()).reshape(1, -1, 1)
    model = structural_model(trend(0.0, 0.03), seasonal(4, 0.02), noise=1.5, initial_variance=1e3).double()
    assert isinstance(model, LGSSM) and model.z_dim == 5
    params = structural(trend(0.0, 0.03), seasonal(4, 0.02), noise=1.5, initial_variance=1e3)
    exact = kalman.kalman_filter(params, x.transpose(0, 1)).log_likelihood.sum()
    assert float(model.exact_log_likelihood(Sequences.from_arrays(x))) == pytest.approx(
        float(exact), abs=1e-6
    )
    assert not any(p.requires_grad for p in model.parameters())
    assert forecast(model, x, horizon=4, samples=20).samples.isfinite().all()


def test_cycles_and_deviations():
    params = structural(cycle(4.0, 1.0, 0.0), autoregressive(0.5, 1.0), noise=0.1, initial_variance=1.0)
    z = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    seen = []
    for _ in range(5):
        seen.append(float((params.C @ z).squeeze()))
        z = params.A @ z
    assert seen == pytest.approx([1.0, 0.0, -1.0, 0.0, 1.0], abs=1e-12)
    assert params.Q.diagonal().tolist() == [0.0, 0.0, 1.0]


def test_classic_series(tmp_path):
    co2 = load_classic("co2")
    assert co2.x.shape == (1, 526, 1) and int(co2.x.isnan().sum()) == 5
    assert (co2.times[0], co2.times[-1], co2.control) == ("1958-03", "2001-12", None)
    (tmp_path / "seatbelts.csv").write_text(",KSI,label\n1983-01-01,1494,0\n1983-02-01,1057,1\n")
    belts = load_classic("seatbelts", folder=tmp_path)
    assert belts.control.flatten().tolist() == [0.0, 1.0] and belts.x.flatten().tolist() == [1494.0, 1057.0]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: level(-1.0), "a variance is 0 or more, or None to be learned; got -1.0"),
        (lambda: seasonal(1), "a season has a period of at least 2 steps; got 1"),
        (lambda: cycle(1.0), "a cycle has a period above 2 steps and a damping in"),
        (lambda: structural(level(), noise=1.0), "structural needs every variance; for those to be learned"),
        (lambda: structural(noise=1.0), "needs at least one component, such as level"),
        (lambda: load_classic("nil"), "unknown series 'nil'; choose one of nile, co2, airline, seatbelts"),
    ],
)
def test_what_they_refuse(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_series_that_is_not_there_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Airline.csv.*DYNAVAE_DATA"):
        load_classic("airline", folder=tmp_path)
