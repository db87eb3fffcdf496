"""Latency of one step of a stream: models with h_dim=128 and their defaults, K = 1 and 32 particles, one thread.

    python benchmarks/streaming.py [--steps 300] [--models VRNN,LGSSM] [--x_dim 8] [--batch 1]

Milliseconds per step, the median over the steps: with the prediction of x_t (`full`), without it (`lean`), at a frame with
a missing coordinate (`gap`); and of the exported program, not compiled, where the model has one (`exported`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynavae.model import SequentialLVM
from dynavae.models import MODELS
from dynavae.runs import table
from dynavae.tasks import capabilities, export_step, step_inputs

OPTIONS: dict[str, dict[str, Any]] = {"LGSSM": {"z_dim": 16}, "HMM": {"states": 64}}


def median(step: Callable[[], object], steps: int) -> float:
    """Milliseconds of one call."""
    times = []
    for i in range(steps + 20):
        start = time.perf_counter()
        step()
        if i >= 20:
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measure(name: str, particles: int, x_dim: int, batch: int, steps: int) -> dict[str, Any]:
    """The record of one model and number of particles."""
    cls = MODELS[name]
    options = {**OPTIONS.get(name, {"h_dim": 128}), **cls.causal_variant}
    torch.manual_seed(0)
    model = cls(x_dim=x_dim, **options).eval()
    x = torch.randn(batch, x_dim)
    holed = x.clone()
    holed[:, 0] = torch.nan
    record: dict[str, Any] = {"model": name, "K": particles, "batch": batch}
    for column, predict, frame in (("full", True, x), ("lean", False, x), ("gap", True, holed)):
        stream = model.stream(batch, particles, predict=predict)
        record[column] = round(median(lambda s=stream, f=frame: s.step(f), steps), 3)
    record["exported"] = round(exported(model, particles, x, steps), 3)
    return record


@torch.inference_mode()
def exported(model: SequentialLVM, particles: int, x: Tensor, steps: int) -> float:
    """Milliseconds of the exported program on a complete frame, noise included."""
    with torch.inference_mode(False):
        program = export_step(model, particles, batch=len(x)).module()
    inputs = step_inputs(model, len(x), particles)
    observed, fresh = torch.ones_like(inputs.observed), torch.zeros_like(inputs.fresh)
    state = [inputs.state]

    def step() -> None:
        noise = torch.randn(inputs.noise.shape)
        _, state[0] = program(x, observed, fresh, None, noise, state[0])

    return median(step, steps)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    streams = [
        name for name, cls in MODELS.items() if capabilities(cls(x_dim=2, **cls.causal_variant))["stream"]
    ]
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--models", default=",".join(streams))
    parser.add_argument("--x_dim", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = [
        measure(name, particles, arguments.x_dim, arguments.batch, arguments.steps)
        for name in arguments.models.split(",")
        for particles in (1, 32)
    ]
    print(table(records, list(records[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
