"""What the numbers of a table were: columns, units, ids and times; so that results come back as the user wrote them."""

from __future__ import annotations

import calendar
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNITS = ("index", "number", "seconds", "months")
"""What a time is: the number of a row, a number of the user's own, seconds or months since 1970 (of a date)."""
EPOCH = datetime(1970, 1, 1)
DAY = 86400.0
SHOWN = 8
"""How many columns a sentence names."""


@dataclass(frozen=True)
class Schema:
    """Columns, scaling and time grid of a table; kept with a run, and applied to every file it is used on.

    Attributes:
        columns: names of the features of x, in order.
        mean, stddev: of each column over the observed training values; empty where nothing is scaled.
        controls: columns that are known inputs, with ``control_mean`` and ``control_stddev``.
        id_column, time_column: where ids and times stand, or None.
        unit: of the times, one of ``UNITS``.
        step: of the grid, in that unit.
        nearest: whether a reading belongs to the nearest grid point, or to the cell [start, start + step).
        style: how dates are written: "date", "T" or " " (between date and time).
        day: of the month, where the unit is months: the last one of a month that is shorter, so 31 is always the last.

    Example:
        >>> schema = Schema(("celsius",)).fitted([np.array([[10.0], [14.0], [np.nan]])])
        >>> schema.mean, schema.stddev
        ((12.0,), (2.0,))
        >>> schema.standardise(np.array([[16.0]])), schema.to_units(np.array([[2.0]]))
        (array([[2.]]), array([[16.]]))
    """

    columns: tuple[str, ...]
    mean: tuple[float, ...] = ()
    stddev: tuple[float, ...] = ()
    controls: tuple[str, ...] = ()
    control_mean: tuple[float, ...] = ()
    control_stddev: tuple[float, ...] = ()
    id_column: str | None = None
    time_column: str | None = None
    unit: str = "index"
    step: float = 1.0
    nearest: bool = True
    style: str = " "
    day: int = 1

    @property
    def standardized(self) -> bool:
        """Whether x is scaled."""
        return bool(self.stddev)

    def fitted(
        self, x: Iterable[NDArray[Any]], control: Iterable[NDArray[Any]] | None = None, scale: bool = True
    ) -> Schema:
        """The same with mean and standard deviation of these sequences, NaN left out; `scale` = False: of controls only.

        A control that is the same throughout has 1 for its standard deviation.

        Raises:
            ValueError: a column without any observed value, or one of x that is the same throughout.
        """
        changes: dict[str, Any] = {}
        if scale:
            values = _joined(x, self.columns)
            _refuse_constant(values, self.columns)
            changes["mean"], changes["stddev"] = _moments(values)
        if control is not None:
            values = _joined(control, self.controls)
            changes["control_mean"], changes["control_stddev"] = _moments(values)
        return dataclasses.replace(self, **changes)

    def standardise(self, x: NDArray[Any]) -> NDArray[Any]:
        """(x - mean) / stddev, for (..., x_dim)."""
        return (x - np.array(self.mean)) / np.array(self.stddev) if self.stddev else x

    def standardise_control(self, u: NDArray[Any]) -> NDArray[Any]:
        """The same of the controls."""
        return (u - np.array(self.control_mean)) / np.array(self.control_stddev) if self.control_mean else u

    def to_units(self, x: NDArray[Any]) -> NDArray[Any]:
        """The inverse of :meth:`standardise`: back to the units of the file."""
        return x * np.array(self.stddev) + np.array(self.mean) if self.stddev else x

    def log_volume(self, observed: NDArray[np.bool_]) -> float:
        """Sum of log stddev over the observed coordinates (..., x_dim): nats in units - nats standardised."""
        counts = observed.reshape(-1, observed.shape[-1]).sum(0)
        return float((counts * np.log(self.stddev)).sum()) if self.stddev else 0.0

    def time(self, start: float, frame: int) -> str:
        """The time of a frame of a sequence that starts at `start`, as the file writes times."""
        return self.written(start + frame * self.step)

    def written(self, t: float) -> str:
        """A time as the file writes times.

        Example:
            >>> Schema(("x",), unit="months").written(12 * 50 + 2), Schema(("x",), unit="number").written(0.5)
            ('2020-03-01', '0.5')
            >>> Schema(("x",), unit="months", day=31).written(12 * 50 + 1)
            '2020-02-29'
            >>> Schema(("x",), unit="number", step=0.1).written(1714521600.1 + 2 * 0.1)
            '1714521600.3'
        """
        if self.unit in ("index", "number"):
            return _number(t, self.step)
        if self.unit == "months":
            year, month = divmod(round(t), 12)
            day = min(self.day, calendar.monthrange(1970 + year, month + 1)[1])
            return f"{1970 + year:04d}-{month + 1:02d}-{day:02d}"
        moment = EPOCH + timedelta(seconds=t)
        if self.style == "date":
            return moment.date().isoformat() if not t % DAY else moment.isoformat(" ")
        return moment.isoformat(self.style, timespec="auto")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Schema:
        """What :meth:`to_dict` gave."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


def _number(t: float, step: float) -> str:
    """A time to a millionth of a step, as far as a float has it."""
    digits = 6 - math.floor(math.log10(step))
    held = 14 - math.floor(math.log10(abs(t))) if t else digits
    text = f"{t:.{max(0, min(digits, held))}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _joined(sequences: Iterable[NDArray[Any]], names: Sequence[str]) -> NDArray[np.float64]:
    """All frames (n, columns), every column of which has a value."""
    x = np.concatenate([np.asarray(s, dtype=np.float64) for s in sequences])
    empty = np.isnan(x).all(0)
    if empty.any():
        raise ValueError(
            f"column {names[int(np.argmax(empty))]!r} has no value in the training part, so it cannot be scaled; "
            "leave it out with columns=[...], or split otherwise."
        )
    return x


def _varies(x: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which columns hold two values or more."""
    return np.nanmax(x, 0) > np.nanmin(x, 0)


