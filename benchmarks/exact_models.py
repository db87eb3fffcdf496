"""How exact the exact models are, in float64, beside hmmlearn, scikit-learn and statsmodels.

    python benchmarks/exact_models.py            # all cases: some minutes on one core
    python benchmarks/exact_models.py --only nile,hmm

Records go into benchmarks/results/exact_accuracy.json, by (case, rival): {case, rival, max_abs_error, what, command, ...}.
The error is absolute: of a total log-likelihood in nats, of posterior probabilities, of parameters. For the classic
series the record also holds the maxima of the likelihood that each library reaches from its own start (EM by itself crawls
before it is there: quasi-Newton steps finish it).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynavae import GMM, HMM, PPCA, FactorAnalysis, Sequences, em, fit_em, structural_model
from dynavae.data import load_classic
from dynavae.exact import kalman
from dynavae.exact.structural import Component, level, seasonal, structural, trend
from dynavae.models import LGSSM
from dynavae.nn.estimation import emission_of_states
from dynavae.testing import sequences, small

RESULTS = Path(__file__).parent / "results" / "exact_accuracy.json"
COMMAND = "python benchmarks/exact_models.py"
Record = dict[str, Any]

HMM_EMISSIONS: dict[str, Any] = {
    "categorical": {"emission": "categorical", "classes": 3},
    "gaussian diag": {"emission": "gaussian", "scale": "learned"},
    "gaussian full": "multivariate_gaussian",
    "gaussian tied": {"emission": "multivariate_gaussian", "covariance": "tied"},
    "gaussian spherical": {"emission": "multivariate_gaussian", "covariance": "spherical"},
    "mixture": {"emission": "gaussian_mixture", "components": 2},
}


# --- hmmlearn -----------------------------------------------------------------------------------------------


def in_hmmlearn(model: HMM, kind: str) -> Any:
    """The same model there, without priors or floors."""
    from hmmlearn import hmm

    common = dict(n_components=model.states, n_iter=1, tol=-np.inf, init_params="")
    p = emission_of_states(model.p_x, model.states)
    if kind == "categorical":
        other = hmm.CategoricalHMM(**common)
        other.emissionprob_ = p.probs[:, 0].numpy()
    elif kind == "mixture":
        other = hmm.GMMHMM(
            n_mix=p.loc.shape[1], covariance_type="diag", min_covar=0.0, params="stmcw", **common
        )
        other.weights_ = p.logits.softmax(-1).numpy()
        other.means_, other.covars_ = p.loc.numpy(), p.scale.square().numpy()
    else:
        shape = kind.split()[1]
        other = hmm.GaussianHMM(
            covariance_type=shape, covars_prior=0.0, covars_weight=1, min_covar=0.0, **common
        )
        other.means_ = p.mean.numpy()
        L = torch.diag_embed(p.scale) if shape == "diag" else p.scale_tril
        S = (L @ L.mT).numpy()
        forms = {
            "diag": lambda: S.diagonal(axis1=1, axis2=2),
            "tied": lambda: S[0],
            "spherical": lambda: S[:, 0, 0],
        }
        other.covars_ = forms.get(shape, lambda: S)()
    other.startprob_, other.transmat_ = model.log_initial.exp().numpy(), model.log_transition.exp().numpy()
    return other


@torch.no_grad()
def hmm_cases() -> Iterator[Record]:
    for kind, emission in HMM_EMISSIONS.items():
        model = small(HMM, x_dim=1 if kind == "categorical" else 3, states=4, emission=emission)
        batch = sequences(model, (200, 120, 160))
        flat, lengths = np.concatenate(batch.arrays()), batch.lengths.tolist()
        flat = flat.astype(int) if kind == "categorical" else flat
        errors = {"log-likelihood": 0.0, "posteriors": 0.0, "EM iterates": 0.0}
        paths = 0
        for _ in range(10):
            other = in_hmmlearn(model, kind)
            total, gamma = other.score_samples(flat, lengths)
            ours = model.exact_smooth(batch)[0][batch.valid].numpy()
            path = model.most_probable_path(batch)[batch.valid].numpy()
            paths += int((path != other.decode(flat, lengths)[1]).sum())
            _worst(errors, "log-likelihood", float(model.exact_log_likelihood(batch).sum()) - total)
            _worst(errors, "posteriors", ours - gamma)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                other.fit(flat, lengths)
            em.step(model, [batch])
            if (
                kind != "mixture"
            ):  # there hmmlearn takes covariances about the old means: its step is not EM's
                _worst(errors, "EM iterates", model.log_transition.exp().numpy() - other.transmat_)
                p = emission_of_states(model.p_x, 4)
                theirs = other.emissionprob_ if kind == "categorical" else other.means_
                _worst(
                    errors,
                    "EM iterates",
                    (p.probs[:, 0] if kind == "categorical" else p.mean).numpy() - theirs,
                )
        for what, error in errors.items():
            if what != "EM iterates" or kind != "mixture":
                yield record(
                    f"HMM, {kind}: {what}", "hmmlearn", error, "10 iterations, 3 sequences, 480 frames"
                )
        yield record(f"HMM, {kind}: Viterbi path", "hmmlearn", float(paths), "states that differ")


# --- scikit-learn -------------------------------------------------------------------------------------------


@torch.no_grad()
def mixture_cases() -> Iterator[Record]:
    from sklearn.mixture import GaussianMixture
    from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky

    g = np.random.default_rng(0)
    flat = 3 * g.normal(size=(4, 5))[g.integers(0, 4, 600)] + g.normal(size=(600, 5)) @ g.normal(size=(5, 5))
    batch = Sequences.from_arrays(flat.reshape(6, 100, 5), dtype=torch.float64)
    for kind in ("full", "diag", "spherical", "tied"):
        model = small(
            GMM, x_dim=5, states=4, covariance="diagonal" if kind == "diag" else kind, min_scale=1e-6
        )
        errors = {"log-likelihood": 0.0, "responsibilities": 0.0, "EM iterates": 0.0}
        for _ in range(20):
            p = emission_of_states(model.p_x, 4)
            S = (p.scale_tril @ p.scale_tril.mT).numpy()
            S = {"full": S, "diag": S.diagonal(axis1=1, axis2=2), "spherical": S[:, 0, 0], "tied": S[0]}[kind]
            other = GaussianMixture(4, covariance_type=kind, reg_covar=0.0)
            other.weights_, other.means_, other.covariances_ = (
                model.log_weights.exp().numpy(),
                p.loc.numpy(),
                S,
            )
            other.precisions_cholesky_ = _compute_precision_cholesky(S, kind)
            ours = model.exact_smooth(batch)[0].flatten(0, 1).numpy()
            _worst(errors, "log-likelihood", em.step(model, [batch]) - 600 * other.score(flat))
            _worst(errors, "responsibilities", ours - other.predict_proba(flat))
            other._m_step(flat, other._estimate_log_prob_resp(flat)[1])
            _worst(errors, "EM iterates", emission_of_states(model.p_x, 4).loc.numpy() - other.means_)
        for what, error in errors.items():
            yield record(f"GMM, {kind}: {what}", "scikit-learn", error, "20 iterations, 600 frames")


def factor_cases() -> Iterator[Record]:
    from sklearn import decomposition

    g = np.random.default_rng(3)
    x = g.normal(size=(400, 3)) @ g.normal(size=(3, 8)) + g.normal(size=(400, 8)) * g.uniform(0.4, 1.2, 8)
    batch = Sequences.from_arrays(x.reshape(4, 100, 8), dtype=torch.float64)
    other = decomposition.FactorAnalysis(3, tol=1e-9, max_iter=50_000, svd_method="lapack").fit(x)
    model = FactorAnalysis(8, 3, min_scale=1e-6).double()
    model.set_moments(other.components_.T, other.mean_, other.noise_variance_**0.5)
    same = total(model, batch)
    yield record(
        "factor analysis: log-likelihood", "scikit-learn", same - 400 * other.score(x), "at its parameters"
    )
    z = model.exact_smooth(batch)[0].flatten(0, 1).detach().numpy()
    yield record("factor analysis: factors", "scikit-learn", z - other.transform(x), "at its parameters")
    fit_em(model, batch, iterations=3000, tolerance=1e-12, progress=False)
    found = {"log_likelihood": total(model, batch), "rival_log_likelihood": 400 * other.score(x)}
    gap = found["log_likelihood"] - found["rival_log_likelihood"]
    yield record("factor analysis: maximum", "scikit-learn", gap, "of our EM, minus its own", **found)
    pca = decomposition.PCA(3).fit(x)
    ppca = PPCA(8, 3, min_scale=1e-6).double().solve(batch)
    S = (ppca.W @ ppca.W.mT + torch.diag(ppca.scale**2)).detach().numpy() * 400 / 399
    yield record(
        "PPCA: covariance of the closed form", "scikit-learn", S - pca.get_covariance(), "times n / (n - 1)"
    )
    grow = (400 / 399) ** 0.5  # scikit-learn divides by n - 1
    unbiased = PPCA(8, 3, min_scale=1e-6).double().set_moments(ppca.W * grow, ppca.mu, ppca.scale[:1] * grow)
    yield record(
        "PPCA: log-likelihood",
        "scikit-learn",
        total(unbiased, batch) - 400 * pca.score(x),
        "at its parameters",
    )


# --- statsmodels: classic series ------------------------------------------------------------------------------


def classic(
    name: str, x: torch.Tensor, components: Callable[..., list[Component]], spec: dict[str, Any],
    control: torch.Tensor | None, variances: list[float], initial: float, start: float, iterations: int,
) -> Iterator[Record]:  # fmt: skip
    """The likelihood at the same parameters, and maxima: by EM, EM and quasi-Newton, gradient, and that of statsmodels."""
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    exog = None if control is None else control[0].numpy()
    other = UnobservedComponents(x[0, :, 0].numpy(), exog=exog, **spec)
    other.ssm.initialize_known(np.zeros(other.k_states), initial * np.eye(other.k_states))
    other.ssm.loglikelihood_burn = 0
    other.ssm.tolerance = 0  # or it stops updating covariances before they are steady, which costs 1e-8
    noise, *rest = variances
    effect = [] if control is None else [0.1]
    params = structural(*components(*rest), noise=noise, regression=effect or None, initial_variance=initial)
    time_first = None if control is None else control.transpose(0, 1)
    ours = float(kalman.kalman_filter(params, x.transpose(0, 1), control=time_first).log_likelihood.sum())
    gap = ours - other.loglike([*variances, *effect])
    yield record(f"{name}: log-likelihood", "statsmodels", gap, "at the same parameters", log_likelihood=ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = other.fit(disp=0, maxiter=2000, method="lbfgs").llf
    data = Sequences.from_arrays(x, control=control)
    learned = [None] * len(rest)

    def build() -> LGSSM:
        width = 0 if control is None else control.shape[-1]
        return structural_model(
            *components(*learned), control_dim=width, initial_variance=initial, start=start
        ).double()

    by_em, by_gradient = build(), build()
    fit_em(by_em, data, iterations=iterations, tolerance=1e-9, progress=False)
    found = {"em": total(by_em, data)}
    em.polish(by_em, data)
    climb(by_gradient, data)
    found |= {
        "em, polished": total(by_em, data),
        "gradient": total(by_gradient, data),
        "statsmodels": float(theirs),
    }
    for by in ("em, polished", "gradient"):
        gap = found[by] - theirs
        yield record(f"{name}: maximum by {by}", "statsmodels", gap, "ours, minus its own", maxima=found)


def classic_cases(name: str) -> Iterator[Record]:
    seasons = lambda *v: [trend(*v[:2]), seasonal(12, v[2])]  # noqa: E731
    if name == "nile":
        x = load_classic("nile").x / 100
        yield from classic(
            name, x, lambda v: [level(v)], {"level": "llevel"}, None, [1.5, 0.15], 1e4, 0.5, 1000
        )
    elif name == "co2":
        x = load_classic("co2").x - 330
        spec = {"level": "lltrend", "seasonal": 12}
        yield from classic(name, x, seasons, spec, None, [0.04, 0.05, 1e-4, 1e-3], 1e4, 0.05, 400)
    elif name == "airline":
        x = load_classic("airline").x.log()
        spec = {"level": "lltrend", "seasonal": 12}
        yield from classic(name, x, seasons, spec, None, [1e-3, 1e-3, 1e-5, 1e-4], 1e2, 1e-3, 500)
    else:
        found = load_classic("seatbelts")
        spec = {"level": "llevel", "seasonal": 12}
        level_and_season = lambda *v: [level(v[0]), seasonal(12, v[1])]  # noqa: E731
        yield from classic(
            name, found.x.log(), level_and_season, spec, found.control, [4e-3, 1e-3, 1e-5], 1e2, 1e-3, 500
        )


def climb(model: LGSSM, data: Sequences) -> None:
    """Quasi-Newton ascent of log p(x)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = -model.exact_log_likelihood(data).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]


