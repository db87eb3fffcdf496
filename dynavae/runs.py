"""A run on disk: one directory that says what was done and holds what came of it.

run.json        what was fitted, on which data, with which options, versions and hardware; notes of what went wrong
best/           the best weights: config.json and model.safetensors
checkpoints/    to resume: last.ckpt, and the one before it
metrics.csv     one row per epoch
score.json      the first bound of the last evaluation; scores.json all of them; each says which weights it is of
forecast.json   the errors of the last forecast, in all and by column, beside forecast.csv and forecast.npz
imputed.json    the same of the last imputation, beside imputed.csv and imputed.npz
report.html     everything to look at and listen to
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynavae import data as datasets
from dynavae.data import DataSplits
from dynavae.files import writable, write_json
from dynavae.model import SequentialLVM


@dataclass(frozen=True)
class Run:
    """An existing run directory."""

    directory: Path
    settings: dict[str, Any]

    @classmethod
    def open(cls, directory: str | Path, exported: bool = False) -> Run:
        """The run in this directory.

        Args:
            directory: of the run.
            exported: a model saved by :func:`dynavae.save_pretrained`, or by :func:`dynavae.fit` in `best/`, will do.

        Raises:
            ValueError: if there is none.
        """
        directory = Path(directory)
        path = directory / "run.json"
        if not path.is_file():
            if exported and (settings := _of_model(directory)) is not None:
                return cls(directory, settings)
            raise ValueError(
                f"{directory} is not a run: it has no run.json. Make one with: dynavae fit --out {directory}"
            )
        try:
            return cls(directory, json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged: {error}. best/ may still be good: see dynavae.load."
            ) from None

    @classmethod
    def create(cls, directory: str | Path, settings: dict[str, Any]) -> Run:
        """Write run.json into a directory, made if need be."""
        directory = writable(Path(directory))
        write_json(directory / "run.json", settings)
        return cls(directory, settings)

    def update(self, **more: Any) -> Run:
        """Add to run.json."""
        return Run.create(self.directory, {**self.settings, **more})

    def model(self, device: str = "cpu") -> SequentialLVM:
        """The fitted model, with its best weights, on a device: see :func:`choose_device`."""
        from dynavae.checkpoint import load

        return load(self._weights, choose_device(device))

    @property
    def _weights(self) -> Path:
        """The directory of the best weights."""
        best = self.directory / "best"
        return best if best.is_dir() else self.directory

    def weights_sha256(self) -> str:
        """Hash of the best weights, as scores quote it; empty where there are none."""
        from dynavae.checkpoint import WEIGHTS

        path = self._weights / WEIGHTS
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def schema(self) -> datasets.Schema | None:
        """Columns, grid and scaling of the table it was fitted on; None of other data.

        Its `standardise` and `to_units` take raw values to the scale of the model, and results back.
        """
        found = self.settings["data"].get("schema")
        return None if found is None else datasets.Schema.from_dict(found)

    def data(self, source: str | None = None, whole: bool = False) -> DataSplits:
        """The data of the run; or another source, with the columns, grid and scaling of the run.

        What another source does not assign to a split itself is its "test"; with `whole`, of the run's own too.
        """
        recorded = self.settings["data"]
        if source is None and recorded["source"] is None:
            raise ValueError(
                f"{self.directory} holds a model and no record of its data (run.json): say which, with --data."
            )
        own = source is None or _same(source, recorded["source"])
        source = recorded["source"] if own or source is None else source
        known = datasets.loader_options(source)
        options = {k: v for k, v in recorded.get("options", {}).items() if k in known}
        if not own:
            options = {k: v for k, v in options.items() if k in OF_ANY_SOURCE}
        if "schema" in recorded and "schema" in known:
            options["schema"] = self.schema
            options.pop("standardize", None)
        elif not own and "standardize" in known:  # a set known by name has its own scaling, or none
            options["standardize"] = self.schema is not None and self.schema.standardized
        if (whole or not own) and "whole" in known:
            options["whole"] = True
        if not own and "kind" in known:
            options["kind"] = recorded.get("kind")
        splits = datasets.load(source, **options)
        parts = {
            s: f"{len(splits.split(s))} sequences, {splits.split(s).frames} frames" for s in splits.available
        }
        if own and not whole and recorded.get("splits", parts) != parts:
            print(
                f"note: {source} is split otherwise than when this run was fitted ({parts}, before {recorded['splits']}): "
                "what is scored as test may have been trained on.",
                file=sys.stderr,
            )
        if not own and splits.schema is not None and self.schema is not None and splits.schema != self.schema:
            print(
                f"note: columns, grid or scaling of {source} are not those of {self.directory}.",
                file=sys.stderr,
            )
        if not own and splits.schema is not None and "schema" not in recorded:
            print(
                f"note: {self.directory} says nothing of a scaling of its data, so the values of {source} are taken as they "
                "are. Train on splits.train of dynavae.data.load(...), and the scaling stays with the model.",
                file=sys.stderr,
            )
        if own and recorded.get("sha256") and splits.sha256 != recorded["sha256"]:
            print(
                f"note: {source} has changed since this run was fitted; its scaling is kept.", file=sys.stderr
            )
        return splits

    def history(self) -> list[dict[str, float]]:
        """Rows of metrics.csv."""
        path = self.directory / "metrics.csv"
        if not path.is_file():
            return []
        with path.open(newline="") as file:
            return [
                {k: _number(v) for k, v in row.items() if v not in ("", None)} for row in csv.DictReader(file)
            ]

    def notes(self) -> list[str]:
        """What was said during training, one sentence each; also of a run that has not ended."""
        path = self.directory / "training.json"
        running = json.loads(path.read_text()).get("notes", []) if path.is_file() else []
        return running or self.settings.get("notes", [])

    def scores(self) -> list[dict[str, Any]]:
        """What evaluations found of the best weights: those of scores.json that quote their hash.

        Scores of other weights, and scores that do not say of which, are left out: see :meth:`score_notes`.
        """
        stored = self._stored_scores()
        now = self.weights_sha256() if stored else ""
        return [score for score in stored if now and score.get("weights_sha256") == now]

    def score_notes(self) -> list[str]:
        """A sentence about the scores that :meth:`scores` leaves out, if it does."""
        left_out = len(self._stored_scores()) - len(self.scores())
        if not left_out:
            return []
        return [
            f"{left_out} of the scores in scores.json left out: of other weights than those in best/ now, or without a "
            f"word of which. Score the run anew: dynavae evaluate {self.directory}"
        ]

    def _stored_scores(self) -> list[dict[str, Any]]:
        path = self.directory / "scores.json"
        return json.loads(path.read_text()) if path.is_file() else []


OF_ANY_SOURCE = ("window", "frame_seconds", "lowest_midi", "keys", "folder")
"""Options of the data that hold for another source too; those of a table are in its schema."""


def _of_model(directory: Path) -> dict[str, Any] | None:
    """What a saved model, in this directory or its best/, says of itself, as far as run.json would."""
    from dynavae.checkpoint import CONFIG, read_config

    for folder in (directory, directory / "best"):
        if (folder / CONFIG).is_file():
            config = read_config(folder)
            data = {key: config[key] for key in ("schema", "kind") if key in config}
            return {"model": config["model"], "options": config["config"], "data": {"source": None, **data}}
    return None


def _same(a: str, b: str | None) -> bool:
    return b is not None and (a == b or Path(a).resolve() == Path(b).resolve())


def choose_device(name: str) -> str:
    """The device of this name; "auto" is a GPU where torch sees one, else the CPU.

    Raises:
        ValueError: no such device, or none here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(f"device should be auto, cpu, cuda or cuda:1; got {name!r}.") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={name!r} needs a GPU, and this torch ({torch.__version__}) sees none: take device='cpu', or "
            "install a build of torch for your GPU."
        )
    return name


