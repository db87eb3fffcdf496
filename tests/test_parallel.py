"""Several processes give the numbers of one."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripts.train_in_parallel import CASES, train

from dynavae import VRNN, Sequences, fit
from dynavae.loading import Turns, _Rows
from dynavae.loss import Loss
from dynavae.parallel import Share, layout

SCRIPT = Path(__file__).parent / "scripts" / "train_in_parallel.py"
ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(command: list[str], **variables: str) -> str:
    done = subprocess.run(command, env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_equal(one: Path, two: Path, cases: list[str]) -> None:
    for case in cases:
        a, b = (json.loads((folder / f"{case}.json").read_text()) for folder in (one, two))
        assert len(a["history"]) == len(b["history"]) == 2
        for x, y in zip(a["history"], b["history"], strict=True):
            for name in x.keys() - {"seconds", "frames_per_second"}:
                assert x[name] == pytest.approx(y[name], rel=1e-5, abs=1e-5), (case, x["epoch"], name)
        for name, value in a["weights"].items():
            np.testing.assert_allclose(value, b["weights"][name], atol=1e-5, err_msg=f"{case} {name}")
        with (two / case / "metrics.csv").open(newline="") as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    cases, one, two = ["VRNN", "SRNN", "free_bits", "em", "conjugate"], tmp_path / "one", tmp_path / "two"
    train(one, 1, cases)
    start([sys.executable, str(SCRIPT), str(two), "2", *cases])
    check_equal(one, two, cases)


def test_an_iteration_of_em_that_two_processes_share_resumes(tmp_path: Path) -> None:
    """The sums of both are kept, whoever goes on: two processes, or one."""
    one, two = tmp_path / "one", tmp_path / "two"
    train(one, 1, ["em"])
    command = [sys.executable, str(SCRIPT), str(two), "2", "em"]
    stopped = subprocess.run(
        command, env=ENVIRONMENT | {"STOP": "1"}, capture_output=True, text=True, timeout=300
    )
    assert stopped.returncode != 0 and "saved in epoch 2" in stopped.stderr, stopped.stderr
    shutil.copytree(two, tmp_path / "alone")
    start(command, RESUME="1")
    start([sys.executable, str(SCRIPT), str(tmp_path / "alone"), "1", "em"], RESUME="1")
    for resumed in (two, tmp_path / "alone"):
        check_equal(one, resumed, ["em"])


def test_all_processes_end_when_one_diverges(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), str(tmp_path), "2", "diverging"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "FloatingPointError: process " in done.stderr and "is NaN first at" in done.stderr
    assert "gloo" not in done.stderr.lower() and "Connection closed" not in done.stderr


@pytest.mark.slow
def test_torchrun_starts_every_case(tmp_path: Path) -> None:
    cases, one, two = [c for c in CASES if c != "diverging"], tmp_path / "one", tmp_path / "two"
    train(one, 1, cases)
    start([*TORCHRUN, str(SCRIPT), str(two), "1", *cases])
    check_equal(one, two, cases)


@pytest.mark.slow
def test_the_command_line_with_two_processes_then_one(tmp_path: Path) -> None:
    """A run begun by two processes and continued by one is the run of one; only one of them prints and writes."""
    x = np.random.default_rng(0).normal(size=(9, 8, 2)).astype(np.float32)
    np.savez(tmp_path / "data.npz", train=x[:5], valid=x[5:7], test=x[7:])
    model = [
        "--model",
        "VAE",
        "--model.z_dim",
        "2",
        "--data",
        str(tmp_path / "data.npz"),
        "--batch_size",
        "2",
    ]
    quiet = ["--progress", "false", "--tensorboard", "false", "--accelerator", "cpu"]
    fit_command = [sys.executable, "-m", "dynavae.cli", "fit"]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    start([*fit_command, *model, *quiet, "--epochs", "3", "--out", whole])
    out = start([*fit_command, *model, *quiet, "--epochs", "2", "--devices", "2", "--out", parts])
    assert out.count("written to") == 1 and out.count("parameters, on") == 1
    start([*fit_command, "--resume", "true", "--epochs", "3", "--devices", "1", "--out", parts])
    best = [json.loads(Path(run, "run.json").read_text())["best"] for run in (whole, parts)]
    assert best[0]["valid/nats_per_frame"] == pytest.approx(best[1]["valid/nats_per_frame"], rel=1e-5)


# --- the parts, in one process --------------------------------------------------------------------------


def shares(data: Sequences, rows: list[int], processes: int) -> list[Any]:
    return [_Rows(data, pad=True)[rows, rank, processes] for rank in range(processes)]


@pytest.mark.parametrize("objective", ["elbo", "iwae", "fivo"])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("truncate", [None, 2])
def test_shares_add_up_to_the_batch(
    objective: str, processes: int, truncate: int | None, float64: None
) -> None:
    """Losses and gradients, averaged over processes, are those of the batch; also with nothing to do for some."""
    x = [torch.randn(n, 4) for n in (7, 2, 5, 6)]
    x[0][3] = torch.nan
    data, rows, model = Sequences.from_arrays(x), [0, 3, 1], VRNN(4, 3, 5)
    loss = Loss(model, objective, particles=2, truncate=truncate, hide_rate=0.2, scheduled_sampling=0.5)

    def run(batch: Sequences, share: Share | None) -> tuple[float, dict[str, float], torch.Tensor]:
        model.zero_grad()
        value, sums = 0.0, {"nats": 0.0, "kl": 0.0}
        for part in loss.parts(batch, seed=3, share=share):
            part.loss.backward()
            value += part.loss.item()
            sums = {name: sums[name] + part.sums[name] for name in sums}
        return value, sums, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected, sums, grad = run(data[rows], None)
    found = [run(b.sequences, b.share) for b in shares(data, rows, processes)]
    assert sum(f[0] for f in found) / processes == pytest.approx(expected, rel=1e-10)
    assert torch.allclose(sum(f[2] for f in found) / processes, grad, atol=1e-12)  # type: ignore[arg-type]
    for name, value in sums.items():
        assert sum(f[1][name] for f in found) == pytest.approx(value, rel=1e-10)


def test_every_row_has_one_process() -> None:
    data = Sequences.from_arrays([torch.randn(n, 2) for n in (4, 7, 2, 5, 3)])
    for processes in (1, 2, 3, 7):
        batches = shares(data, [4, 1, 0], processes)
        assert sorted(r for b in batches for r in b.rows) == [0, 1, 4]
        assert sum(b.frames for b in batches) == 14
        assert len({b.sequences.steps for b in batches}) == 1
        assert all(processes == 1 or b.share.frames == 14 for b in batches)


def test_turns_continue_within_an_epoch() -> None:
    turns = Turns([[0], [1], [2]])
    assert [rows for rows, _, _ in turns] == [[0], [1], [2]]
    turns.resume(4, 2)
    assert [rows for rows, _, _ in turns] == [[2]] and len(turns) == 3
    turns.set_epoch(4)  # Lightning repeats the epoch it resumes
    assert len(list(turns)) == 1
    turns.set_epoch(5)
    assert len(list(turns)) == 3


def test_wrong_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="devices should be a number of processes, 1 or more; got 0"):
        fit(VRNN(2, 2, 4), torch.randn(2, 3, 2), devices=0)
    with pytest.raises(ValueError, match="strategy should be one of auto, ddp; got 'fsdp'"):
        layout(2, "fsdp")
    assert layout(1, "auto") == {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert [layout(1, "auto")[name] for name in ("devices", "num_nodes")] == [2, 2]
    with pytest.raises(ValueError, match="torchrun has started 2 processes on this machine, but devices=3"):
        layout(3, "auto")
