"""EM: iterates of other libraries, fixed points of the gradient, constraints that hold, and runs on disk."""

from __future__ import annotations

import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynavae import HMM, LGSSM, VRNN, Sequences, cli, em, fit, fit_em, load, score
from dynavae.exact import em as exact_em
from dynavae.exact import kalman
from dynavae.learner import Learner
from dynavae.loading import Batch
from dynavae.nn.estimation import emission_of_states
from dynavae.testing import sequences, small

close = torch.testing.assert_close
NAN = float("nan")


def generic(model, lengths=(30, 1, 17, 8), missing=False, seed=0):
    return sequences(model, lengths, missing, seed)


# --- HMM: hmmlearn, iterate by iterate ------------------------------------------------------------------


def hmmlearn_model(model, kind, states):
    """The same model there, without priors or floors."""
    hmmlearn = pytest.importorskip("hmmlearn.hmm")
    p = emission_of_states(model.p_x, states)
    common = dict(n_components=states, n_iter=1, tol=-np.inf, init_params="")
    if kind == "categorical":
        other = hmmlearn.CategoricalHMM(**common)
        other.emissionprob_ = p.probs[:, 0].detach().numpy()
    elif kind == "mixture":
        other = hmmlearn.GMMHMM(
            n_mix=p.loc.shape[1], covariance_type="diag", min_covar=0.0, params="stmcw", **common
        )
        other.weights_ = p.logits.softmax(-1).detach().numpy()
        other.means_, other.covars_ = p.loc.detach().numpy(), p.scale.square().detach().numpy()
    else:
        other = hmmlearn.GaussianHMM(
            covariance_type=kind, covars_prior=0.0, covars_weight=1, min_covar=0.0, **common
        )
        other.means_ = p.mean.detach().numpy()
        if kind == "diag":
            other.covars_ = p.scale.square().detach().numpy()
        else:
            S = (p.scale_tril @ p.scale_tril.mT).detach().numpy()
            other.covars_ = S[0] if kind == "tied" else S[:, 0, 0] if kind == "spherical" else S
    other.startprob_ = model.log_initial.exp().detach().numpy()
    other.transmat_ = model.log_transition.exp().detach().numpy()
    return other


EMISSION = {
    "categorical": {"emission": "categorical", "classes": 3},
    "diag": {"emission": "gaussian", "scale": "learned"},
    "full": "multivariate_gaussian",
    "tied": {"emission": "multivariate_gaussian", "covariance": "tied"},
    "spherical": {"emission": "multivariate_gaussian", "covariance": "spherical"},
    "mixture": {"emission": "gaussian_mixture", "components": 2},
}


