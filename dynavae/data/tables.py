"""Tables on disk as columns of text or numbers: ``.csv`` and ``.tsv`` by the standard library, ``.parquet`` by pandas."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TABLES = (".csv", ".tsv", ".parquet")
MISSING = frozenset({"", "na", "nan", "n/a", "null", "none", "nat"})
"""What stands for a missing value, in any case."""

Columns = dict[str, list[Any]]


def read_table(path: Path) -> Columns:
    """The columns of a table by name. A column without a name, as an index is written, is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no header, no rows, two columns of one name, or rows of another width; the sentence says where.
        ImportError: pandas or pyarrow is not installed, for ``.parquet``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    return _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)


def _csv(path: Path) -> Columns:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is not text in UTF-8; save it as CSV in UTF-8.") from None
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
    if len(rows) < 2:
        raise ValueError(
            f"{path.name} has {len(rows)} line(s); expected a header with column names, then rows."
        )
    header = [name.strip() for name in rows[0]]
    if all(_is_number(name) for name in header):
        raise ValueError(f"{path.name} starts with numbers; expected a header line with column names.")
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(
                f"{path.name} has {len(row)} cells in line {i + 1}, but {len(header)} column names."
            )
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise ValueError(f"{path.name} has two columns named {twice[0]!r}; rename one.")
    return {
        name: list(cells) for name, cells in zip(header, zip(*rows[1:], strict=True), strict=True) if name
    }


def _parquet(path: Path) -> Columns:
    try:
        import pandas as pd
        import pyarrow  # noqa: F401
    except ImportError:
        raise ImportError(
            f'{path.name}: .parquet needs pandas and pyarrow; pip install "dynavae[tables]". (.csv needs neither.)'
        ) from None
    frame = pd.read_parquet(path)
    if frame.index.names != [None]:
        frame = frame.reset_index()
    return {str(name): _cells(frame[name]) for name in frame.columns}


def _cells(column: Any) -> list[Any]:
    """Values of a pandas column: dates as ISO text, missing ones as empty text."""
    if column.dtype.kind == "M":
        return ["" if v is None or v != v else v.isoformat() for v in column.tolist()]
    return ["" if v is None or v != v else v for v in column.astype(object).tolist()]


def numbers(values: list[Any], column: str, where: str) -> NDArray[np.float64]:
    """A column as numbers; what is missing is NaN.

    Raises:
        ValueError: a cell that is not a number; the sentence names the column.

    Example:
        >>> numbers(["1", "", "NA", "2.5"], "x", "a.csv")
        array([1. , nan, nan, 2.5])
    """
    try:
        out = np.array([float(v) if v != "" else np.nan for v in values], dtype=np.float64)
    except (ValueError, TypeError):
        out = np.empty(len(values))
        for i, v in enumerate(values):
            text = str(v).strip()
            if text.lower() in MISSING:
                out[i] = np.nan
            elif _is_number(text):
                out[i] = float(text)
            else:
                raise ValueError(
                    f"column {column!r} of {where} holds text ({text!r} in row {i + 1}), not numbers; choose the "
                    "numeric ones with columns=[...], or write it as numbers."
                ) from None
    if np.isinf(out).any():
        raise ValueError(
            f"column {column!r} of {where} is infinite in row {int(np.argmax(np.isinf(out))) + 1}."
        )
    return out


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
