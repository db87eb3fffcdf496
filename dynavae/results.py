"""Results as the user's table: ids, times, columns and units of the file they came from."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynavae.data import DataSplits
from dynavae.files import replacing

QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}
MAX_ROWS = 5_000_000
BLOCK = 100_000  # rows at a time


def to_units(splits: DataSplits, x: np.ndarray) -> np.ndarray:
    """Values (..., x_dim) in the units of the file."""
    return x if splits.schema is None else splits.schema.to_units(x)


def quantiles(samples: np.ndarray) -> dict[str, np.ndarray]:
    """The 5 %, 50 % and 95 % quantiles over the first axis."""
    return dict(zip(QUANTILES, np.quantile(samples, list(QUANTILES.values()), axis=0), strict=True))


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
    """A long table: id, time, column, and one column for each array (B, T, x_dim).

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
    labels = schema.columns if schema else splits.meta.get("x_names") or [str(d) for d in range(shape[2])]
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
            cells = [f"{v[b, t, d]:.6g}" if np.isfinite(v[b, t, d]) else "" for v in values.values()]
            writer.writerow([*key, *cells])


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