# --- records ------------------------------------------------------------------------------------------------


@torch.no_grad()
def total(model: Any, data: Sequences) -> float:
    return float(model.exact_log_likelihood(data).sum())


def _worst(errors: dict[str, float], what: str, difference: Any) -> None:
    errors[what] = max(errors[what], float(np.abs(difference).max()))


def record(case: str, rival: str, difference: Any, what: str, **more: Any) -> Record:
    error = float(np.abs(np.asarray(difference)).max())
    about = {
        "command": COMMAND,
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, CPU only",
        "versions": {name: version(name) for name in ("torch", rival)},
    }
    return {"case": case, "rival": rival, "max_abs_error": error, "what": what, **more, **about}


def write(records: list[Record]) -> None:
    """Replace the records of the same (case, rival); leave the others."""
    before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    new = {(r["case"], r["rival"]) for r in records}
    kept = [r for r in before if (r["case"], r["rival"]) not in new]
    RESULTS.write_text(json.dumps(kept + records, indent=1) + "\n")


CASES: dict[str, Callable[[], Iterator[Record]]] = {
    "hmm": hmm_cases,
    "gmm": mixture_cases,
    "factors": factor_cases,
    **{name: (lambda name=name: classic_cases(name)) for name in ("nile", "airline", "seatbelts", "co2")},  # type: ignore[misc]
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(CASES), help="cases, with commas between")
    torch.set_num_threads(1)
    for name in parser.parse_args().only.split(","):
        records = list(CASES[name]())
        for r in records:
            print(
                f"{r['case']:45} {r['rival']:12} {r['max_abs_error']:.1e}  {r.get('maxima', '')}", flush=True
            )
        write(records)


if __name__ == "__main__":
    main()
