"""The pieces of the page: numbers, tables, figure cards, clips, and the page itself. Text is escaped here."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

HASH = re.compile(r"[0-9a-f]{32,}")


class Section(NamedTuple):
    """One section of the page: its anchor, its heading, one sentence on how to read it, and its HTML."""

    anchor: str
    heading: str
    lead: str
    body: str


def escape(text: object) -> str:
    """Text as it may stand in HTML, inside an element or a quoted attribute.

    Example:
        >>> escape('<b> & "c"')
        '&lt;b&gt; &amp; &quot;c&quot;'
    """
    return html.escape(str(text), quote=True)


def number(value: float, digits: int = 4) -> str:
    r"""A number for people: integers in full, with thousands apart; others to ``digits`` significant digits.

    Example:
        >>> number(1234567), number(6.123456), number(1.5e-7), number(-0.5), number(float("nan"))
        ('1\u202f234\u202f567', '6.123', '1.5e−7', '−0.5', 'NaN')
    """
    if isinstance(value, int) or float(value).is_integer():
        text = f"{int(value):,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(int(value))
    elif not math.isfinite(value):
        text = "NaN" if math.isnan(value) else ("∞" if value > 0 else "-∞")
    elif 1e-3 <= abs(value) < 10**digits:
        text = f"{value:.{digits}g}"
    else:
        text = re.sub(r"e([+-])0*(\d)", lambda m: f"e{m[1].strip('+')}{m[2]}", f"{value:.{digits}g}")
    return text.replace("-", "−")


def fixed(value: float, decimals: int) -> str:
    """A number with the given decimals, so that a column of them lines up.

    Example:
        >>> fixed(-6.3, 4), fixed(float("inf"), 4)
        ('−6.3000', '∞')
    """
    return f"{value:.{decimals}f}".replace("-", "−") if math.isfinite(value) else number(value)


def value(item: Any) -> str:
    """Any value of a setting or a score as HTML: numbers formatted, hashes in code, lists joined."""
    if item is None:
        return '<span class="none">none</span>'
    if isinstance(item, bool):
        return "yes" if item else "no"
    if hasattr(item, "item") and getattr(item, "ndim", 1) == 0:
        return value(item.item())
    if isinstance(item, int | float):
        return number(item)
    if isinstance(item, str):
        return f"<code>{escape(item)}</code>" if HASH.fullmatch(item) else escape(item)
    if isinstance(item, Mapping):
        return ", ".join(f"{escape(key)}: {value(entry)}" for key, entry in item.items()) or "none"
    if isinstance(item, Iterable):
        return ", ".join(value(entry) for entry in item) or "none"
    return escape(item)


def words(key: object) -> str:
    """A key such as ``z_dim`` or ``nats_per_frame`` as words, where it is not an option's own name."""
    return escape(str(key).replace("_", " ").replace("/", " / "))


def definitions(title: str, entries: Mapping[str, Any], as_code: bool = False) -> str:
    """A card with a list of names and values."""
    names = [f"<code>{escape(key)}</code>" if as_code else words(key) for key in entries]
    rows = "".join(
        f"<div><dt>{name}</dt><dd>{value(entry)}</dd></div>"
        for name, entry in zip(names, entries.values(), strict=True)
    )
    return f'<div class="card"><h3>{escape(title)}</h3><dl>{rows}</dl></div>'


def table(heads: Sequence[str], rows: Sequence[tuple[str, str, Sequence[str]]], caption: str) -> str:
    """A table whose first column names the rows; all is HTML; rows are (class, name, cells)."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join(
        f'<tr class="{kind}"><th scope="row">{name}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for kind, name, cells in rows
    )
    return (
        '<div class="card table"><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{escape(caption)}">'
        f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        "</table></div></div>"
    )


def tile(figure: str, unit: str, label: str, role: str = "") -> str:
    """One figure in large type, for the head of the page; a role gives it the colour of a run."""
    edge = f' style="border-left:4px solid var(--{role})"' if role else ""
    return (
        f'<div class="tile"{edge}><strong>{escape(figure)}</strong> <span>{escape(unit)}</span>'
        f"<p>{escape(label)}</p></div>"
    )


def legend(*keys: tuple[str, str, str]) -> str:
    """The legend of a chart: (shape, colour, label), the shape line, dotted, dashed, area or bar."""
    items = "".join(
        f'<li><i class="{shape}" style="color:var(--{colour})"></i>{escape(label)}</li>'
        for shape, colour, label in keys
    )
    return f'<ul class="legend">{items}</ul>'


def card(
    title: str, picture: str, caption: str, alt: str, *, keys: str = "", extras: str = "", wide: bool = True
) -> str:
    """A figure with its title, legend, picture, clips and caption.

    Args:
        title: heading of the card.
        picture: the ``<svg>`` element.
        caption: says what is shown.
        alt: the text alternative: what a reader who cannot see the picture should know.
        keys: HTML of the legend.
        extras: HTML below the picture.
        wide: whether the card takes the full width of the page.
    """
    return (
        f'<figure class="card{" wide" if wide else ""}"><h3>{escape(title)}</h3>{keys}'
        f'<div class="picture"><div role="img" aria-label="{escape(alt)}">{picture}</div></div>{extras}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def clip(label: str, wav: bytes, midi: bytes | None, file_name: str) -> str:
    """A sound to play, and its MIDI file to save."""
    link = ""
    if midi is not None:
        link = (
            f'<a download="{escape(file_name)}.mid" href="data:audio/midi;base64,{_base64(midi)}"'
            f' aria-label="MIDI file: {escape(label)}">MIDI</a>'
        )
    return (
        f'<div class="clip"><span>{escape(label)}</span>'
        f'<audio controls preload="metadata" aria-label="{escape(label)}"'
        f' src="data:audio/wav;base64,{_base64(wav)}"></audio>{link}</div>'
    )


def page(title: str, subtitle: str, tiles: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page as one HTML document that needs nothing but itself."""
    style = resources.files("dynavae.report").joinpath("style.css").read_text(encoding="utf-8")
    links = "".join(f'<li><a href="#{s.anchor}">{escape(s.heading)}</a></li>' for s in sections)
    body = "".join(
        f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-heading"><h2 id="{s.anchor}-heading">'
        f"{escape(s.heading)}</h2>"
        + (f'<p class="lead">{escape(s.lead)}</p>' if s.lead else "")
        + f"{s.body}</section>"
        for s in sections
    )
    head = f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<nav aria-label="Contents"><p>Contents</p><ol>{links}</ol></nav>\n'
        f"<main>\n<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p>{head}</header>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
