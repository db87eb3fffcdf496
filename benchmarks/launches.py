"""How many operations Python starts in one training step: what a GPU waits for when batches are small.

    python benchmarks/launches.py

The models, the plain loop and the sizes are those of `engine_speed.py`, 32 sequences of 150 frames. `loop` and `whole` are
the plain loop, without and with recurrences over x in one call; `engine` is the engine, of which `recursion` is the loop
over time and its backward; `recorded` is what is left when that is played from a CUDA graph (compile="recursion"): two
launches, and copies of what goes in and comes out. Counted on a CPU as operations that compute, views apart, with tanh as
one operation, which it is on a GPU; there nearly all of them are one kernel. These are counts, no times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import plain_loops
import torch
from engine_speed import Case
from torch.utils._python_dispatch import TorchDispatchMode

import dynavae
from dynavae import recursion
from dynavae.files import write_json
from dynavae.nn.mlp import Tanh
from dynavae.nn.through_time import TanhInto
from dynavae.recursion import Recursion
from dynavae.runs import table

RESULTS = Path(__file__).parent / "results" / "launches.json"


class Count(TorchDispatchMode):
    """Operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = [r.alias_info for r in op._schema.returns]
        self.n += not any(alias is not None and not alias.is_write for alias in returns)
        return op(*args, **(kwargs or {}))


class Within:
    """Operations of the recursion, and tensors that cross its border."""

    def __init__(self) -> None:
        self.n = self.tensors = 0

    def of(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(own: Recursion, *given: Any) -> Any:
            with Count() as count:
                out = method(own, *given)
            self.n += count.n
            self.tensors += sum(a is not None for a in (*given, *out))
            return out

        return counted

    @contextmanager
    def watching(self) -> Iterator[None]:
        forward, backward = Recursion.forward, Recursion.backward
        Recursion.forward, Recursion.backward = self.of(forward), self.of(backward)  # type: ignore[method-assign]
        try:
            yield
        finally:
            Recursion.forward, Recursion.backward = forward, backward  # type: ignore[method-assign]


def launches(name: str, batch: int, steps: int) -> dict[str, Any]:
    case = Case(name, batch, steps)

    def count(loss: Callable[[], Any]) -> int:
        with Count() as counted:
            case.train(loss)
        return counted.n

    within = Within()
    record = {"loop": count(case.plain), "whole": count(case.whole)}
    with within.watching():
        engine = count(case.launched)
    recorded = engine - within.n + within.tensors + 2
    return record | {"engine": engine, "recursion": within.n, "recorded": recorded}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="32x150")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    Tanh.MANY = TanhInto.MANY = sys.maxsize
    recursion.sigmoids_pay = lambda like: False
    batch, steps = map(int, arguments.size.split("x"))
    versions = {"dynavae": dynavae.__version__, "torch": torch.__version__}
    records = [
        {"model": name, "batch": batch, "steps": steps, **launches(name, batch, steps), "versions": versions}
        for name in plain_loops.MODELS
    ]
    write_json(arguments.out, records)
    print(
        table(records, ["model", "batch", "steps", "loop", "whole", "engine", "recursion", "recorded"]),
        flush=True,
    )


if __name__ == "__main__":
    main()
