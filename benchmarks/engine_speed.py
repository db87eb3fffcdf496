"""Speed of the engine against the plain loop over t, and against the matrix products alone.

    python benchmarks/engine_speed.py [--threads N] [--models VRNN,DKF] [--sizes 128x50,32x150] [--repeats 5] [--no-growth]
    python benchmarks/engine_speed.py --device cuda

Four models of the speech literature (x 257, z 16, LSTM of 128, hidden layers of their papers, gamma likelihood of a power
spectrum), float32. `loop_ms` is the same mathematics with the same weights and noise written in the usual way
(`plain_loops.py`, everything in the loop); `whole_ms` has the recurrences over x alone in one call of nn.LSTM. `gemm_ms` is
the floating point operations of the plain step's matrix products at this machine's rate for 1024 x 1024 matrices. The
engine and the plain loop have a process each: the engine's keeps freed memory, as `fit` does, which would slow some plain
loops down. They take turns: steps for 0.5 s to warm up, since after a pause a step takes up to 1.4 times as long as in a
run, then for 0.5 s (at least one) those that count; the 1024 x 1024 products have turns of the same kind. The median of a
turn, then the median over the turns, is kept; ratio = loop_ms / fast_ms.
Gradients of both are compared first (`grad_error`, relative to the largest entry of each parameter's gradient); above 1e-5
in float64 the program stops.
`peak_mb`: greatest resident memory of one step above what the process held before it.
`repeats` counts the turns; with 500 steps and more three are enough.

On a GPU `fast_ms` has the loop over time in a CUDA graph (`compile="recursion"`), `launched_ms` has not; the rate is that of
a 4096 x 4096 product, all without TF32, and `peak_mb` is what torch allocated there, recordings included.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_loops
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dynavae
from dynavae import Sequences, data, objectives, recording
from dynavae.allocator import keep_freed_memory
from dynavae.files import write_json
from dynavae.loading import loader
from dynavae.nn.mlp import Tanh
from dynavae.noise import Noise, draw
from dynavae.runs import table
from dynavae.scan import scan

RESULTS = Path(__file__).parent / "results" / "engine_speed.json"
SIZES = "128x50,16x50,32x150,32x1000"
X_DIM = 257
WARM_UP, COUNTS = 0.5, 0.5  # seconds of a turn


class Case:
    """One model at one size: both ways to take a training step, and to score."""

    def __init__(
        self, name: str, batch: int, steps: int, particles: int = 1, device: str = "cpu", **options: Any
    ) -> None:
        torch.manual_seed(0)
        kind = plain_loops.MODELS[name]
        self.name, self.model = name, kind(X_DIM, emission="power_spectrum", **options).to(device)
        self.batch = Sequences.from_arrays(torch.rand(batch, steps, X_DIM) + 0.1).to(device)
        self.noise = draw(self.model, steps, particles, batch)
        self.particles, self.device = particles, device

    def fast(self) -> Tensor:
        return self.launched(compile="recursion" if self.device == "cuda" else False)

    def launched(self, compile: bool | str = False) -> Tensor:
        trajectory = scan(self.model, self.batch, particles=self.particles, noise=self.noise, compile=compile)
        return -objectives.elbo(trajectory).mean()

    def plain(self, whole: bool = False) -> Tensor:
        x = self.batch.x.transpose(0, 1)
        return -plain_loops.PLAIN[self.name](self.model, x, self.noise.z[:, 0], whole).mean()

    def whole(self) -> Tensor:
        return self.plain(True)

    def train(self, loss: Callable[[], Tensor]) -> float:
        """Seconds of one forward and backward pass."""
        self.model.zero_grad()
        begin = now(self.device)
        loss().backward()
        return now(self.device) - begin

    def infer(self, loss: Callable[[], Tensor]) -> float:
        begin = now(self.device)
        with torch.no_grad():
            loss()
        return now(self.device) - begin

    def double(self) -> Case:
        self.model.double()
        self.batch = self.batch.to(dtype=torch.float64)
        self.noise = Noise(*(None if a is None else a.double() for a in self.noise))  # type: ignore[arg-type]
        return self

    def error(self) -> float:
        """Greatest difference of a gradient, relative to the largest entry of that parameter's gradient."""
        parameters = list(self.model.parameters())
        for _ in range(2 if self.device == "cuda" else 0):  # a size is recorded when it comes again
            self.train(self.fast)
        grads = [
            torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
            for loss in (self.fast, self.plain, self.whole)
        ]
        return max(
            float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
            for other in grads[1:]
            for a, b in zip(grads[0], other, strict=True)
        )


def recorded(case: Case) -> int:
    """How many recordings are played; a benchmark of recordings that are not is none."""
    held = [r for several in recording.recordings.held.values() for r in several]
    if case.device == "cuda" and not held:
        raise SystemExit(f"{case.name}: the loop over time was not recorded.")
    if any(tape is None for r in held for _, tape in r.backwards.values()):
        raise SystemExit(f"{case.name}: the backward of the loop over time was not recorded.")
    return len(held)


