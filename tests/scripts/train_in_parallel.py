"""Trains small models on ragged data with DEVICES processes, and saves what came of it.

python train_in_parallel.py OUT DEVICES CASE ...

The case "diverging" has one sequence whose features are NaN: only the process that has it sees that. With STOP set, "em" is
asked to stop after the second batch of its second iteration; with RESUME it goes on from there.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from dynavae import HMM, SRNN, SVAE, VRNN, Sequences, fit
from dynavae.parallel import main_process

CASES: dict[str, dict[str, Any]] = {
    "VRNN": {},
    "SRNN": {"objective": "iwae", "particles": 2},
    "truncated": {"truncate": 3},
    "free_bits": {"free_bits": 0.05, "truncate": 4},
    "diverging": {},
    "em": {"objective": "em"},
    "conjugate": {"global_lr": 0.3},
    "fivo": {"objective": "fivo", "particles": 3, "hide_rate": 0.2, "scheduled_sampling": 0.3},
}


class Poisoned(VRNN):
    """Its features are NaN wherever x is above 100."""

    def features(self, frame: Any) -> torch.Tensor:
        return torch.where(frame.x.amax(-1, keepdim=True) > 100, torch.nan, super().features(frame))


def stop_within_an_iteration(model: HMM) -> None:
    """The fifth batch brings a SIGTERM."""
    batches, expectation = itertools.count(1), model.expectation

    def counted(batch: Sequences) -> Any:
        if next(batches) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return expectation(batch)

    model.expectation = counted  # type: ignore[method-assign]


def train(out: Path, devices: int, cases: list[str]) -> None:
    """One file of figures and weights per case."""
    for name in cases:
        options = CASES[name]
        torch.manual_seed(0)
        x = [torch.randn(n, 3) for n in (8, 5, 7, 3, 6, 4, 9)]  # 7 sequences: batches of 3, 3 and 1
        x[2][1:3] = torch.nan
        if name == "diverging":
            x[3][0] = 1000.0
        data = Sequences.from_arrays(x)
        if name == "em":
            model = HMM(3, 2, "multivariate_gaussian")
            if "STOP" in os.environ:
                stop_within_an_iteration(model)
        elif name == "conjugate":
            model = SVAE(3, 2, conjugate=True)
        else:
            model = {"SRNN": SRNN, "diverging": Poisoned}.get(name, VRNN)(3, 2, 4)
        result = fit(
            model, data, data[[0, 1, 2]], epochs=2, batch_size=3, out_dir=out / name, devices=devices,
            accelerator="cpu", progress=False, tensorboard=False, seed=4, resume="RESUME" in os.environ, **options,
        )  # fmt: skip
        if main_process():
            weights = {k: v.tolist() for k, v in model.state_dict().items()}
            text = json.dumps({"history": result.history, "weights": weights})
            (out / f"{name}.json").write_text(text)


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
