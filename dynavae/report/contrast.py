"""The sections of a comparison that set runs against each other: scores, settings, training, KL, notes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dynavae.report import html, overlays
from dynavae.report.html import Section
from dynavae.report.sections import ACTIVE_NATS, METRICS, finite, score_cell, score_title, split_of
from dynavae.report.theme import svg, theme

if TYPE_CHECKING:
    from dynavae.report.compare import Compared

Question = tuple[Any, ...]

# key of a score, its name in the table; together they are what a number answers
ASKED = (
    ("data", "data"),
    ("data_sha256", "data, SHA-256"),
    ("split", "split"),
    ("frames", "frames"),
    ("sequences", "sequences"),
    ("first_frame", "first frame"),
    ("bound", "bound"),
    ("particles", "particles K"),
    ("resampling", "resampling"),
    ("density", "density or mass"),
    ("scaling", "values standardised"),
    ("data_options", "options of the data"),
)
CURVES = {
    "nats_per_frame": ("valid", "train"),
    "kl_per_frame": ("valid",),
    "active_units": ("valid",),
    "grad_norm": ("",),
    "frames_per_second": ("",),
    "kl_weight": ("",),
    "lr": ("",),
}
"""Metrics that are overlaid, and of which splits; the rest is in the report of each run."""
ENVIRONMENT = ("dynavae", "torch", "python", "system", "cores", "threads", "gpu")


# --- scores ------------------------------------------------------------------------------------------------


def questions(runs: Sequence[Compared]) -> dict[Question, dict[int, dict[str, Any]]]:
    """{what was asked: {run: its score}}; those that most runs answer first."""
    found: dict[Question, dict[int, dict[str, Any]]] = {}
    for run in runs:
        for score in run.scores:
            asked = {**score, "particles": None} if score.get("bound") == "exact" else score
            found.setdefault(tuple(asked.get(key) for key, _ in ASKED), {})[run.index] = asked
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def tiles(runs: Sequence[Compared]) -> list[str]:
    """The score of each run in the question that most runs answer."""
    asked = next(iter(questions(runs).values()), {})
    out = []
    for run in runs:
        score = asked.get(run.index)
        figure = html.fixed(float(score["nats_per_frame"]), 3) if score else "–"
        label = f"{run.name}: {score_title(score)}" if score else f"{run.name}: not scored like the others"
        out.append(html.tile(figure, "nats per frame" if score else "", label, overlays.mark(run.index).role))
    return out


def score_section(runs: Sequence[Compared]) -> Section:
    """A column for each question, a row for each run: only numbers of one column may be compared."""
    asked = questions(runs)
    without = [run.name for run in runs if not run.scores]
    lead = (
        "Minus a bound on log p(x), in nats per frame: lower is better. Each column is one question, and only the "
        "numbers of one column may be compared; ≠ marks what sets a column apart from the first. One training run "
        "each: what another seed would change is not in these numbers. Large: total nats / total frames; then the distance "
        "to the lowest of the column, the mean over sequences, and the seed of the noise of the bound."
    )
    if without:
        lead += f" Not scored yet: {', '.join(without)} (dynavae evaluate RUN)."
    if not asked:
        return Section("scores", "Scores", lead, "")
    first = next(iter(asked))
    heads = ["", *(html.escape(score_title(next(iter(answers.values())))) for answers in asked.values())]
    rows = [
        ("main", run_name(run), [_number(run.index, answers) for answers in asked.values()]) for run in runs
    ]
    rows.append(("", "may be compared", [_verdict(answers, len(runs)) for answers in asked.values()]))
    for place, (key, name) in enumerate(ASKED):
        if not any(question[place] for question in asked):
            continue
        cells = []
        for question, answers in asked.items():
            answer = next(iter(answers.values()))
            cell = "–" if answer.get(key) in (None, "") else score_cell(answer, key, True)
            differs = question[place] != first[place] and None not in (question[place], first[place])
            differs &= "" not in (question[place], first[place])
            cells.append(f'<mark title="differs from the first column">≠</mark> {cell}' if differs else cell)
        rows.append(("", name, cells))
    return Section("scores", "Scores", lead, html.table(heads, rows, "Scores of all runs"))


def _number(index: int, answers: Mapping[int, dict[str, Any]]) -> str:
    if index not in answers:
        return '<span class="none">not scored</span>'
    score = answers[index]
    value = float(score["nats_per_frame"])
    lowest = min(float(s["nats_per_frame"]) for s in answers.values())
    number = html.fixed(value, 4)
    if len(answers) == 1:
        shown = f'<span class="alone">{number}</span>'
    elif value == lowest:
        shown = f'<strong title="lowest of this column">{number}</strong>'
    else:
        shown = f'<span class="plain">{number}</span>'
    more = [] if value == lowest else [f"+{html.fixed(value - lowest, 4)}"]
    if score.get("nats_per_frame_by_sequence") is not None:
        more.append(f"by sequence {html.fixed(float(score['nats_per_frame_by_sequence']), 4)}")
    if score.get("nats_per_frame_in_units") is not None and score.get("standardized"):
        more.append(f"in units of the file {html.fixed(float(score['nats_per_frame_in_units']), 4)}")
    noise = [f"KL {score['kl']}"] if score.get("kl") else []
    noise += [f"seed {score['seed']}"] if score.get("seed") is not None else []
    more += [", ".join(noise)] if noise else []
    return shown + "".join(f"<small>{html.escape(text)}</small>" for text in more)


def _verdict(answers: Mapping[int, Any], runs: int) -> str:
    if len(answers) == 1:
        return "<mark>no: one run only</mark>"
    return "all runs" if len(answers) == runs else f"{len(answers)} of {runs} runs"


# --- settings ----------------------------------------------------------------------------------------------


def setting_section(runs: Sequence[Compared]) -> Section:
    """What differs between run.json files, named as the command line names it."""
    flat = [dict(_settings(run.settings)) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    shared = [key for key in keys if all(key in settings for settings in flat)]
    differing = [key for key in shared if len({repr(settings[key]) for settings in flat}) > 1]
    only = [key for key in keys if key not in shared]
    heads = ["", *(run_name(run) for run in runs)]

    def table(chosen: Sequence[str], caption: str) -> str:
        rows = [
            ("wrap", f"<code>{html.escape(key)}</code>", [_setting(settings, key) for settings in flat])
            for key in chosen
        ]
        return html.table(heads, rows, caption)

    lead = f"What differs; {len(shared) - len(differing)} further settings agree in all runs."
    body = table(differing, "Settings that differ") if differing else ""
    if only:
        what = f"{len(only)} options that only some of these models have"
        body += f"<details><summary>{what}</summary>{table(only, what)}</details>"
    return Section("settings", "Differing settings", lead, body)


def _settings(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """run.json as flat options; versions and hardware at the end."""
    data = settings["data"]
    yield "model", settings["model"]
    yield "parameters", settings.get("parameters")
    yield "data", data["name"]
    yield "data_sha256", data.get("sha256")
    for split, what in data.get("splits", {}).items():
        yield f"data, {split}", what
    yield from sorted((f"data, {key}", value) for key, value in data.get("options", {}).items())
    yield "seed", settings.get("seed")
    yield "seconds of training", settings.get("seconds")
    for key, value in settings["options"].items():
        yield f"model.{key}", value
    yield from settings["training"].items()
    for key in ENVIRONMENT:
        yield key, settings.get("environment", {}).get(key)


def _setting(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return '<span class="none">–</span>'
    value = settings[key]
    return f"<code>{value[:12]}…</code>" if key == "data_sha256" and value else html.value(value)


# --- training ----------------------------------------------------------------------------------------------


def history_section(runs: Sequence[Compared]) -> Section | None:
    """A chart for each quantity of `CURVES`, a line for each run; nats of different data in charts apart."""
    several = len({_data(run) for run in runs}) > 1
    cards = []
    for metric, splits in CURVES.items():
        for split in splits:
            charts: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
            for run in runs:
                points = _points(run.history, metric, split)
                if len(points):
                    apart = _data(run) if several and metric == "nats_per_frame" else ""
                    charts.setdefault(apart, []).append((run.index, *points.T))
            everything = [y for lines in charts.values() for _, _, y in lines]
            if metric in ("kl_weight", "lr") and len({float(v) for y in everything for v in y}) == 1:
                continue  # a constant on which all agree
            cards += [_curves(metric, split, apart, lines, runs) for apart, lines in charts.items()]
    if not cards:
        return None
    lead = "Recorded in training, a line for each run. Dots mark smallest values."
    if several:
        lead += (
            " Bounds have charts apart where the data, or density and mass, differ: their heights do not "
            "compare."
        )
    return Section("training", "Training", lead, f'<div class="cards">{"".join(cards)}</div>')


def _points(history: Sequence[Mapping[str, float]], metric: str, split: str) -> np.ndarray:
    """(epoch, value), (points, 2), of what was recorded and is finite."""
    found = [
        (row["epoch"], row[key])
        for row in history
        for key in row
        if split_of(key) == (split, metric) and finite(row[key])
    ]
    return np.array(sorted(found), dtype=float)


def _curves(
    metric: str,
    split: str,
    apart: str,
    lines: Sequence[tuple[int, np.ndarray, np.ndarray]],
    runs: Sequence[Compared],
) -> str:
    name = METRICS.get(metric, metric.replace("_", " "))
    title = " · ".join(part for part in (name, split, apart) if part)
    smallest = metric == "nats_per_frame" and split == "valid"
    with theme():
        drawing = overlays.curves(lines, "epoch", name, smallest)
        picture = svg(drawing, f"compare-{metric}-{split}-{apart}")
    said = []
    for index, x, y in lines:
        best = int(np.argmin(y))
        said.append(
            f"{runs[index].name} {html.number(y[best])} at epoch {html.number(x[best])} of {html.number(x[-1])}"
            if smallest
            else f"{runs[index].name} {html.number(y[-1])}"
        )
    caption = f"{'Smallest' if smallest else 'Last'} values: {'; '.join(said)}."
    keys = overlays.legend([(index, runs[index].name) for index, *_ in lines])
    return html.card(title, picture, caption, f"Line chart of {title}. {caption}", keys=keys, wide=False)


def _data(run: Compared) -> str:
    """What a bound in nats depends on, beside the model."""
    return f"{run.data} {str(run.settings['data'].get('sha256') or '')[:8]}, {run.measure}"


# --- latents and notes -------------------------------------------------------------------------------------


def kl_section(runs: Sequence[Compared]) -> Section | None:
    """KL of the latent dimensions, sorted, a line for each run."""
    with_kl = [(run, run.kl) for run in runs if run.kl is not None]
    if not with_kl:
        return None
    with theme():
        lines = [(run.index, kl) for run, kl in with_kl]
        drawing = overlays.ranked(lines, "nats per frame", "latent dimensions, in order of KL", ACTIVE_NATS)
        picture = svg(drawing, "compare-kl")
    active = "; ".join(
        f"{run.name} {html.number(kl.sum())} nats per frame, {int((kl > ACTIVE_NATS).sum())} of {len(kl)} active"
        for run, kl in with_kl
    )
    caption = (
        f"KL from prior to posterior of each latent dimension, largest first; active: above {ACTIVE_NATS} nats per frame "
        f"(dashed grey); what is below a tenth of that is drawn there. {active}."
    )
    keys = overlays.legend([(run.index, run.name) for run, _ in with_kl])
    card = html.card("KL per latent dimension", picture, caption, f"Line chart. {caption}", keys=keys)
    lead = "What the latent variables carry. Models with different latents use them differently: more is not better."
    return Section("kl", "KL per dimension", lead, f'<div class="cards">{card}</div>')


def note_section(runs: Sequence[Compared]) -> Section | None:
    """What was said during training, by run."""
    items = "".join(
        f"<li><strong>{html.escape(run.name)}</strong>: {html.escape(note)}</li>"
        for run in runs
        for note in run.notes
    )
    return Section("notes", "Notes", "", f'<ul class="card notes">{items}</ul>') if items else None


def run_name(run: Compared) -> str:
    """The name of a run with its colour."""
    look = overlays.mark(run.index)
    return f'<i class="key {look.shape}" style="color:var(--{look.role})"></i>{html.escape(run.name)}'
