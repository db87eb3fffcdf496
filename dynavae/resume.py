"""The checkpoints of a run: written so that a kill loses nothing, read so that damage is noticed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from dynavae.data.archives import DAMAGE
from dynavae.files import remove_parts, replacing, writable

FREE = ("epochs", "patience")
"""Options that may change when a run is resumed: they do not change what has been done so far."""

DERIVED = (
    *("training.json", "metrics.csv", "kl_dim.csv", "score.json", "scores.json", "report.html"),
    *(f"{what}.{kind}" for what in ("forecast", "imputed") for kind in ("npz", "csv", "json")),
    *("samples/samples.npz", "samples/sample_[0-9]*.wav", "samples/sample_[0-9]*.mid"),
)
"""Files that say something of the weights in best/: without these weights they say nothing."""


class Start(NamedTuple):
    """Where a run begins."""

    checkpoint: Path | None  # None: at the beginning
    notes: list[str]  # what the user should know


class Checkpoints:
    """`checkpoints/last.ckpt` and the one before it, `previous.ckpt`."""

    def __init__(self, out_dir: Path) -> None:
        self.out_dir, self.folder = out_dir, out_dir / "checkpoints"
        self.last, self.previous = self.folder / "last.ckpt", self.folder / "previous.ckpt"

    def exist(self) -> bool:
        return self.last.exists() or self.previous.exists()

    def save(self, trainer: Trainer) -> None:
        """Write `last.ckpt`; all processes have to call this, one writes.

        The new file is complete and on the disk before it takes the name; at every moment there is a whole one.
        """
        if not trainer.is_global_zero:
            trainer.save_checkpoint(self.last, weights_only=False)  # takes part, writes nothing
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.last) as beside:
            trainer.save_checkpoint(beside, weights_only=False)
            if self.last.exists():
                with replacing(self.previous) as second:
                    try:
                        os.link(self.last, second)
                    except OSError:  # a file system without hard links
                        shutil.copyfile(self.last, second)

    def find(self) -> Start:
        """The newest checkpoint that is whole. A damaged one is put aside, and said.

        Raises:
            FileNotFoundError: nothing was ever begun here.
            ValueError: there are checkpoints, but all are damaged.
        """
        notes = []
        for path in (self.last, self.previous):
            if not path.exists():
                continue
            reason = damage(path)
            if reason is None:
                if notes:
                    notes.append(f"continued from the checkpoint before it, {path.name}.")
                return Start(path, [" ".join(notes)] if notes else [])
            notes.append(f"{path} is damaged ({reason}):")
        if notes:
            raise ValueError(
                f"{' '.join(notes)} no whole checkpoint is left to resume from. The best weights may still be good: "
                f"dynavae.load({str(self.out_dir / 'best')!r}). To start again, replace the run: resume=False."
            )
        if not any((self.out_dir / name).is_file() for name in ("training.json", "run.json")):
            raise FileNotFoundError(
                f"there is no run to resume in {str(self.out_dir)!r} (no checkpoints/last.ckpt)."
            )
        return Start(None, ["there was no checkpoint yet to resume from: started at the beginning."])

    def set_aside(self) -> None:
        """A damaged `last.ckpt` must not become `previous.ckpt` at the next save."""
        if self.last.exists() and damage(self.last) is not None:
            os.replace(self.last, self.last.with_suffix(".damaged"))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file; None if it is whole (every part of it has its checksum)."""
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except OSError as error:
        return error.strerror or str(error)
    except DAMAGE as error:
        return str(error) or type(error).__name__
    return None if bad is None else f"wrong checksum in {bad}"


def prepare(out_dir: Path | None, resume: bool | None, description: dict[str, Any], writes: bool) -> Start:
    """Make the directory, and say where to start; a run that is replaced is removed, with its results.

    Args:
        out_dir: of the run.
        resume: see :func:`dynavae.fit`.
        description: of the run, as `training.json` holds it, to compare with that of the run to resume.
        writes: whether this process is the one that writes files.
    """
    if out_dir is None:
        if resume:
            raise ValueError("resume=True needs out_dir, the directory of the run to continue.")
        return Start(None, [])
    checkpoints = Checkpoints(out_dir)
    if resume:
        start = checkpoints.find()
        check_same(out_dir / "training.json", description)
        if writes:
            writable(out_dir)
            checkpoints.set_aside()
            remove_parts(out_dir)
        return start
    if resume is None and checkpoints.exist():
        raise FileExistsError(
            f"{str(out_dir)!r} already holds a run: pass resume=True to continue it, resume=False to replace it, or "
            "another out_dir."
        )
    if writes:
        writable(out_dir)
        remove_parts(out_dir)
        remove_run(out_dir)
    return Start(None, [])


def remove_run(out_dir: Path) -> None:
    """Remove a run that is replaced, with what was found out about its weights; files of the user's own stay."""
    if not any((out_dir / name).exists() for name in ("checkpoints", "best", "training.json")):
        return
    for part in ("checkpoints", "best", "tensorboard"):
        if (out_dir / part).exists():
            shutil.rmtree(out_dir / part)
    for pattern in DERIVED:
        for path in out_dir.glob(pattern):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # there is none, or it holds something else
        (out_dir / "samples").rmdir()


def check_same(path: Path, description: dict[str, Any]) -> None:
    """Whether a run is resumed with the model, data and options it was begun with.

    Raises:
        ValueError: names the first difference.
    """
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete it to resume without comparing options."
        ) from None
    now = json.loads(json.dumps(description, default=str))
    for what in ("model", "config", "train", "valid", "options"):
        a, b = before.get(what), now.get(what)
        if isinstance(a, dict) and isinstance(b, dict):
            names = [n for n in {**a, **b} if not (what == "options" and n in FREE)]
            changed = [
                (n, a.get(n, "the default"), b.get(n, "the default")) for n in names if a.get(n) != b.get(n)
            ]
            if changed and what in ("train", "valid"):
                raise ValueError(
                    f"the run in {str(path.parent)!r} was trained on other data: {what} differs in {changed[0][0]} "
                    f"({changed[0][1]}, now {changed[0][2]}). Resume it with the same data, or choose another out_dir."
                )
            if changed:
                name, old, new = changed[0]
                raise ValueError(
                    f"{name}={new!r} contradicts the run in {str(path.parent)!r}, which was begun with {old!r}: leave "
                    "it as it was to resume, or choose another out_dir."
                )
        elif a != b:
            raise ValueError(
                f"the run in {str(path.parent)!r} was begun with {what} {_short(a)}, not {_short(b)}: resume it with "
                "the same, or choose another out_dir."
            )


def _short(value: Any) -> str:
    return "none" if value is None else "some" if isinstance(value, dict) else str(value)


def unfinished(out_dir: str | Path) -> bool:
    """Whether a run can be continued there."""
    with contextlib.suppress(OSError):
        return Checkpoints(Path(out_dir)).exist()
    return False
