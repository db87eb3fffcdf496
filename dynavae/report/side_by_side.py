"""What several models make of the same sequences: forecasts, filled gaps, samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from dynavae.report import arrays, figures, html, images, overlays
from dynavae.report.canvas import Canvas, choose_dims
from dynavae.report.html import Section
from dynavae.report.images import Roll
from dynavae.report.theme import svg, theme

if TYPE_CHECKING:
    from dynavae.report.compare import Compared

MOST_DIMS = 4
MOST_COLUMNS = 4
CUT = " Keys far from those of the data are cut off."
SPARE_KEYS = 5  # on either side of those that the data use


def sections(runs: Sequence[Compared]) -> list[Section]:
    """Forecasts, imputations and samples, for each set of sequences that some runs share."""
    groups: dict[Any, list[Compared]] = {}
    for run in runs:
        groups.setdefault(run.same, []).append(run)
    out = []
    for number, group in enumerate(groups.values(), 1):
        heading, anchor, who = "", "", ""
        if len(groups) > 1:
            heading, anchor = f", data {number} ({group[0].data})", f"-{number}"
            listed = ", ".join(run.name for run in group)
            who = f" {'Runs' if len(group) > 1 else 'Only'}: {listed}."
            who += " No other run has these data." if len(group) == 1 else ""
        out += [section for section in _group(group, heading, anchor, who) if section is not None]
    return out


def _group(runs: Sequence[Compared], heading_more: str, anchor: str, who: str) -> list[Section | None]:
    futures = [[arrays.to_forecast(f, f["name"]) for f in run.forecasts] for run in runs]
    filled = [[arrays.to_reconstruction(f, f["name"]) for f in run.imputations] for run in runs]
    drawn = [run.samples for run in runs]
    canvas = arrays.to_canvas(
        runs[0].kind, runs[0].meta, filled[0], [x for xs in drawn for x in xs], futures[0], []
    )
    canvas = replace(canvas, dims=list(canvas.dims)[:MOST_DIMS], clips=2 * len(runs) + 1)
    keys = images.key_range([item["data"] for item in filled[0]], SPARE_KEYS)

    def section(key: str, heading: str, lead: str, items: Sequence[Sequence[Any]], draw: Any) -> Any:
        count = min(map(len, items))
        if not count:
            return None
        cards = "".join(
            draw([mine[i] for mine in items], runs, canvas, keys, f"{key}{anchor}-{i}") for i in range(count)
        )
        return Section(key + anchor, heading + heading_more, lead + who, f'<div class="cards">{cards}</div>')

    return [
        section(
            "forecasts", "Forecasts", "The same beginnings, continued by each model.", futures, _forecast
        ),
        section("imputations", "Imputations", "The same gaps, filled by each model.", filled, _imputation),
        section("samples", "Samples", "Sequences drawn from each model.", drawn, _sample),
    ]


def _forecast(
    items: Sequence[Any], runs: Sequence[Compared], canvas: Canvas, keys: tuple[int, int], name: str
) -> str:
    first, names = items[0], [run.name for run in runs]
    context, truth, title = first["context"], first["truth"], f"{runs[0].data} {first['name']}"
    total = min(canvas.frames, canvas.clip_frames) if canvas.rolls else canvas.frames
    horizon = min(len(truth), max(1, round(0.6 * total)))
    past = min(len(context), max(0, total - horizon), 2 * horizon)
    errors = _errors(names, [(item["samples"].mean(0), truth) for item in items], np.isfinite(truth))
    caption = f"{len(truth)} frames after {len(context)} observed ones"
    if horizon < len(truth) or past < len(context):
        caption += f" (shown: the last {past} and the first {horizon})"
    caption += f". {errors}"
    context, truth = context[len(context) - past :], truth[:horizon]
    drawn = [item["samples"][:, :horizon] for item in items]
    if canvas.lines:
        before, since = np.arange(-past, 0) * canvas.step, np.arange(horizon) * canvas.step

        def draw(axis: Axes, dim: int, run: int) -> None:
            seen, samples = truth[:, dim], drawn[run][:, :, dim]
            figures.draw_forecast(axis, before, since, context[:, dim], seen, samples)

        entries = html.legend(
            ("line", "ink", "observed"),
            ("area", "blue", "forecast, 50 % and 90 %"),
            ("line", "orange", "truth"),
        )
        return _columns(title, draw, names, canvas, canvas.dims, caption, name, entries)
    if canvas.rolls:
        blank = np.zeros_like(context, dtype=float)
        before, after = np.concatenate([context, 0 * truth]), np.concatenate([blank, truth])
        rolls = [Roll("truth", notes=np.concatenate([context, truth]))]
        rolls += [
            Roll(
                f"{label}: share of {len(samples)} samples with the note; outlined, the truth",
                notes=before,
                shade=np.concatenate([blank, samples.mean(0)]),
                outline=after,
            )
            for label, samples in zip(names, drawn, strict=True)
        ]
        caption += CUT
        heard = {f"{title}: truth": truth}
        heard |= {
            f"{title}: {label}, one sample": samples[0] for label, samples in zip(names, drawn, strict=True)
        }
        extras = _clips({label: np.concatenate([context, x]) for label, x in heard.items()}, canvas, name)
        with theme():
            picture = svg(
                images.piano_rolls(rolls, canvas.step, canvas.lowest_midi or 0, now=past, keys=keys), name
            )
        return html.card(title, picture, caption, f"Piano rolls. {caption}", extras=extras)
    pictures = [np.concatenate([context, x]) for x in (truth, *(samples.mean(0) for samples in drawn))]
    with theme():
        picture = svg(canvas.pictures(["truth", *(f"{n}: mean" for n in names)], pictures, now=past), name)
    return html.card(title, picture, caption, f"Pictures. {caption}")


def _imputation(
    items: Sequence[Any], runs: Sequence[Compared], canvas: Canvas, keys: tuple[int, int], name: str
) -> str:
    first, names = items[0], [run.name for run in runs]
    span, title = min(len(first["data"]), canvas.frames), f"{runs[0].data} {first['name']}"
    held_out = ~first["observed"] & np.isfinite(first["data"])
    errors = _errors(names, [(item["mean"], first["data"]) for item in items], held_out)
    caption = f"{1 - first['observed'].mean():.0%} of the values are hidden or missing. {errors}"
    if span < len(first["data"]):
        caption = f"The first {span} of {len(first['data'])} frames. {caption}"
    data, observed = first["data"][:span], first["observed"][:span]
    means = [item["mean"][:span] for item in items]
    if canvas.lines:
        dims = sorted(choose_dims([np.where(observed, data, np.nan)], gaps=~observed)[:MOST_DIMS])
        time = np.arange(span) * canvas.step

        def draw(axis: Axes, dim: int, run: int) -> None:
            bounds = (items[run]["lower"][:span, dim], items[run]["upper"][:span, dim])
            columns = (data[:, dim], observed[:, dim], means[run][:, dim])
            figures.draw_against(axis, time, *columns, bounds=bounds, only_gaps=True)

        entries = html.legend(
            ("line", "ink", "observed"),
            ("line", "blue", "imputed"),
            ("area", "blue", "90 % of the draws"),
            *([("dotted", "ink", "held out")] if held_out.any() else []),
        )
        return _columns(title, draw, names, canvas, dims, caption, name, entries)
    if canvas.rolls:
        on = np.where(observed, np.nan_to_num(data), 0)
        hidden = np.where(held_out[:span], np.nan_to_num(data), 0)
        rolls = [Roll("observed", notes=on, observed=observed)]
        rolls += [
            Roll(
                f"{label}: probability of each note in the gap; outlined, what was hidden",
                notes=on,
                shade=np.where(observed, 0, mean),
                outline=hidden,
            )
            for label, mean in zip(names, means, strict=True)
        ]
        caption += CUT
        with theme():
            picture = svg(images.piano_rolls(rolls, canvas.step, canvas.lowest_midi or 0, keys=keys), name)
    else:
        pictures = [np.where(observed, data, np.nan), *(np.where(observed, data, mean) for mean in means)]
        with theme():
            picture = svg(canvas.pictures(["observed", *names], pictures), name)
    return html.card(title, picture, caption, f"Pictures, one above the other. {caption}")


def _sample(
    items: Sequence[np.ndarray], runs: Sequence[Compared], canvas: Canvas, keys: tuple[int, int], name: str
) -> str:
    names = [run.name for run in runs]
    title = f"samples {int(name.rsplit('-', 1)[1]) + 1}"
    caption = f"One sequence of {len(items[0])} frames from each model; they do not correspond to each other."
    items = [x[: canvas.frames] for x in items]
    if canvas.lines:
        time = np.arange(len(items[0])) * canvas.step

        def draw(axis: Axes, dim: int, run: int) -> None:
            axis.plot(time, items[run][:, dim], color=overlays.mark(0).colour)

        return _columns(title, draw, names, canvas, canvas.dims, caption, name, "")
    if canvas.rolls:
        notes = "; ".join(
            f"{label} {html.number(float((x > 0.5).sum(1).mean()), 2)}"
            for label, x in zip(names, items, strict=True)
        )
        caption += f"{CUT} Notes that sound in a frame on average: {notes}."
        rolls = [Roll(label, notes=x) for label, x in zip(names, items, strict=True)]
        heard = {f"{title}: {label}": x for label, x in zip(names, items, strict=True)}
        extras = _clips(heard, canvas, name)
        with theme():
            picture = svg(images.piano_rolls(rolls, canvas.step, canvas.lowest_midi or 0, keys=keys), name)
        return html.card(title, picture, caption, f"Piano rolls. {caption}", extras=extras)
    with theme():
        picture = svg(canvas.pictures(names, items), name)
    return html.card(title, picture, caption, f"Pictures. {caption}")


def _columns(
    title: str,
    draw: Callable[[Axes, int, int], None],
    names: Sequence[str],
    canvas: Canvas,
    dims: Sequence[int],
    caption: str,
    name: str,
    keys: str,
) -> str:
    """A card with a column for each run, `MOST_COLUMNS` in a figure; draw(axis, dimension, run)."""
    pictures = []
    for start in range(0, len(names), MOST_COLUMNS):
        some = names[start : start + MOST_COLUMNS]
        with theme():
            drawing = overlays.grid(
                some,
                canvas.label(dims),
                lambda axis, row, column, start=start: draw(axis, dims[row], start + column),
                canvas.unit,
            )
            pictures.append(svg(drawing, f"{name}-{start}"))
    return html.card(
        title, "".join(pictures), caption, f"Line charts, a column for each run. {caption}", keys=keys
    )


def _clips(heard: dict[str, np.ndarray], canvas: Canvas, name: str) -> str:
    """Sound of the first card of a section; that of all would make the page too large."""
    if not name.endswith("-0"):
        return ""
    clips = [canvas.clip(label, roll, f"{name}-{i}") for i, (label, roll) in enumerate(heard.items())]
    return f'<div class="clips">{"".join(clips)}</div>'


def _errors(names: Sequence[str], pairs: Sequence[tuple[np.ndarray, np.ndarray]], where: np.ndarray) -> str:
    """The root mean squared error of each run on what was not shown to it."""
    if not where.any():
        return "The truth is not known."
    found = [float(np.sqrt(np.mean((mean - truth)[where] ** 2))) for mean, truth in pairs]
    listed = "; ".join(f"{name} {html.number(error)}" for name, error in zip(names, found, strict=True))
    return f"Root mean squared error of the mean on this sequence: {listed}."