def check_accelerator(name: str) -> None:
    """Refuse an accelerator that this torch does not see.

    Raises:
        ValueError: none of that name, or none here.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    seen = {"auto": True, "cpu": True, "gpu": cuda or mps, "cuda": cuda, "mps": mps}
    if name not in seen:
        raise ValueError(f"accelerator should be auto, cpu or gpu; got {name!r}.")
    if not seen[name]:
        raise ValueError(
            f"accelerator={name!r} needs a GPU, and this torch ({torch.__version__}) sees none: take "
            "accelerator='auto' or 'cpu', or install a build of torch for your GPU."
        )


def environment() -> dict[str, Any]:
    """Versions and hardware, as a report should say them."""
    import dynavae

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "dynavae": dynavae.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def table(rows: list[dict[str, Any]], columns: list[str] | None = None, digits: int | None = None) -> str:
    """Records as an aligned plain-text table, with four decimals, or so many significant digits.

    Example:
        >>> print(table([{"model": "VRNN", "nats": 7.25}, {"model": "SRNN", "nats": 7.1}]))
        model    nats
        VRNN   7.2500
        SRNN   7.1000
        >>> print(table([{"column": "Pa", "mae": 1234567.0}, {"column": "m", "mae": 1e-9}], digits=4))
        column        mae
        Pa      1.235e+06
        m           1e-09
    """
    if not rows:
        return "(nothing)"
    columns = columns or list(rows[0])

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.4f}" if digits is None else f"{value:.{digits}g}"
        return "" if value is None else str(value)

    cells = [[cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    numeric = [all(isinstance(row.get(c), int | float | None) for row in rows) for c in columns]

    def line(values: list[str]) -> str:
        return "  ".join(
            v.rjust(w) if n else v.ljust(w) for v, w, n in zip(values, widths, numeric, strict=True)
        ).rstrip()

    return "\n".join([line(columns), *(line(c) for c in cells)])
