"""What `dynavae fit | evaluate | generate | forecast | impute | report | list` do, as plain functions.

Each works on a run directory (see `runs.py`), writes files into it, and returns what it prints as a table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynavae import catalogue, presets, results, tasks
from dynavae import data as datasets
from dynavae.batch import Sequences
from dynavae.data import DataSplits
from dynavae.files import write_json
from dynavae.model import SequentialLVM
from dynavae.models import MODELS
from dynavae.nn.heads import EMISSIONS
from dynavae.parallel import main_process
from dynavae.resume import unfinished
from dynavae.runs import Run, environment, table

EMISSION_OF_KIND = {
    "binary": "bernoulli",
    "real": "gaussian",
    "power": "power_spectrum",
    "categorical": "categorical",
}


def build(model: str, options: dict[str, Any], splits: DataSplits) -> SequentialLVM:
    """A model for this data: sizes and, unless given, the emission follow from it."""
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; choose one of {', '.join(MODELS)}.")
    import inspect

    known = inspect.signature(MODELS[model]).parameters
    options = {**options, "x_dim": splits.x_dim}
    if splits.control_dim:
        if "control_dim" not in known:
            raise ValueError(
                f"{model} takes no controls, but {splits.name} has {splits.control_dim}; choose another model."
            )
        options["control_dim"] = splits.control_dim
    if "emission" in known and "emission" not in options:
        emission: Any = EMISSION_OF_KIND[splits.kind]
        if splits.kind == "categorical":
            classes = int(max(np.nanmax(x) for x in splits.split(splits.available[0]).x)) + 1
            emission = {"emission": "categorical", "classes": classes}
        options["emission"] = emission
    return MODELS[model](**options)


def fit(
    model: str,
    options: dict[str, Any],
    data: str,
    out: str,
    seed: int = 0,
    threads: int | None = None,
    data_options: dict[str, Any] | None = None,
    preset: str | None = None,
    **training: Any,
) -> str:
    """Train a model on the train split, keep the weights that are best on the valid split."""
    from dynavae import training as trainer
    from dynavae.checkpoint import annotate

    if threads is not None:
        torch.set_num_threads(threads)
    if training.get("resume") is None and unfinished(out) and main_process():
        raise FileExistsError(
            f"there is a run in {out} already: continue it with --resume true, replace it with --resume false, "
            "or choose another --out."
        )
    splits = datasets.load(data, **(data_options or {}))
    torch.manual_seed(seed)
    net = build(model, options, splits)
    settings = {
        "model": model,
        "options": net.config,
        "parameters": sum(p.numel() for p in net.parameters()),
        "data": {
            "source": data,
            "options": data_options or {},
            "name": splits.name,
            "kind": splits.kind,
            "sha256": splits.sha256,
            "splits": {
                s: f"{len(splits.split(s))} sequences, {splits.split(s).frames} frames"
                for s in splits.available
            },
            **{key: splits.meta[key] for key in ("split", "step", "schema") if key in splits.meta},
        },
        "training": {k: v for k, v in training.items() if k not in ("progress", "resume")},
        "seed": seed,
        "threads": threads,
        "preset": preset,
        "environment": environment(),
    }
    if main_process():
        Run.create(out, settings)
        print(
            f"{model}, {settings['parameters']:,} parameters, on {splits.name}: {settings['data']['splits']}"
        )
        for line in describe(splits):
            print(line)
    result = trainer.fit(net, splits.split("train"), splits.valid, out_dir=out, seed=seed, **training)
    if not main_process():
        return ""
    settings |= {"seconds": round(result.seconds, 1), "best": result.best, "notes": list(result.notes)}
    Run.create(out, settings)
    if "schema" in splits.meta and (Path(out) / "best").is_dir():
        annotate(Path(out) / "best", schema=splits.meta["schema"], kind=splits.kind)
    columns = {
        "best epoch": "epoch",
        "valid nats/frame": "valid/nats_per_frame",
        "valid kl/frame": "valid/kl_per_frame",
        "active units": "valid/active_units",
        "train nats/frame": "train/nats_per_frame",
    }
    row = {
        "model": model,
        **{k: result.best.get(v) for k, v in columns.items()},
        "seconds": round(result.seconds),
    }
    return table([row]) + f"\nwritten to {out}"


def describe(splits: DataSplits) -> list[str]:
    """What was understood of a table, in a few lines."""
    schema = splits.schema
    if schema is None:
        return []
    x = np.concatenate([x for s in splits.available for x in splits.split(s).x])
    controls = f"; controls {', '.join(schema.controls)}" if schema.controls else ""
    grid = splits.meta.get("step", "rows in order")
    scaled = "standardised by the training part" if schema.standardized else "as they are"
    return [
        f"  columns {', '.join(schema.columns)}{controls}; ids {schema.id_column or '-'}, times {schema.time_column or '-'}",
        f"  grid {grid}, {100 * np.isnan(x).mean():.1f} % missing; split {splits.meta.get('split', '-')}; values {scaled}",
    ]


def evaluate(
    run: str,
    bounds: list[str] | None = None,
    data: str | None = None,
    split: str = "test",
    batch_size: int = 64,
    seed: int = 0,
) -> str:
    """Score a run: `bounds` such as elbo, iwae-100, fivo-64, exact. Writes score.json and scores.json.

    Args:
        run: run directory, made by dynavae fit --out; or a saved model, with `data`.
        bounds: such as [elbo, iwae-100, fivo-64, exact]; a number is how many particles.
        data: another data set or file; default: that of the run.
        split: which part of the data.
        batch_size: sequences at a time.
        seed: of the noise.
    """
    opened = Run.open(run, exported=True)
    net, splits = opened.model(), opened.data(data)
    requested = bounds or (["exact"] if net.exact else []) + ["elbo", "iwae-100"]
    if not bounds and net.per_step_likelihood:
        requested.append("fivo-64")
    found = []
    for text in requested:
        bound, _, k = text.partition("-")
        if k and not k.isdigit():
            raise ValueError(f"a bound looks like elbo, iwae-100 or fivo-64; got {text!r}.")
        kl = "sample" if net.exact else "auto"
        scored = tasks.score(
            net, splits, bound, int(k or 1), split=split, kl=kl, batch_size=batch_size, seed=seed
        ).to_dict()
        scored = results.in_units(scored, splits, split)
        found.append(scored)
        print(f"  {text}: {scored['nats_per_frame']:.4f} nats per frame", flush=True)
    write_json(opened.directory / "score.json", found[0])
    others = [s for s in opened.scores() if not any(_same_question(s, f) for f in found)]
    write_json(opened.directory / "scores.json", found + others)
    columns = [
        "model",
        "data",
        "split",
        "bound",
        "particles",
        "nats_per_frame",
        "nats_per_frame_by_sequence",
        "frames",
        "sequences",
        "first_frame",
    ]
    if splits.schema is not None and splits.schema.standardized:
        columns.insert(6, "nats_per_frame_in_units")
        print("  nats_per_frame: of standardised values; nats_per_frame_in_units: in the units of the file")
    return (
        table(found, columns) + f"\nwritten to {opened.directory}: score.json (the first), scores.json (all)"
    )


def _same_question(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a.get(k) == b.get(k) for k in ("bound", "particles", "split", "data_sha256"))


def generate(run: str, batch: int = 4, length: int = 64, seed: int = 0) -> str:
    """Draw new sequences. Writes samples.npz, and for music one .mid and .wav each.

    Args:
        run: run directory, made by dynavae fit --out.
        batch: number of sequences.
        length: frames of each.
        seed: of the noise.
    """
    opened = Run.open(run)
    net, splits = opened.model(), opened.data()
    if net.control_dim:
        raise ValueError(
            "this model reads controls, which cannot be invented; use dynavae.generate(model, control=...) in Python."
        )
    made = tasks.generate(net, batch, length, seed=seed)
    folder = opened.directory / "samples"
    folder.mkdir(exist_ok=True)
    x, mean = (results.to_units(splits, v.numpy()) for v in (made.x, made.mean))
    np.savez_compressed(folder / "samples.npz", x=x, mean=mean, z=made.z.numpy())
    written = [folder / "samples.npz"]
    if "lowest_midi" in splits.meta:
        rolls = (made.x > 0.5).numpy()  # already 0 and 1, unless the emission is not Bernoulli
        written += _music(folder, "sample", list(rolls.astype(np.uint8)), splits.meta)
    rows = [
        {"sample": i, "frames": length, "mean": float(x.mean()), "stddev": float(x.std())}
        for i, x in enumerate(x)
    ]
    return table(rows) + f"\nwritten to {folder}: {', '.join(p.name for p in written)}"


def forecast(
    run: str,
    horizon: int = 16,
    context: int | None = None,
    samples: int = 100,
    data: str | None = None,
    split: str = "test",
    future: bool = False,
    seed: int = 0,
) -> str:
    """Forecast each sequence from its first `context` frames (default: all but the last `horizon`).

    With `future`, forecast what comes after the last frame. Writes forecast.npz and forecast.csv: id, time, column,
    mean, quantiles, and the truth where it is known, in the units of the data.

    Args:
        run: run directory, made by dynavae fit --out; or a saved model, with `data`.
        horizon: frames to forecast.
        context: frames to read first; default: all but the last `horizon`.
        samples: futures drawn for each sequence.
        data: another data set or file; default: that of the run.
        split: which part of the data.
        future: continue after the last frame instead.
        seed: of the noise.
    """
    opened = Run.open(run, exported=True)
    net, splits = opened.model(), opened.data(data)
    chosen = splits.split(split)
    lengths = chosen.lengths.tolist()
    if future and context is not None:
        raise ValueError("future forecasts from all frames of a sequence: leave context out.")
    shortest = 0 if future else context or horizon
    keep = [i for i, n in enumerate(lengths) if n > shortest]
    if future:  # the last piece of each id
        keep = sorted({splits.origin(split, chosen.names[i])[0]: i for i in keep}.values())
    if not keep:
        raise ValueError(
            f"no sequence of {split} is longer than {shortest} frames; lower horizon or context."
        )
    first = [lengths[i] if future else context or lengths[i] - horizon for i in keep]
    groups: dict[int, list[int]] = {}
    for i, frames in zip(keep, first, strict=True):
        groups.setdefault(frames, []).append(i)
    draws = np.full((samples, len(keep), horizon, net.x_dim), np.nan, dtype=np.float32)
    means, truth = draws[0].copy(), draws[0].copy()
    for frames, rows in groups.items():
        batch = chosen.batch(rows)
        f = tasks.forecast(net, batch, horizon, frames, samples, seed=seed, control=batch.control)
        places = [keep.index(i) for i in rows]
        draws[:, places], means[places] = f.samples.numpy(), f.mean.numpy()
        for place, array in zip(places, batch.arrays(), strict=True):
            known = array[frames : frames + horizon]
            truth[place, : len(known)] = known
    draws, means, truth = (results.to_units(splits, v) for v in (draws, means, truth))
    values = {"mean": means, **results.quantiles(draws), "truth": truth}
    names = [chosen.names[i] for i in keep]
    facts = results.times(splits, split, names)
    np.savez_compressed(
        opened.directory / "forecast.npz", **values, samples=draws, first=np.array(first), **facts
    )
    results.write_table(opened.directory / "forecast.csv", splits, split, names, values, first)
    row: dict[str, Any] = {"sequences": len(keep), "horizon": horizon, "samples": samples}
    known = ~np.isnan(truth)
    if known.any():
        row["mae"] = float(np.abs(means - truth)[known].mean())
        inside = (truth >= values["q05"]) & (truth <= values["q95"])
        row["coverage_90"] = float(inside[known].mean())
    return table([row]) + f"\nwritten to {opened.directory}: forecast.npz, forecast.csv"


def impute(
    run: str,
    hide: float = 0.0,
    hide_what: str = "frames",
    samples: int = 100,
    data: str | None = None,
    split: str = "test",
    seed: int = 0,
) -> str:
    """Fill what is missing; with `hide`, first hide that share and report the error on it.

    `hide_what` is "frames" or single "values"; `split` may be "all", to fill every gap of the data. Writes
    imputed.npz and imputed.csv: id, time, column, mean and quantiles of the missing values only, in the units of the
    data.

    Args:
        run: run directory, made by dynavae fit --out; or a saved model, with `data`.
        hide: share to hide first, in [0, 1), so that the error on it can be reported.
        hide_what: hide whole "frames" or single "values".
        samples: completions drawn for each sequence.
        data: another data set or file; default: that of the run.
        split: which part of the data.
        seed: of the noise.
    """
    if not 0 <= hide < 1:
        raise ValueError(f"hide is a share of the frames or values, in [0, 1); got {hide}.")
    if hide_what not in ("frames", "values"):
        raise ValueError(f"hide_what should be frames or values; got {hide_what!r}.")
    opened = Run.open(run, exported=True)
    net, splits = opened.model(), opened.data(data)
    if split == "all":
        splits, split = splits.joined(), "test"
    chosen = splits.split(split)
    whole = chosen.batch()
    batch = whole.hide(_holes(whole, hide, hide_what, seed)) if hide else whole
    if batch.complete:
        raise ValueError(
            f"nothing is missing in {split}; pass --hide 0.2 to hide a share of the frames and score it."
        )
    filled = tasks.impute(net, batch, samples, seed=seed)
    missing = ~filled.observed.numpy() & whole.valid.unsqueeze(-1).numpy()
    drawn = results.to_units(splits, filled.samples.numpy())
    values = {
        "mean": results.to_units(splits, filled.x.numpy()),
        **results.quantiles(drawn),
        "truth": results.to_units(splits, torch.where(whole.observed, whole.x, torch.nan).numpy()),
    }
    mean, truth = values["mean"], values["truth"]
    np.savez_compressed(
        opened.directory / "imputed.npz",
        x=mean,
        **{k: v for k, v in values.items() if k != "mean"},
        observed=filled.observed.numpy(),
        lengths=filled.lengths.numpy(),
        **results.times(splits, split, chosen.names),
    )
    results.write_table(
        opened.directory / "imputed.csv", splits, split, list(chosen.names), values, where=missing, once=True
    )
    scored = missing & ~np.isnan(truth)
    row: dict[str, Any] = {"sequences": len(chosen), "missing": int(missing.sum()), "samples": samples}
    if scored.any():
        row["mae"] = float(np.abs(mean - truth)[scored].mean())
        if "train" in splits.available:
            row["mae_of_mean"] = _mean_baseline(splits, truth, scored)
    return table([row]) + f"\nwritten to {opened.directory}: imputed.npz, imputed.csv"


def _holes(batch: Sequences, share: float, what: str, seed: int) -> torch.Tensor:
    """Whole frames, or single values, hidden at random; the first frame of a sequence is always kept."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch.x.shape[:2] if what == "frames" else batch.x.shape
    hidden = torch.rand(shape, generator=generator) < share
    hidden[:, 0] = False
    return hidden.reshape(*shape, *[1] * (batch.x.ndim - len(shape))).expand_as(batch.x)