def _refuse_constant(x: NDArray[np.float64], names: Sequence[str]) -> None:
    """A column without any spread has no scale: a model would spend all it learns on it."""
    varies = _varies(x)
    if varies.all():
        return
    constant = [
        f"{n!r} ({v:g})" for n, v, free in zip(names, np.nanmax(x, 0), varies, strict=True) if not free
    ]
    others = [n for n, free in zip(names, varies, strict=True) if free]
    if not others:
        raise ValueError(
            f"every column is the same throughout the training part: {_listed(constant)}, so there is nothing to "
            "learn; choose columns that vary, or split otherwise."
        )
    column, it = ("column", "it") if len(constant) == 1 else ("columns", "them")
    wanted = f"columns={others}" if len(others) <= SHOWN else "columns=[...]"
    raise ValueError(
        f"{column} {_listed(constant)} stayed the same throughout the training part and cannot be scaled; leave {it} "
        f"out (of a table with {wanted}), or split otherwise."
    )


def _listed(texts: Sequence[str]) -> str:
    """The first few of them, and how many there are besides."""
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def _moments(x: NDArray[np.float64]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each column over what is not NaN; 1 for a constant column."""
    varies = _varies(x)
    mean, stddev = np.where(varies, np.nanmean(x, 0), np.nanmax(x, 0)), np.nanstd(x, 0)
    stddev = np.where(varies & (stddev > 0), stddev, 1.0)  # of tiny values it is 0 in float64
    return tuple(mean.tolist()), tuple(stddev.tolist())


# --- times ----------------------------------------------------------------------------------------------


def parse_times(values: Sequence[Any], where: str) -> tuple[NDArray[np.float64], str, str]:
    """Times as numbers, their unit and the style of their dates: all numbers, or all ISO dates.

    Dates with a zone are taken to UTC; "2014/05/01 01:00:00" is read too.

    Raises:
        ValueError: an empty time, or one that is neither a number nor an ISO date.

    Example:
        >>> parse_times(["1970-01-02", "1970-01-03"], "t")
        (array([ 86400., 172800.]), 'seconds', 'date')
    """
    texts = [str(v).strip() for v in values]
    empty = [i for i, t in enumerate(texts) if t.lower() in ("", "nan", "nat", "na", "none")]
    if empty:
        raise ValueError(f"{where} is empty in row {empty[0] + 1}; every row needs a time: fill or drop it.")
    try:
        numbers = np.array([float(t) for t in texts])
    except ValueError:
        pass
    else:
        if not np.isfinite(numbers).all():
            raise ValueError(f"{where} holds an infinite time.")
        return numbers, "number", " "
    out = np.empty(len(texts))
    for i, text in enumerate(texts):
        try:
            moment = datetime.fromisoformat(text.replace("/", "-"))
        except ValueError:
            raise ValueError(
                f"{where} should hold numbers or ISO dates such as 2024-05-01 13:00:00; got {text!r} in row {i + 1}."
            ) from None
        if moment.tzinfo is not None:
            moment = moment.astimezone(UTC).replace(tzinfo=None)
        out[i] = (moment - EPOCH).total_seconds()
    style = "date" if max(map(len, texts)) <= 10 else "T" if "T" in texts[0] else " "
    return out, "seconds", style


STEPS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
MONTHS = {"month": 1.0, "quarter": 3.0, "year": 12.0}


def parse_step(step: str | float, unit: str) -> tuple[float, str]:
    """A step as a number and its unit: 0.5, or for dates "30s", "15min", "1h", "7d", "2w", "month", "year".

    Example:
        >>> parse_step("15min", "seconds"), parse_step(2, "number"), parse_step("month", "seconds")
        ((900.0, 'seconds'), (2.0, 'number'), (1.0, 'months'))
    """
    text = str(step).strip().lower()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz").strip()
    name = text[len(number) :].strip()
    try:
        amount = float(number) if number else 1.0
    except ValueError:
        amount = math.nan
    if name.rstrip("s") in MONTHS and unit == "seconds":
        amount, unit = amount * MONTHS[name.rstrip("s")], "months"
    elif name in STEPS and unit == "seconds":
        amount *= STEPS[name]
    elif name:
        amount = math.nan
    if not (0 < amount < math.inf):
        raise ValueError(
            f"step should be a positive number in the unit of the times, or for dates such as '15min', '1h', '7d', "
            f"'month'; got {step!r} for times in {unit}."
        )
    return amount, unit


def to_months(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Months since January 1970; a whole number on the first of a month."""
    months, since, length = _in_month(seconds)
    return months + since / length


def day_of_month(seconds: NDArray[np.float64]) -> int | None:
    """The day of the month that all these dates are, 31 for the last one; None if they differ or have a time of day.

    Example:
        >>> dates = lambda *texts: parse_times(texts, "t")[0]
        >>> day_of_month(dates("2024-01-16", "2024-02-16")), day_of_month(dates("2024-01-31", "2024-02-29"))
        (16, 31)
        >>> day_of_month(dates("2024-01-30", "2024-02-29", "2024-03-30")), day_of_month(dates("2024-01-01", "2024-01-02"))
        (30, None)
    """
    _, since, length = _in_month(seconds)
    day, last = since / DAY + 1, length / DAY
    found = 31 if bool((day == last).all()) else int(day.max())
    return found if bool((day == np.minimum(found, last)).all()) else None


def _in_month(
    seconds: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Months since January 1970, seconds since the beginning of that month, and seconds in all of it."""
    moments = np.floor(seconds).astype(np.int64).astype("datetime64[s]")
    months = moments.astype("datetime64[M]")
    first, after = months.astype("datetime64[s]"), (months + 1).astype("datetime64[s]")
    since, length = (moments - first).astype(np.float64), (after - first).astype(np.float64)
    return months.astype(np.int64).astype(np.float64), since, length
