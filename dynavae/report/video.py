"""Frames of a video side by side, and what the dynamics of a KVAE do where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dynavae.report import html
from dynavae.report.html import Section
from dynavae.report.theme import BLUE, INK, MUTED, ORANGE, WIDE, figure, svg, theme

FRAMES = 20
"""Frames of one strip, at most."""

CELLS = 24
"""Cells across the plane of points."""

MISSING = (0.55, 0.60, 0.66, 0.45)
"""Colour of what was not observed."""


def strips(
    titles: Sequence[str],
    values: Sequence[np.ndarray],
    image: Sequence[int],
    marks: Sequence[int] = (),
) -> Figure:
    """Videos (T, pixels) as rows of frames, white where a pixel is 1; what is NaN is greyed.

    Args:
        titles: one for each video.
        values: the videos, all of one length.
        image: (height, width) or (channels, height, width); three channels are colours, others are averaged.
        marks: frames before which a line is drawn.
    """
    channels, height, width = image if len(image) == 3 else (1, *image)
    frames = len(values[0])
    gap = max(1, width // 12)
    drawing = figure(WIDE, len(values) * (0.2 + WIDE / max(frames, 12) * height / width) + 0.1)
    axes = np.atleast_1d(drawing.subplots(len(values), 1))
    for axis, title, video in zip(axes, titles, values, strict=True):
        axis.imshow(_side_by_side(video, channels, height, width, gap), interpolation="nearest")
        axis.set_title(title)
        axis.axis("off")
        axis.set_xlim(-0.5, max(frames, 12) * (width + gap) - gap - 0.5)
        for now in marks:
            axis.axvline(now * (width + gap) - gap / 2 - 0.5, color=ORANGE, linewidth=1.4)
    return drawing


def _side_by_side(video: np.ndarray, channels: int, height: int, width: int, gap: int) -> np.ndarray:
    """One picture (height, width of all frames, RGBA)."""
    pixels = video.reshape(len(video), channels, height, width)
    hidden = np.isnan(pixels).any(1)
    shade = np.nan_to_num(pixels).clip(0, 1)
    colours = shade.transpose(0, 2, 3, 1) if channels == 3 else shade.mean(1)[..., None].repeat(3, -1)
    picture = np.concatenate([colours, np.ones((*hidden.shape, 1))], -1)
    picture[hidden] = MISSING
    out = np.zeros((height, len(video) * (width + gap) - gap, 4))
    for t, frame in enumerate(picture):
        out[:, t * (width + gap) : t * (width + gap) + width] = frame
    return out


def weights_map(a: np.ndarray, weights: np.ndarray) -> Figure:
    """Weight of each set of dynamics, (N, K), averaged over the points a (N, 2) in each cell of the plane."""
    number = weights.shape[1]
    drawing = figure(WIDE, WIDE / max(number, 3) + 0.5)
    axes = np.atleast_1d(drawing.subplots(1, number, sharex=True, sharey=True))
    cells = [
        axis.hexbin(*a.T, C=weights[:, k], gridsize=CELLS, linewidths=0.1, cmap="viridis")
        for k, axis in enumerate(axes)
    ]
    shown = np.concatenate([np.asarray(cell.get_array()) for cell in cells])
    for k, (axis, cell) in enumerate(zip(axes, cells, strict=True)):
        cell.set_clim(shown.min(), shown.max())
        axis.set_title(f"weight of dynamics {k + 1}")
        axis.set_aspect("equal")
        axis.grid(visible=False)
        axis.set_xlabel("a 0")
    axes[0].set_ylabel("a 1")
    bar = drawing.colorbar(cells[0], ax=list(axes), pad=0.01, fraction=0.03, shrink=0.8)
    bar.outline.set_visible(False)
    return drawing


def trajectory(
    truth: np.ndarray, paths: Mapping[str, np.ndarray], observed: np.ndarray, time: np.ndarray, unit: str
) -> Figure:
    """The points of one video in time: encoded, filtered and smoothed (T, z_dim), greyed where nothing was seen."""
    drawing = figure(WIDE, 1.25 * truth.shape[1] + 0.3)
    axes = np.atleast_1d(drawing.subplots(truth.shape[1], 1, sharex=True))
    step = time[1] - time[0] if len(time) > 1 else 1.0
    for i, axis in enumerate(axes):
        for t in np.flatnonzero(~observed):
            axis.axvspan(time[t] - step / 2, time[t] + step / 2, color=MUTED, alpha=0.15, linewidth=0)
        axis.plot(time, truth[:, i], color=INK, linewidth=1, label="encoded from all frames")
        for (name, path), colour in zip(paths.items(), (ORANGE, BLUE), strict=False):
            axis.plot(time, path[:, i], color=colour, label=name)
        axis.set_ylabel(f"a {i}")
    axes[-1].set_xlabel(unit)
    axes[0].legend(frameon=False, fontsize=7, ncols=3)
    return drawing


def dynamics_section(item: Mapping[str, Any], image: Sequence[int] | None, step: float | None) -> Section:
    """Filtered, smoothed and generated frames of a KVAE, and where each set of its dynamics rules.

    Args:
        item: `strips` {title: (T, pixels)}, `hidden` (T,) bool, `points` (N, 2) or None with `weights` (N, K), and
            `encoded`, `filtered`, `smoothed` (T, z_dim).
        image: how a frame folds; None draws no strips.
        step: seconds of a frame, or None.
    """
    cards = []
    hidden = np.asarray(item["hidden"], dtype=bool)
    with theme():
        if image is not None:
            shown = {title: np.asarray(video)[:FRAMES] for title, video in item["strips"].items()}
            ends = [t for t in np.flatnonzero(np.diff(hidden)) + 1 if t < FRAMES]
            drawn = strips(list(shown), list(shown.values()), image, marks=ends)
            picture = svg(drawn, "dynamics-strips")
            caption = (
                f"{int(hidden.sum())} of {len(hidden)} frames are hidden (grey, between lines). The filter knows the frames "
                "before, the smoother all that were seen; what is generated goes on from the frames before the gap alone."
            )
            cards.append(html.card("a gap", picture, caption, f"Strips of frames. {caption}"))
        time = np.arange(len(hidden)) * (step or 1.0)
        paths = {name: np.asarray(item[name]) for name in ("filtered", "smoothed")}
        unit = "time (s)" if step else "frame"
        drawing = trajectory(np.asarray(item["encoded"]), paths, ~hidden, time, unit)
        caption = "The points a_t of the same video; shaded where frames are hidden."
        cards.append(
            html.card("its points", svg(drawing, "dynamics-points"), caption, f"Line charts. {caption}")
        )
        if item.get("points") is not None:
            drawing = weights_map(np.asarray(item["points"]), np.asarray(item["weights"]))
            caption = (
                "The plane of points, coloured by the weight alpha of each set of dynamics in the step that led there, "
                "averaged over the frames in a cell. What differs between the middle and the border is what walls change."
            )
            cards.append(html.card("weights", svg(drawing, "dynamics-weights"), caption, f"Maps. {caption}"))
    lead = "What the linear dynamics know: states by the exact filter and smoother, given the encoded frames."
    return Section("dynamics", "Dynamics", lead, f'<div class="cards">{"".join(cards)}</div>')
