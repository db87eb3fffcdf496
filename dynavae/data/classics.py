"""Classic series of one variable: small enough to look at, and to compare maximum-likelihood fits on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dynavae.data.music import ASSETS, find

FILES = {
    "nile": ("nile.csv", "volume", None),
    "co2": ("co2.csv", "co2", None),
    "airline": ("Airline.csv", "Passengers", None),
    "seatbelts": ("seatbelts.csv", "KSI", "label"),
}
SHIPPED = ("nile", "co2")


class Classic(NamedTuple):
    """One series.

    Attributes:
        x: (1, T, 1), float64; NaN is missing.
        control: (1, T, 1) known input, or None.
        times: T of them, as the file says.
        name: of the values.
    """

    x: Tensor
    control: Tensor | None
    times: list[str]
    name: str


def load_classic(name: str, *, folder: str | Path | None = None) -> Classic:
    """A classic series.

    - "nile": annual flow of the Nile at Aswan, 1871 to 1970 (Cobb 1978); ships with the package.
    - "co2": carbon dioxide at Mauna Loa, monthly, 1958 to 2001, with 5 months missing (Keeling and Whorf 2004); ships too.
    - "airline": international airline passengers, thousands a month, 1949 to 1960 (Box and Jenkins 1976). Looked for as
      ``timeseries/Airline.csv`` in the folder that the environment variable ``DYNAVAE_DATA`` names.
    - "seatbelts": car drivers killed or seriously injured in Great Britain, monthly, 1969 to 1984, with the seat-belt law of
      February 1983 as control (Harvey and Durbin 1986). Looked for as ``timeseries/seatbelts.csv`` in the same place.

    Args:
        name: one of them.
        folder: where to look instead.

    Raises:
        ValueError: an unknown name.
        FileNotFoundError: the file is not there; the sentence says where it is looked for.

    Example:
        >>> nile = load_classic("nile")
        >>> nile.x.shape, nile.times[0], float(nile.x[0, 0, 0])
        (torch.Size([1, 100, 1]), '1871', 1120.0)
    """
    if name not in FILES:
        raise ValueError(f"unknown series {name!r}; choose one of {', '.join(FILES)}.")
    file, column, control = FILES[name]
    path = ASSETS / file if name in SHIPPED and folder is None else find(file, folder, "timeseries")
    with path.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    time = next(iter(rows[0]))
    values = [float(row[column]) if row[column] else float("nan") for row in rows]
    known = None if control is None else [float(row[control]) for row in rows]
    return Classic(
        torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1),
        None if known is None else torch.tensor(known, dtype=torch.float64).reshape(1, -1, 1),
        [row[time] for row in rows],
        column,
    )