def now(device: str) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def turn(step: Callable[[], float], at_least: int = 1) -> float:
    """Median seconds of the steps of one turn."""
    spent: list[float] = []
    while len(spent) < at_least or sum(spent) < WARM_UP:
        spent.append(step())
    counted: list[float] = []
    while not counted or sum(counted) < COUNTS:
        counted.append(step())
    return statistics.median(counted)


def gemm_rate(device: str = "cpu") -> float:
    """Floating point operations per second of a 1024 x 1024 product, on a GPU 4096 x 4096."""
    n = 4096 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device)

    def product() -> float:
        begin = now(device)
        a @ a
        return now(device) - begin

    return 2 * n**3 / turn(product)


class Worker:
    """A process that takes steps when it is asked to."""

    def __init__(self, kind: str, threads: int, device: str) -> None:
        command = [sys.executable, __file__, "--worker", kind, "--threads", str(threads), "--device", device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *words: Any) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(*words, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work(device: str) -> None:
    """What a worker does: `case VRNN 32 150`, then `train fast` or `infer plain`; it answers with seconds."""
    case: Case | None = None
    for line in sys.stdin:
        task, *words = line.split()
        if task == "case":
            name, batch, steps = words
            recording.recordings.clear()
            case = Case(name, int(batch), int(steps), device=device)
            print(0.0, flush=True)
        else:
            assert case is not None
            run = getattr(case, task)
            way = getattr(case, words[0])
            at_least = 3 if device == "cuda" else 1  # a size is recorded when it comes for the second time
            seconds = turn(functools.partial(run, way), at_least)
            if words[0] == "fast":
                recorded(case)
            print(seconds, flush=True)


def compare(
    task: str, name: str, batch: int, steps: int, repeats: int, engine: Worker, plain: Worker, device: str
) -> dict[str, float]:
    case = Case(name, batch, steps)
    with FlopCounterMode(display=False) as counter:
        (case.train if task == "train" else case.infer)(case.plain)
    del case
    for worker in (engine, plain):
        worker.ask("case", name, batch, steps)
    ways = {"fast_ms": (engine, "fast"), "loop_ms": (plain, "plain"), "whole_ms": (plain, "whole")}
    if device == "cuda":
        ways["launched_ms"] = engine, "launched"
    times: dict[str, list[float]] = {key: [] for key in ways}
    rates = []
    for _ in range(repeats):
        for key, (worker, way) in ways.items():
            time.sleep(0.05)  # until the other process's threads no longer wait for work
            times[key].append(worker.ask(task, way))
        time.sleep(0.05)
        rates.append(gemm_rate(device))
    out = {key: 1e3 * statistics.median(values) for key, values in times.items()}
    gemm = 1e3 * counter.get_total_flops() / statistics.median(rates)
    return {
        "ratio": out["loop_ms"] / out["fast_ms"],
        **out,
        "gemm_ms": gemm,
        "fast_over_gemm": out["fast_ms"] / gemm,
    }


def peak_mb(task: str, way: str, device: str, **case: Any) -> float:
    """In a process of its own, since freed memory is not always handed back."""
    what = json.dumps({"task": task, "way": way, "case": case})
    command = [sys.executable, __file__, "--peak", what]
    command += ["--threads", str(torch.get_num_threads()), "--device", device]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_peak(task: str, way: str, device: str, **size: Any) -> float:
    case = Case(**size, device=device)
    run, loss = getattr(case, task), getattr(case, way)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        for _ in range(3):  # the size is recorded when it comes again, which takes more, once
            run(loss)
        torch.cuda.reset_peak_memory_stats()
        run(loss)
        segments = (
            torch.cuda.memory_snapshot()
        )  # what graphs keep for themselves counts, though nothing lives there now
        kept = sum(
            s["total_size"] - s["allocated_size"]
            for s in segments
            if tuple(s.get("segment_pool_id", (0, 0))) != (0, 0)
        )
        return (torch.cuda.max_memory_allocated() - before + kept) / 2**20
    small = Case(case.name, 2, 3)
    small.train(small.fast)  # what torch allocates once
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    run(loss)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1])


def growth(repeats: int) -> list[dict[str, Any]]:
    """How a VRNN training step grows with each size, from (B, T, K, h) = (32, 100, 1, 128)."""
    base = {"batch": 32, "steps": 100, "particles": 1, "h_dim": 128}
    records = []
    for name, values in {
        "steps": (50, 100, 200, 400),
        "batch": (8, 16, 32, 64, 128),
        "particles": (1, 2, 4, 8),
        "h_dim": (32, 64, 128, 256, 512),
    }.items():
        for value in values:
            size: dict[str, int] = base | {name: value}
            case = Case("VRNN", **size)
            times = [turn(functools.partial(case.train, case.fast)) for _ in range(repeats)]
            records.append(
                {
                    "task": "growth",
                    "model": "VRNN",
                    "grows": name,
                    **size,
                    "fast_ms": 1e3 * statistics.median(times),
                    "peak_mb": peak_mb("train", "fast", "cpu", name="VRNN", **size),
                }
            )
    return records


