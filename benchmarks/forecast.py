"""Forecasts of two real sets with real gaps, against simple baselines and a GRU.

    DYNAVAE_DATA=/path/to/data python benchmarks/forecast.py [--sets pm25,physionet] [--methods last,DKF] [--seed 0]

Writes benchmarks/results/forecast.json, one record per set and method; with --sets or --methods only those records are
replaced. `mae` (of the median of the samples) and `crps` are those of `imputation.py`, lower is better; `mae_at` has the
MAE at some hours of the forecast.

Protocol. Every method is given the same hours, gaps included, and is scored on the same values after them.

pm25       hourly PM2.5 of 36 stations; from every 48 hours of the test months (March, June, September, December; one start
           a day) the next 24. Given are the values of the `missing` file; the truth is that of the `ground` file; µg/m³.
physionet  of each test stay the first 36 hours are given and the last 12 forecast; errors in standard deviations of the
           training split.

Nothing was chosen for forecasting: models and settings are those that `imputation.py` chose on hidden validation values
(its record is read), trained again in the same way; the test split is forecast once with each --seed.
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

import imputation as base
import numpy as np
import torch
from imputation import Gaps, Task
from torch import Tensor

import dynavae
from dynavae.batch import Sequences
from dynavae.data import load

RESULTS = Path(__file__).parent / "results" / "forecast.json"
SPAN = {"pm25": (48, 24), "physionet": (36, 12)}  # hours given, hours forecast
HOURS = {"pm25": (1, 6, 12, 24), "physionet": (1, 6, 12)}
DAY = 24


class Ahead(NamedTuple):
    """What is given, with nothing seen from frame `context` on, and what should come out there."""

    gaps: Gaps
    context: int
    horizon: int
    left_out: int  # sequences without a value within the context, or with none to score


def ahead(given: Sequences, truth: Sequences, context: int, horizon: int) -> Ahead:
    """Sequences of context + horizon frames, the latter hidden."""
    later = torch.arange(context + horizon) >= context
    hidden = truth.observed & later[:, None]
    given = given.hide(later[:, None].expand_as(hidden))
    keep = given.observed.flatten(1).any(1) & hidden.flatten(1).any(1)
    rows = keep.nonzero().flatten().tolist()
    return Ahead(Gaps(given[rows], truth[rows].x, hidden[rows]), context, horizon, len(keep) - len(rows))


def pm25() -> Ahead:
    context, horizon = SPAN["pm25"]
    seen, ground = (load("pm25", window=None, ground=g).split("test") for g in (False, True))

    def cut(data: Any) -> Sequences:
        starts = [range(0, len(x) - context - horizon + 1, DAY) for x in data.x]
        pieces = [x[a : a + context + horizon] for x, s in zip(data.x, starts, strict=True) for a in s]
        x = np.stack(pieces)  # with pieces that have no value
        observed = ~np.isnan(x)
        lengths = torch.full((len(x),), context + horizon)
        return Sequences(torch.from_numpy(np.where(observed, x, 0)), torch.from_numpy(observed), lengths)

    return ahead(cut(seen), cut(ground), context, horizon)


def physionet() -> Ahead:
    whole = load("physionet", seed=0).split("test").batch()
    return ahead(whole, whole, *SPAN["physionet"])


# --- methods: one setting, learned, gives a function from what is given to samples (S, B, T, x_dim) --------------

Continue = Callable[[Ahead], Tensor]
Learn = Callable[[Task, int, dict[str, Any]], tuple[Continue, dict[str, Any]]]


def filling(name: str) -> Learn:
    """A method of `imputation.py`, which fills the hidden end."""

    def learn(task: Task, seed: int, setting: dict[str, Any]) -> tuple[Continue, dict[str, Any]]:
        fill, facts = base.METHODS[name](task, seed, setting)
        return lambda a: fill(a.gaps), facts

    return learn


def line(task: Task, seed: int, setting: dict[str, Any]) -> tuple[Continue, dict[str, Any]]:
    """The straight line of least squares through what was seen of each column; through one value, that value."""

    def go_on(a: Ahead) -> Tensor:
        x, seen = a.gaps.given.x.double(), a.gaps.given.observed.double()
        t = torch.arange(x.shape[1], dtype=torch.float64)[:, None]
        count = seen.sum(1, keepdim=True).clamp(min=1)
        mean_t, mean_x = (seen * t).sum(1, keepdim=True) / count, (seen * x).sum(1, keepdim=True) / count
        d = (t - mean_t) * seen
        slope = (d * x).sum(1, keepdim=True) / (d**2).sum(1, keepdim=True).clamp(min=1e-12)
        return (mean_x + slope * (t - mean_t)).float()[None]

    return go_on, {}


def yesterday(task: Task, seed: int, setting: dict[str, Any]) -> tuple[Continue, dict[str, Any]]:
    """The value of the same hour of the day before; where it was not seen, the last one seen."""
    last = base.last(task, seed, setting)[0]

    def go_on(a: Ahead) -> Tensor:
        x, seen, out = a.gaps.given.x, a.gaps.given.observed, last(a.gaps)[0]
        for t in range(a.context, x.shape[1]):
            out[:, t] = torch.where(seen[:, t - DAY], x[:, t - DAY], out[:, t])
        return out[None]

    return go_on, {}


def of_library(name: str) -> Learn:
    """A model of the library: trained by `fit`, continued by `forecast`."""

    def learn(task: Task, seed: int, setting: dict[str, Any]) -> tuple[Continue, dict[str, Any]]:
        model, facts = base.fitted(task, name, seed, setting)

        def go_on(a: Ahead) -> Tensor:
            given, out = a.gaps.given, []
            for rows in torch.arange(len(given)).split(100):
                batch = given[rows]
                future = dynavae.forecast(
                    model, batch, a.horizon, a.context, base.SAMPLES[task.name], seed=seed
                ).samples
                past = batch.x[:, : a.context].expand(len(future), -1, -1, -1)
                out.append(torch.cat([past, future], 2))
            return torch.cat(out, 1)

        return go_on, facts

    return learn


METHODS: dict[str, Learn] = {
    "mean": filling("mean"),
    "last": filling("last"),
    "linear": line,
    "yesterday": yesterday,
    "gru": filling("gru"),
    **{name: of_library(name) for name in ("LGSSM", "DKF", "SRNN", "VRNN")},
}
BASELINES = ("mean", "last", "linear", "yesterday", "gru")


def chosen(data: str, method: str) -> dict[str, Any]:
    """The setting that the record of imputations chose on validation."""
    candidates = base.CANDIDATES.get((data, method), [{}])
    if len(candidates) == 1:
        return candidates[0]
    records = json.loads(base.RESULTS.read_text())
    tried = next(r for r in records if (r["data"], r["model"]) == (data, method))["selection"]["candidates"]
    best = min(tried, key=lambda c: c["mae"])
    return next(c for c in candidates if all(best[k] == c[k] for k in c))


def by_hour(task: Task, gaps: Gaps, samples: Tensor, context: int) -> dict[str, float]:
    """MAE at some hours of the forecast."""
    median = np.median(samples.numpy(), 0)
    error = torch.from_numpy(np.abs(median - gaps.truth.numpy()) * task.units)
    out = {}
    for hour in HOURS[task.name]:
        t = context + hour - 1
        out[str(hour)] = round(float(error[:, t][gaps.hidden[:, t]].mean()), 4)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", default="pm25,physionet")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for name in arguments.sets.split(","):
        task = {"pm25": base.pm25, "physionet": base.physionet}[name](arguments.seed)
        test = {"pm25": pm25, "physionet": physionet}[name]()
        for method in arguments.methods.split(","):
            started = time.time()
            setting = chosen(name, method)
            go_on, facts = METHODS[method](task, arguments.seed, setting)
            learned = time.time()
            samples = go_on(test)
            record = {
                "task": "forecast", "data": name, "model": method, "baseline": method in BASELINES,
                **base.score(task, test.gaps, samples),
                "mae_at": by_hour(task, test.gaps, samples, test.context),
                "seed": arguments.seed, "samples": len(samples), "context": test.context, "horizon": test.horizon,
                "sequences": len(test.gaps.truth), "left_out": test.left_out,
                "values": int(test.gaps.hidden.sum()), "split": task.protocol["split"],
                "units": task.protocol["units"], "data_sha256": task.protocol["data_sha256"], **facts,
                "test_seconds": round(time.time() - learned, 1), "seconds": round(time.time() - started, 1),
                "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores",
                "versions": {"dynavae": dynavae.__version__, "torch": torch.__version__},
                "command": f"python benchmarks/forecast.py --sets {name} --methods {method} --seed {arguments.seed}",
            }  # fmt: skip
            shown = ("data", "model", "mae", "crps", "coverage_90", "mae_at", "best_epoch", "seconds")
            print({k: record[k] for k in shown if k in record}, flush=True)
            base.save(arguments.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
