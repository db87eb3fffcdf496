"""The charts of a report: arrays in, matplotlib figures out. Draw them within `theme`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynavae.music import runs
from dynavae.report.theme import (
    BLUE,
    GAP,
    GREEN,
    HALF,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    WIDE,
    figure,
    plain_log,
    whole_ticks,
)

SPLIT_COLOURS = {"train": BLUE, "valid": ORANGE, "test": GREEN, "": PURPLE}
BANDS = ((0.05, 0.95, 0.18), (0.25, 0.75, 0.30))  # lower and upper quantile, opacity


def curve(
    series: dict[str, tuple[np.ndarray, np.ndarray]], xlabel: str, ylabel: str, mark: str | None
) -> Figure:
    """One quantity over the course of training, a line for each split.

    Args:
        series: split -> (x, y), both of shape (points,).
        xlabel: what x counts.
        ylabel: the quantity.
        mark: the split whose smallest value gets a dot, if any.
    """
    drawing = figure(HALF, 2.05)
    axis = drawing.add_subplot()
    for split, (x, y) in series.items():
        colour = SPLIT_COLOURS.get(split, PURPLE)
        axis.plot(x, y, color=colour, marker="o" if len(x) == 1 else None, markersize=3)
        if split == mark:
            best = int(np.argmin(y))
            axis.plot(x[best], y[best], "o", color=colour, markersize=4.5)
    values = np.concatenate([y for _, y in series.values()])
    if values.min() > 0 and values.max() > 100 * values.min():
        plain_log(axis)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.margins(x=0.02, y=0.08)
    if all((x == np.round(x)).all() for x, _ in series.values()):
        whole_ticks(axis)
    places = np.unique(np.concatenate([x for x, _ in series.values()]))
    if len(places) == 1:
        axis.set_xticks(places, [f"{places[0]:g}"])
    if values.min() == values.max():
        axis.set_yticks(values[:1], [f"{values[0]:.4g}"])
    return drawing


def kl_bars(kl_per_dim: np.ndarray, threshold: float) -> Figure:
    """KL per latent dimension in nats per frame, largest first; inactive dimensions in grey."""
    order = np.argsort(-kl_per_dim, kind="stable")
    drawing = figure(WIDE, 2.1)
    axis = drawing.add_subplot()
    place = np.arange(len(order))
    colours = [BLUE if kl_per_dim[dim] > threshold else MUTED for dim in order]
    axis.bar(place, kl_per_dim[order], color=colours, width=0.8)
    axis.axhline(threshold, color=ORANGE, linewidth=1, linestyle=(0, (4, 2)))
    step = max(1, int(np.ceil(len(order) / 32)))
    axis.set_xticks(place[::step], [str(dim) for dim in order[::step]])
    axis.set_xlim(-0.7, len(order) - 0.3)
    axis.set_ylabel("nats per frame")
    axis.set_xlabel("latent dimension, in order of KL")
    axis.grid(axis="x", visible=False)
    return drawing


def panels(
    labels: Sequence[str], draw: Callable[[Axes, int], object], xlabel: str, height: float = 0.72
) -> Figure:
    """Panels one above the other that share the horizontal axis; ``draw(axis, i)`` fills panel i."""
    drawing = figure(WIDE, 0.42 + height * max(len(labels), 2))
    axes = np.atleast_1d(drawing.subplots(len(labels), 1, sharex=True))
    for index, (axis, label) in enumerate(zip(axes, labels, strict=True)):
        draw(axis, index)
        axis.set_ylabel(label, rotation=0, ha="right", va="center")
        axis.margins(x=0)
        axis.locator_params(axis="y", nbins=4)
    axes[-1].set_xlabel(xlabel)
    drawing.align_ylabels(axes)
    return drawing


def latents(
    time: np.ndarray, mean: np.ndarray, stddev: np.ndarray, dims: Sequence[int], xlabel: str
) -> Figure:
    """Posterior mean of some latent dimensions over time, with a band of two standard deviations."""

    def draw(axis: Axes, index: int) -> None:
        centre, spread = mean[:, dims[index]], 2 * stddev[:, dims[index]]
        axis.fill_between(time, centre - spread, centre + spread, color=BLUE, alpha=0.22, linewidth=0)
        axis.plot(time, centre, color=BLUE)

    return panels([f"z {dim}" for dim in dims], draw, xlabel)


def lines(time: np.ndarray, x: np.ndarray, labels: Sequence[str], xlabel: str) -> Figure:
    """The columns of one sequence (T, dims)."""
    return panels(labels, lambda axis, index: axis.plot(time, x[:, index], color=BLUE), xlabel)


def against_data(
    time: np.ndarray,
    data: np.ndarray,
    observed: np.ndarray,
    mean: np.ndarray,
    labels: Sequence[str],
    xlabel: str,
    bounds: tuple[np.ndarray, np.ndarray] | None = None,
    only_gaps: bool = False,
) -> Figure:
    """Data against what a model says of them: a reconstruction, or an imputation of the gaps.

    Args:
        time: (T,).
        data: (T, dims); where ``observed`` is False a finite value is held-out truth, and dotted.
        observed: (T, dims), False in the gaps, which are shaded.
        mean: (T, dims).
        labels: names of the dimensions.
        xlabel: unit of time.
        bounds: lower and upper quantile, (T, dims) each.
        only_gaps: draw mean and quantiles in the gaps alone, joined to the data beside them.
    """

    def draw(axis: Axes, index: int) -> None:
        limits = None if bounds is None else (bounds[0][:, index], bounds[1][:, index])
        columns = (data[:, index], observed[:, index], mean[:, index])
        draw_against(axis, time, *columns, bounds=limits, only_gaps=only_gaps)

    return panels(labels, draw, xlabel)


def forecast(
    past: np.ndarray,
    future: np.ndarray,
    context: np.ndarray,
    truth: np.ndarray | None,
    samples: np.ndarray,
    labels: Sequence[str],
    xlabel: str,
    paths: int = 3,
) -> Figure:
    """What came before, the quantiles of the forecast, a few of its samples, and the truth.

    Args:
        past: times of the context, (C,).
        future: times of the horizon, (H,).
        context: (C, dims).
        truth: (H, dims) or None.
        samples: (S, H, dims).
        labels: names of the dimensions.
        xlabel: unit of time.
        paths: samples that are drawn as lines.
    """

    def draw(axis: Axes, index: int) -> None:
        seen = None if truth is None else truth[:, index]
        draw_forecast(axis, past, future, context[:, index], seen, samples[:, :, index], paths)

    return panels(labels, draw, xlabel, height=0.85)


def draw_against(
    axis: Axes,
    time: np.ndarray,
    data: np.ndarray,
    observed: np.ndarray,
    mean: np.ndarray,
    bounds: tuple[np.ndarray, np.ndarray] | None = None,
    only_gaps: bool = False,
) -> None:
    """One dimension of data against a model's mean: all arrays (T,)."""
    step = np.median(np.diff(time)) if len(time) > 1 else 1.0
    gaps = runs(~observed[:, None])[:, 1:]
    for start, stop in gaps:
        axis.axvspan(time[start] - step / 2, time[stop - 1] + step / 2, color=GAP, linewidth=0, zorder=0)
    centre, lower, upper = (
        np.where(observed, data, value) if only_gaps else value for value in (mean, *(bounds or (mean, mean)))
    )
    shown = _beside(~observed) if only_gaps else np.ones_like(observed)
    if bounds is not None:
        axis.fill_between(time, lower, upper, where=shown, color=BLUE, alpha=0.22, linewidth=0)
    if (np.isfinite(data) & ~observed).any():
        axis.plot(
            time,
            np.where(_beside(~observed), data, np.nan),
            color=INK,
            linewidth=0.9,
            linestyle=(0, (1, 1.5)),
        )
    width, opacity = (1.0, 1.0) if only_gaps else (3.0, 0.35)  # a reconstruction would hide a thin line
    axis.plot(
        time, np.where(observed, data, np.nan), color=INK, linewidth=width, alpha=opacity, **_dots(observed)
    )
    axis.plot(time, np.where(shown, centre, np.nan), color=BLUE)


