"""The user's own tables: a long ``.csv`` or ``.parquet``, or a folder of them, as splits of sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dynavae.data.dataset import SequenceDataset
from dynavae.data.grid import fill, infer_step, is_regular, to_grid
from dynavae.data.repeats import check_repeats
from dynavae.data.rows import Readings, column_of, folder_sha256, readings_of, tables_of
from dynavae.data.schema import Schema, day_of_month, parse_step, to_months
from dynavae.data.splits import (
    SPLITS,
    DataSplits,
    by_name,
    check_shares,
    kind_of,
    lists_of,
    refuse_lists,
    shuffled,
)
from dynavae.data.windows import windows

ID_NAMES = ("id", "unique_id", "series_id", "item_id")
TIME_NAMES = ("time", "date", "datetime", "timestamp", "ds", "t")
BY_SEQUENCE_FROM = 5
"""With fewer sequences than this, and no other wish, each is split by time."""


class Part(NamedTuple):
    """Some rows of the table that are one sequence, or one stretch of it."""

    split: str | None  # where the table says to which split it belongs
    id: str
    start: float  # time of the first frame
    x: NDArray[np.float64]  # (T, x_dim), in the user's units
    control: NDArray[np.float64] | None

    def cut(self, a: int, b: int, step: float, split: str | None = None) -> Part:
        control = None if self.control is None else self.control[a:b]
        return Part(split or self.split, self.id, self.start + a * step, self.x[a:b], control)


def load_table(
    path: str | Path,
    *,
    id_column: str | None = None,
    time_column: str | None = None,
    columns: Sequence[str] | None = None,
    controls: Sequence[str] | None = None,
    step: float | str | None = None,
    window: int | None = None,
    stride: int | None = None,
    split_column: str | None = None,
    valid: float | Sequence[str] = 0.1,
    test: float | Sequence[str] = 0.1,
    seed: int = 0,
    standardize: bool | None = None,
    kind: str | None = None,
    name: str | None = None,
    schema: Schema | None = None,
    whole: bool = False,
) -> DataSplits:
    """Read sequences from one long table, or from a folder with a table for each sequence.

    An empty cell, NA, NaN, null or None is missing. Times are numbers or ISO dates; they are put on a regular grid.
    Readings of one cell are averaged; where most rows have the very same time as another, an id_column is missing.

    Args:
        path: a ``.csv``, ``.tsv`` or ``.parquet``, or a folder of them. Files or folders named train, valid and test
            are the splits; else each file of a folder is a sequence, named as the file.
        id_column: whose rows are one sequence each; by default a column named id, else the table is one sequence.
        time_column: by default a column named time, date, datetime, timestamp, ds or t, else rows are in order.
        columns: the features; by default every other column.
        controls: columns that are known inputs and not modelled: not any of `columns`. A gap is filled with the value
            before it.
        step: of the grid: a number in the unit of the times, or "15min", "1h", "7d", "month". By default the median
            difference, if the times are almost regular, or months, if all dates are the same day of a month, or its last.
        window: cut long sequences into pieces of so many frames. One without any value is dropped from train, and joined
            to the piece before it in valid and test, so that it can be filled.
        stride: frames between the starts of training pieces (`window` by default); those of valid and test never overlap.
        split_column: a column that says train, valid or test.
        valid, test: shares, or lists of ids. Shares are of the sequences, drawn with `seed`; of fewer than five
            sequences, the last part of each by time. 0 for none. With a list for one of them, a share of the other counts
            as none.
        seed: of that draw.
        standardize: every column, and control, to mean 0 and standard deviation 1 over the training part; by default
            for real values only. A column that is the same throughout that part is refused.
        kind: "binary", "real", "categorical" or "power"; by default "binary" if the only values are 0 and 1.
        name: of the data set; the file's name by default.
        schema: columns, grid and scaling of an earlier table, to be used again.
        whole: everything that the table does not assign to a split itself becomes "test", and no frame is left out of train.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column that is not there, not numeric or constant, irregular times without a step, rows of several
            sequences without an id, shares that leave nothing to train on, and any rule of :class:`SequenceDataset`.
        ImportError: pandas or pyarrow is not installed, for ``.parquet``.

    Example:
        >>> import pathlib, tempfile
        >>> rows = ["station,date,pm"] + [f"{s},2024-05-{d:02d},{d}" for s in "ab" for d in range(1, 31) if d != 9]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "air.csv")
        ...     _ = path.write_text("\\n".join(rows))
        ...     splits = load_table(path, id_column="station")
        >>> splits.train, splits.test.names, splits.schema.written(splits.schema.step)
        (SequenceDataset(2 sequences, 48 frames, x_dim=1), ('a', 'b'), '1970-01-02')
    """
    path = Path(path)
    tables = list(tables_of(path))
    known = list(dict.fromkeys(c for _, _, table in tables for c in table))
    base = schema or Schema(())
    id_column = column_of(id_column or base.id_column, ID_NAMES, known, "id_column", path)
    time_column = column_of(time_column or base.time_column, TIME_NAMES, known, "time_column", path)
    if split_column is not None:
        column_of(split_column, (), known, "split_column", path)
    controls = tuple(controls) if controls is not None else base.controls
    special = {id_column, time_column, split_column, *controls}
    columns = tuple(columns or base.columns) or tuple(c for c in known if c not in special)
    if not columns:
        raise ValueError(f"{path.name} has no column left to model; found {', '.join(known)}.")
    for twice in (c for c in columns if c in controls):
        raise ValueError(
            f"{twice!r} is among both columns and controls; a known input is not modelled: leave it out of one of them."
        )
    for wanted in (*columns, *controls):
        column_of(wanted, (), known, "columns" if wanted in columns else "controls", path)
    base = dataclasses.replace(
        base, columns=columns, controls=controls, id_column=id_column, time_column=time_column
    )
    readings, unit, style = readings_of(tables, base, split_column, path)
    check_repeats(readings, tables, base, split_column, path.name)
    base, readings = _timed(base, readings, unit, style, step, schema is not None, path.name)
    parts = [_gridded(r, base, path.name) for r in readings]
    found = kind_of(kind, [p.x for p in parts], path.name)
    parts, how = _split(parts, valid, test, seed, base.step, whole, path.name)
    scale = found == "real" if standardize is None else standardize
    if schema is None:
        train = [p for p in parts if p.split == "train"] or parts
        base = base.fitted([p.x for p in train], [p.control for p in train] if controls else None, scale)  # type: ignore[misc]
    sets, rows = _datasets(parts, base, window, stride, whole)
    step_text = f"{base.step:g} {base.unit}" if base.time_column else "rows in order"
    meta: dict[str, Any] = {
        "schema": base.to_dict(), "rows": rows, "x_names": list(columns), "split": how, "step": step_text,
    }  # fmt: skip
    return DataSplits(name or path.stem, **sets, kind=found, meta=meta, sha256=folder_sha256(path))


# --- times ------------------------------------------------------------------------------------------------


def _timed(
    schema: Schema,
    readings: list[Readings],
    unit: str,
    style: str,
    step: float | str | None,
    fixed: bool,
    where: str,
) -> tuple[Schema, list[Readings]]:
    """The grid: that of the schema if it is fixed, the one asked for, or the one the times are on."""
    if schema.time_column is None:
        if step is not None:
            raise ValueError(f"step={step!r} needs a time_column; without one, rows are in order.")
        return schema, readings
    if fixed:
        if (schema.unit == "number") != (unit == "number"):
            raise ValueError(f"the times of {where} are {unit}, but the grid to use is in {schema.unit}.")
        return schema, _in_months(readings, schema.step) if schema.unit == "months" else readings
    times = [r.times for r in readings if r.times is not None]
    day = day_of_month(np.concatenate(times)) if unit == "seconds" else None
    size = 1.0
    if step is not None:
        size, unit = parse_step(step, unit)
    elif day is not None and any(len(np.unique(t)) > 1 for t in times):
        unit = "months"
    if unit == "months":
        readings = _in_months(readings, size)
        times = [r.times for r in readings if r.times is not None]
        schema = dataclasses.replace(schema, day=day or 1)
    if step is None:
        size = infer_step(times, where, unit)
    return dataclasses.replace(
        schema, unit=unit, style=style, step=size, nearest=is_regular(times, size)
    ), readings


def _in_months(readings: list[Readings], step: float) -> list[Readings]:
    """Dates as months since 1970; on a grid of whole months, a date of any day belongs to its month."""
    months = [to_months(r.times) for r in readings if r.times is not None]
    if step % 1 == 0:
        months = [np.floor(t) for t in months]
    return [r._replace(times=t) for r, t in zip(readings, months, strict=True)]


def _gridded(r: Readings, schema: Schema, where: str) -> Part:
    """The rows of a sequence on the grid; without times, as they are."""
    start, values = 0.0, r.values
    if r.times is not None:
        start, values = to_grid(r.times, values, schema.step, schema.nearest, f"{where}, {r.id}")
    d = len(schema.columns)
    if np.isnan(values[:, :d]).all():
        raise ValueError(
            f"sequence {r.id!r} of {where} has no value in {', '.join(schema.columns)}; drop it."
        )
    control = fill(values[:, d:]) if schema.controls else None
    if control is not None and np.isnan(control).any():
        column = schema.controls[int(np.argmax(np.isnan(control).any(0)))]
        raise ValueError(
            f"control {column!r} of sequence {r.id!r} of {where} has no value at all: fill it in."
        )
    return Part(r.split, r.id, start, values[:, :d], control)


# --- splits -----------------------------------------------------------------------------------------------


def _split(
    parts: list[Part], valid: float | Sequence[str], test: float | Sequence[str], seed: int, step: float,
    whole: bool, where: str,
) -> tuple[list[Part], str]:  # fmt: skip
    """Parts with their splits, and how that was decided."""
    if any(p.split is not None for p in parts):
        refuse_lists(valid, test, where)
        return parts, "as the data say"
    if whole:
        return [p._replace(split="test") for p in parts], "all of it is test"
    if lists := lists_of(valid, test):
        chosen = by_name([p.id for p in parts], lists, where)
        return [p._replace(split=s) for p, s in zip(parts, chosen, strict=True)], "by id"
    assert isinstance(valid, int | float) and isinstance(test, int | float)
    check_shares(valid, test)
    if len(parts) >= BY_SEQUENCE_FROM:
        index = shuffled(len(parts), valid, test, seed, where)
        return [parts[i]._replace(split=s) for s in SPLITS for i in index[s]], f"by sequence, seed {seed}"
    out = []
    for part in parts:
        n = (
            int(np.flatnonzero(~np.isnan(part.x).all(1))[-1]) + 1
        )  # what comes after it are inputs of the future
        b = n - round(test * n)
        a = b - round(valid * n)
        spans = [
            (split, start, end)
            for split, start, end in zip(SPLITS, (0, a, b), (a, b, n), strict=True)
            if not np.isnan(part.x[start:end]).all()
        ]
        for split, start, end in spans:
            out.append(part.cut(start, len(part.x) if end == n else end, step, split))
    if not any(p.split == "train" for p in out):
        raise ValueError(
            f"{where} is too short to split: nothing is left to train on with valid={valid}, test={test}."
        )
    return out, f"by time: the last {test:g} of each sequence is test, the {valid:g} before it valid"


def _with_values(x: NDArray[np.float64], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same pieces, one without any value joined to the piece before it (at the beginning, to the next)."""
    out: list[tuple[int, int]] = []
    for a, b in spans:
        if out and (np.isnan(x[a:b]).all() or np.isnan(x[slice(*out[-1])]).all()):
            out[-1] = out[-1][0], b
        else:
            out.append((a, b))
    return out


def _datasets(
    parts: list[Part], schema: Schema, window: int | None, stride: int | None, whole: bool
) -> tuple[dict[str, SequenceDataset], dict[str, dict[str, list[Any]]]]:
    """Scaled data sets in windows, and for each sequence its id and the time it starts."""
    windows(1, window, stride)  # refuses what makes no sense
    sets, rows = {}, {}
    for split in SPLITS:
        pieces: dict[str, Part] = {}
        for part in (p for p in parts if p.split == split):
            if split == "train" and not whole:
                spans = windows(len(part.x), window, stride)
            else:  # every frame once
                spans = _with_values(part.x, windows(len(part.x), window))
            for a, b in spans:
                if np.isnan(part.x[a:b]).all():
                    continue
                piece = part.cut(a, b, schema.step)
                pieces[part.id if len(spans) == 1 else f"{part.id} {schema.written(piece.start)}"] = piece
        if pieces:
            found = list(pieces.values())
            control = [schema.standardise_control(p.control) for p in found if p.control is not None]
            sets[split] = SequenceDataset(
                [schema.standardise(p.x) for p in found], control or None, list(pieces)
            )
            rows[split] = {name: [p.id, p.start] for name, p in pieces.items()}
    return sets, rows
