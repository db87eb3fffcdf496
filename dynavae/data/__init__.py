"""Data sets of sequences: what ships with the package, what is on disk, and the user's own ``.npz``."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynavae.data.dataset import SequenceDataset
from dynavae.data.music import load_jsb, load_jsb16, load_muse, load_nottingham, load_piano
from dynavae.data.npz import load_npz, save_npz
from dynavae.data.splits import KINDS, DataSplits
from dynavae.data.timeseries import load_physionet, load_pm25

__all__ = ["DATASETS", "KINDS", "DataSplits", "SequenceDataset", "load", "load_npz", "save_npz"]

DATASETS: dict[str, Callable[..., DataSplits]] = {
    "jsb": load_jsb,
    "nottingham": load_nottingham,
    "muse": load_muse,
    "piano": load_piano,
    "jsb16": load_jsb16,
    "pm25": load_pm25,
    "physionet": load_physionet,
}
"""The data sets known by name: ``load(name)`` calls ``DATASETS[name]()``."""


def load(source: str | Path, **options: Any) -> DataSplits:
    """Load a data set by name, or from a path to an ``.npz`` file.

    Args:
        source: one of ``DATASETS`` ("jsb", "nottingham", "muse", "piano", "jsb16"), or a path to an ``.npz``.
            Only "jsb" ships with the package; the others are looked up in the folder that the environment
            variable ``DYNAVAE_DATA`` names.
        options: keywords of the loader: ``folder`` for the music sets,
            ``kind``, ``valid``, ``test``, ``seed`` and ``name`` for an ``.npz`` (see :func:`load_npz`).

    Returns:
        The splits, each a :class:`SequenceDataset` or None.

    Raises:
        FileNotFoundError: the file is not there; the sentence names it and says where it is looked for.
        ValueError: an unknown name or option, or a file whose content is not usable.

    Example:
        >>> from dynavae.data import load
        >>> splits = load("jsb")
        >>> len(splits.train), splits.train.frames, splits.train.x_dim, splits.kind
        (229, 13807, 88, 'binary')
    """
    name = str(source)
    loader: Callable[..., DataSplits]
    arguments: tuple[Path, ...]
    if name in DATASETS:
        loader, arguments = DATASETS[name], ()
    elif name.endswith(".npz") or Path(name).is_file():
        loader, arguments = load_npz, (Path(source),)
    else:
        near = difflib.get_close_matches(name.lower(), DATASETS, n=1)
        hint = f" did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown data set {name!r};{hint} Give one of {', '.join(DATASETS)}, or a path to an .npz file."
        )
    known = [p.name for p in inspect.signature(loader).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f" did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"unknown option {option!r} for load({name!r});{hint} Options: {', '.join(known)}."
            )
    return loader(*arguments, **options)
