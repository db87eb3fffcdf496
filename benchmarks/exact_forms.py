"""The forms of the Kalman filter and smoother against each other: where `method="auto"` should change from one to another.

    OMP_NUM_THREADS=1 python benchmarks/exact_forms.py [--repeats 5] [--out benchmarks/results/exact_forms.json]

Filter and smoother in float64 without gradients, one thread, on a model whose A varies in time ("varying"), on a constant
one with complete data ("constant"), and on that with frames missing at random, others in each sequence ("gaps").
`compiled` needs Numba; its compilation is not counted. Median milliseconds, interleaved.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from dynavae.allocator import keep_freed_memory
from dynavae.exact.forms import choose
from dynavae.exact.kalman import LinearGaussian, kalman_filter, kalman_smoother

METHODS = {
    "constant": ["compiled", "shared", "joseph"],
    "gaps": ["compiled", "shared", "joseph"],
    "varying": ["compiled", "joseph", "parallel"],
}
LARGEST = 70_000
OUT = Path(__file__).parent / "results" / "exact_forms.json"


def model(z: int, T: int, varying: bool) -> LinearGaussian:
    g = torch.Generator().manual_seed(0)
    A = 0.95 * torch.linalg.qr(torch.randn(z, z, generator=g, dtype=torch.float64)).Q
    if varying:
        A = A + 0.01 * torch.randn(T, 1, z, z, generator=g, dtype=torch.float64)
    x, eye = max(1, z // 2), torch.eye(z, dtype=torch.float64)
    C = torch.randn(x, z, generator=g, dtype=torch.float64) / z**0.5
    return LinearGaussian(torch.zeros(z).double(), eye, A, 0.1 * eye, C, 0.5 * torch.eye(x).double())


@torch.no_grad()
def run(params: LinearGaussian, x: torch.Tensor, method: str) -> float:
    start = time.perf_counter()
    kalman_smoother(params, kalman_filter(params, x, method=method), method=method)
    return 1e3 * (time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    records = []
    for kind, z, T, B in itertools.product(METHODS, (2, 4, 8, 16, 32), (8, 32, 128, 512), (1, 8, 64, 512)):
        if B * T > LARGEST:
            continue
        params = model(z, T, kind == "varying")
        g = torch.Generator().manual_seed(1)
        x = torch.randn(T, B, params.C.shape[0], dtype=torch.float64, generator=g)
        if kind == "gaps":
            x[torch.rand(T, B, generator=g) < 0.2] = torch.nan
        methods = METHODS[kind]
        for method in methods:
            run(params, x, method)
        times: dict[str, list[float]] = {method: [] for method in methods}
        for _ in range(args.repeats):
            for method, seen in times.items():
                seen.append(run(params, x, method))
        ms = {method: round(statistics.median(seen), 2) for method, seen in times.items()}
        auto = choose(params, T, B, B if kind == "gaps" else 0)
        record = {"kind": kind, "dim": z, "steps": T, "batch": B, "ms": ms, "auto": auto}
        records.append(record | {"to_fastest": round(ms[auto] / min(ms.values()), 2)})
        print(records[-1], flush=True)
    shared = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/exact_forms.py --repeats {args.repeats}",
        "what": "median milliseconds of filter and smoother, interleaved, float64, one thread; auto: the form it takes",
        "versions": {"torch": torch.__version__},
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, CPU only; load {os.getloadavg()[0]:.1f}",
    }
    args.out.write_text(json.dumps([record | shared for record in records], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
