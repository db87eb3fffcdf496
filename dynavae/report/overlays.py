"""The charts of a comparison: several runs in one picture. Draw them within `theme`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynavae.report import html
from dynavae.report.theme import (
    BLUE,
    GREEN,
    HALF,
    MUTED,
    ORANGE,
    PURPLE,
    WIDE,
    figure,
    plain_log,
    whole_ticks,
)

COLOURS = ((BLUE, "blue"), (ORANGE, "orange"), (GREEN, "green"), (PURPLE, "purple"))
STYLES: tuple[tuple[Any, str], ...] = (("-", "line"), ((0, (4, 1.5)), "dashed"), ((0, (1, 1.2)), "dotted"))
MOST_RUNS = len(COLOURS) * len(STYLES)
"""More runs than that could not be told apart."""


class Mark(NamedTuple):
    """How the lines of one run look, in a figure and in a legend."""

    colour: str
    role: str
    style: Any
    shape: str


def mark(index: int) -> Mark:
    """The look of run ``index``: four colours, then the same dashed, then dotted."""
    (colour, role), (style, shape) = COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS)]
    return Mark(colour, role, style, shape)


def legend(names: Sequence[tuple[int, str]]) -> str:
    """The legend of runs, given as (index, name)."""
    return html.legend(*((mark(i).shape, mark(i).role, name) for i, name in names))


def curves(
    lines: Sequence[tuple[int, np.ndarray, np.ndarray]], xlabel: str, ylabel: str, smallest: bool
) -> Figure:
    """One quantity over training, a line for each run.

    Args:
        lines: (index of the run, x, y), x and y of shape (points,).
        xlabel: what x counts.
        ylabel: the quantity.
        smallest: whether the smallest value of each line gets a dot.
    """
    drawing = figure(HALF, 2.05)
    axis = drawing.add_subplot()
    for index, x, y in lines:
        look = mark(index)
        single = "o" if len(x) == 1 else None
        axis.plot(x, y, color=look.colour, linestyle=look.style, marker=single, markersize=3)
        if smallest:
            best = int(np.argmin(y))
            axis.plot(x[best], y[best], "o", color=look.colour, markersize=4.5)
    values = np.concatenate([y for *_, y in lines])
    if values.min() > 0 and values.max() > 100 * values.min():
        plain_log(axis)
    if values.min() == values.max():
        axis.set_yticks(values[:1], [f"{values[0]:.4g}"])
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.margins(x=0.03, y=0.08)
    whole_ticks(axis)
    places = np.unique(np.concatenate([x for _, x, _ in lines]))
    if len(places) == 1:
        axis.set_xticks(places, [f"{places[0]:g}"])
    return drawing


def ranked(lines: Sequence[tuple[int, np.ndarray]], ylabel: str, xlabel: str, threshold: float) -> Figure:
    """Values in falling order, a line for each run, on a logarithmic scale from a tenth of the threshold."""
    drawing = figure(WIDE, 2.1)
    axis = drawing.add_subplot()
    for index, values in lines:
        look = mark(index)
        falling = np.maximum(np.sort(values)[::-1], threshold / 10)
        place = np.arange(1, len(falling) + 1)
        axis.plot(place, falling, color=look.colour, linestyle=look.style, marker="o", markersize=2.2)
    axis.axhline(threshold, color=MUTED, linewidth=0.9, linestyle=(0, (4, 2)))
    plain_log(axis)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.margins(x=0.02)
    whole_ticks(axis)
    return drawing


def grid(
    titles: Sequence[str],
    labels: Sequence[str],
    draw: Callable[[Axes, int, int], object],
    xlabel: str,
    height: float = 0.85,
) -> Figure:
    """A column for each run, a row for each dimension; ``draw(axis, row, column)`` fills a panel.

    Panels of a row share their vertical axis, so that runs can be compared by eye.
    """
    drawing = figure(WIDE, 0.65 + height * max(len(labels), 2))
    axes = drawing.subplots(len(labels), len(titles), sharex=True, sharey="row", squeeze=False)
    for row, label in enumerate(labels):
        for column in range(len(titles)):
            draw(axes[row, column], row, column)
            axes[row, column].margins(x=0)
            axes[row, column].locator_params(axis="y", nbins=4)
        axes[row, 0].set_ylabel(label, rotation=0, ha="right", va="center")
    for column, title in enumerate(titles):
        axes[0, column].set_title(title)
        axes[-1, column].set_xlabel(xlabel)
    drawing.align_ylabels(axes[:, 0])
    return drawing
