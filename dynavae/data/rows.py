"""From tables on disk to the rows of each sequence: which file, which id, which split, at which times."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dynavae.data.schema import Schema, parse_times
from dynavae.data.splits import SPLITS
from dynavae.data.tables import MISSING, TABLES, Columns, numbers, read_table

SPLIT_NAMES = {s: s for s in SPLITS} | {
    "training": "train",
    "val": "valid",
    "validation": "valid",
    "dev": "valid",
}


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in TABLES and p.is_file())


def split_folders(path: Path) -> dict[Path, str]:
    """The folders in a folder that are named as splits, and the split of each."""
    inside = (p for p in sorted(path.iterdir()) if p.is_dir())
    return {p: SPLIT_NAMES[p.name.lower()] for p in inside if p.name.lower() in SPLIT_NAMES}


def tables_of(path: Path) -> Iterator[tuple[str | None, str | None, Columns]]:
    """(split, id, columns) of every table; None where the columns have to say."""
    if not path.is_dir():
        yield None, None, read_table(path)
        return
    folders = split_folders(path)
    for folder, split in folders.items():
        for file in _files(folder):
            yield split, file.stem, read_table(file)
    files = _files(path)
    named = [f for f in files if f.stem.lower() in SPLIT_NAMES]
    if files and len(named) == len(files):
        for file in files:
            yield SPLIT_NAMES[file.stem.lower()], None, read_table(file)
    elif files and (folders or named):
        odd = next(f for f in files if f not in named)
        raise ValueError(
            f"{path} holds {odd.name} beside its splits; put every file into train, valid or test, or none."
        )
    else:
        for file in files:
            yield None, file.stem, read_table(file)
    if not files and not folders:
        raise ValueError(f"{path} holds no table; expected files ending in {', '.join(TABLES)}.")


class Readings(NamedTuple):
    split: str | None
    id: str
    times: NDArray[np.float64] | None
    values: NDArray[np.float64]  # x, then controls


def readings_of(
    tables: list[tuple[str | None, str | None, Columns]], schema: Schema, split_column: str | None, path: Path
) -> tuple[list[Readings], str, str]:
    """The rows of each sequence, in the order of the file; the unit and style of the times."""
    units: set[tuple[str, str]] = set()
    groups: dict[tuple[str | None, str], list[Readings]] = {}
    for split, stem, table in tables:
        where = path.name if stem is None else f"{path.name}/{stem}"
        wanted = (*schema.columns, *schema.controls)
        for column in (*wanted, schema.id_column, schema.time_column, split_column):
            if column is not None and column not in table:
                if column == schema.id_column and stem is not None:
                    continue
                raise ValueError(f"{where} has no column {column!r}; it has {', '.join(table)}.")
        values = np.stack([numbers(table[c], c, where) for c in wanted], 1)
        times = None
        if schema.time_column is not None:
            times, unit, style = parse_times(
                table[schema.time_column], f"column {schema.time_column!r} of {where}"
            )
            units.add((unit, style))
        n = len(values)
        ids = [stem or path.stem] * n
        if schema.id_column in table:
            ids = [str(v).strip() for v in table[str(schema.id_column)]]
            if any(i.lower() in MISSING for i in ids):
                raise ValueError(f"column {schema.id_column!r} of {where} is empty in some rows: drop them.")
        splits = [split] * n if split_column is None else [_split_name(v, where) for v in table[split_column]]
        places: dict[tuple[str | None, str], list[int]] = {}
        for i, key in enumerate(zip(splits, ids, strict=True)):
            places.setdefault(key, []).append(i)
        for key, index in places.items():
            piece = Readings(*key, None if times is None else times[index], values[index])
            groups.setdefault(key, []).append(piece)
    if len({unit for unit, _ in units}) > 1:
        raise ValueError(f"{path.name} mixes numbers and dates as times; write all of them one way.")
    found = []
    for (split, name), pieces in groups.items():
        stamps = [p.times for p in pieces if p.times is not None]
        values = np.concatenate([p.values for p in pieces])
        found.append(Readings(split, name, np.concatenate(stamps) if stamps else None, values))
    unit, style = min(units, default=("index", " "))
    return found, unit, style


def _split_name(value: Any, where: str) -> str:
    name = str(value).strip().lower()
    if name not in SPLIT_NAMES:
        raise ValueError(f"split_column of {where} should say train, valid or test; got {value!r}.")
    return SPLIT_NAMES[name]


def column_of(
    asked: str | None, usual: Sequence[str], known: Sequence[str], option: str, path: Path
) -> str | None:
    """The column asked for, which must be there; else one with a usual name, if there is one."""
    if asked is None:
        return next((c for c in known if c.lower() in usual), None)
    if asked not in known:
        near = difflib.get_close_matches(asked, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{option}: {path.name} has no column {asked!r}{hint} It has {', '.join(known)}.")
    return asked


def folder_sha256(path: Path) -> str:
    """Of a file; of a folder, the names and contents of its tables and MIDI files."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.suffix.lower() in (*TABLES, ".mid", ".midi")):
        digest.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
