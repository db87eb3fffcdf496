"""How far predictions are from what came true: in all, and of each column in its own units."""

from __future__ import annotations

from typing import Any

import numpy as np

from dynavae import tasks
from dynavae.data import DataSplits
from dynavae.results import column_names, to_units
from dynavae.runs import table

MOST_SAMPLED = 2**25
"""Numbers that the samples of one pass may hold."""
MOST_COLUMNS = 20
"""Of more columns than that, only the .json has the errors of each."""
DIGITS = 4
"""Significant digits of an error, as printed."""


def of_mean(splits: DataSplits, mean: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """The error of each value: its distance, or whether a class is wrong (numbers of classes have no distances)."""
    if splits.kind == "categorical":
        return {"error_rate": np.where(np.isnan(truth), np.nan, mean != truth)}
    return {"mae": np.abs(mean - truth)}


def of_baseline(splits: DataSplits, truth: np.ndarray) -> dict[str, np.ndarray]:
    """The error of filling each column with its mean over the training part, or with its most frequent class."""
    train = np.concatenate([np.asarray(x, dtype=np.float64) for x in splits.split("train").x])
    if splits.kind == "categorical":
        usual = np.array([_most_frequent(column) for column in train.T])
        return {"error_rate_of_mode": of_mean(splits, usual, truth)["error_rate"]}
    return {"mae_of_mean": of_mean(splits, to_units(splits, np.nanmean(train, 0)), truth)["mae"]}


def _most_frequent(column: np.ndarray) -> float:
    classes, counts = np.unique(column[~np.isnan(column)], return_counts=True)
    return float(classes[counts.argmax()]) if len(classes) else np.nan


def of_samples(samples: np.ndarray, truth: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The CRPS of each value that is known, (B, T, x_dim), from samples (S, B, T, x_dim); NaN elsewhere."""
    found = np.full(truth.shape, np.nan)
    places = np.argwhere(known)
    for block in np.array_split(places, max(1, len(samples) * len(places) // MOST_SAMPLED)):
        at = tuple(block.T)
        found[at] = tasks.crps(samples[:, *at], truth[at]).numpy()
    return found


def by_column(splits: DataSplits, found: dict[str, np.ndarray], known: np.ndarray) -> list[dict[str, Any]]:
    """A record for each column: its name, how many of its values are known, and their mean errors."""
    names = column_names(splits, known.shape[-1])
    return [
        {
            "column": name,
            "values": int(known[..., d].sum()),
            **in_all({key: error[..., d] for key, error in found.items()}, known[..., d]),
        }
        for d, name in enumerate(names)
    ]


def in_all(found: dict[str, np.ndarray], known: np.ndarray) -> dict[str, float]:
    """The mean errors over all known values; nothing where none is known."""
    return {key: float(error[known].mean()) for key, error in found.items()} if known.any() else {}


def printed(row: dict[str, Any], columns: list[dict[str, Any]], stored: str) -> str:
    """One line for all, and one for each of a few columns of which something is known.

    Args:
        row: counts and errors over all columns.
        columns: what :func:`by_column` found.
        stored: the file that holds all of it.
    """
    text = table([row], digits=DIGITS)
    if len(columns) < 2 or not any(column["values"] for column in columns):
        return text
    if len(columns) > MOST_COLUMNS:
        return f"{text}\nthe errors of each of {len(columns)} columns: {stored}"
    heads = list(dict.fromkeys(key for column in columns for key in column))
    return text + "\n" + table(columns, heads, digits=DIGITS)