def pipeline(repeats: int) -> dict[str, Any]:
    """Frames per second that the loader delivers, training batches of the packaged chorales."""
    train = data.load("jsb").train
    assert train is not None
    frames = sum(batch.frames for batch in loader(train, 16, seed=0))

    def epoch() -> float:
        begin = time.perf_counter()
        for _ in loader(train, 16, seed=0):
            pass
        return time.perf_counter() - begin

    seconds = statistics.median(turn(epoch) for _ in range(repeats))
    return {
        "task": "input",
        "data": "jsb",
        "batch": 16,
        "fast_ms": 1e3 * seconds,
        "frames_per_second": frames / seconds,
    }


def save(path: Path, records: list[dict[str, Any]]) -> None:
    """In place of what the file has of the same measurements; it holds those at several numbers of threads."""

    def what(record: dict[str, Any]) -> tuple[Any, ...]:
        names = ("device", "threads", "task", "model", "batch", "steps", "grows", "particles", "h_dim")
        return tuple(record.get(name, "cpu" if name == "device" else None) for name in names)

    new = {what(record) for record in records}
    old = json.loads(path.read_text()) if path.exists() else []
    write_json(path, [record for record in old if what(record) not in new] + records)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--models", default=",".join(plain_loops.PLAIN))
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--no-growth", action="store_true", help="leave out the growth with sizes and the input pipeline"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=["engine", "plain"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False  # as it is with products
    kept = arguments.worker != "plain" and keep_freed_memory()
    if arguments.worker == "plain":
        Tanh.MANY = sys.maxsize  # torch's own, as one would write it
    if arguments.worker:
        work(arguments.device)
        return
    if arguments.peak:
        what = json.loads(arguments.peak)
        print(measure_peak(what["task"], what["way"], arguments.device, **what["case"]))
        return
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU, and torch sees none here.")
    shared = {
        "device": device,
        "threads": arguments.threads,
        "turns": f"{WARM_UP} s to warm up, {COUNTS} s that count",
        "allocator": "the engine's keeps freed memory, as fit does" if kept else "as it is",
        "hardware": hardware(device),
        "versions": {"dynavae": dynavae.__version__, "torch": torch.__version__},
        "command": shlex.join(["python", "benchmarks/engine_speed.py", *sys.argv[1:]]),
    }
    records: list[dict[str, Any]] = []
    engine, plain = (Worker(kind, arguments.threads, device) for kind in ("engine", "plain"))
    for name in arguments.models.split(","):
        small = Case(name, 4, 7, device=device).double()
        error = small.error()
        recorded(small)
        if error > 1e-5:
            raise SystemExit(
                f"{name}: gradients of the two ways differ by {error:.1e}, so their times mean nothing."
            )
        for size in arguments.sizes.split(","):
            batch, steps = map(int, size.split("x"))
            for task in ("train", "infer"):
                record: dict[str, Any] = {"task": task, "model": name, "batch": batch, "steps": steps}
                repeats = arguments.repeats if steps < 500 else min(arguments.repeats, 3)
                record |= compare(task, name, batch, steps, repeats, engine, plain, device) | {
                    "repeats": repeats
                }
                one = dict(name=name, batch=batch, steps=steps)
                record |= {
                    "peak_mb": peak_mb(task, "fast", device, **one),
                    "loop_peak_mb": peak_mb(task, "plain", device, **one),
                }
                if task == "train":
                    record["grad_error"] = error
                records.append(_rounded(record) | shared)
                print({k: v for k, v in records[-1].items() if k not in shared}, flush=True)
                save(arguments.out, records)
    engine.close()
    plain.close()
    if not arguments.no_growth and device == "cpu":
        records += [_rounded(r) | shared for r in (*growth(arguments.repeats), pipeline(arguments.repeats))]
        save(arguments.out, records)
    for task in ("train", "infer"):
        rows = [r for r in records if r["task"] == task]
        print(
            table(
                rows,
                [
                    "task",
                    "model",
                    "batch",
                    "steps",
                    "ratio",
                    "fast_ms",
                    "loop_ms",
                    "whole_ms",
                    "gemm_ms",
                    "peak_mb",
                ],
            )
        )
        mean = math.exp(statistics.mean(math.log(r["ratio"]) for r in rows))
        print(f"{task}: geometric mean of the ratios {mean:.2f}, least {min(r['ratio'] for r in rows):.2f}\n")


def hardware(device: str) -> str:
    cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return cpu if device == "cpu" else f"{torch.cuda.get_device_name()}, {cpu}"


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}


if __name__ == "__main__":
    main()
