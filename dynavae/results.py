"""Results as the user's table: ids, times, columns and units of the file they came from."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynavae.data import DataSplits
from dynavae.files import replacing

QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}
MAX_ROWS = 5_000_000
BLOCK = 100_000  # rows at a time
DIGITS = 6  # significant digits of how far a value is from the level of its column
MOST_DIGITS = 17  # of a number in double precision


def to_units(splits: DataSplits, x: np.ndarray) -> np.ndarray:
    """Values (..., x_dim) in the units of the file."""
    return x if splits.schema is None else splits.schema.to_units(x)


def quantiles(samples: np.ndarray) -> dict[str, np.ndarray]:
    """The 5 %, 50 % and 95 % quantiles over the first axis."""
    return dict(zip(QUANTILES, np.quantile(samples, list(QUANTILES.values()), axis=0), strict=True))


def column_names(splits: DataSplits, width: int) -> Sequence[str]:
    """The columns of the file, or numbers where they have no names."""
    if splits.schema is not None:
        return splits.schema.columns
    return splits.meta.get("x_names") or [str(d) for d in range(width)]


def spreads(splits: DataSplits, values: dict[str, np.ndarray]) -> list[float]:
    """How far the values of each column lie apart: its standard deviation in the schema, else that of the values."""
    if splits.schema is not None and splits.schema.standardized:
        return list(splits.schema.stddev)
    return [
        _stddev([v[..., d] for v in values.values()]) for d in range(next(iter(values.values())).shape[-1])
    ]


def _stddev(arrays: Sequence[np.ndarray]) -> float:
    seen = np.concatenate([v[np.isfinite(v)] for v in arrays]).astype(np.float64)
    return float(seen.std()) if len(seen) else 0.0


def written(value: float, spread: float = 0.0) -> str:
    """A value with six significant digits, and with as many more as leave six to a deviation of the size of `spread`.

    Example:
        >>> written(1700000000.123456, spread=0.5), written(21.5, spread=3.0), written(float("nan"))
        ('1700000000.123456', '21.5', '')
    """
    if not math.isfinite(value):
        return ""
    more = _magnitude(value) - _magnitude(spread) if value and spread else 0
    return f"{value:.{min(MOST_DIGITS, DIGITS + max(0, more))}g}"


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def write_table(
    path: Path,
    splits: DataSplits,
    split: str,
    names: Sequence[str],
    values: dict[str, np.ndarray],
    first: Sequence[int] | None = None,
    where: np.ndarray | None = None,
    once: bool = False,
) -> None:
    """A long table: id, time, column, and one column for each array (B, T, x_dim), with digits as :func:`written` says.

    Args:
        path: the .csv to write.
        splits, split: what the sequences belong to.
        names: of the sequences, as in the split.
        values: in the units of the file.
        first: number of the frame that each sequence's first row is; 0 by default.
        where: (B, T, x_dim) bool: the rows to write; all by default.
        once: leave out what an earlier sequence has said of the same id, time and column (pieces that overlap).
    """
    schema = splits.schema
    shape = next(iter(values.values())).shape
    labels, apart = column_names(splits, shape[2]), spreads(splits, values)
    index = np.argwhere(np.ones(shape, dtype=bool) if where is None else where)
    if len(index) > MAX_ROWS:
        print(f"{path.name}: only the first {MAX_ROWS} of {len(index)} rows; the .npz has all.")
        index = index[:MAX_ROWS]
    origins = [splits.origin(split, name) for name in names]
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "time", "column", *values])
        said: set[tuple[str, str, str]] = set()
        rows = (row for i in range(0, len(index), BLOCK) for row in index[i : i + BLOCK].tolist())
        for b, t, d in rows:
            frame = t + (first[b] if first is not None else 0)
            identity, start = origins[b]
            time = schema.time(start, frame) if schema else str(frame)
            key = (identity, time, labels[d])
            if once:
                if key in said:
                    continue
                said.add(key)
            writer.writerow([*key, *(written(float(v[b, t, d]), apart[d]) for v in values.values())])


def times(splits: DataSplits, split: str, names: Sequence[str]) -> dict[str, Any]:
    """For an .npz: the ids of sequences, when they start, and the names of the columns."""
    origins = [splits.origin(split, name) for name in names]
    schema = splits.schema
    start = [schema.written(o[1]) if schema else "0" for o in origins]
    found: dict[str, Any] = {"names": list(names), "id": [o[0] for o in origins], "start": start}
    if schema:
        found |= {"columns": list(schema.columns), "step": schema.step, "unit": schema.unit}
    return found


def in_units(score: dict[str, Any], splits: DataSplits, split: str) -> dict[str, Any]:
    """What a score is in the units of the file: log p(raw) = log p(standardised) - sum of log stddev where observed."""
    schema = splits.schema
    if schema is None:
        return score
    volume = sum(schema.log_volume(~np.isnan(x)) for x in splits.split(split).x)
    frames = score["frames"]
    return {
        **score,
        "standardized": schema.standardized,
        "nats_per_frame_in_units": (score["nats_total"] + volume) / frames,
    }
