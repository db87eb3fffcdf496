"""`dynavae generate | forecast | impute`: sequences that a run makes, continues or completes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynavae import results, tasks, tree
from dynavae.batch import Sequences
from dynavae.commands import errors
from dynavae.commands.checks import check_numbers
from dynavae.data import DataSplits, SequenceDataset
from dynavae.files import replacing, writable, write_arrays, write_json
from dynavae.runs import Run, table


def generate(run: str, batch: int = 4, length: int = 64, seed: int = 0, device: str = "auto") -> str:
    """Draw new sequences. Writes samples.npz, and for music one .mid and .wav each.

    Args:
        run: run directory, made by dynavae fit --out.
        batch: number of sequences.
        length: frames of each.
        seed: of the noise.
        device: auto (a GPU, if torch sees one), cpu, cuda or cuda:1.
    """
    check_numbers(batch=batch, length=length, seed=seed)
    opened = Run.open(run)
    net, splits = opened.model(device), opened.data()
    if net.control_dim:
        raise ValueError(
            "this model reads controls, which cannot be invented; use dynavae.generate(model, control=...) in Python."
        )
    made = on_host(tasks.generate(net, batch, length, seed=seed))
    folder = writable(opened.directory / "samples")
    x, mean = (results.to_units(splits, v.numpy()) for v in (made.x, made.mean))
    write_arrays(folder / "samples.npz", x=x, mean=mean, z=made.z.numpy())
    written = [folder / "samples.npz"]
    if "lowest_midi" in splits.meta:
        rolls = (made.x > 0.5).numpy()  # already 0 and 1, unless the emission is not Bernoulli
        written += _music(folder, "sample", list(rolls.astype(np.uint8)), splits.meta)
    rows = [
        {"sample": i, "frames": length, "mean": float(x.mean()), "stddev": float(x.std())}
        for i, x in enumerate(x)
    ]
    return table(rows) + f"\nwritten to {folder}: {', '.join(p.name for p in written)}"


def _music(folder: Path, stem: str, rolls: list[np.ndarray], meta: dict[str, Any]) -> list[Path]:
    from dynavae import music

    written = []
    for i, roll in enumerate(rolls):
        wave = music.to_audio(roll, meta["frame_seconds"], lowest_midi=meta["lowest_midi"])
        path = folder / f"{stem}_{i}.wav"
        with replacing(path) as beside:
            beside.write_bytes(music.wav_bytes(wave))
        written.append(path)
        if music.can_write_midi():
            path = folder / f"{stem}_{i}.mid"
            with replacing(path) as beside:
                music.to_midi(roll, beside, meta["frame_seconds"], meta["lowest_midi"])
            written.append(path)
    return written


def forecast(
    run: str,
    horizon: int = 16,
    context: int | None = None,
    samples: int = 100,
    data: str | None = None,
    split: str = "test",
    future: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """Forecast each sequence from its first `context` frames (default: all but the last `horizon`).

    With `future`, forecast what comes after the last frame; of a model with controls, after the last frame that has a
    value, while the file still has controls. Writes forecast.npz; forecast.csv: id, time, column, mean, quantiles, and
    the truth where it is known, in the units of the data; and forecast.json: the errors, in all and by column.

    Args:
        run: run directory, made by dynavae fit --out; or a saved model, with `data`.
        horizon: frames to forecast.
        context: frames to read first; default: all but the last `horizon`.
        samples: futures drawn for each sequence.
        data: another data set or file; default: that of the run.
        split: which part of the data.
        future: continue after the last frame instead.
        seed: of the noise.
        device: auto (a GPU, if torch sees one), cpu, cuda or cuda:1.
    """
    check_numbers(horizon=horizon, context=context, samples=samples, seed=seed)
    opened = Run.open(run, exported=True)
    net, splits = opened.model(device), opened.data(data)
    chosen = splits.split(split)
    lengths = chosen.lengths.tolist()
    if future and context is not None:
        raise ValueError("future forecasts from all frames of a sequence: leave context out.")
    shortest = 0 if future else context or horizon
    keep = [i for i, n in enumerate(lengths) if n > shortest]
    if not keep:
        raise ValueError(
            f"no sequence of {split} is longer than {shortest} frames; lower horizon or context."
        )
    if future:  # the last piece of each id
        keep = sorted({splits.origin(split, chosen.names[i])[0]: i for i in keep}.values())
    starts = {i: lengths[i] if future else context or lengths[i] - horizon for i in keep}
    if future and net.control_dim:
        starts = {i: _controls_reach(chosen, i, horizon) for i in keep}
    silent = [i for i in keep if np.isnan(chosen.x[i][: starts[i]]).all()]
    if len(silent) == len(keep):
        raise ValueError(
            f"no sequence of {split} has an observed value to forecast from; lengthen the context."
        )
    keep = [i for i in keep if i not in silent]
    first = [starts[i] for i in keep]
    groups: dict[int, list[int]] = {}
    for i, frames in zip(keep, first, strict=True):
        groups.setdefault(frames, []).append(i)
    draws = np.full((samples, len(keep), horizon, net.x_dim), np.nan, dtype=np.float32)
    means, truth = draws[0].copy(), draws[0].copy()
    for frames, rows in groups.items():
        batch = chosen.batch(rows)
        f = on_host(tasks.forecast(net, batch, horizon, frames, samples, seed=seed, control=batch.control))
        places = [keep.index(i) for i in rows]
        draws[:, places], means[places] = f.samples.numpy(), f.mean.numpy()
        for place, array in zip(places, batch.arrays(), strict=True):
            known = array[frames : frames + horizon]
            truth[place, : len(known)] = known
    draws, means, truth = (results.to_units(splits, v) for v in (draws, means, truth))
    values = {"mean": means, **results.quantiles(draws), "truth": truth}
    names = [chosen.names[i] for i in keep]
    facts = results.times(splits, split, names)
    write_arrays(opened.directory / "forecast.npz", **values, samples=draws, first=np.array(first), **facts)
    results.write_table(opened.directory / "forecast.csv", splits, split, names, values, first)
    row: dict[str, Any] = {"sequences": len(keep), "horizon": horizon, "samples": samples}
    known = ~np.isnan(truth)
    found = errors.of_mean(splits, means, truth)
    if splits.kind != "categorical":
        found["crps"] = errors.of_samples(draws, truth, known)
        found["coverage_90"] = (truth >= values["q05"]) & (truth <= values["q95"])
    row |= errors.in_all(found, known)
    columns = errors.by_column(splits, found, known)
    text = _said(opened, "forecast", _asked(splits, split, seed), row, columns)
    if silent:
        named = ", ".join(chosen.names[i] for i in silent[:5]) + (", ..." if len(silent) > 5 else "")
        text += f"\nleft out, without an observed value to forecast from: {len(silent)} ({named})"
    return text


def _controls_reach(chosen: SequenceDataset, i: int, horizon: int) -> int:
    """Where the future of a sequence begins: after its last observed frame. Its controls have to cover the horizon."""
    seen = np.flatnonzero(~np.isnan(chosen.x[i]).all(-1))
    start, have = int(seen[-1]) + 1, len(chosen.x[i])
    if have - start < horizon:
        raise ValueError(
            f"this model reads controls, and those of sequence {chosen.names[i]!r} reach {have - start} frames beyond its "
            f"last value, fewer than the horizon of {horizon}: add rows with the controls to come and empty values, and "
            "pass the file with --data."
        )
    return start


def impute(
    run: str,
    hide: float = 0.0,
    hide_what: str = "frames",
    samples: int = 100,
    data: str | None = None,
    split: str = "test",
    seed: int = 0,
    device: str = "auto",
) -> str:
    """Fill what is missing; with `hide`, first hide that share and report the error on it.

    `hide_what` is "frames" or single "values"; `split` may be "all", to fill every gap of the data. Writes
    imputed.npz; imputed.csv: id, time, column, mean and quantiles of the missing values only, in the units of the data;
    and imputed.json: the errors, in all and by column.

    Args:
        run: run directory, made by dynavae fit --out; or a saved model, with `data`.
        hide: share to hide first, in [0, 1), so that the error on it can be reported.
        hide_what: hide whole "frames" or single "values".
        samples: completions drawn for each sequence.
        data: another data set or file; default: that of the run.
        split: which part of the data.
        seed: of the noise.
        device: auto (a GPU, if torch sees one), cpu, cuda or cuda:1.
    """
    check_numbers(samples=samples, seed=seed)
    if not 0 <= hide < 1:
        raise ValueError(f"hide is a share of the frames or values, in [0, 1); got {hide}.")
    if hide_what not in ("frames", "values"):
        raise ValueError(f"hide_what should be frames or values; got {hide_what!r}.")
    opened = Run.open(run, exported=True)
    net, splits, asked = opened.model(device), opened.data(data, whole=split == "all"), split
    if split == "all":
        splits, split = splits.joined(), "test"
    chosen = splits.split(split)
    whole = chosen.batch()
    batch = whole.hide(_holes(whole, hide, hide_what, seed)) if hide else whole
    if batch.complete:
        raise ValueError(
            f"nothing is missing in {split}; pass --hide 0.2 to hide a share of the frames and score it."
        )
    truth = results.to_units(splits, torch.where(whole.observed, whole.x, torch.nan).numpy())
    missing = (~batch.observed & whole.valid.unsqueeze(-1)).numpy()
    scored = missing & ~np.isnan(truth)
    values = {name: np.full(truth.shape, np.nan) for name in ("mean", *results.QUANTILES)}
    crps = np.full(truth.shape, np.nan)
    at_once = max(1, errors.MOST_SAMPLED // (samples * whole.steps * whole.x_dim))
    for start in range(0, len(chosen), at_once):  # all samples of all sequences may be more than memory holds
        filled = on_host(tasks.impute(net, batch[start : start + at_once], samples, seed=seed + start))
        drawn = results.to_units(splits, filled.samples.numpy())
        here = np.s_[start : start + at_once, : drawn.shape[2]]
        values["mean"][here] = results.to_units(splits, filled.x.numpy())
        for name, quantile in results.quantiles(drawn).items():
            values[name][here] = quantile
        if splits.kind != "categorical":
            crps[here] = errors.of_samples(drawn, truth[here], scored[here])
    values["truth"] = truth
    mean = values["mean"]
    write_arrays(
        opened.directory / "imputed.npz",
        x=mean,
        **{k: v for k, v in values.items() if k != "mean"},
        observed=batch.observed.numpy(),
        lengths=batch.lengths.numpy(),
        **results.times(splits, split, chosen.names),
    )
    results.write_table(
        opened.directory / "imputed.csv", splits, split, list(chosen.names), values, where=missing, once=True
    )
    row: dict[str, Any] = {"sequences": len(chosen), "missing": int(missing.sum()), "samples": samples}
    found = errors.of_mean(splits, mean, truth)
    if splits.kind != "categorical":
        found["crps"] = crps
    if "train" in splits.available:
        found |= errors.of_baseline(splits, truth)
    row |= errors.in_all(found, scored)
    columns = errors.by_column(splits, found, scored)
    return _said(opened, "imputed", _asked(splits, asked, seed), row, columns)


def _said(
    opened: Run, what: str, asked: dict[str, Any], row: dict[str, Any], columns: list[dict[str, Any]]
) -> str:
    """Write the errors beside the table, and say them.

    Args:
        opened: the run.
        what: "forecast" or "imputed", the name of the files.
        asked: of which data.
        row, columns: counts and errors, in all and by column.
    """
    record = {**asked, "weights_sha256": opened.weights_sha256(), **row, "columns": columns}
    write_json(opened.directory / f"{what}.json", record)
    said = errors.printed(row, columns, f"{what}.json")
    return f"{said}\nwritten to {opened.directory}: {what}.npz, {what}.csv, {what}.json"


def _asked(splits: DataSplits, split: str, seed: int) -> dict[str, Any]:
    return {"data": splits.name, "data_sha256": splits.sha256, "split": split, "seed": seed}


def on_host(result: Any) -> Any:
    """The tensors of a result, on the CPU."""
    return tree.tree_map(lambda a: a.cpu(), result)


def _holes(batch: Sequences, share: float, what: str, seed: int) -> torch.Tensor:
    """Whole frames, or single values, hidden at random; the first frame of a sequence is always kept."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch.x.shape[:2] if what == "frames" else batch.x.shape
    hidden = torch.rand(shape, generator=generator) < share
    hidden[:, 0] = False
    return hidden.reshape(*shape, *[1] * (batch.x.ndim - len(shape))).expand_as(batch.x)