def draw_forecast(
    axis: Axes,
    past: np.ndarray,
    future: np.ndarray,
    context: np.ndarray,
    truth: np.ndarray | None,
    samples: np.ndarray,
    paths: int = 3,
) -> None:
    """One dimension of a forecast: context (C,), truth (H,) or None, samples (S, H)."""
    if len(samples) > 1:
        for low, high, opacity in BANDS:
            lower, upper = np.quantile(samples, (low, high), axis=0)
            axis.fill_between(future, lower, upper, color=BLUE, alpha=opacity, linewidth=0)
    for sample in samples[:paths]:
        axis.plot(future, sample, color=BLUE, linewidth=0.7, alpha=0.8)
    axis.plot(past, context, color=INK, linewidth=1, **_dots(np.isfinite(context)))
    if truth is not None:
        axis.plot(future, truth, color=ORANGE, linewidth=1.2)
    axis.axvline(future[0], color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)))


def _beside(mask: np.ndarray) -> np.ndarray:
    """The frames of a mask (T,) and their direct neighbours."""
    wide = np.pad(mask, 1)
    return wide[:-2] | wide[1:-1] | wide[2:]


def _dots(seen: np.ndarray) -> dict[str, Any]:
    """Markers for the points that a line cannot show: those with no neighbour."""
    padded = np.pad(seen, 1)
    alone = np.flatnonzero(seen & ~padded[:-2] & ~padded[2:])
    return {"marker": "o", "markersize": 2.2, "markevery": alone.tolist()} if len(alone) else {}
