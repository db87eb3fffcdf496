"""Readings at any times on a regular grid: cells without a reading are missing, several in one are averaged."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dynavae.data.schema import DAY

TOLERANCE = 0.1
"""How far, in steps, a time may be off the grid for the times to count as regular."""


def infer_step(times: list[NDArray[np.float64]], where: str, unit: str) -> float:
    """The step of times that are almost regular, rows missing or not: the median difference.

    Raises:
        ValueError: the times are irregular; the sentence gives the differences.

    Example:
        >>> infer_step([np.array([0.0, 0.5, 1.0, 2.0, 2.5])], "a.csv", "number")
        0.5
    """
    gaps = np.concatenate([np.diff(np.unique(t)) for t in times])
    if not len(gaps):
        return DAY if unit == "seconds" else 1.0
    for candidate in (float(np.median(gaps)), float(np.quantile(gaps, 0.05, method="lower"))):
        if _regular(gaps, candidate):
            return _refined(times, candidate)
    low, middle, high = np.quantile(gaps, [0, 0.5, 1])
    raise ValueError(
        f"the times of {where} are irregular (differences from {low:g} to {high:g}, median {middle:g}, in {unit}): "
        f"choose the step of the grid they are put on, such as step={middle:.3g}."
    )


def _refined(times: list[NDArray[np.float64]], step: float) -> float:
    """The step without the digits that times so large do not have; the mean one if that one drifts off the times."""
    resolution = 2 * float(np.spacing(max(float(np.abs(t).max()) for t in times)))
    held = max(0, math.floor(-math.log10(resolution)))  # decimals
    nominal = float(f"{round(step, held):.10g}") or step
    gaps = np.concatenate([np.diff(np.unique(t)) for t in times])
    count = np.round(gaps / step)
    regular = np.abs(gaps / step - count) <= TOLERANCE  # not those where a clock was set
    mean = float(f"{gaps[regular].sum() / count[regular].sum():.10g}")

    def off(s: float) -> float:
        ratio = np.concatenate([(t - t.min()) / s for t in times])
        return float(np.abs(ratio - np.round(ratio)).max())

    return mean if off(mean) <= TOLERANCE < off(nominal) else nominal


def is_regular(times: list[NDArray[np.float64]], step: float) -> bool:
    """Whether times lie on a grid of that step, give or take a tenth of it."""
    return _regular(np.concatenate([np.diff(np.unique(t)) for t in times]), step)


def _regular(gaps: NDArray[np.float64], step: float) -> bool:
    ratio = gaps / step
    off = (np.abs(ratio - np.round(ratio)) > TOLERANCE) | (ratio < 1 - TOLERANCE)
    return bool(off.mean() <= 0.01) if len(gaps) else True


def to_grid(
    times: NDArray[np.float64], values: NDArray[np.float64], step: float, nearest: bool, where: str
) -> tuple[float, NDArray[np.float64]]:
    """The time of the first frame, and values (frames, features) on the grid; NaN where there is no reading.

    Args:
        times: of the readings (n,), in any order.
        values: (n, features), NaN where missing.
        step: of the grid.
        nearest: a reading belongs to the nearest grid point from the first time on; else to the cell
            [k step, (k + 1) step) of its time.
        where: the sequence, for sentences.

    Raises:
        ValueError: a grid with far more cells than there are readings.

    Example:
        >>> to_grid(np.array([0.1, 0.7, 2.2]), np.array([[1.0], [3.0], [5.0]]), 1.0, False, "a")
        (0.0, array([[ 2.],
               [nan],
               [ 5.]]))
    """
    first = float(times.min())
    if nearest:
        start, cell = first, np.round((times - first) / step).astype(np.int64)
    else:
        cell = np.floor(times / step + 1e-9).astype(np.int64)
        start, cell = float(cell.min() * step), cell - cell.min()
    frames = int(cell.max()) + 1
    if frames > 50 * len(times) + 10_000:
        raise ValueError(
            f"{where}: a grid of step {step:g} from {first:g} to {float(times.max()):g} has {frames} cells for "
            f"{len(times)} readings; choose a larger step."
        )
    seen = ~np.isnan(values)
    total, count = (np.zeros((frames, values.shape[1])) for _ in range(2))
    np.add.at(total, cell, np.where(seen, values, 0.0))
    np.add.at(count, cell, seen)
    return start, np.where(count > 0, total / np.maximum(count, 1), np.nan)


def fill(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN replaced by the value before it, at the beginning by the first one: for controls.

    Example:
        >>> fill(np.array([[np.nan], [1.0], [np.nan]])).tolist()
        [[1.0], [1.0], [1.0]]
    """
    out = values.copy()
    for column in out.T:
        seen = ~np.isnan(column)
        if seen.any():
            before = np.maximum.accumulate(np.where(seen, np.arange(len(column)), -1))
            column[:] = column[np.where(before < 0, int(np.argmax(seen)), before)]
    return out
