"""Imputation of two real sets with real gaps, against simple baselines, a GRU and a bidirectional GRU.

    DYNAVAE_DATA=/path/to/data python benchmarks/imputation.py [--sets pm25,physionet] [--methods linear,DKF] [--seed 0]

Writes benchmarks/results/imputation.json, one record per set and method; with --sets or --methods only those records
are replaced. Lower is better: `mae`, the mean absolute error of the median of the samples (the median minimises it), and
`crps`, the continuous ranked probability score E|X - x| - E|X - X'| / 2 over the samples (of a point forecast it is the
absolute error).

Protocol. Every method is given the same values, and is scored on the same hidden ones.

pm25       hourly PM2.5 of 36 stations; values present in the `ground` file and absent in the `missing` file, in March,
           June, September and December; errors in µg/m³. Test sequences are whole months.
physionet  48 hours of intensive care, 35 variables; of each test stay 10 % of the observed values are hidden at random;
           errors in standard deviations of the training split. The split, 70/10/20 by stay, is ours.

Selection. Nothing is learned from what is hidden. Values of the validation split are hidden in the same manner (pm25: what
the `missing` file lacks there, and at the hours at which it lacks values in the stretch before, so that the share is
nearer to that of the test months). Every method tries the settings in `CANDIDATES`; weights are chosen by the validation
bound (the GRU's by its validation error, the bidirectional GRU's by that on the hidden validation values, by which settings
are chosen too: an advantage over the models), the setting by the MAE on the hidden validation values, and the chosen one is
run on the test split once. One seed. `also_tried_on_validation`, where a record has it, lists settings that were tried by
hand before `CANDIDATES` was written, on validation values only; this program does not run them. On PhysioNet EM joined the
candidates of the LGSSM when it had become fast enough, after a first record by gradient (MAE 0.296).
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


class Gaps(NamedTuple):
    """What is given to fill, and what should come out."""

    given: Sequences  # with the values hidden
    truth: Tensor  # (B, T, x_dim)
    hidden: Tensor  # (B, T, x_dim) bool: what is scored


class Task(NamedTuple):
    """What is given to learn from, to choose by, and to be scored on."""

    name: str
    train: SequenceDataset
    valid: SequenceDataset
    choose: Gaps  # of the validation split
    test: Gaps
    units: np.ndarray  # (x_dim,) of one standardised unit
    protocol: dict[str, Any]


def pm25(seed: int) -> Task:
    splits = load("pm25", window=48, stride=24)
    seen, ground = (load("pm25", window=None, ground=g) for g in (False, True))

    def lacking(split: str) -> tuple[Sequences, Sequences, Tensor]:
        given, truth = seen.split(split).batch(), ground.split(split).batch()
        return given, truth, truth.observed & ~given.observed

    given, truth, hidden = lacking("valid")
    before, _, pattern = lacking("train")
    for b, (start, frames) in enumerate(zip(before.lengths.tolist(), given.lengths.tolist(), strict=True)):
        hidden[b, :frames] |= truth.observed[b, :frames] & pattern[b, start - frames : start]
    choose = Gaps(given.hide(hidden), truth.x, hidden)
    given, truth, hidden = lacking("test")
    protocol = {
        "split": "test: March, June, September, December; valid: last tenth of the other months; train: the rest",
        "hidden": "values of the ground file that the missing file lacks",
        "hidden_share": round(float(hidden.sum() / truth.observed.sum()), 4),
        "units": "µg/m³",
        "data_sha256": splits.sha256,
    }
    scale = np.array(splits.meta["schema"]["stddev"])
    test = Gaps(given, truth.x, hidden)
    return Task("pm25", splits.split("train"), splits.split("valid"), choose, test, scale, protocol)


def physionet(seed: int) -> Task:
    splits = load("physionet", seed=0)

    def some(split: str, seed: int) -> tuple[Gaps, float]:
        whole = splits.split(split).batch()
        chance = torch.rand(whole.x.shape, generator=torch.Generator().manual_seed(seed))
        hidden = whole.observed & (chance < HIDDEN_SHARE)
        keep = (whole.observed & ~hidden).flatten(1).any(1)
        whole, hidden = whole[keep.nonzero().flatten().tolist()], hidden[keep]
        share = float(hidden.sum() / whole.observed.sum())
        return Gaps(whole.hide(hidden), whole.x, hidden), round(share, 4)

    (choose, _), (test, share) = some("valid", seed + 1), some("test", seed)
    protocol = {
        "split": "ours, by stay, seed 0: 70 % train, 10 % valid, 20 % test",
        "hidden": f"of the observed values at random, seed {seed}",
        "hidden_share": share,
        "units": "standard deviations of the training split",
        "data_sha256": splits.sha256,
    }
    units = np.ones(test.given.x_dim)
    return Task("physionet", splits.split("train"), splits.split("valid"), choose, test, units, protocol)


# --- methods: one setting, learned, gives a function that fills gaps with samples (S, B, T, x_dim) ----------

Fill = Callable[[Gaps], Tensor]


def mean(task: Task, seed: int, setting: dict[str, Any]) -> tuple[Fill, dict[str, Any]]:
    """The mean of the training values."""
    return lambda gaps: torch.zeros_like(gaps.truth)[None], {}  # standardised


def last(task: Task, seed: int, setting: dict[str, Any]) -> tuple[Fill, dict[str, Any]]:
    """The last value seen, before the first one the mean."""

    def fill(gaps: Gaps) -> Tensor:
        x, seen = gaps.given.x, gaps.given.observed
        out, held = torch.empty_like(x), torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            held = torch.where(seen[:, t], x[:, t], held)
            out[:, t] = held
        return out[None]

    return fill, {}


def linear(task: Task, seed: int, setting: dict[str, Any]) -> tuple[Fill, dict[str, Any]]:
    """Straight lines between the values seen, constant beyond the first and the last."""

    def fill(gaps: Gaps) -> Tensor:
        out = torch.zeros_like(gaps.truth)
        frames = np.arange(out.shape[1])
        for b in range(len(out)):
            for d in range(out.shape[2]):
                seen = gaps.given.observed[b, :, d].numpy()
                if seen.any():
                    values = gaps.given.x[b, :, d].numpy()
                    out[b, :, d] = torch.from_numpy(np.interp(frames, frames[seen], values[seen]))
        return out[None]

    return fill, {}


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


def gru(task: Task, seed: int, setting: dict[str, Any]) -> tuple[Fill, dict[str, Any]]:
    """A GRU that forecasts each value from the past of all of them, trained on the absolute error."""
    torch.manual_seed(seed)
    model = ForecastGRU(task.test.given.x_dim, setting["h_dim"])
    held_out = task.valid.batch()

    def error(batch: Sequences) -> Tensor:
        return (model(batch.x, batch.observed) - batch.x).abs()[batch.observed].mean()

    best_epoch = descended(model, task, seed, setting["lr"], error, lambda: error(held_out))

    @torch.no_grad()
    def fill(gaps: Gaps) -> Tensor:
        return model(gaps.given.x, gaps.given.observed)[None]

    return fill, {"options": setting, "best_epoch": best_epoch}


def descended(
    model: nn.Module,
    task: Task,
    seed: int,
    lr: float,
    training: Callable[[Sequences], Tensor],
    validation: Callable[[], Tensor],
) -> int:
    """Train by Adam in batches of 32 until the validation error has not fallen for 15 epochs; the best weights are kept.

    Returns their epoch.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr)
    best, state, bad, best_epoch = float("inf"), None, 0, 0
    for epoch in range(200):
        order = np.random.default_rng((seed, epoch)).permutation(len(task.train))
        for rows in np.array_split(order, max(1, len(order) // 32)):
            optimizer.zero_grad()
            training(task.train.batch(rows.tolist())).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            value = float(validation())
        if value < best:
            best, bad, best_epoch = value, 0, epoch + 1
            state = {k: v.clone() for k, v in model.state_dict().items()}
        else:
            bad += 1
        if bad == 15:
            break
    assert state is not None
    model.load_state_dict(state)
    return best_epoch


class BidirectionalGRU(nn.Module):
    """Completes x from all values seen, before and after; a missing value is read as the mean, beside the mask."""

    def __init__(self, x_dim: int, h_dim: int) -> None:
        super().__init__()
        self.memory = nn.GRU(2 * x_dim, h_dim, batch_first=True, bidirectional=True)
        self.out = nn.Sequential(nn.Linear(2 * h_dim, h_dim), nn.ReLU(), nn.Linear(h_dim, x_dim))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return self.out(self.memory(torch.cat([torch.where(seen, x, 0), seen.to(x)], -1))[0])


def bigru(task: Task, seed: int, setting: dict[str, Any]) -> tuple[Fill, dict[str, Any]]:
    """A GRU in both directions, trained on the absolute error of values hidden at random, as the test hides them."""
    torch.manual_seed(seed)
    model = BidirectionalGRU(task.test.given.x_dim, setting["h_dim"])

    def error(batch: Sequences, hidden: Tensor) -> Tensor:
        return (model(batch.x, batch.observed & ~hidden) - batch.x).abs()[hidden].mean()

    def training(batch: Sequences) -> Tensor:
        return error(batch, batch.observed & (torch.rand(batch.x.shape) < setting["hide_rate"]))

    def validation() -> Tensor:
        return (
            (model(task.choose.given.x, task.choose.given.observed) - task.choose.truth)
            .abs()[task.choose.hidden]
            .mean()
        )

    best_epoch = descended(model, task, seed, setting["lr"], training, validation)

    @torch.no_grad()
    def fill(gaps: Gaps) -> Tensor:
        return model(gaps.given.x, gaps.given.observed)[None]

    return fill, {"options": setting, "best_epoch": best_epoch}


def fitted(
    task: Task, name: str, seed: int, setting: dict[str, Any]
) -> tuple[dynavae.SequentialLVM, dict[str, Any]]:
    """A model of the library, trained on the task, and what a record says of it."""
    torch.manual_seed(seed)
    model = dynavae.MODELS[name](x_dim=task.test.given.x_dim, **setting["model"])
    training = setting["training"]
    result = dynavae.fit(
        model, task.train, task.valid, seed=seed, progress=False, accelerator="cpu", **training
    )
    facts = {"options": model.config, "training": training, "best_epoch": result.best["epoch"],
             "valid_nats_per_frame": round(result.best["valid/nats_per_frame"], 4),
             "parameters": result.parameters, "training_seconds": round(result.seconds)}  # fmt: skip
    return model, facts


def of_library(name: str) -> Callable[..., tuple[Fill, dict[str, Any]]]:
    """A model of the library: trained by `fit`, completed by `impute`."""

    def learn(task: Task, seed: int, setting: dict[str, Any]) -> tuple[Fill, dict[str, Any]]:
        model, facts = fitted(task, name, seed, setting)
        how = setting.get("impute", {})

        def fill(gaps: Gaps) -> Tensor:
            parts = [
                dynavae.impute(model, gaps.given[rows], SAMPLES[task.name], seed=seed, **how)
                for rows in torch.arange(len(gaps.truth)).split(100)
            ]
            return torch.cat([part.samples for part in parts], 1)

        return fill, {**facts, "impute": how}

    return learn


METHODS = {
    "mean": mean,
    "last": last,
    "linear": linear,
    "gru": gru,
    "bigru": bigru,
    **{name: of_library(name) for name in ("LGSSM", "DKF", "SRNN", "VRNN")},
}
BASELINES = ("mean", "last", "linear", "gru", "bigru")


# --- settings to choose from -------------------------------------------------------------------------------


def setting(model: dict[str, Any], training: dict[str, Any], **impute: Any) -> dict[str, Any]:
    return {"model": model, "training": training, "impute": impute}


GRU = [dict(h_dim=64, lr=2e-3), dict(h_dim=128, lr=2e-3)]
BIGRU = [dict(h_dim=h_dim, lr=2e-3, hide_rate=rate) for h_dim in (64, 128) for rate in (0.1, 0.3)]


def by_em(z_dim: int, start: str, iterations: int) -> dict[str, Any]:
    """EM, from one state per column with local levels, or from slow states that random mixtures show."""
    return setting(dict(z_dim=z_dim, noise="diagonal", start=start),
                   dict(objective="em", epochs=iterations, batch_size=64))  # fmt: skip


def by_gradient(z_dim: int, start: str, **training: Any) -> dict[str, Any]:
    """The exact likelihood by gradient."""
    return setting(dict(z_dim=z_dim, noise="diagonal", start=start),
                   dict(objective="exact", lr_schedule="cosine", **training))  # fmt: skip


def dkf(z_dim: int, h_dim: int, emission: str, **training: Any) -> dict[str, Any]:
    """A Markov chain in z inferred from both sides, trained to predict hidden values."""
    model = dict(z_dim=z_dim, h_dim=h_dim, inference="ST-LR", x_layers=[h_dim], decoder_layers=[h_dim],
                 combiner_layers=[64], transition_dim=64, mask_input=True, emission=emission)  # fmt: skip
    return setting(model, dict(lr_schedule="cosine", hide="values", score_hidden=True, **training))


def srnn(z_dim: int, h_dim: int, emission: str, **training: Any) -> dict[str, Any]:
    """A memory of x below a chain in z, inferred from both sides."""
    model = dict(z_dim=z_dim, h_dim=h_dim, x_layers=[h_dim], encoder_layers=[h_dim], decoder_layers=[h_dim],
                 memory="gru", mask_input=True, emission=emission)  # fmt: skip
    return setting(model, dict(lr_schedule="cosine", hide="values", **training))


def vrnn(z_dim: int, h_dim: int, emission: str, reweight: bool, **training: Any) -> dict[str, Any]:
    """Everything through one recurrence; its posterior reads the past only."""
    model = dict(z_dim=z_dim, h_dim=h_dim, x_layers=[h_dim], memory="gru", mask_input=True, emission=emission)
    return setting(model, dict(lr_schedule="cosine", hide="values", **training), reweight=reweight)


CANDIDATES: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("pm25", "gru"): GRU,
    ("physionet", "gru"): GRU,
    ("pm25", "bigru"): BIGRU,
    ("physionet", "bigru"): BIGRU,
    ("pm25", "LGSSM"): [
        # On validation no better: 40 iterations from local levels, 36 states from data, 20 at random.
        by_em(36, "local_level", 10),
        by_em(20, "data", 40),
        by_gradient(36, "local_level", epochs=10, batch_size=16, lr=2e-3),
    ],
    ("physionet", "LGSSM"): [
        *(by_gradient(35, "local_level", epochs=8, batch_size=64, lr=lr) for lr in (1e-3, 2e-3, 4e-3)),
        by_gradient(20, "random", epochs=16, batch_size=64, lr=1e-2),
        by_em(35, "local_level", 40),
        by_em(20, "data", 80),
    ],
    ("pm25", "DKF"): [
        dkf(24, 96, "laplace", epochs=100, batch_size=16, lr=3e-3, kl_warmup=20, hide_rate=0.3),
        dkf(48, 192, "laplace", epochs=100, batch_size=16, lr=3e-3, kl_warmup=40, hide_rate=0.2),
        dkf(48, 192, "laplace", epochs=100, batch_size=16, lr=3e-3, kl_warmup=20, hide_rate=0.2, beta=0.3),
    ],
    ("physionet", "DKF"): [
        dkf(32, 128, "laplace", epochs=20, batch_size=64, lr=2e-3, kl_warmup=5, hide_rate=0.2),
        dkf(32, 128, "laplace", epochs=20, batch_size=64, lr=4e-3, kl_warmup=5, hide_rate=0.2, beta=0.3),
    ],
    ("pm25", "SRNN"): [
        srnn(32, 128, "laplace", epochs=60, batch_size=16, lr=3e-3, kl_warmup=10, hide_rate=0.2),
        srnn(32, 128, "gaussian", epochs=60, batch_size=16, lr=3e-3, kl_warmup=10, hide_rate=0.2),
    ],
    ("physionet", "SRNN"): [
        srnn(32, 128, "laplace", epochs=12, batch_size=64, lr=3e-3, kl_warmup=3, hide_rate=0.2),
    ],
    ("pm25", "VRNN"): [
        vrnn(32, 128, "laplace", False, epochs=60, batch_size=16, lr=3e-3, kl_warmup=10, hide_rate=0.2),
        vrnn(32, 128, "laplace", True, epochs=60, batch_size=16, lr=3e-3, kl_warmup=10, hide_rate=0.2),
    ],
    ("physionet", "VRNN"): [
        vrnn(32, 128, "laplace", False, epochs=12, batch_size=64, lr=3e-3, kl_warmup=3, hide_rate=0.2),
    ],
}


def select(task: Task, method: str, seed: int) -> tuple[Fill, dict[str, Any], dict[str, Any]]:
    """Learn every setting; the one with the least error on hidden validation values, and how it was chosen."""
    tried, best = [], None
    for candidate in CANDIDATES.get((task.name, method), [{}]):
        started = time.time()
        fill, facts = METHODS[method](task, seed, candidate)
        found = score(task, task.choose, fill(task.choose))
        tried.append(
            {**candidate, **{k: found[k] for k in ("mae", "crps")}, "seconds": round(time.time() - started)}
        )
        print(f"  {task.name} {method} valid {tried[-1]}", flush=True)
        if best is None or found["mae"] < best[0]["mae"]:
            best = found, fill, facts
    assert best is not None
    how = "weights by the validation bound, " if method not in BASELINES else ""
    selection = {
        "by": f"{how}setting by MAE on hidden validation values; test run once" if len(tried) > 1 else
        f"{how}one setting; test run once",
        "hidden_values": int(task.choose.hidden.sum()),
        "valid_mae": best[0]["mae"],
        "candidates": tried,
    }  # fmt: skip
    return best[1], best[2], selection


def score(task: Task, gaps: Gaps, samples: Tensor) -> dict[str, float]:
    """Errors in the units of the task, on what was hidden."""
    scale = np.broadcast_to(task.units, gaps.truth.shape)[gaps.hidden.numpy()]
    drawn = np.stack([s[gaps.hidden].double().numpy() for s in samples])
    truth = gaps.truth[gaps.hidden].double().numpy()
    median = np.median(drawn, 0)
    out = {
        "mae": float((scale * np.abs(median - truth)).mean()),
        "crps": float((scale * dynavae.crps(drawn, truth).numpy()).mean()),
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
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for set_name in arguments.sets.split(","):
        task = {"pm25": pm25, "physionet": physionet}[set_name](arguments.seed)
        for method in arguments.methods.split(","):
            started = time.time()
            fill, facts, selection = select(task, method, arguments.seed)
            chosen = time.time()
            samples = fill(task.test)
            record = {
                "data": set_name, "model": method, "baseline": method in BASELINES,
                **score(task, task.test, samples), "seed": arguments.seed, "samples": len(samples),
                "hidden_values": int(task.test.hidden.sum()), "sequences": len(task.test.truth), **task.protocol, **facts,
                "test_seconds": round(time.time() - chosen, 1), "seconds": round(time.time() - started, 1),
                "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} of {os.cpu_count()} cores",
                "selection": selection, "versions": {"dynavae": dynavae.__version__, "torch": torch.__version__},
                "command": COMMAND.format(set_name, method, arguments.seed),
            }  # fmt: skip
            shown = ("data", "model", "mae", "crps", "coverage_90", "best_epoch", "seconds")
            print({k: record[k] for k in shown if k in record}, flush=True)
            save(RESULTS, record)
    return 0


def save(path: Path, record: dict[str, Any]) -> None:
    """Replace the record of this set, method and seed."""
    old = json.loads(path.read_text()) if path.is_file() else []
    key = record["data"], record["model"], record["seed"]
    kept = [r for r in old if (r["data"], r["model"], r["seed"]) != key]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps([*kept, record], indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
