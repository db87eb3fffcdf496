"""Exact inference in linear-Gaussian models against other libraries: filter + smoother, and likelihood + gradient.

    OMP_NUM_THREADS=1 python benchmarks/exact_speed.py [--repeats 15] [--only 1] [--out benchmarks/results/exact_speed.json]

A model that is the same at all steps, float64 for everybody, one thread; complete data, and in one case frames missing
at random, others in each sequence: NaN for us and statsmodels; dynamax has no missing data and gets a variance of 1e12
there (its likelihood is then off by a constant). Everybody starts from arrays
in memory and returns all moments of all sequences, and, for the gradient, the gradient of the summed log-likelihood
with respect to m0, P0, A, Q, C, R. dynamax (JAX) is jitted over the batch (vmap), which shares covariances too, and
its compilation is not counted, and neither is ours by Numba; "dynavae without Numba" is what a user without it has.
statsmodels and filterpy have no batches: a loop over sequences; and no gradient: central differences of statsmodels'
log-likelihood, timed as two per free entry, from two evaluations. The pykalman-like rival is the textbook recursion in
NumPy. Rivals whose single run takes longer than --slow seconds run once. Others are interleaved with ours, and medians
are compared. `memory` is the peak increase of resident memory in
MiB of one call, after one on little data, in a fresh process (Linux). The process that is timed keeps freed memory, for
everybody, as one that runs `dynavae.fit` does; else the time of pages that the kernel clears is a matter of who ran before.

Rivals that are not installed (dynamax, filterpy, statsmodels) are left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import numpy as np
import torch

from dynavae.allocator import keep_freed_memory
from dynavae.exact import _native
from dynavae.exact.kalman import LinearGaussian, kalman_filter, kalman_smoother
from dynavae.exact.likelihood import log_likelihood

Size = tuple[int, int, int, float]
SIZES: list[Size] = [
    (1, 1000, 4, 0.0), (64, 1000, 4, 0.0), (64, 200, 16, 0.0), (1000, 100, 4, 0.0), (64, 200, 4, 0.2)
]  # fmt: skip
OUT = Path(__file__).parent / "results" / "exact_speed.json"
Run = Callable[[], object]


def model(z: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A damped rotation of z states, seen through z / 2 random projections."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(z, z)))
    x = z // 2
    return {
        "m0": np.zeros(z), "P0": np.eye(z), "A": 0.95 * rotation, "Q": 0.1 * np.eye(z),
        "C": rng.normal(size=(x, z)) / np.sqrt(z), "R": 0.5 * np.eye(x),
    }  # fmt: skip


def ours(p: dict[str, np.ndarray], x: np.ndarray) -> dict[str, Run]:
    params = LinearGaussian(**{name: torch.from_numpy(value) for name, value in p.items()})
    data = torch.from_numpy(np.ascontiguousarray(x.swapaxes(0, 1)))

    @torch.no_grad()
    def smooth() -> object:
        filtered = kalman_filter(params, data)
        return filtered, kalman_smoother(params, filtered)

    free = [value.clone().requires_grad_() for value in params[:6]]

    def gradient() -> object:
        return torch.autograd.grad(log_likelihood(LinearGaussian(*free), data).sum(), free)

    return {"filter+smoother": smooth, "filter+gradient": gradient}


def torch_alone(p: dict[str, np.ndarray], x: np.ndarray) -> dict[str, Run]:
    """Ours where Numba is not installed."""

    def without(run: Run) -> Run:
        def call() -> object:
            with mock.patch.object(_native, "installed", return_value=False):
                return run()

        return call

    return {task: without(run) for task, run in ours(p, x).items()}


def dynamax(p: dict[str, np.ndarray], x: np.ndarray) -> dict[str, Run]:
    import jax

    jax.config.update("jax_enable_x64", True)
    from dynamax.linear_gaussian_ssm.inference import lgssm_filter, lgssm_smoother, make_lgssm_params

    data = jax.numpy.asarray(x)

    def params(v: dict[str, Any]) -> Any:
        return make_lgssm_params(v["m0"], v["P0"], v["A"], v["Q"], v["C"], v["R"])

    gone = jax.numpy.isnan(data)
    if bool(gone.any()):  # it knows no missing data: a variance so large that the frame says nothing
        data = jax.numpy.where(gone, 0.0, data)
        vague = jax.numpy.where(gone.any(-1), 1e12, 0.0)[..., None, None] * jax.numpy.eye(x.shape[-1])

        def each(run: Any, v: dict[str, Any]) -> Any:
            return jax.vmap(lambda e, extra: run(params(v | {"R": v["R"] + extra}), e))(data, vague)
    else:

        def each(run: Any, v: dict[str, Any]) -> Any:
            return jax.vmap(lambda e: run(params(v), e))(data)

    smooth = jax.jit(lambda v: each(lgssm_smoother, v))

    def total(v: dict[str, Any]) -> Any:
        return each(lgssm_filter, v).marginal_loglik.sum()

    gradient = jax.jit(jax.value_and_grad(total))
    v = {name: jax.numpy.asarray(value) for name, value in p.items()}
    return {
        "filter+smoother": lambda: jax.block_until_ready(smooth(v)),
        "filter+gradient": lambda: jax.block_until_ready(gradient(v)),
    }


def statsmodels(p: dict[str, np.ndarray], x: np.ndarray) -> dict[str, Run]:
    from statsmodels.tsa.statespace.kalman_smoother import KalmanSmoother

    z, x_dim = len(p["m0"]), x.shape[-1]

    def bound(row: np.ndarray) -> Any:
        k = KalmanSmoother(k_endog=x_dim, k_states=z)
        k.bind(row.copy())
        k["transition"], k["selection"], k["state_cov"] = p["A"], np.eye(z), p["Q"]
        k["design"], k["obs_cov"] = p["C"], p["R"]
        k.initialize_known(p["m0"], p["P0"])
        return k

    entries = z + z * (z + 1) + z * z + z * x_dim + x_dim * (x_dim + 1) // 2

    def differences() -> float:  # seconds it would take: 2 entries evaluations, of which two are run
        kept = [bound(row) for row in x]
        start = time.perf_counter()
        for _ in range(2):
            sum(k.loglike() for k in kept)
        return entries * (time.perf_counter() - start)

    return {"filter+smoother": lambda: [bound(row).smooth() for row in x], "filter+gradient": differences}


def filterpy(p: dict[str, np.ndarray], x: np.ndarray) -> dict[str, Run]:
    from filterpy.kalman import KalmanFilter

    def one(row: np.ndarray) -> object:
        k = KalmanFilter(dim_x=len(p["m0"]), dim_z=row.shape[-1])
        k.F, k.Q, k.H, k.R = p["A"], p["Q"], p["C"], p["R"]
        k.x, k.P = p["m0"].copy(), p["P0"].copy()
        means, covariances, _, _ = k.batch_filter(list(row), update_first=True)
        return k.rts_smoother(means, covariances)

    return {"filter+smoother": lambda: [one(row) for row in x]}


def numpy_loop(p: dict[str, np.ndarray], x: np.ndarray) -> dict[str, Run]:
    A, Q, C, R = (p[name] for name in "AQCR")

    def one(row: np.ndarray) -> object:
        m, P, past = p["m0"], p["P0"], []
        for t, y in enumerate(row):
            if t:
                m, P = A @ m, A @ P @ A.T + Q
            S = C @ P @ C.T + R
            K = np.linalg.solve(S, C @ P).T
            past.append((m, P, m + K @ (y - C @ m), P - K @ S @ K.T))
            m, P = past[-1][2:]
        smoothed = [past[-1][2:]]
        for (_, _, m_f, P_f), (m_, P_, _, _) in zip(past[-2::-1], past[:0:-1], strict=True):
            G = np.linalg.solve(P_, A @ P_f).T
            m, P = smoothed[-1]
            smoothed.append((m_f + G @ (m - m_), P_f + G @ (P - P_) @ G.T))
        return past, smoothed

    return {"filter+smoother": lambda: [one(row) for row in x]}


WITHOUT_GAPS = ("filterpy", "numpy loop")
RIVALS = {
    "dynavae without Numba": torch_alone,
    "dynamax": dynamax,
    "statsmodels": statsmodels,
    "filterpy": filterpy,
    "numpy loop": numpy_loop,
}


def data(B: int, T: int, d: int, missing: float = 0.0) -> np.ndarray:
    """Noise; each sequence misses other frames, NaN."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(B, T, d // 2))
    if missing:
        x[rng.random((B, T)) < missing] = np.nan
    return x


