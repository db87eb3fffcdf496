"""Does a run survive being killed? Random SIGKILLs of a real `dynavae fit`, each followed by `--resume true`.

    python benchmarks/kill_test.py [--kills 20] [--seed 0] [--out DIRECTORY]

Every second kill waits for a checkpoint to be half-written, the others come at a random moment of training. The
resumed run is given its directory only. It must end with the weights, the best weights and the figures of a run that
was never killed, bit for bit, and with one row per epoch. Prints a table; with --record it is
written to benchmarks/results/kill_test.json. The exit status is 1 if any run differs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import dynavae
from dynavae.files import write_json
from dynavae.resume import damage
from dynavae.runs import table

RESULTS = Path(__file__).parent / "results" / "kill_test.json"
CLOCKS = ("seconds", "frames_per_second")
UPDATES = 28


def command(out: Path, data: Path) -> list[str]:
    """A small run that saves after every update."""
    model = ["--model", "VRNN", "--model.z_dim", "3", "--model.h_dim", "24", "--model.dropout", "0.1"]
    options = [
        "--epochs",
        "4",
        "--batch_size",
        "2",
        "--lr",
        "0.003",
        "--kl_warmup",
        "2",
        "--hide_rate",
        "0.1",
    ]
    quiet = ["--progress", "false", "--tensorboard", "false", "--threads", "1", "--accelerator", "cpu"]
    return fit(*model, "--data", str(data), *options, *quiet, "--checkpoint_minutes", "0", "--out", str(out))


def fit(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dynavae.cli", "fit", *arguments]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_training(process: subprocess.Popen[str], out: Path) -> None:
    """Until the first file of the run says that training has begun."""
    while process.poll() is None and not (out / "training.json").exists():
        time.sleep(0.005)


def saves(process: subprocess.Popen[str], out: Path, count: int) -> None:
    """Wait until that many checkpoints have been written: every one is a new file of the same name."""
    last, seen = out / "checkpoints" / "last.ckpt", set[int]()
    while process.poll() is None and len(seen) < count:
        if last.exists():
            seen.add(last.stat().st_mtime_ns)
        time.sleep(0.0005)


def kill(process: subprocess.Popen[str], out: Path, chance: random.Random, while_saving: bool) -> bool:
    """Kill the process; whether a file was being written at that moment."""
    wait_for_training(process, out)
    saves(process, out, chance.randrange(UPDATES - 3))
    if while_saving:
        while process.poll() is None and not list((out / "checkpoints").glob(".last.ckpt.*")):
            time.sleep(0.0002)
    else:
        time.sleep(chance.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return bool(list(out.rglob(".*.part")))


def figures(out: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without what a clock measured."""
    with (out / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)]


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def weights(out: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of the last epoch, and of the best."""
    last = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return last, load_file(out / "best" / "model.safetensors")


def trial(number: int, whole: Path, folder: Path, data: Path, chance: random.Random) -> dict[str, object]:
    """Kill one run and resume it; what came of it."""
    out, while_saving = folder / f"killed-{number}", number % 2 == 0
    process = start(command(out, data))
    writing = kill(process, out, chance, while_saving)
    path = out / "checkpoints" / "last.ckpt"
    broken = path.exists() and damage(path) is not None
    saved = torch.load(path, weights_only=True)["global_step"] if path.exists() and not broken else 0
    resumed = start(fit("--resume", "true", "--out", str(out)))
    _, err = resumed.communicate(timeout=300)
    row: dict[str, object] = {
        "kill": number,
        "aimed at": "a save" if while_saving else "any moment",
        "while writing": "yes" if writing else "no",
        "updates saved": f"{saved} of {UPDATES}",
    }
    if resumed.returncode or broken:
        return {
            **row,
            "loss": None,
            "weights": None,
            "best": None,
            "rows": "",
            "result": err.strip()[-200:] or "broken",
        }
    a, b = figures(whole), figures(out)
    (wa, ba), (wb, bb) = weights(whole), weights(out)
    row["loss"] = f"{abs(float(a[-1]['train/loss']) - float(b[-1]['train/loss'])):g}"
    last, kept = difference(wa, wb), difference(ba, bb)
    row |= {"weights": f"{last:g}", "best": f"{kept:g}", "rows": f"{len(b)} of {len(a)}"}
    best = [json.loads((o / "run.json").read_text())["best"] for o in (whole, out)]
    same = process.returncode == -signal.SIGKILL and a == b and not last and not kept
    same = same and all(best[0][k] == best[1][k] for k in best[0] if k not in CLOCKS)
    return {**row, "result": "same" if same else "DIFFERS"}


def run(kills: int, seed: int, folder: Path, keep: bool) -> int:
    """All trials; the exit status."""
    chance, data, whole = random.Random(seed), folder / "data.npz", folder / "whole"
    x = np.random.default_rng(seed).normal(size=(20, 16, 3)).cumsum(1).astype(np.float32)
    np.savez(data, train=x[:14], valid=x[14:17], test=x[17:])
    process = start(command(whole, data))
    _, err = process.communicate()
    if process.returncode:
        print(err, file=sys.stderr)
        return 1
    rows = []
    for number in range(kills):
        rows.append(trial(number, whole, folder, data, chance))
        print(f"kill {number}: {rows[-1]['result']}", file=sys.stderr, flush=True)
    print(table(rows))
    lost = sum(row["result"] != "same" for row in rows)
    record = {
        "kills": kills, "same": kills - lost, "while_writing": sum(row["while writing"] == "yes" for row in rows),
        "seed": seed, "updates": UPDATES, "hardware": f"{platform.machine()} CPU, 1 of {os.cpu_count()} cores",
        "versions": {"dynavae": dynavae.__version__, "torch": torch.__version__},
        "command": f"python benchmarks/kill_test.py --kills {kills} --seed {seed} --record", "trials": rows,
    }  # fmt: skip
    if keep:
        write_json(RESULTS, record)
    print(f"{kills - lost} of {kills} killed runs ended as the run that was never killed.")
    return int(lost > 0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="keep the runs there")
    parser.add_argument("--record", action="store_true", help="write results/kill_test.json")
    given = parser.parse_args()
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        return run(given.kills, given.seed, given.out, given.record)
    with tempfile.TemporaryDirectory() as folder:
        return run(given.kills, given.seed, Path(folder), given.record)


if __name__ == "__main__":
    sys.exit(main())
