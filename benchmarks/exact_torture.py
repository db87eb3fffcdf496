"""Where a plain float32 Kalman filter loses positive-definiteness or accuracy, and what the forms of this library do there.

    OMP_NUM_THREADS=1 python benchmarks/exact_torture.py [--digits 60] [--out benchmarks/results/exact_torture.json]

Every condition is given in float32: parameters and observations are rounded to float32 first, so that no form can be
blamed for it. The reference computes with them in mpmath, with so many digits (in float64, by the square-root form,
for the long series). `plain` is the textbook recursion P - K S K' in float32. Errors are the largest over time: of
filtered means in filtered standard deviations, of filtered and smoothed variances relative to them, and of the
log-likelihood in nats per frame. `positive` says whether every covariance that was returned, or its factor, is
positive definite (semidefinite to rounding where the true one is singular).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any, NamedTuple

import mpmath
import torch
from torch import Tensor

from dynavae.exact.kalman import Filtered, LinearGaussian, kalman_filter, kalman_smoother, simulate

OUT = Path(__file__).parent / "results" / "exact_torture.json"


class Condition(NamedTuple):
    name: str
    params: LinearGaussian
    T: int


def constant_velocity(dt: float, q: float, r: float, p: float) -> LinearGaussian:
    A = torch.tensor([[1, dt], [0, 1]])
    Q = q * torch.tensor([[dt**3 / 3, dt**2 / 2], [dt**2 / 2, dt]])
    return LinearGaussian(
        torch.zeros(2), p * torch.eye(2), A, Q, torch.tensor([[1.0, 0.0]]), r * torch.eye(1)
    )


def constant_acceleration(dt: float, q: float, r: float, p: float) -> LinearGaussian:
    A = torch.tensor([[1, dt, dt**2 / 2], [0, 1, dt], [0, 0, 1]])
    Q = q * torch.diag(torch.tensor([dt**5 / 20, dt**3 / 3, dt]))
    return LinearGaussian(torch.zeros(3), p * torch.eye(3), A, Q, torch.eye(3)[:1], r * torch.eye(1))


def collinear(r: float, p: float) -> LinearGaussian:
    """Two sensors that see almost the same."""
    C = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1e-3]])
    return LinearGaussian(
        torch.zeros(3), p * torch.eye(3), 0.99 * torch.eye(3), 1e-6 * torch.eye(3), C, r * torch.eye(2)
    )


def conditions() -> list[Condition]:
    scales = torch.diag(torch.tensor([1e-6, 1.0, 1e-3, 1e-5]))
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    C = torch.randn(2, 4, generator=generator)
    mixed = LinearGaussian(torch.zeros(4), torch.eye(4), 0.99 * rotation, scales, C, 1e-4 * torch.eye(2))
    free = torch.tensor([[1e-3, 0.0], [0.0, 0.0]])
    return [
        Condition("mild", constant_velocity(1.0, 0.1, 1.0, 1.0), 200),
        Condition("R = 1e-6", constant_velocity(1.0, 1e-2, 1e-6, 1.0), 200),
        Condition("R = 1e-10", constant_velocity(1.0, 1e-2, 1e-10, 1.0), 200),
        Condition("P0 = 1e6, R = 1e-4", constant_velocity(0.1, 1e-3, 1e-4, 1e6), 200),
        Condition("P0 = 1e8, R = 1e-8", constant_velocity(0.1, 1e-3, 1e-8, 1e8), 200),
        Condition("acceleration, P0 = 1e4, R = 1e-6", constant_acceleration(0.05, 1e-2, 1e-6, 1e4), 200),
        Condition("two sensors alike, P0 = 1e4, R = 1e-8", collinear(1e-8, 1e4), 200),
        Condition("Q of condition 1e6, R = 1e-4", mixed, 200),
        Condition(
            "Q singular, R = 1e-8",
            LinearGaussian(torch.zeros(2), torch.eye(2), torch.tensor([[1.0, 1.0], [0.0, 1.0]]), free,
                           torch.tensor([[1.0, 0.0]]), 1e-8 * torch.eye(1)), 200,
        ),
        Condition("T = 10,000, Q = 1e-10, R = 1e-6", constant_velocity(1.0, 1e-10, 1e-6, 100.0), 10_000),
    ]  # fmt: skip


def observations(condition: Condition) -> Tensor:
    """Simulated in float64 from a tame start, rounded."""
    params = double(condition.params)
    params = params._replace(P0=params.P0.clamp(max=1.0))
    g = torch.Generator().manual_seed(1)
    sizes = (len(params.m0), len(params.C))
    noise = [torch.randn(condition.T, 1, n, dtype=torch.float64, generator=g) for n in sizes]
    return simulate(params, *noise).x.float()


def double(params: LinearGaussian) -> LinearGaussian:
    return LinearGaussian(*(None if a is None else a.double() for a in params))


class Moments(NamedTuple):
    mean: Tensor  # (T, z)
    variance: Tensor
    smoothed: Tensor  # variance
    log_likelihood: float
    positive: bool


def plain(params: LinearGaussian, x: Tensor) -> Moments:
    """The textbook filter and smoother."""
    m, P, kept, total = params.m0, params.P0, [], 0.0
    A, C = params.A, params.C
    for t, y in enumerate(x[:, 0]):
        if t:
            m, P = A @ m, A @ P @ A.T + params.Q
        S = C @ P @ C.T + params.R
        K = torch.linalg.lstsq(S, C @ P).solution.T if (S == 0).all() else torch.linalg.solve(S, C @ P).T
        e = y - C @ m
        density = -0.5 * (len(y) * math.log(2 * math.pi) + torch.logdet(S) + e @ torch.linalg.solve(S, e))
        total += float(density)
        kept.append((m, P, m + K @ e, P - K @ S @ K.T))
        m, P = kept[-1][2:]
    smoothed = [P]
    for (_, _, _, P_f), (_, P_, _, _) in zip(kept[-2::-1], kept[:0:-1], strict=True):
        G = torch.linalg.solve_ex(P_, A @ P_f).result.T
        smoothed.append(P_f + G @ (smoothed[-1] - P_) @ G.T)
    covariances = torch.stack([c[3] for c in kept] + smoothed)
    return Moments(
        torch.stack([c[2] for c in kept]), torch.stack([c[3].diagonal() for c in kept]),
        torch.stack([s.diagonal() for s in smoothed[::-1]]), total, positive(covariances),
    )  # fmt: skip


def positive(covariances: Tensor) -> bool:
    """No eigenvalue below what rounding makes of a singular matrix, after scaling to correlations."""
    if not covariances.isfinite().all() or (covariances.diagonal(dim1=-2, dim2=-1) <= 0).any():
        return False
    scale = covariances.diagonal(dim1=-2, dim2=-1).sqrt()
    correlation = (covariances / (scale.unsqueeze(-1) * scale.unsqueeze(-2))).double()
    least = torch.linalg.eigvalsh(0.5 * (correlation + correlation.mT)).min()
    return bool(least > -8 * torch.finfo(covariances.dtype).eps)


def ours(params: LinearGaussian, x: Tensor, method: str) -> Moments:
    filtered: Filtered = kalman_filter(params, x, method=method)
    smoothed = kalman_smoother(params, filtered, method=method)
    return Moments(
        filtered.mean[:, 0], filtered.covariance[:, 0].diagonal(dim1=-2, dim2=-1),
        smoothed.covariance[:, 0].diagonal(dim1=-2, dim2=-1), float(filtered.log_likelihood.double().sum()),
        positive(torch.cat([filtered.covariance[:, 0], smoothed.covariance[:, 0]])),
    )  # fmt: skip


def exact(params: LinearGaussian, x: Tensor, digits: int) -> Moments:
    """The same recursions with so many digits."""
    mpmath.mp.dps = digits
    m, P, A, Q, C, R = (mpmath.matrix(a.double().tolist()) for a in params[:6])
    kept, total = [], mpmath.mpf(0)
    for t, y in enumerate(x[:, 0].double().tolist()):
        if t:
            m, P = A * m, A * P * A.T + Q
        S = C * P * C.T + R
        K = P * C.T * S**-1
        e = mpmath.matrix(y) - C * m
        total -= (len(y) * mpmath.log(2 * mpmath.pi) + mpmath.log(mpmath.det(S)) + (e.T * S**-1 * e)[0]) / 2
        kept.append((m, P, m + K * e, P - K * S * K.T))
        m, P = kept[-1][2:]
    smoothed = [P]
    for (_, _, _, P_f), (_, P_, _, _) in zip(kept[-2::-1], kept[:0:-1], strict=True):
        G = P_f * A.T * P_**-1
        smoothed.append(P_f + G * (smoothed[-1] - P_) * G.T)

    def diagonals(matrices: list[Any]) -> Tensor:
        return torch.tensor([[float(M[i, i]) for i in range(M.rows)] for M in matrices], dtype=torch.float64)

    means = torch.tensor([[float(v) for v in c[2]] for c in kept], dtype=torch.float64)
    return Moments(means, diagonals([c[3] for c in kept]), diagonals(smoothed[::-1]), float(total), True)


def errors(got: Moments, true: Moments) -> dict[str, Any]:
    def finite(value: Tensor) -> float | None:
        return float(f"{float(value):.2g}") if bool(value.isfinite()) else None

    frames = len(true.mean)
    return {
        "mean_in_sd": finite(((got.mean.double() - true.mean).abs() / true.variance.sqrt()).max()),
        "variance": finite((got.variance.double() / true.variance - 1).abs().max()),
        "smoothed_variance": finite((got.smoothed.double() / true.smoothed - 1).abs().max()),
        "nats_per_frame": finite(torch.tensor(abs(got.log_likelihood - true.log_likelihood) / frames)),
        "positive": got.positive,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--digits", type=int, default=60)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    for condition in conditions():
        x = observations(condition)
        long = condition.T > 1000
        if long:
            true = ours(double(condition.params), x.double(), "square_root")
        else:
            true = exact(condition.params, x, args.digits)
        for form in ("plain", "joseph", "square_root", "auto"):
            try:
                got = plain(condition.params, x) if form == "plain" else ours(condition.params, x, form)
                found = errors(got, true)
            except (ValueError, RuntimeError) as failure:
                found = {"failure": str(failure).split(".")[0]}
            reference = "float64, square_root" if long else f"mpmath, {args.digits} digits"
            records.append({"condition": condition.name, "form": form, "reference": reference, **found})
            print(records[-1], flush=True)
    shared = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/exact_torture.py --digits {args.digits}",
        "what": "float32 in and out; largest errors over time: filtered means in standard deviations, "
        "filtered and smoothed variances relative, log-likelihood in nats per frame",
        "versions": {"torch": torch.__version__, "mpmath": mpmath.__version__},
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, CPU only",
    }
    args.out.write_text(json.dumps([record | shared for record in records], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
