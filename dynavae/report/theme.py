"""Matplotlib figures as inline SVG that follows the light or dark colours of the page.

A figure is drawn with placeholder colours, one per role; `svg` turns each placeholder into a CSS variable of
the page, so that one drawing serves both modes. Text stays text, in the font of the page.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from PIL import Image

# role -> placeholder; `style.css` gives each variable --<role> a light and a dark value
COLOURS = {
    "ink": "#010203",  # text, data
    "muted": "#010204",  # tick labels, secondary lines
    "grid": "#010205",  # grid lines, frames
    "gap": "#010206",  # where nothing was observed
    "blue": "#010207",
    "orange": "#010208",
    "green": "#010209",
    "purple": "#01020a",
    "stripe": "#01020b",  # rows of the black keys in a piano roll
}
INK, MUTED, GRID, GAP, BLUE, ORANGE, GREEN, PURPLE, STRIPE = COLOURS.values()
BLUE_RGB = (0.23, 0.53, 0.90)  # for pictures, whose pixels no style sheet reaches; readable in both modes

WIDE, HALF = 7.4, 3.7  # inches, of the two sizes of figures on the page

RC: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 7.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 8,
    "axes.titleweight": "normal",
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.035,
    "figure.constrained_layout.w_pad": 0.02,
    "figure.constrained_layout.hspace": 0.02,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # shipped with matplotlib: its metrics lay the figure out
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "image.interpolation": "none",
    "lines.linewidth": 1.3,
    "savefig.bbox": None,
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "xtick.labelsize": 7,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
    "ytick.labelsize": 7,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


@contextmanager
def theme() -> Iterator[None]:
    """Within this context matplotlib draws in the style of the report; the caller's own settings come back
    after it.

    The glyph warnings that are silenced concern the font used to measure text: the text itself is drawn by
    the browser, in the fonts it has.
    """
    with matplotlib.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield


def figure(width: float = WIDE, height: float = 2.4) -> Figure:
    """An empty figure of the given size in inches, apart from pyplot's global state."""
    return Figure(figsize=(width, height))


def plain_log(axis: Axes) -> None:
    """A logarithmic vertical axis with ticks such as 0.01, for text that is not typeset as mathematics."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def whole_ticks(axis: Axes) -> None:
    """Ticks of a count, such as epochs, at whole numbers."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def svg(figure: Figure, name: str) -> str:
    """A figure as an ``<svg>`` element without size, ready to stand in an HTML page.

    Args:
        figure: the matplotlib figure, drawn within `theme`.
        name: distinct for every figure of a page: the identifiers in the SVG are derived from it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # it would reach the rest of the page
    used = set(re.findall(r'(?:url\(|href=")#([^")]*)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r"font-family: [^;\"]*(; )?", "", text)
    text = re.sub(r"<defs>\s*</defs>", "", text)
    view_box = re.search(r'viewBox="([^"]*)"', text)
    assert view_box is not None, "matplotlib wrote an SVG without a viewBox"
    text = re.sub(r"^<svg[^>]*>", f'<svg viewBox="{view_box[1]}" aria-hidden="true" focusable="false">', text)
    text = re.sub(r"data:image/png;base64,([^\"]*)", lambda match: _png(match[1]), text)
    text = re.sub(r"#01020[0-9a-f]", lambda match: _VARIABLES[match[0]], text)
    return re.sub(r"\s*\n\s*", " ", text).strip()


_VARIABLES = {placeholder: f"var(--{role})" for role, placeholder in COLOURS.items()}


def _png(encoded: str) -> str:
    """The same picture, lossless, as a palette where 256 colours suffice: several times smaller."""
    data = base64.b64decode(encoded)
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    colours, index = np.unique(pixels.reshape(-1, 4), axis=0, return_inverse=True)
    if len(colours) <= 256:
        picture = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8), mode="P")
        picture.putpalette(colours.tobytes(), rawmode="RGBA")
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", optimize=True)
        data = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
