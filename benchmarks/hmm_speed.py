"""Hidden Markov models: expected counts (an E-step given the emissions) and the most probable path, against hmmlearn.

    OMP_NUM_THREADS=1 python benchmarks/hmm_speed.py [--repeats 9] [--out benchmarks/results/hmm_speed.json]

Everybody starts from log p(x_t | s_t) in memory, float64, one thread, and returns log p(x), expected numbers of first
states and of transitions, and p(s_t | x). hmmlearn's recursions are in C++, one sequence after the other: "scaling", in
probabilities, and "log", in logarithms, which its defaults take; they are called without its Python classes. Ours are in
logarithms, and have structural zeros and lengths. Medians of interleaved repeats; compilation by Numba is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from dynavae.allocator import keep_freed_memory
from dynavae.exact import _native, hmm

SIZES = [(1, 1000, 4), (64, 1000, 4), (64, 200, 16), (1000, 100, 4), (1, 1000, 64), (64, 130, 64)]
OUT = Path(__file__).parent / "results" / "hmm_speed.json"
Run = Callable[[], object]


def ours(chain: list[torch.Tensor]) -> dict[str, Run]:
    free = [a.clone().requires_grad_() for a in chain]

    def counts() -> object:
        log_likelihood = hmm.hmm_filter(*free).log_likelihood
        return log_likelihood, torch.autograd.grad(log_likelihood.sum(), free)

    return {"expected counts": counts, "best path": lambda: hmm.viterbi(*chain)}


def without(run: Run) -> Run:
    def call() -> object:
        with mock.patch.object(_native, "installed", return_value=False):
            return run()

    return call


def hmmlearn(chain: list[torch.Tensor], form: str) -> dict[str, Run]:
    from hmmlearn import _hmmc

    initial, transition = (a.exp().numpy() for a in chain[:2])
    rows = [np.ascontiguousarray(row) for row in chain[2].transpose(0, 1).numpy()]

    def scaling() -> object:
        made = []
        for row in rows:
            likely = np.exp(row)
            log_p, forward, scales = _hmmc.forward_scaling(initial, transition, likely)
            backward = _hmmc.backward_scaling(initial, transition, likely, scales)
            gamma = forward * backward
            gamma /= gamma.sum(1, keepdims=True)
            made.append((log_p, gamma, _hmmc.compute_scaling_xi_sum(forward, transition, backward, likely)))
        return made

    def log() -> object:
        made = []
        for row in rows:
            log_p, forward = _hmmc.forward_log(initial, transition, row)
            backward = _hmmc.backward_log(initial, transition, row)
            gamma = forward + backward
            gamma = np.exp(gamma - np.logaddexp.reduce(gamma, 1, keepdims=True))
            made.append((log_p, gamma, _hmmc.compute_log_xi_sum(forward, transition, backward, row)))
        return made

    best = {"best path": lambda: [_hmmc.viterbi(initial, transition, row) for row in rows]}
    return {"expected counts": scaling if form == "scaling" else log, **(best if form == "scaling" else {})}


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    shared = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/hmm_speed.py --repeats {args.repeats}",
        "what": "median milliseconds, interleaved; ratio = rival / dynavae; float64, one thread",
        "versions": {name: version(name) for name in ("torch", "numba", "hmmlearn", "numpy")},
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, CPU only; load {os.getloadavg()[0]:.1f}",
    }
    records = []
    for B, T, S in SIZES:
        g = torch.Generator().manual_seed(0)
        chain = [torch.randn(*shape, generator=g).double() for shape in [(S,), (S, S), (T, B, S)]]
        chain = [chain[0].log_softmax(-1), chain[1].log_softmax(-1), chain[2]]
        mine = ours(chain)
        runs = {
            "dynavae": mine,
            "dynavae without Numba": {task: without(run) for task, run in mine.items()},
            "hmmlearn, scaling": hmmlearn(chain, "scaling"),
            "hmmlearn, log": hmmlearn(chain, "log"),
        }
        for task in mine:
            own = {name: tasks[task] for name, tasks in runs.items() if task in tasks}
            for run in own.values():
                run()  # compile, warm up
            times: dict[str, list[float]] = {name: [] for name in own}
            for _ in range(args.repeats):
                for name, run in own.items():
                    times[name].append(seconds(run))
            ms = {name: 1e3 * statistics.median(seen) for name, seen in times.items()}
            for name, value in ms.items():
                record = {
                    "task": task,
                    "batch": B,
                    "steps": T,
                    "states": S,
                    "rival": name,
                    "ms": round(value, 2),
                }
                records.append(
                    record | {"ratio": round(value / ms["dynavae"], 2), "repeats": args.repeats} | shared
                )
                print({k: records[-1][k] for k in (*record, "ratio")}, flush=True)
    args.out.write_text(json.dumps(records, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
