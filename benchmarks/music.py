"""The presets on polyphonic music, and what they have to beat, through the command line.

    python benchmarks/music.py [--presets dkf-jsb,srnn-jsb] [--seeds 0,1,2] [--bounds '[elbo, iwae-100]'] [--floors jsb]

Fits each preset (a finished run in --out is not fitted again), chooses the epoch on the valid split, scores the
test split, and merges the records into benchmarks/results/music.json: one record per preset, seed, split and bound.
Minus the bound in nats per frame: total nats / total frames, every frame scored, the first from the model's own
initial state. `baseline` marks the floors of `floors.py`. Nottingham needs DYNAVAE_DATA, see README.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from floors import FLOORS, floor

from dynavae import cli, presets
from dynavae.data import load
from dynavae.runs import Run, environment, table

RESULTS = Path(__file__).parent / "results" / "music.json"
AVERAGE = "total nats / total frames"
KEY = ("model", "preset", "data", "split", "bound", "particles", "seed")


def hardware(threads: int | None) -> str:
    """The machine, in words."""
    cores = environment()["cores"]
    return f"{cores}-core CPU ({platform.machine()}), {threads or torch.get_num_threads()} thread"


def versions(found: dict[str, Any]) -> dict[str, str]:
    """Of what computed a number."""
    return {name: found[name] for name in ("dynavae", "torch", "python")}


def preset_records(name: str, seed: int, bounds: list[str], out: Path) -> list[dict[str, Any]]:
    """Fit one preset with one seed, and score it on the valid split (-ELBO) and the test split."""
    folder = out / f"{name}-{seed}"
    done = (folder / "run.json").is_file() and "best" in Run.open(folder).settings
    commands = [["evaluate", str(folder), "--split", "valid", "--bounds", "[elbo]"]]
    commands += [["evaluate", str(folder), "--bounds", json.dumps(bounds)]]
    if not done:
        fit = ["fit", "--preset", name, "--seed", str(seed), "--out", str(folder), "--resume", "false"]
        commands.insert(0, fit)
    for command in commands:
        print(f"$ dynavae {' '.join(command)}", flush=True)
        if cli.main(command):
            raise SystemExit(f"{name}: dynavae {command[0]} failed")
    run = Run.open(folder)
    asked = {
        ("valid", "elbo", 1),
        *(("test", b.partition("-")[0], int(b.partition("-")[2] or 1)) for b in bounds),
    }
    return [
        {
            "model": score["model"],
            "preset": name,
            "data": run.settings["data"]["name"],
            "data_sha256": score["data_sha256"],
            "split": score["split"],
            "bound": score["bound"],
            "particles": score["particles"],
            "nats_per_frame": round(score["nats_per_frame"], 4),
            "average": score["average"],
            "first_frame": score["first_frame"],
            "frames": score["frames"],
            "kl": score["kl"],
            "seed": seed,
            "epoch": run.settings["best"]["epoch"],
            "seconds": run.settings["seconds"],
            "parameters": run.settings["parameters"],
            "baseline": False,
            "hardware": hardware(run.settings["threads"]),
            "versions": versions(run.settings["environment"]),
            "command": f"python benchmarks/music.py --presets {name} --seeds {seed} --bounds '[{', '.join(bounds)}]'",
        }
        for score in run.scores()
        if (score["split"], score["bound"], score["particles"]) in asked
    ]


def floor_records(data: str, seed: int) -> list[dict[str, Any]]:
    """The floors on one data set, test split."""
    splits = load(data)
    test = splits.split("test")
    found = []
    for name in FLOORS:
        result = floor(name, splits, "test", seed)
        found.append(
            {
                "model": name,
                "preset": None,
                "data": data,
                "data_sha256": test.sha256(),
                "split": "test",
                "bound": "exact",
                "particles": 1,
                "nats_per_frame": round(result.nats_per_frame, 4),
                "average": AVERAGE,
                "first_frame": "scored",
                "frames": test.frames,
                "kl": "",
                "seed": seed,
                "epoch": None,
                "seconds": round(result.seconds, 1),
                "parameters": result.parameters,
                "baseline": True,
                "hardware": hardware(None),
                "versions": versions(environment()),
                "command": f"python benchmarks/music.py --presets '' --floors {data} --seeds {seed}",
            }
        )
    return found


def merge(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the records over those of the same question, and keep the others."""
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    merged = {tuple(r[k] for k in KEY): r for r in [*kept, *records]}
    order = sorted(merged.values(), key=lambda r: (r["data"], not r["baseline"], *(str(r[k]) for k in KEY)))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(order, indent=1) + "\n")
    return order


def summary(records: list[dict[str, Any]]) -> str:
    """Mean over seeds of every model and bound."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for r in records:
        key = (r["data"], r["preset"] or r["model"], r["split"], f"{r['bound']}-{r['particles']}")
        groups.setdefault(key, []).append(r["nats_per_frame"])
    names = ("data", "model", "split", "bound")
    return table(
        [dict(zip(names, key, strict=True), nats=mean(v), seeds=len(v)) for key, v in groups.items()]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", default=",".join(presets.names()))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--bounds", default="[elbo, iwae-100]")
    parser.add_argument("--floors", default="", help="data sets whose floors to compute: jsb,nottingham")
    parser.add_argument("--out", type=Path, default=Path("runs/music"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bounds = [b.strip() for b in arguments.bounds.strip("[] ").split(",")]
    seeds = [int(s) for s in arguments.seeds.split(",")]
    for data in filter(None, arguments.floors.split(",")):
        merge(floor_records(data, seeds[0]))
    for name in filter(None, arguments.presets.split(",")):
        for seed in seeds:
            merge(preset_records(name, seed, bounds, arguments.out))
    print(summary(json.loads(RESULTS.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
