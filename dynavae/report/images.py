"""The pictures of a report: piano rolls, spectrograms and rasters. Draw them within `theme`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from dynavae.music import note_name, runs
from dynavae.report.theme import BLUE, BLUE_RGB, GAP, INK, MUTED, ORANGE, STRIPE, WIDE, figure

BLACK_KEYS = (1, 3, 6, 8, 10)
SHADES = 24  # of a probability


class Roll(NamedTuple):
    """One panel of a piano-roll figure.

    Attributes:
        title: what the panel shows.
        notes: binary (T, keys), drawn as bars; None for none.
        shade: probabilities (T, keys), drawn as shades of blue; None for none.
        outline: binary (T, keys), drawn as outlines over the shades; None for none.
        observed: (T, keys), False where the panel is greyed; None if all is observed.
    """

    title: str
    notes: np.ndarray | None = None
    shade: np.ndarray | None = None
    outline: np.ndarray | None = None
    observed: np.ndarray | None = None


def piano_rolls(
    rolls: Sequence[Roll],
    frame_seconds: float,
    lowest_midi: int,
    now: int | None = None,
    keys: tuple[int, int] | None = None,
) -> Figure:
    """Piano rolls one above the other: time in seconds, notes by name, the rows of the black keys shaded.

    Args:
        rolls: the panels; all of one shape (T, keys).
        frame_seconds: duration of a frame.
        lowest_midi: MIDI note number of column 0.
        now: the frame that is time 0 and is marked by a line; later notes are orange. None: time 0 is the
            beginning.
        keys: the columns to show, first and one past the last; by default those in use.
    """
    shape = next(a for a in (rolls[0].notes, rolls[0].shade) if a is not None).shape
    used = [a for roll in rolls for a in (roll.notes, roll.shade, roll.outline) if a is not None]
    low, high = keys or key_range(used)
    rows = high - low
    drawing = figure(WIDE, len(rolls) * (0.36 + 0.026 * rows) + 0.3)
    axes = np.atleast_1d(drawing.subplots(len(rolls), 1, sharex=True, sharey=True))
    origin = -(now or 0) * frame_seconds
    end = origin + shape[0] * frame_seconds
    for axis, roll in zip(axes, rolls, strict=True):
        for key in range(low, high):
            if (lowest_midi + key) % 12 in BLACK_KEYS:
                axis.axhspan(key - 0.5, key + 0.5, color=STRIPE, linewidth=0, zorder=0)
        if roll.observed is not None:
            _bars(axis, ~roll.observed, origin, frame_seconds, facecolors=GAP, height=1.0, zorder=0.5)
        if roll.shade is not None:
            extent = (origin, end, -0.5, shape[1] - 0.5)
            axis.imshow(_shades(roll.shade), extent=extent, origin="lower", aspect="auto", zorder=1)
        if roll.notes is not None:
            split = shape[0] if now is None else now
            _bars(axis, roll.notes[:split], origin, frame_seconds, facecolors=BLUE, zorder=2)
            _bars(axis, roll.notes[split:], 0.0, frame_seconds, facecolors=ORANGE, zorder=2)
        if roll.outline is not None:
            _bars(
                axis,
                roll.outline,
                origin,
                frame_seconds,
                facecolors="none",
                edgecolors=INK,
                linewidths=0.6,
                zorder=3,
            )
        if now is not None:
            axis.axvline(0, color=MUTED, linewidth=1, linestyle=(0, (3, 2)))
        axis.set_title(roll.title)
        axis.grid(axis="y", visible=False)
        axis.set_xlim(origin, end)
        axis.set_ylim(low - 0.5, high - 0.5)
        ticks = [key for key in range(low, high) if (lowest_midi + key) % 12 in (0, 7)]
        axis.set_yticks(ticks, [note_name(lowest_midi + key) for key in ticks])
    axes[-1].set_xlabel("time (s)" if now is None else "time (s), from the start of the forecast")
    return drawing


def spectrograms(
    titles: Sequence[str],
    powers: Sequence[np.ndarray],
    frame_seconds: float | None,
    sample_rate: float | None,
    now: int | None = None,
    dynamic_range: float = 70.0,
) -> Figure:
    """Power spectrograms (T, bins) in decibels, one above the other; missing values stay blank.

    The colour scale spans ``dynamic_range`` decibels below the largest value shown. With ``sample_rate`` in
    Hz the bins are taken to run from 0 to half of it.
    """
    decibels = [10 * np.log10(np.maximum(power, np.finfo(np.float64).tiny)) for power in powers]
    top = max((float(d[np.isfinite(d)].max()) for d in decibels if np.isfinite(d).any()), default=0.0)
    vertical = (0.0, sample_rate / 2000) if sample_rate else (-0.5, powers[0].shape[1] - 0.5)
    ylabel = "frequency (kHz)" if sample_rate else "bin"
    limits = (top - dynamic_range, top)
    return _pictures(titles, decibels, vertical, ylabel, limits, "decibel", "magma", frame_seconds, now)


def rasters(
    titles: Sequence[str],
    values: Sequence[np.ndarray],
    frame_seconds: float | None,
    now: int | None = None,
    unit: str = "",
) -> Figure:
    """Matrices (T, dims) as pictures on one colour scale, one above the other; missing values stay blank."""
    finite = np.concatenate([v[np.isfinite(v)].ravel() for v in values])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    limits = (low, high if high > low else low + 1)
    vertical = (values[0].shape[1] - 0.5, -0.5)
    return _pictures(titles, values, vertical, "dimension", limits, unit, "viridis", frame_seconds, now)


def _pictures(
    titles: Sequence[str],
    values: Sequence[np.ndarray],
    vertical: tuple[float, float],
    ylabel: str,
    limits: tuple[float, float],
    unit: str,
    colours: str,
    frame_seconds: float | None,
    now: int | None,
) -> Figure:
    step, xlabel = (frame_seconds, "time (s)") if frame_seconds else (1.0, "frame")
    origin = -(now or 0) * step
    drawing = figure(WIDE, 1.4 * len(values) + 0.35)
    axes = np.atleast_1d(drawing.subplots(len(values), 1, sharex=True))
    for axis, title, value in zip(axes, titles, values, strict=True):
        picture = axis.imshow(
            np.ma.masked_invalid(value.T),
            extent=(origin, origin + len(value) * step, *vertical),
            origin="lower" if vertical[0] < vertical[1] else "upper",
            aspect="auto",
            cmap=colormaps[colours].resampled(128),
            vmin=limits[0],
            vmax=limits[1],
        )
        axis.set_title(title)
        axis.set_ylabel(ylabel)
        axis.grid(visible=False)
        if now is not None:
            axis.axvline(0, color="#ffffff", linewidth=1, linestyle=(0, (3, 2)))
    axes[-1].set_xlabel(xlabel if now is None else f"{xlabel}, from the start of the forecast")
    bar = drawing.colorbar(picture, ax=list(axes), pad=0.01, fraction=0.03, aspect=12 * len(values))
    bar.set_label(unit)
    bar.outline.set_visible(False)
    return drawing


def key_range(rolls: Sequence[np.ndarray], spare_keys: int = 2) -> tuple[int, int]:
    """The keys in use, with some to spare on either side; an octave and a half at least."""
    keys = rolls[0].shape[1]
    used = np.flatnonzero(np.any([(np.nan_to_num(roll) > 0.05).any(0) for roll in rolls], axis=0))
    low, high = (
        (int(used[0]) - spare_keys, int(used[-1]) + spare_keys + 1)
        if len(used)
        else (keys // 2 - 9, keys // 2 + 9)
    )
    spare = max(0, 18 - (high - low))
    return max(0, low - spare // 2), min(keys, high + (spare + 1) // 2)


def _bars(
    axis: Axes, mask: np.ndarray, origin: float, frame_seconds: float, height: float = 0.8, **style: Any
) -> None:
    key, start, stop = runs(np.nan_to_num(mask) > 0.5).T
    left, right = origin + start * frame_seconds, origin + stop * frame_seconds
    below, above = key - height / 2, key + height / 2
    corners = np.stack([left, below, left, above, right, above, right, below], 1).reshape(-1, 4, 2)
    axis.add_collection(PolyCollection(list(corners), **{"linewidths": 0, **style}))


def _shades(probability: np.ndarray) -> np.ndarray:
    """Probabilities (T, keys) as a picture (keys, T, RGBA) whose opacity is the probability."""
    picture = np.empty((*probability.T.shape, 4))
    picture[..., :3] = BLUE_RGB
    picture[..., 3] = np.round(np.clip(np.nan_to_num(probability.T), 0, 1) * SHADES) / SHADES
    return picture
