"""Data sets of sequences: what ships with the package, what is on disk, and the user's own files."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynavae.data.classics import Classic, load_classic
from dynavae.data.dataset import SequenceDataset
from dynavae.data.midi import load_midi, midi_files
from dynavae.data.music import load_jsb, load_jsb16, load_muse, load_nottingham, load_piano
from dynavae.data.npz import load_npz, save_npz
from dynavae.data.own import load_table
from dynavae.data.schema import Schema
from dynavae.data.splits import KINDS, DataSplits
from dynavae.data.tables import TABLES
from dynavae.data.timeseries import load_physionet, load_pm25
from dynavae.data.video import VIDEOS, true_states

__all__ = [
    "DATASETS",
    "KINDS",
    "Classic",
    "DataSplits",
    "Schema",
    "SequenceDataset",
    "load",
    "load_classic",
    "load_midi",
    "load_npz",
    "load_table",
    "loader_options",
    "save_npz",
    "true_states",
]

DATASETS: dict[str, Callable[..., DataSplits]] = {
    "jsb": load_jsb,
    "nottingham": load_nottingham,
    "muse": load_muse,
    "piano": load_piano,
    "jsb16": load_jsb16,
    "pm25": load_pm25,
    "physionet": load_physionet,
    **VIDEOS,
}
"""The data sets known by name: ``load(name)`` calls ``DATASETS[name]()``."""


def load(source: str | Path, **options: Any) -> DataSplits:
    """Load a data set by name, or the user's own from a path.

    Args:
        source: one of ``DATASETS``, or a path: an ``.npz``; a ``.csv``, ``.tsv`` or ``.parquet``; a folder of such
            tables, or of ``.mid`` files. "jsb" ships with the package, and the videos ("box", "box_gravity", "polygon",
            "pong", "pendulum") are simulated; the other names are looked up in the folder that the environment variable
            ``DYNAVAE_DATA`` names.
        options: keywords of the loader: :func:`load_npz`, :func:`load_table`, :func:`load_midi`, or that of the name.

    Returns:
        The splits, each a :class:`SequenceDataset` or None.

    Raises:
        FileNotFoundError: the file is not there; the sentence names it and says where it is looked for.
        ValueError: an unknown name or option, or a file whose content is not usable.
        TypeError: neither a name nor a path, such as a DataFrame or an array.

    Example:
        >>> from dynavae.data import load
        >>> splits = load("jsb")
        >>> len(splits.train), splits.train.frames, splits.train.x_dim, splits.kind
        (229, 13807, 88, 'binary')
    """
    loader, arguments = _loader(source)
    known = loader_options(source)
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f" did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"unknown option {option!r} for load({str(source)!r});{hint} Options: {', '.join(known)}."
            )
    return loader(*arguments, **options)


def loader_options(source: str | Path) -> list[str]:
    """Names of the options that :func:`load` takes for this source."""
    parameters = inspect.signature(_loader(source)[0]).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def _loader(source: str | Path) -> tuple[Callable[..., DataSplits], tuple[Path, ...]]:
    """What reads this source, and its positional arguments."""
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"load takes the name of a data set or the path of a file; got {type(source).__name__}. Write a table to a "
            "file first (df.to_csv('own.csv', index=False)), or give arrays to SequenceDataset([...])."
        )
    name, path = str(source), Path(source)
    if name in DATASETS:
        return DATASETS[name], ()
    if path.is_dir():
        folders = [path, *(p for p in path.iterdir() if p.is_dir())]
        return (load_midi if any(midi_files(folder) for folder in folders) else load_table), (path,)
    if path.suffix.lower() in TABLES:
        return load_table, (path,)
    if name.endswith(".npz") or path.is_file():
        return load_npz, (path,)
    near = difflib.get_close_matches(name.lower(), DATASETS, n=1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"unknown data set {name!r};{hint} Give one of {', '.join(DATASETS)}, or a path to an .npz file, a table "
        f"({', '.join(TABLES)}), or a folder of tables or .mid files."
    )