def _mean_baseline(splits: DataSplits, truth: np.ndarray, scored: np.ndarray) -> float:
    """Error of filling with the train mean of each coordinate."""
    train = np.concatenate([np.asarray(x, dtype=np.float64) for x in splits.split("train").x])
    mean = results.to_units(splits, np.nanmean(train, 0))
    return float(np.abs(mean - truth)[scored].mean())


def report(
    run: str | list[str],
    out: str | None = None,
    split: str = "test",
    sequences: int = 2,
    horizon: int = 16,
    samples: int = 20,
    seed: int = 0,
) -> str:
    """Write report.html of a run: setting, scores, curves, latents, reconstructions, samples, forecasts.

    With several runs, write comparison.html instead: scores in one table, differing settings, curves overlaid, and
    forecasts and imputations of the same sequences side by side.

    Args:
        run: run directory, made by dynavae fit --out; or several, to compare them.
        out: file to write; default: report.html in the run, or comparison.html here.
        split: which part of the data is shown.
        sequences: how many of its sequences.
        horizon: frames of the forecasts.
        samples: futures drawn for each.
        seed: of the noise.
    """
    from dynavae.report import write_comparison, write_report
    from dynavae.report.gather import gather

    runs = [run] if isinstance(run, str) else run
    options = {"split": split, "sequences": sequences, "horizon": horizon, "samples": samples, "seed": seed}
    if len(runs) > 1:
        path = write_comparison(out or "comparison.html", runs, **options)  # type: ignore[arg-type]
    else:
        opened = Run.open(runs[0])
        path = write_report(out or opened.directory / "report.html", **gather(opened, **options))  # type: ignore[arg-type]
    return f"written to {path} ({path.stat().st_size / 1e6:.1f} MB)"


