"""Two real sets with real gaps: air quality of Beijing, and patients of an intensive care unit.

Neither ships with the package: both are looked for in the folder ``timeseries`` of the folder that the environment
variable ``DYNAVAE_DATA`` names.
"""

from __future__ import annotations

import csv
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynavae.data.archives import arrays_of, gunzipped
from dynavae.data.dataset import SequenceDataset
from dynavae.data.music import find
from dynavae.data.schema import Schema, parse_times
from dynavae.data.splits import DataSplits
from dynavae.data.windows import windows

TEST_MONTHS = (3, 6, 9, 12)
STATIC = ("RecordID", "Age", "Gender", "Height", "ICUType", "Weight", "MechVent")
"""Variables of PhysioNet that do not vary, or are a flag: left out, which leaves the usual 35."""


def load_pm25(
    *,
    folder: str | Path | None = None,
    window: int | None = 36,
    stride: int | None = None,
    standardize: bool = True,
    ground: bool = False,
) -> DataSplits:
    """Hourly PM2.5 of 36 stations in Beijing for a year: one sequence of 36 columns, cut into windows.

    The test split is March, June, September and December, as usual (Yi, Zheng, Zhang, Li, ST-MVL: Filling Missing
    Values in Geo-Sensory Time Series Data, 2016). The validation split is the last tenth of each other month. The
    values are those of the file in which some are hidden (24.6 % missing); those hidden ones, the truth to compare
    with, are in the other file: ``ground=True`` (13.2 % missing). The scaling is that of the first file.

    Args:
        folder: where the files are.
        window: frames of a sequence; None keeps the runs of whole months.
        stride: frames between the starts of training windows; `window` by default.
        standardize: each station to mean 0 and standard deviation 1 over the training split.
        ground: the values without anything hidden.
    """
    names = ("pm25_missing.txt.gz", "pm25_ground.txt.gz")
    paths = [find(name, folder, "timeseries") for name in names]
    contents = [path.read_bytes() for path in paths]
    (header, stamps, seen), (_, _, truth) = (
        _readings(gunzipped(c, path).decode()) for c, path in zip(contents, paths, strict=True)
    )
    times, unit, style = parse_times(stamps, "datetime of pm25")
    month = np.array([int(stamp[5:7]) for stamp in stamps])
    parts: dict[str, list[tuple[int, int]]] = {"train": [], "valid": [], "test": []}
    edges = np.flatnonzero(np.diff(month)) + 1
    for a, b in zip([0, *edges], [*edges, len(month)], strict=True):
        if month[a] in TEST_MONTHS:
            parts["test"].append((int(a), int(b)))
        else:
            cut = int(a + round(0.9 * (b - a)))
            parts["train"].append((int(a), cut))
            parts["valid"].append((cut, int(b)))
    schema = Schema(header, time_column="datetime", unit=unit, step=3600.0, style=style)
    if standardize:
        schema = schema.fitted([seen[a:b] for a, b in parts["train"]])
    values = schema.standardise(truth if ground else seen)
    sets: dict[str, SequenceDataset] = {}
    rows: dict[str, dict[str, list[Any]]] = {}
    for split, spans in parts.items():
        cut_x, names_x, rows[split] = [], [], {}
        for a, b in spans:
            for start, end in windows(b - a, window, stride if split == "train" else None):
                if np.isnan(seen[a + start : a + end]).all():
                    continue
                name = f"{stamps[a + start]}"
                cut_x.append(values[a + start : a + end])
                names_x.append(name)
                rows[split][name] = ["Beijing", float(times[a + start])]
        sets[split] = SequenceDataset(cut_x, names=names_x)
    meta = {"schema": schema.to_dict(), "rows": rows, "x_names": list(header), "files": list(names)}
    digest = hashlib.sha256(b"".join(contents)).hexdigest()
    return DataSplits("pm25", **sets, kind="real", meta=meta, sha256=digest)


def _readings(text: str) -> tuple[tuple[str, ...], list[str], NDArray[np.float64]]:
    """Columns, times and values (hours, stations) of a PM2.5 file; an empty cell is NaN."""
    rows = list(csv.reader(io.StringIO(text)))
    values = np.array([[float(v) if v else np.nan for v in row[1:]] for row in rows[1:]])
    return tuple(rows[0][1:]), [row[0] for row in rows[1:]], values


def load_physionet(
    *,
    folder: str | Path | None = None,
    valid: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    standardize: bool = True,
) -> DataSplits:
    """The first 48 hours of 4000 stays in intensive care: 35 variables on an hourly grid, 80 % missing.

    PhysioNet/Computing in Cardiology Challenge 2012, set A (Silva et al., Predicting In-Hospital Mortality of ICU
    Patients, 2012). Readings of one hour are averaged; age, sex, height, weight, kind of ward and ventilation are left
    out. The set has no split: this one is ours, by stay, and so is the scaling, from the training stays.

    Args:
        folder: where the file is.
        valid, test: shares of the stays.
        seed: of the split.
        standardize: each variable to mean 0 and standard deviation 1 over the training split.
    """
    path = find("physionet2012_set_a.npz", folder, "timeseries")
    content = path.read_bytes()
    a = arrays_of(content, path)
    columns = tuple(str(name) for name in a["param_names"] if name not in STATIC)
    place = np.array([columns.index(n) if n in columns else -1 for n in map(str, a["param_names"])])
    stay = np.repeat(np.arange(len(a["record"])), np.diff(a["offsets"]))
    column, hour = place[a["param"]], np.minimum(a["minute"] // 60, 47).astype(np.int64)
    keep = column >= 0
    cell = (stay[keep], hour[keep], column[keep])
    total = np.zeros((len(a["record"]), 48, len(columns)))
    count = np.zeros_like(total)
    np.add.at(total, cell, a["value"][keep].astype(np.float64))
    np.add.at(count, cell, 1)
    x = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    some = np.flatnonzero((count > 0).any((1, 2)))  # a few stays hold no reading of these variables
    order = some[np.random.default_rng(seed).permutation(len(some))]
    n_valid, n_test = round(valid * len(some)), round(test * len(some))
    parts = {
        "train": np.sort(order[n_valid + n_test :]),
        "valid": np.sort(order[:n_valid]),
        "test": np.sort(order[n_valid : n_valid + n_test]),
    }
    schema = Schema(columns, id_column="RecordID", time_column="hour", unit="number", step=1.0)
    if standardize:
        schema = schema.fitted(x[parts["train"]])
    sets = {
        split: SequenceDataset(list(schema.standardise(x[index])), names=[str(r) for r in a["record"][index]])
        for split, index in parts.items()
    }
    rows = {split: {name: [name, 0.0] for name in data.names} for split, data in sets.items()}
    meta = {
        "schema": schema.to_dict(),
        "rows": rows,
        "x_names": list(columns),
        "split": {"valid": valid, "test": test, "seed": seed},
    }
    return DataSplits("physionet", **sets, kind="real", meta=meta, sha256=hashlib.sha256(content).hexdigest())