def _peak(name: str, size: Size, task: str, queue: Any) -> None:
    torch.set_num_threads(1)
    maker = ours if name == "dynavae" else RIVALS[name]
    maker(model(size[2]), data(1, 10, *size[2:])).get(task, int)()  # imports
    run = maker(model(size[2]), data(*size))[task]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    run()
    queue.put(_resident("VmHWM") - before)


def _resident(field: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def memory(name: str, size: Size, task: str) -> float:
    """Peak increase in MiB of the first call, compilation included where there is one."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(name, size, task, queue))
    process.start()
    value: float = queue.get()
    process.join()
    return round(value, 1)


def seconds(run: Run) -> float:
    start = time.perf_counter()
    said = run()
    return said if isinstance(said, float) else time.perf_counter() - start


def compare(size: Size, repeats: int, slow: float) -> list[dict[str, Any]]:
    """Records of every task and rival at one size."""
    B, T, d, missing = size
    runs = {"dynavae": ours(model(d), data(*size))}
    for name, maker in RIVALS.items():
        if missing and name in WITHOUT_GAPS:
            continue
        try:
            runs[name] = maker(model(d), data(*size))
        except ImportError as missing:
            print(f"{name} is left out: {missing}", file=sys.stderr)
    records = []
    for task in ("filter+smoother", "filter+gradient"):
        times: dict[str, list[float]] = {}
        for name, tasks in runs.items():
            if task in tasks:
                quick = name.startswith("dyna")
                if quick:
                    tasks[task]()  # compile, warm up
                times[name] = [seconds(tasks[task])]
        for _ in range(repeats - 1):
            for name, seen in times.items():
                if seen[0] < slow:
                    seen.append(seconds(runs[name][task]))
        medians = {name: 1e3 * statistics.median(seen) for name, seen in times.items()}
        for name, ms in medians.items():
            records.append({
                "task": task, "batch": B, "steps": T, "dim": d, "missing": missing, "rival": name, "ms": round(ms, 2),
                "ratio": round(ms / medians["dynavae"], 2), "repeats": len(times[name]),
                "memory_mib": memory(name, size, task) if times[name][0] < slow else None,
            })  # fmt: skip
            print(records[-1], flush=True)
    return records


def _size(record: dict[str, Any]) -> Size:
    return record["batch"], record["steps"], record["dim"], record["missing"]


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "numba", "jax", "dynamax", "statsmodels", "filterpy", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--only", type=int, choices=range(1, len(SIZES) + 1), help="one size; others are kept"
    )
    parser.add_argument("--slow", type=float, default=3.0, help="seconds; slower rivals run once")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    sizes = SIZES[args.only - 1 : args.only] if args.only else SIZES
    records = [record for size in sizes for record in compare(size, args.repeats, args.slow)]
    args.out.parent.mkdir(exist_ok=True)
    only = f" --only {args.only}" if args.only else ""
    shared = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/exact_speed.py --repeats {args.repeats} "
        f"--slow {args.slow}{only}",
        "what": "median milliseconds, interleaved; ratio = rival / dynavae, above 1 where dynavae is faster; "
        "float64; z_dim = dim, x_dim = dim / 2; one thread",
        "versions": versions(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, CPU only; load {os.getloadavg()[0]:.1f}",
    }
    records = [record | shared for record in records]
    if args.only:
        old = json.loads(args.out.read_text()) if args.out.exists() else []
        records = sorted(
            records + [r for r in old if _size(r) not in sizes], key=lambda r: SIZES.index(_size(r))
        )
    args.out.write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