@pytest.mark.parametrize("kind", EMISSION)
def test_hmm_against_hmmlearn(kind):
    """Log-likelihood, posteriors and Viterbi path; then five iterates of EM, over sequences of three lengths."""
    x_dim = 1 if kind == "categorical" else 3
    model = small(HMM, x_dim=x_dim, states=3, emission=EMISSION[kind])
    batch = generic(model, (40, 25, 33))
    arrays = batch.arrays()
    flat, lengths = np.concatenate(arrays), [len(a) for a in arrays]
    flat = flat.astype(int) if kind == "categorical" else flat
    for _ in range(5):
        other = hmmlearn_model(model, kind, 3)
        total, gamma = other.score_samples(flat, lengths)
        with torch.no_grad():
            assert float(model.exact_log_likelihood(batch).sum()) == pytest.approx(total, abs=1e-8)
            ours = model.exact_smooth(batch)[0][batch.valid]
            close(ours, torch.tensor(gamma), atol=1e-8, rtol=0)
            path = model.most_probable_path(batch)[batch.valid]
        assert np.array_equal(path.numpy(), other.decode(flat, lengths)[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other.fit(flat, lengths)
        em.step(model, [batch])
        if kind == "mixture":  # hmmlearn takes its covariances about the means before the step: not quite EM
            continue
        after = float(model.exact_log_likelihood(batch).sum().detach())
        assert after == pytest.approx(other.score(flat, lengths), abs=1e-7)
        close(model.log_transition.exp().detach(), torch.tensor(other.transmat_), atol=1e-8, rtol=0)


def climb(model, batch, steps=150):
    """The nearest maximum of log p(x), by gradient alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=0.0
    )

    def closure():
        optimizer.zero_grad()
        loss = -model.exact_log_likelihood(batch).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return -float(closure().detach())


@pytest.mark.parametrize(
    "emission", ["bernoulli", EMISSION["categorical"], "multivariate_gaussian", "gaussian_mixture"]
)
def test_em_stays_at_a_maximum_that_the_gradient_found(emission):
    """With missing values."""
    model = small(HMM, states=2, x_dim=2, emission=emission)
    batch = generic(model, (30, 20, 25, 1), missing=True)
    for _ in range(5):
        em.step(model, [batch])
    top = climb(model, batch)
    for _ in range(3):
        em.step(model, [batch])
    after = float(model.exact_log_likelihood(batch).sum().detach())
    assert -1e-8 < after - top < 1e-5


def test_a_state_that_nobody_visits_stays():
    model = small(HMM, states=2, x_dim=1, emission="multivariate_gaussian")
    with torch.no_grad():
        model.raw_initial.copy_(torch.tensor([60.0, -60.0]))
        model.raw_transition.copy_(torch.tensor([[60.0, -60.0], [60.0, -60.0]]))
    before = emission_of_states(model.p_x, 2).loc[1]
    em.step(model, [generic(model)])
    close(emission_of_states(model.p_x, 2).loc[1], before)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_several_starts_are_no_worse_than_one():
    torch.manual_seed(0)
    centers = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 4.0], [9.0, 9.0]], dtype=torch.float64)
    state = torch.randint(0, 5, (3, 60))
    x = centers[state] + 0.3 * torch.randn(3, 60, 2, dtype=torch.float64)
    found = []
    for starts in (1, 6):
        model = HMM(x_dim=2, states=5, emission="multivariate_gaussian").double()
        fit_em(model, x, iterations=60, starts=starts, seed=3, progress=False)
        found.append(score(model, x, bound="exact").nats_per_frame)
    assert found[1] <= found[0] + 1e-9
    assert found[1] < 2.2  # log 5 + the entropy of a Gaussian of 0.3 in the plane: 2.04


# --- LGSSM ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"noise": "diagonal", "control_dim": 1}, {"stationary": True}], ids=str
)
def test_lgssm_em_stays_at_a_maximum_that_the_gradient_found(options):
    model = small(LGSSM, x_dim=3, z_dim=1, **options)
    batch = generic(model, (30, 25, 18, 1), missing=True)
    for _ in range(5):
        em.step(model, [batch])
    top = climb(model, batch)
    for _ in range(3):
        em.step(model, [batch])
    after = float(model.exact_log_likelihood(batch).sum().detach())
    assert -1e-8 < after - top < 1e-4


def test_the_m_step_by_hand():
    """Sums of the smoother, as the textbook has them: one sequence, no gaps, no offsets."""
    torch.manual_seed(0)
    I = torch.eye(2, dtype=torch.float64)  # noqa: E741
    params = kalman.LinearGaussian(m0=0 * I[0], P0=I, A=0.9 * I, Q=0.5 * I, C=I + 0.1, R=0.3 * I)
    x = torch.randn(50, 1, 2, dtype=torch.float64)
    new = exact_em.maximise(params, exact_em.expect(params, x))
    s = kalman.kalman_smoother(params, kalman.kalman_filter(params, x))
    m, P, cross = s.mean[:, 0], s.covariance[:, 0], s.cross_covariance[:, 0]
    E = P + m.unsqueeze(-1) * m.unsqueeze(-2)
    S10 = (cross + m[1:].unsqueeze(-1) * m[:-1].unsqueeze(-2)).sum(0)
    A = S10 @ torch.linalg.inv(E[:-1].sum(0))
    Q = (E[1:].sum(0) - A @ S10.mT) / 49
    xz = torch.einsum("ti,tj->ij", x[:, 0], m)
    C = xz @ torch.linalg.inv(E.sum(0))
    R = (x[:, 0].mT @ x[:, 0] - C @ xz.mT) / 50
    for name, value in (("A", A), ("Q", Q), ("C", C), ("R", R), ("m0", m[0]), ("P0", P[0])):
        close(getattr(new, name), value, atol=1e-10, rtol=1e-9)


def test_missing_coordinates_count_as_the_marginal():
    """A coordinate that is never seen changes nothing of the others, in the likelihood and in the M-step."""
    torch.manual_seed(1)
    whole, part = small(LGSSM, x_dim=3, z_dim=2), LGSSM(x_dim=2, z_dim=2).double()
    p = whole.parameters_in_moments
    part.set_moments(m0=p.m0, P0=p.P0, A=p.A, Q=p.Q, b=p.b, C=p.C[:2], d=p.d[:2], R=p.R[:2, :2])
    x = torch.randn(2, 30, 3, dtype=torch.float64)
    x[..., 2] = NAN
    for _ in range(3):
        a = em.step(whole, [Sequences.from_arrays(x)])
        b = em.step(part, [Sequences.from_arrays(x[..., :2])])
        assert a == pytest.approx(b, abs=1e-7)
    close(whole.value("A").detach(), part.value("A").detach(), atol=1e-7, rtol=0)


def test_what_is_known_stays():
    known = {
        "A": [[1.0, 1.0], [0.0, None]],
        "C": [[1.0, 0.0]],
        "Q": [None, 0.25],
        "b": [0.0, 0.0],
        "m0": [0.0, 0.0],
        "P0": [[4.0, 1.0], [1.0, 2.0]],
    }
    torch.manual_seed(0)
    model = LGSSM(x_dim=1, z_dim=2, known=known).double()
    data = torch.randn(2, 40, 1, dtype=torch.float64).cumsum(1)
    before = model.parameters_in_moments
    by_em = fit_em(model, data, iterations=10, progress=False)
    after = model.parameters_in_moments
    assert by_em.history[-1]["train/nats_per_frame"] < by_em.history[0]["train/nats_per_frame"]
    fit(model, data, epochs=3, objective="exact", lr=0.1, progress=False)
    trained = model.parameters_in_moments
    for p in (before, after, trained):
        assert p.A[0].tolist() == [1.0, 1.0] and p.A[1, 0] == 0 and p.C.tolist() == [[1.0, 0.0]]
        close(p.P0, torch.tensor(known["P0"], dtype=torch.float64))
        assert p.Q[1, 1].item() == pytest.approx(0.25) and p.Q[0, 1] == 0
    assert after.A[1, 1] != before.A[1, 1] and trained.A[1, 1] != after.A[1, 1]
    assert after.Q[0, 0] != before.Q[0, 0]
    assert not model.C.requires_grad and model.A.requires_grad


def test_a_stationary_model_starts_where_it_stays():
    torch.manual_seed(0)
    model = small(LGSSM, stationary=True)
    batch = generic(model)
    for _ in range(5):
        em.step(model, [batch])
    p = model.parameters_in_moments
    close(p.A @ p.P0 @ p.A.mT + p.Q, p.P0, atol=1e-10, rtol=0)
    close(p.A @ p.m0 + p.b, p.m0, atol=1e-10, rtol=0)
    with torch.no_grad():  # an unstable A is scaled down
        model.A.copy_(3 * torch.eye(3, dtype=torch.float64))
    assert bool(model.exact_log_likelihood(batch).isfinite().all())


def test_held_entries_under_a_full_covariance_still_rise():
    """The rows of a regression are coupled by Q where some entries are held."""
    g = torch.Generator().manual_seed(4)
    I = torch.eye(2, dtype=torch.float64)  # noqa: E741
    Q = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    params = kalman.LinearGaussian(m0=0 * I[0], P0=I, A=0.5 * I, Q=Q, C=I, R=0.1 * I, b=0 * I[0], d=0 * I[0])
    free = {"A": torch.tensor([[True, False], [False, True]]), "C": torch.zeros(2, 2, dtype=torch.bool)}
    x = torch.randn(80, 1, 2, dtype=torch.float64, generator=g).cumsum(0) * 0.3
    values = []
    for _ in range(30):
        expected = exact_em.expect(params, x)
        values.append(float(expected.log_likelihood))
        params = exact_em.maximise(params, expected, free)
    assert np.diff(values).min() > -1e-9
    assert params.A[0, 1] == 0 and params.A[1, 0] == 0 and torch.equal(params.C, I)


@settings(max_examples=12, deadline=None)
@given(
    z_dim=st.integers(1, 3),
    x_dim=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    missing=st.floats(0.0, 0.7),
    noise=st.sampled_from(["full", "diagonal"]),
    seed=st.integers(0, 10_000),
)
def test_em_rises_whatever_is_missing(z_dim, x_dim, lengths, missing, noise, seed):
    """Any sizes, lengths and gaps; batches of one sequence give the iterates of one batch."""
    g = torch.Generator().manual_seed(seed)
    xs = [torch.randn(n, x_dim, generator=g, dtype=torch.float64) for n in lengths]
    for x in xs:
        holes = torch.rand(x.shape, generator=g) < missing
        holes[0, 0] = False
        x[holes] = NAN
    whole = Sequences.from_arrays(xs)
    models = [small(LGSSM, z_dim=z_dim, x_dim=x_dim, noise=noise, min_scale=1e-2) for _ in range(2)]
    together = [em.step(models[0], [whole]) for _ in range(6)]
    apart = [em.step(models[1], list(whole)) for _ in range(6)]
    assert np.diff(together).min() > -1e-7
    np.testing.assert_allclose(apart, together, rtol=1e-6, atol=1e-6)


# --- fit, files, resume ---------------------------------------------------------------------------------


def data(n=12, T=20):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, T, 2, generator=g).cumsum(1)
    x[0, 3:6] = NAN
    x[1, 2, 0] = NAN
    return x


def test_fit_em_runs_like_any_fit(tmp_path):
    torch.manual_seed(0)
    x = data()
    model = LGSSM(x_dim=2, z_dim=2)
    result = fit_em(model, x[:9], x[9:], iterations=6, batch_size=4, out_dir=tmp_path, progress=False)
    train = [row["train/nats_per_frame"] for row in result.history]
    assert len(train) == 6 and np.diff(train).max() < 1e-5
    assert "grad_norm" not in result.history[0]
    best = min(row["valid/nats_per_frame"] for row in result.history)
    assert result.best["valid/nats_per_frame"] == best
    again = load(tmp_path / "best")
    assert score(again, x[9:], bound="exact").nats_per_frame == pytest.approx(best, abs=1e-5)
    assert json.loads((tmp_path / "training.json").read_text())["options"]["objective"] == "em"


def test_em_resumes(tmp_path):
    x = data()
    runs = []
    for folder, epochs in (("whole", [6]), ("parts", [2, 6])):
        for n in epochs:
            torch.manual_seed(0)
            model = HMM(x_dim=2, states=3)
            resume = True if n != epochs[0] else None
            out = fit(
                model,
                x,
                objective="em",
                epochs=n,
                batch_size=5,
                out_dir=tmp_path / folder,
                resume=resume,
                progress=False,
            )
        runs.append(out)
    a, b = ([row["train/nats_per_frame"] for row in run.history] for run in runs)
    assert a == b
    close(runs[0].model.state_dict(), runs[1].model.state_dict())


def test_em_resumes_within_an_iteration():
    """The sums of the batches done travel through the checkpoint."""
    x = data()
    batches = [Batch(Sequences.from_arrays(x[rows]), rows) for rows in (list(range(7)), list(range(7, 12)))]
    weights = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model = HMM(x_dim=2, states=3)
        learner = Learner(model, objective="em")
        learner._em_step(batches[0], last=False)
        if interrupted:
            checkpoint = {}
            learner.on_save_checkpoint(checkpoint)
            learner = Learner(model, objective="em")
            learner.on_load_checkpoint(checkpoint)
        learner._em_step(batches[1], last=True)
        weights.append({k: v.clone() for k, v in model.state_dict().items()})
    close(weights[0], weights[1])


def test_em_stops_when_it_gains_too_little():
    torch.manual_seed(0)
    result = fit_em(HMM(x_dim=2, states=2), data(), iterations=500, tolerance=1e-3, progress=False)
    train = [row["train/nats_per_frame"] for row in result.history]
    assert len(train) < 500
    assert train[-2] - train[-1] < 1e-3 < train[-3] - train[-2]


def test_a_prior_of_the_parameters_joins_what_rises():
    """With pseudo-counts EM raises log p(x) plus the log-prior; log p(x) alone may fall, and is no reason to stop."""
    x = torch.randn(3, 12, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.manual_seed(0)
    model = HMM(1, 3, {"emission": "gaussian", "scale": "shared"}).double()
    fit_em(model, x, iterations=30, progress=False)  # to a maximum of log p(x)
    model.pseudo_count = 50.0
    batch, rises, objective = Sequences.from_arrays(x), [], []
    for _ in range(8):
        objective.append(model.em_log_prior())
        rises.append(em.step(model, [batch]))
        objective[-1] += rises[-1]
    assert rises[1] < rises[0]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(objective))
    torch.manual_seed(0)
    model = HMM(1, 3, {"emission": "gaussian", "scale": "shared"}, pseudo_count=50.0).double()
    result = fit_em(model, x, iterations=50, tolerance=1e-4, progress=False)
    last = [r["train/nats_per_frame"] for r in result.history]
    assert len(last) > 2
    assert abs(last[-1] - last[-2]) < 1e-2  # it stopped where nothing moves


def test_em_from_the_command_line(tmp_path, capsys):
    np.savez(tmp_path / "own.npz", train=data().numpy(), valid=data(3).numpy(), test=data(3).numpy())
    out = str(tmp_path / "run")
    arguments = [
        "--data",
        str(tmp_path / "own.npz"),
        "--out",
        out,
        "--progress",
        "false",
        "--tensorboard",
        "false",
    ]
    fitted = ["fit", "--model", "LGSSM", "--model.z_dim", "2", "--model.start", "data", "--objective", "em",
              "--epochs", "4", "--starts", "2", *arguments]  # fmt: skip
    assert cli.main(fitted) == 0, capsys.readouterr().err
    assert cli.main(["fit", "--resume", "true", "--epochs", "6", *arguments[2:4]]) == 0, (
        capsys.readouterr().err
    )
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 7
    assert cli.main(["evaluate", out, "--bounds", "[exact]"]) == 0
    assert cli.main(["report", out, "--samples", "2", "--horizon", "3", "--sequences", "1"]) == 0, (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: fit_em(VRNN(2, 2, 4), data()), "em needs an M-step in closed form, which VRNN has not"),
        (
            lambda: fit_em(HMM(2, 2, "laplace"), data()),
            "which a Laplace emission of HMM has not; use objective='exact'",
        ),
        (lambda: fit_em(LGSSM(2, 2), data(), starts=3), "starts=3 would be all the same"),
        (lambda: fit(LGSSM(2, 2), data(), starts=3), "tolerance and starts belong to objective='em'"),
        (lambda: fit(LGSSM(2, 2), data(), objective="em", ema=0.9), "has no updates to average"),
        (lambda: fit(LGSSM(2, 2), data(), objective="em", beta=0.5), "objective='em' is log p"),
        (lambda: VRNN(2, 2, 4).expectation(Sequences.from_arrays(data())), "VRNN has no closed-form EM"),
        (lambda: VRNN(2, 2, 4).maximisation(None), "VRNN has no closed-form EM"),
        (lambda: em.step(LGSSM(2, 2), []), "EM needs at least one batch"),
        (lambda: LGSSM(2, 2, known={"X": [0.0]}), "known names 'X', which is no parameter"),
        (lambda: LGSSM(2, 2, known={"A": [[1.0]]}), r"known\['A'\] should have shape \(2, 2\); got \(1, 1\)"),
        (lambda: LGSSM(2, 2, known={"Q": [[1.0, None], [None, 1.0]]}), "cannot be learned in part"),
        (lambda: LGSSM(2, 2, known={"m0": [0.0, 0.0]}, stationary=True), "leave them out of known"),
        (lambda: LGSSM(2, 2, state_noise="some"), "state_noise should be 'full' or 'diagonal'; got 'some'"),
        (lambda: HMM(2, 2, pseudo_count=-1.0), "pseudo_count should be 0 or more; got -1.0"),
    ],
)
def test_what_em_refuses(call, match):
    with pytest.raises((ValueError, TypeError), match=match):
        call()


def test_constraints_are_checked():
    I = torch.eye(2)  # noqa: E741
    params = kalman.LinearGaussian(m0=I[0], P0=I, A=I, Q=I, C=I, R=I)
    expected = exact_em.expect(params, torch.randn(5, 2, 2))
    for free, diagonal, match in (
        ({"B": I > 0}, (), "free names 'B', but the model has no such parameter"),
        ({"A": torch.ones(3, 3, dtype=torch.bool)}, (), r"free\['A'\] should have shape"),
        ({"Q": I > 0}, (), "holds some entries of a full covariance"),
        ({}, ("A",), "diagonal should name covariances, P0, Q or R; got 'A'"),
    ):
        with pytest.raises(ValueError, match=match):
            exact_em.maximise(params, expected, free, diagonal)


def test_em_in_float32_on_large_values():
    """Sums are about the current means, in float64: a level of 10,000 costs no digits."""
    torch.manual_seed(0)
    x = torch.randn(4, 50, 2).cumsum(1)
    level = 1e4
    found = []
    for shift in (0.0, level):
        torch.manual_seed(1)
        model = HMM(x_dim=2, states=2, emission="multivariate_gaussian")
        result = fit_em(model, x + shift, iterations=20, tolerance=None, progress=False)
        found.append(result.history[-1]["train/nats_per_frame"])
    assert found[0] == pytest.approx(found[1], abs=2e-2)
