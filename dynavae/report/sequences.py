"""The sections of a report that show sequences: data against reconstruction, samples, forecasts, filled gaps.

How a sequence is drawn follows from the kind of data: notes and sound for piano rolls, line charts for real
values, spectrograms for power, rasters for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dynavae import music
from dynavae.report import figures, html, images
from dynavae.report.canvas import SHOWN, Canvas, choose_dims
from dynavae.report.html import Section
from dynavae.report.images import Roll
from dynavae.report.theme import svg, theme

Arrays = Mapping[str, Any]


def reconstruction_section(items: Sequence[Arrays], canvas: Canvas) -> Section | None:
    """Data against the mean of the reconstruction."""
    lead = "The data, and what the model makes of them after passing them through its latent variables."
    return _section("reconstructions", "Data and reconstruction", lead, items, canvas, _reconstruction)


def sample_section(items: Sequence[np.ndarray], canvas: Canvas) -> Section | None:
    """Sequences drawn from the model."""
    lead = "Sequences drawn from the model, which has seen no data while drawing them."
    return _section("samples", "Samples", lead, items, canvas, _sample, shown=SHOWN)


def forecast_section(items: Sequence[Arrays], canvas: Canvas) -> Section | None:
    """Continuations of a sequence."""
    lead = "How sequences go on, given their beginning: the forecasts of the model, and what happened."
    return _section("forecasts", "Forecasts", lead, items, canvas, _forecast)


def imputation_section(items: Sequence[Arrays], canvas: Canvas) -> Section | None:
    """Gaps filled in by the model."""
    lead = "What the model puts where nothing was observed, given everything that was."
    return _section("imputations", "Imputations", lead, items, canvas, _imputation)


def _section(
    anchor: str,
    heading: str,
    lead: str,
    items: Sequence[Any],
    canvas: Canvas,
    draw: Callable[[Any, int, Canvas], str],
    shown: int | None = None,
) -> Section | None:
    if not items:
        return None
    shown = shown or canvas.shown
    if len(items) > shown:
        lead += f" The first {shown} of {len(items)} are shown."
    if canvas.rolls and anchor != "imputations" and not music.can_write_midi():
        lead += " There are no MIDI files here: the package pretty_midi is not installed."
    cards = "".join(draw(item, index, canvas) for index, item in enumerate(items[:shown]))
    return Section(anchor, heading, lead, f'<div class="cards">{cards}</div>')


def _reconstruction(item: Arrays, index: int, canvas: Canvas) -> str:
    name = f"reconstruction-{index}"
    whole, span = _span(item["data"], canvas)
    data, observed, mean = (item[key][:span] for key in ("data", "observed", "mean"))
    title = str(item["name"])
    with theme():
        if canvas.rolls:
            on = np.where(observed, np.nan_to_num(data), 0) > 0.5
            rolls = [
                Roll("data", notes=on, observed=observed),
                Roll(
                    "reconstruction: probability of each note, outlined where the data have it",
                    shade=mean,
                    outline=on,
                ),
            ]
            picture = svg(images.piano_rolls(rolls, canvas.step, canvas.lowest_midi or 0), name)
            hit = (mean > 0.5) & observed
            found = (hit & on).sum() / max(on.sum(), 1)
            right = (hit & on).sum() / max(hit.sum(), 1)
            caption = (
                f"{whole} Above, the notes of the data; below, shades from 0 (blank) to 1 (blue). "
                "At a threshold of 0.5 the "
                f"reconstruction finds {found:.0%} of the notes, and {right:.0%} of its notes are "
                "in the data."
            )
            extras = _clips(
                canvas.clip(f"{title}: data", on, f"{_slug(title)}-data"),
                canvas.clip(f"{title}: reconstruction above 0.5", mean, f"{_slug(title)}-reconstruction"),
            )
            return html.card(title, picture, caption, f"Two piano rolls. {caption}", extras=extras)
        if canvas.lines:
            dims = list(canvas.dims)
            picture = svg(_against_data(data, observed, mean, dims, canvas), name)
            caption = (
                f"{whole}{_which(dims, data)} Root mean squared error "
                f"{_rmse(data, mean, observed)} over the observed values."
            )
            if not observed.all():
                caption += f" Shaded: not observed ({1 - observed.mean():.0%})."
            keys = html.legend(
                ("area", "ink", "data"), ("line", "blue", "reconstruction"), *_gap_key(observed)
            )
            return html.card(title, picture, caption, f"Line charts. {caption}", keys=keys)
        picture = svg(
            canvas.pictures(("data", "reconstruction"), (np.where(observed, data, np.nan), mean)),
            name,
        )
        caption = f"{whole} Above, the data, blank where not observed; below, the mean of the reconstruction."
        return html.card(title, picture, caption, f"Two pictures, {canvas.what}. {caption}")


def _sample(x: np.ndarray, index: int, canvas: Canvas) -> str:
    name, title = f"sample-{index}", f"sample {index + 1}"
    whole, span = _span(x, canvas)
    x = x[:span]
    with theme():
        if canvas.rolls:
            roll = [Roll("", notes=x)]
            picture = svg(images.piano_rolls(roll, canvas.step, canvas.lowest_midi or 0), name)
            caption = (
                f"{whole} {html.number(float((x > 0.5).sum(1).mean()), 2)} notes sound in a frame on average."
            )
            extras = _clips(canvas.clip(title, x, title.replace(" ", "-")))
            return html.card(title, picture, caption, f"Piano roll. {caption}", extras=extras)
        if canvas.lines:
            dims = list(canvas.dims)
            picture = svg(
                figures.lines(_time(len(x), canvas), x[:, dims], canvas.label(dims), canvas.unit), name
            )
            caption = f"{whole}{_which(dims, x)}"
            return html.card(
                title, picture, caption, f"Line charts of a sequence drawn from the model. {caption}"
            )
        picture = svg(canvas.pictures(("",), (x,)), name)
        return html.card(
            title,
            picture,
            whole,
            f"Picture, {canvas.what}, of a sequence drawn from the model. {whole}",
        )


def _forecast(item: Arrays, index: int, canvas: Canvas) -> str:
    name, title = f"forecast-{index}", str(item["name"])
    context, truth, samples = item["context"], item["truth"], item["samples"]
    total = min(canvas.frames, canvas.clip_frames) if canvas.rolls else canvas.frames
    horizon = min(samples.shape[1], max(1, round(0.6 * total)))
    past = min(len(context), max(0, total - horizon))
    whole = f"{samples.shape[1]} frames after {len(context)} observed ones."
    if horizon < samples.shape[1] or past < len(context):
        whole += f" Shown: the last {past} observed frames and the first {horizon} of the forecast."
    context, samples = context[len(context) - past :], samples[:, :horizon]
    truth = None if truth is None else truth[:horizon]
    after = {f"sample {i + 1}": sample for i, sample in enumerate(samples[:2])}
    if truth is not None:
        after = {"truth": truth, **after}
    with theme():
        if canvas.rolls:
            joined = {label: np.concatenate([context, x]) for label, x in after.items()}
            share = np.concatenate([np.zeros_like(context, dtype=float), samples.mean(0)])
            rolls = [Roll(label, notes=x) for label, x in joined.items()]
            rolls.insert(
                1 if truth is not None else 0,
                Roll(f"share of {len(samples)} samples with the note", shade=share),
            )
            picture = svg(images.piano_rolls(rolls, canvas.step, canvas.lowest_midi or 0, now=past), name)
            caption = (
                f"{whole} Time 0 is where the forecast begins: observed notes before it, "
                "orange ones after it."
            )
            extras = _clips(
                *(
                    canvas.clip(f"{title}: then {label}", x, f"{_slug(title)}-{_slug(label)}")
                    for label, x in joined.items()
                )
            )
            keys = html.legend(("bar", "blue", "observed"), ("bar", "orange", "what follows"))
            return html.card(title, picture, caption, f"Piano rolls. {caption}", keys=keys, extras=extras)
        if canvas.lines:
            dims = list(canvas.dims)
            before, since = np.arange(-past, 0) * canvas.step, np.arange(horizon) * canvas.step
            context_lines, truth_lines = context[:, dims], None if truth is None else truth[:, dims]
            unit = f"{canvas.unit}, from the start of the forecast"
            drawing = figures.forecast(
                before, since, context_lines, truth_lines, samples[..., dims], canvas.label(dims), unit
            )
            picture = svg(drawing, name)
            caption = f"{whole}{_which(dims, samples[0])}"
            if len(samples) > 1:
                caption += (
                    f" Bands hold the middle 50 % and 90 % of {len(samples)} samples; thin "
                    "lines are single samples."
                )
            if truth is not None:
                low, high = np.quantile(samples, (0.05, 0.95), axis=0)
                seen = np.isfinite(truth)
                inside = ((truth >= low) & (truth <= high))[seen].mean() if seen.any() else float("nan")
                caption += f" Root mean squared error of the mean {_rmse(truth, samples.mean(0), seen)}; "
                caption += f"{inside:.0%} of the true values lie in the 90 % band."
            entries = [("line", "ink", "observed"), ("area", "blue", "forecast"), ("line", "orange", "truth")]
            keys = html.legend(*(entries if truth is not None else entries[:2]))
            return html.card(title, picture, caption, f"Line charts. {caption}", keys=keys)
        joined = {label: np.concatenate([context, x]) for label, x in after.items()}
        picture = svg(canvas.pictures(list(joined), list(joined.values()), now=past), name)
        caption = (
            f"{whole} The line marks where the forecast begins; before it all pictures show "
            "the same observed frames."
        )
        return html.card(title, picture, caption, f"Pictures, {canvas.what}. {caption}")


def _imputation(item: Arrays, index: int, canvas: Canvas) -> str:
    name, title = f"imputation-{index}", str(item["name"])
    whole, span = _span(item["data"], canvas)
    data, observed, mean = (item[key][:span] for key in ("data", "observed", "mean"))
    missing = f"{1 - observed.mean():.0%} of the values are missing"
    held_out = ~observed & np.isfinite(data)
    with theme():
        if canvas.lines:
            bounds = (
                (item["lower"][:span], item["upper"][:span]) if "lower" in item and "upper" in item else None
            )
            dims = choose_dims([np.where(observed, data, np.nan)], gaps=~observed)
            picture = svg(_against_data(data, observed, mean, dims, canvas, bounds, only_gaps=True), name)
            caption = (
                f"{whole}{_which(dims, data, 'those with the most gaps')} {missing} (shaded). "
                "In the gaps, the mean of the model"
            )
            caption += " and a band from its lower to its upper quantile." if bounds else "."
            keys = [("line", "ink", "observed"), ("line", "blue", "imputed")]
            keys += [("area", "blue", "between quantiles")] if bounds else []
            if held_out.any():
                caption += (
                    f" Root mean squared error {_rmse(data, mean, held_out)} over the "
                    "held-out values (dotted)."
                )
                keys.append(("dotted", "ink", "held out"))
            legend = html.legend(*keys, *_gap_key(observed))
            return html.card(title, picture, caption, f"Line charts. {caption}", keys=legend)
        if canvas.rolls:
            on = np.where(observed, np.nan_to_num(data), 0)
            rolls = [
                Roll("observed", notes=on, observed=observed),
                Roll("filled in", shade=np.where(observed, on, mean), observed=observed),
            ]
            picture = svg(images.piano_rolls(rolls, canvas.step, canvas.lowest_midi or 0), name)
        else:
            values = (np.where(observed, data, np.nan), np.where(observed, data, mean))
            picture = svg(canvas.pictures(("observed", "filled in"), values), name)
    caption = (
        f"{whole} {missing}. Above, what was observed; below, the gaps filled with the mean of the model."
    )
    return html.card(title, picture, caption, f"Two pictures, {canvas.what}. {caption}")


def _against_data(
    data: np.ndarray,
    observed: np.ndarray,
    mean: np.ndarray,
    dims: list[int],
    canvas: Canvas,
    bounds: Any = None,
    **options: Any,
) -> Any:
    time, labels = _time(len(data), canvas), canvas.label(dims)
    data, observed, mean = (a[:, dims] for a in (data, observed, mean))
    bounds = None if bounds is None else (bounds[0][:, dims], bounds[1][:, dims])
    return figures.against_data(time, data, observed, mean, labels, canvas.unit, bounds=bounds, **options)


def _span(x: np.ndarray, canvas: Canvas) -> tuple[str, int]:
    """A phrase on how much of a sequence is shown, and the number of frames that are."""
    span = min(len(x), canvas.frames)
    return (f"{len(x)} frames." if span == len(x) else f"The first {span} of {len(x)} frames."), span


def _time(frames: int, canvas: Canvas) -> np.ndarray:
    return np.arange(frames) * canvas.step


def _which(dims: list[int], x: np.ndarray, why: str = "those that vary most") -> str:
    return "" if len(dims) == x.shape[1] else f" {len(dims)} of {x.shape[1]} dimensions, {why}."


def _rmse(truth: np.ndarray, mean: np.ndarray, where: np.ndarray) -> str:
    return html.number(float(np.sqrt(np.mean((truth - mean)[where] ** 2)))) if where.any() else "not defined"


def _gap_key(observed: np.ndarray) -> list[tuple[str, str, str]]:
    return [] if observed.all() else [("bar", "gap", "not observed")]


def _clips(*clips: str) -> str:
    return f'<div class="clips">{"".join(clips)}</div>'


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-")
