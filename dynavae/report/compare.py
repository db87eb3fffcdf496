"""Several runs on one page: what can be compared side by side, and a mark on what cannot."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynavae import tasks
from dynavae.files import writable, write_text
from dynavae.report import contrast, gather, html, overlays, side_by_side
from dynavae.results import to_units
from dynavae.runs import Run


@dataclass(frozen=True)
class Compared:
    """One run of a comparison: what its directory says, and what its best weights make of the data.

    Attributes:
        index: its place, from which its colour follows.
        name: what the page calls it.
        settings: its run.json.
        scores, history, notes: what was recorded.
        measure: "mass" or "density", of its likelihood.
        kl: KL of each latent dimension in nats per frame, or None.
        data: name of its data set.
        kind, meta: of its data, for drawing.
        same: runs for which this is equal show the same sequences.
        forecasts, imputations, samples: as `write_report` takes them.
    """

    index: int
    name: str
    settings: Mapping[str, Any]
    scores: list[dict[str, Any]]
    history: list[dict[str, float]]
    notes: list[str]
    measure: str
    kl: np.ndarray | None
    data: str
    kind: str
    meta: dict[str, Any]
    same: tuple[Any, ...]
    forecasts: list[dict[str, Any]]
    imputations: list[dict[str, Any]]
    samples: list[np.ndarray]


def write_comparison(
    path: str | Path,
    runs: Sequence[str | Path | Run],
    *,
    names: Sequence[str] | None = None,
    split: str = "test",
    sequences: int = 2,
    horizon: int = 16,
    samples: int = 100,
    seed: int = 0,
) -> Path:
    """Write one HTML file that compares runs: scores, differing settings, curves, and what the models do.

    Scores stand in columns, one for each question that was asked: data and their hash, split, bound, K, density or
    mass, frames. Numbers of one column may be compared; what sets a column apart from the first is marked.
    Runs may be on different data, which is marked too; then each data set has its own pictures. Forecasts and
    imputations are of the same sequences with the same gaps, computed anew from the best weights of each run.

    Args:
        path: the file to write; its folder is made if need be.
        runs: two run directories or more, made by ``dynavae fit --out``.
        names: what the page calls them; by default the names of the directories.
        split: which part of the data is shown; of data without a test part, what they have in its place.
        sequences: how many of its sequences.
        horizon: frames of the forecasts.
        samples: futures and completions drawn for each sequence.
        seed: of the noise.

    Returns:
        The path of the file.

    Raises:
        ValueError: fewer than two runs, more than twelve, one of them twice, a directory that is no run, or a split
            that the data of a run do not have.

    Example:
        >>> write_comparison("compare.html", ["runs/srnn", "runs/srnn"])
        Traceback (most recent call last):
        ...
        ValueError: runs/srnn is given twice; a comparison takes different runs.
    """
    opened = [run if isinstance(run, Run) else _open(run) for run in runs] if _checked(runs) else []
    called = list(names) if names is not None else _names([run.directory for run in opened])
    if len(called) != len(opened) or len(set(called)) != len(called):
        raise ValueError(
            f"names should be {len(opened)} different names, one for each run; got {', '.join(map(repr, called))}."
        )
    found = [
        read(run, index, name, split, sequences, horizon, samples, seed)
        for index, (run, name) in enumerate(zip(opened, called, strict=True))
    ]
    sections = [
        contrast.score_section(found),
        contrast.setting_section(found),
        contrast.history_section(found),
        contrast.kl_section(found),
        *side_by_side.sections(found),
        contrast.note_section(found),
    ]
    data = dict.fromkeys(run.data for run in found)
    text = html.page(
        f"{len(found)} runs on {' and '.join(data)}",
        ", ".join(f"{run.name} ({run.settings['model']})" for run in found),
        contrast.tiles(found),
        [section for section in sections if section is not None],
    )
    path = Path(path)
    writable(path.parent)
    return write_text(path, text)


def read(
    run: Run, index: int, name: str, split: str, sequences: int, horizon: int, samples: int, seed: int
) -> Compared:
    """A run as the page shows it."""
    model, splits, settings = run.model(), run.data(), run.settings
    notes = list(run.notes())
    if settings["data"].get("sha256") not in (None, "", splits.sha256):
        notes.append("the data have changed since this run was fitted; pictures show the present data")
    shown, note = gather.shown_split(splits, split)
    notes += [*run.score_notes(), *note]
    chosen = splits.split(shown)
    rows = list(range(min(sequences, len(chosen))))
    batch = chosen.batch(rows)
    drawn: list[np.ndarray] = []
    if not model.control_dim:
        drawn = list(tasks.generate(model, len(rows), int(np.median(chosen.lengths)), seed=seed).x.numpy())
    return Compared(
        index=index,
        name=name,
        settings=settings,
        scores=[{**score, **_circumstances(settings, score)} for score in run.scores()],
        history=run.history(),
        notes=notes,
        measure="mass" if model.emission.discrete else "density",
        kl=gather.kl_per_dimension(model, chosen, seed),
        data=splits.name,
        kind=splits.kind,
        meta=splits.meta,
        same=(splits.sha256, shown, *batch.names, *batch.lengths.tolist(), _options(settings)),
        forecasts=gather.shown_in_units(
            splits, gather.forecasts(model, chosen, rows, horizon, samples, seed)
        ),
        imputations=gather.shown_in_units(splits, gather.imputations(model, batch, seed, samples)),
        samples=[to_units(splits, x) for x in drawn],
    )


def _checked(runs: Sequence[str | Path | Run]) -> bool:
    if isinstance(runs, str | Path):
        raise TypeError(f"runs should be a list of run directories; got {runs!r} alone.")
    if not 2 <= len(runs) <= overlays.MOST_RUNS:
        raise ValueError(
            f"a comparison takes 2 to {overlays.MOST_RUNS} runs; got {len(runs)}. One run: dynavae report RUN."
        )
    places = [Path(run.directory if isinstance(run, Run) else run) for run in runs]
    for i, place in enumerate(places):
        if place.resolve() in [other.resolve() for other in places[:i]]:
            raise ValueError(f"{place} is given twice; a comparison takes different runs.")
    return True


def _open(directory: str | Path) -> Run:
    run = Run.open(directory)
    if not (run.directory / "best").is_dir():
        raise ValueError(
            f"{directory} has no best/: its training has not finished an epoch. Continue it with: "
            f"dynavae fit --resume true --out {directory}"
        )
    return run


def _names(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [place.resolve().parts for place in places]
    depth = next(d for d in range(1, max(map(len, parts)) + 1) if len({p[-d:] for p in parts}) == len(parts))
    return [os.path.join(*p[-depth:]) for p in parts]


def _circumstances(settings: Mapping[str, Any], score: Mapping[str, Any]) -> dict[str, str]:
    """What a score does not say of itself: the scaling of the values, and how its data were cut."""
    schema = settings["data"].get("schema", {})
    scaling = ""
    if schema.get("stddev"):
        moments = json.dumps([schema["mean"], schema["stddev"]])
        scaling = f"scaling {hashlib.sha256(moments.encode()).hexdigest()[:8]}"
    own = score.get("data_sha256") == settings["data"].get("sha256")
    return {"scaling": scaling, "data_options": _options(settings) if own else ""}


def _options(settings: Mapping[str, Any]) -> str:
    """Options of the data that decide what is in a split; where its files are does not."""
    given = {k: v for k, v in settings["data"].get("options", {}).items() if k != "folder"}
    return ", ".join(f"{k}: {v}" for k, v in sorted(given.items()))
