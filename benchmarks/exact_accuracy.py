"""Filter, smoother and likelihood of random linear-Gaussian models against statsmodels and filterpy, in float64.

    OMP_NUM_THREADS=1 python benchmarks/exact_accuracy.py [--seeds 5] [--out benchmarks/results/exact_accuracy.json]

For every form, the largest absolute difference over seeds, time and everything that the rival returns: filtered and
smoothed means and covariances, lag-one covariances and log-likelihoods per frame for statsmodels (coordinates
missing, lengths, controls, matrices that vary in time), the moments for filterpy (whole frames missing, controls, a
constant model). Records of cases that this program does not make stay in the file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynavae.exact.kalman import Filtered, LinearGaussian, Smoothed, kalman_filter, kalman_smoother

OUT = Path(__file__).parent / "results" / "exact_accuracy.json"
Z, X, U, T, B = 4, 3, 2, 120, 2


class Problem(NamedTuple):
    params: LinearGaussian
    x: Tensor
    observed: Tensor
    control: Tensor


def problem(seed: int, varying: bool) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def covariance(n: int) -> Tensor:
        root = normal(n, n)
        return root @ root.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)

    rotation = torch.linalg.qr(normal(Z, Z)).Q
    A = 0.97 * rotation + (0.02 * normal(T, 1, Z, Z) if varying else 0.0)
    params = LinearGaussian(
        normal(Z),
        covariance(Z),
        A,
        0.2 * covariance(Z),
        normal(X, Z),
        covariance(X),
        B=normal(Z, U),
        D=normal(X, U),
    )
    some = (
        torch.rand(T, B, X, generator=g) < 0.8
        if varying
        else (torch.rand(T, B, 1, generator=g) < 0.8).expand(T, B, X)
    )
    observed = some & (torch.arange(T)[:, None] < torch.tensor([T, T // 2]))[..., None]
    return Problem(params, normal(T, B, X), observed, normal(T, B, U))


def against_statsmodels(p: Problem, f: Filtered, s: Smoothed) -> float:
    from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother

    params, x, observed, control = p
    worst = 0.0
    for row in range(B):
        k = KalmanSmoother(k_endog=X, k_states=Z)
        k.bind(x[:, row].masked_fill(~observed[:, row], math.nan).numpy().copy())
        k["transition"] = params.A.expand(T, 1, Z, Z)[:, 0].roll(-1, 0).permute(1, 2, 0).numpy()  # out of t
        k["state_intercept"] = (control[:, row] @ params.B.mT).roll(-1, 0).mT.numpy()
        k["obs_intercept"] = (control[:, row] @ params.D.mT).mT.numpy()
        k["selection"], k["state_cov"] = np.eye(Z), params.Q.numpy()
        k["design"], k["obs_cov"] = params.C.numpy(), params.R.numpy()
        k.initialize_known(params.m0.numpy(), params.P0.numpy())
        result = k.smooth()
        pairs = [
            (f.mean, result.filtered_state.T), (f.covariance, result.filtered_state_cov.transpose(2, 0, 1)),
            (s.mean, result.smoothed_state.T), (s.covariance, result.smoothed_state_cov.transpose(2, 0, 1)),
            (f.log_likelihood, result.llf_obs),
            (s.cross_covariance, result.smoothed_state_autocov.transpose(2, 0, 1)[: T - 1]),
        ]  # fmt: skip
        worst = max(worst, *(float((a[:, row] - torch.from_numpy(b.copy())).abs().max()) for a, b in pairs))
    return worst


def against_filterpy(p: Problem, f: Filtered, s: Smoothed) -> float:
    from filterpy.kalman import KalmanFilter

    params, x, observed, control = p
    worst = 0.0
    for row in range(B):
        k = KalmanFilter(dim_x=Z, dim_z=X, dim_u=U)
        k.F, k.Q, k.H, k.R, k.B = (getattr(params, name).numpy() for name in "AQCRB")
        k.x, k.P = params.m0.numpy().copy(), params.P0.numpy().copy()
        means, covariances = [], []
        for t in range(T):
            if t:
                k.predict(u=control[t, row].numpy())
            seen = bool(observed[t, row].all())
            k.update((x[t, row] - params.D @ control[t, row]).numpy() if seen else None)
            means.append(k.x.copy())
            covariances.append(k.P.copy())
        pairs = [(f.mean, means), (f.covariance, covariances)]
        worst = max(
            worst, *(float((a[:, row] - torch.from_numpy(np.stack(b))).abs().max()) for a, b in pairs)
        )
        smooth = KalmanFilter(dim_x=Z, dim_z=X)
        smooth.F, smooth.Q = params.A.numpy(), params.Q.numpy()
        no_control = kalman_filter(
            params._replace(B=None, D=None), x[:, [row]], observed[:, [row]], method="joseph"
        )
        means_0, covariances_0 = no_control.mean[:, 0].numpy(), no_control.covariance[:, 0].numpy()
        theirs = smooth.rts_smoother(means_0, covariances_0)
        ours = kalman_smoother(params._replace(B=None, D=None), no_control, method="joseph")
        worst = max(worst, float((ours.mean[:, 0] - torch.from_numpy(theirs[0])).abs().max()))
        worst = max(worst, float((s.covariance[:, row] - torch.from_numpy(theirs[1])).abs().max()))
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = f"OMP_NUM_THREADS=1 python benchmarks/exact_accuracy.py --seeds {args.seeds}"
    records: list[dict[str, Any]] = []
    cases = [
        ("time-varying, coordinates missing, lengths, controls", True, "statsmodels", against_statsmodels),
        ("constant, frames missing, lengths, controls", False, "statsmodels", against_statsmodels),
        ("constant, frames missing, lengths, controls", False, "filterpy", against_filterpy),
    ]
    for case, varying, rival, compare in cases:
        forms = "joseph", "square_root", "parallel", "compiled", *(() if varying else ("shared",)), "auto"
        for method in forms:
            worst = 0.0
            for seed in range(args.seeds):
                p = problem(seed, varying)
                filtered = kalman_filter(*p, method=method)
                worst = max(worst, compare(p, filtered, kalman_smoother(p.params, filtered, method=method)))
            record = {
                "case": f"Kalman, {method}: {case}", "rival": rival, "max_abs_error": float(f"{worst:.2g}"),
                "what": f"{args.seeds} models, {B} sequences, {T} steps, z_dim {Z}, x_dim {X}; all quantities returned",
                "command": command, "hardware": f"{platform.machine()}, {os.cpu_count()} cores, CPU only",
                "versions": {name: version(name) for name in ("torch", rival)},
            }  # fmt: skip
            records.append(record)
            print(record["case"], "|", rival, "|", record["max_abs_error"], flush=True)
    before = json.loads(args.out.read_text()) if args.out.exists() else []
    made = {(record["case"], record["rival"]) for record in records}
    kept = [record for record in before if (record["case"], record["rival"]) not in made]
    args.out.write_text(json.dumps(kept + records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