def list_all(what: str = "models", as_json: bool = False) -> str:
    """The registry: models with the model × task table, presets, data sets, emissions."""
    import json

    if what == "models":
        records = catalogue.records()
        if as_json:
            return json.dumps(records, indent=2, default=str)
        rows = [{"model": r["name"], "what": r["summary"]} for r in records if not r["variant"]]
        return table(rows) + "\n\n" + catalogue.task_table()
    if what == "presets":
        rows = presets.records()
    elif what == "data":
        rows = [{"data": n, "what": d} for n, d in _data_names().items()]
    elif what == "emissions":
        rows = [
            {"emission": n, "what": (c.__doc__ or "").strip().splitlines()[0]} for n, c in EMISSIONS.items()
        ]
    else:
        raise ValueError(f"list models, presets, data or emissions; got {what!r}.")
    return json.dumps(rows, indent=2) if as_json else table(rows)


def _data_names() -> dict[str, str]:
    return {
        "jsb": "Bach chorales, quarter notes (in the package)",
        "nottingham": "folk tunes with chords (file under DYNAVAE_DATA)",
        "muse": "orchestral and piano classics (file under DYNAVAE_DATA; no test split)",
        "piano": "classical piano (file under DYNAVAE_DATA; no test split)",
        "jsb16": "Bach chorales, sixteenth notes (file under DYNAVAE_DATA)",
        "pm25": "PM2.5 of 36 stations in Beijing, hourly, with gaps (files under DYNAVAE_DATA)",
        "physionet": "48 hours of intensive care, 35 variables, 80 % missing (file under DYNAVAE_DATA)",
        "PATH.csv": "your own table (or .tsv, .parquet): id, time and value columns, see dynavae.data.load_table",
        "FOLDER": "your own tables or .mid files, one sequence each; or folders train, valid, test",
        "PATH.npz": "your own arrays: train, valid, test (B, T, x), or x with lengths; NaN is missing",
    }


def _music(folder: Path, stem: str, rolls: list[np.ndarray], meta: dict[str, Any]) -> list[Path]:
    from dynavae import music

    written = []
    for i, roll in enumerate(rolls):
        wave = music.to_audio(roll, meta["frame_seconds"], lowest_midi=meta["lowest_midi"])
        path = folder / f"{stem}_{i}.wav"
        path.write_bytes(music.wav_bytes(wave))
        written.append(path)
        if music.can_write_midi():
            music.to_midi(roll, folder / f"{stem}_{i}.mid", meta["frame_seconds"], meta["lowest_midi"])
            written.append(folder / f"{stem}_{i}.mid")
    return written
