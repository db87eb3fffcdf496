"""Rows of one time: whether a table has forgotten to say whose they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from dynavae.data.rows import Readings
from dynavae.data.schema import Schema
from dynavae.data.tables import MISSING, Columns

Table = tuple[str | None, str | None, Columns]
REFUSED, WARNED = 0.5, 0.01
"""Shares of readings that have the very same time as another of their sequence."""


def check_repeats(
    readings: list[Readings], tables: list[Table], schema: Schema, split_column: str | None, where: str
) -> None:
    """Refuse a table most of whose readings share their time with another of the same column and sequence.

    Readings of different times that fall into one cell of the grid are no fault: they are averaged.

    Raises:
        ValueError: at least half of the readings do, and there are two or more for each time, or a column tells them
            apart.
    """
    total, times, shared = _counted(readings, len(schema.columns))
    most = shared > 0 and shared >= REFUSED * total
    likely = _likely(tables, schema, split_column) if most else None
    if most and (total >= 2 * times or likely is not None):
        raise ValueError(
            f"{shared} of {total} readings of {where} have the very same {schema.time_column!r} as another of their "
            f"sequence, {total / times:.3g} for each time: {_remedy(likely, schema.id_column)} "
            "Or average the readings of one time beforehand."
        )
    if shared > WARNED * total:
        warnings.warn(
            f"{shared} of {total} readings of {where} have the very same {schema.time_column!r} as another of their "
            "sequence and are averaged; if they are of different sequences, say which column tells with id_column.",
            stacklevel=4,
        )


def _counted(readings: list[Readings], x_dim: int) -> tuple[int, int, int]:
    """Over all sequences and columns: readings, their different times, and readings that share their time."""
    total = times = shared = 0
    for r in readings:
        if r.times is None:
            continue
        alone = len(np.unique(r.times)) == len(r.times)
        for column in r.values[:, :x_dim].T:
            seen = r.times[~np.isnan(column)]
            counts = np.ones(len(seen), dtype=np.int64) if alone else np.unique(seen, return_counts=True)[1]
            total, times = total + len(seen), times + len(counts)
            shared += int(counts[counts > 1].sum())
    return total, times, shared


def _remedy(likely: str | None, id_column: str | None) -> str:
    """What to ask the user, given the column that tells the rows of one time apart, if there is one."""
    if likely is None:
        return "does a column say which sequence a row is of? Name it with id_column."
    if id_column is None:
        return f"is {likely!r} the id_column? Say so with id_column={likely!r}."
    return f"does {likely!r} tell sequences apart as well as {id_column!r}? Join both into one id_column."


def _likely(tables: list[Table], schema: Schema, split_column: str | None) -> str | None:
    """Of the columns of labels that tell (nearly) all rows of one time apart, the one of the fewest labels."""
    found: dict[int, str] = {}
    known = dict.fromkeys(c for _, _, table in tables for c in table)
    for name in (c for c in known if c not in (schema.id_column, schema.time_column, split_column)):
        rows = list(_labelled(tables, schema, name))
        labels = {label for *_, label in rows}
        few = 2 <= len(labels) <= len(rows) / 2 and all(map(_is_label, labels))
        if few and len(set(rows)) >= 0.99 * len(rows):
            found.setdefault(len(labels), name)
    return found[min(found)] if found else None


def _labelled(tables: list[Table], schema: Schema, name: str) -> Iterator[tuple[Any, ...]]:
    """(file, id, time, label) of every row."""
    for split, stem, table in tables:
        if name in table:
            ids = table.get(schema.id_column or "", [""] * len(table[name]))
            for i, t, label in zip(ids, table[str(schema.time_column)], table[name], strict=True):
                yield split, stem, str(i), str(t), str(label).strip()


def _is_label(text: str) -> bool:
    """A whole number, or text; neither a measurement nor missing."""
    if text.lower() in MISSING:
        return False
    try:
        return float(text).is_integer()
    except ValueError:
        return True
