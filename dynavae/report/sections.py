"""The sections of a report that describe the run: setting, scores, training, latents, notes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dynavae.report import figures, html
from dynavae.report.html import Section
from dynavae.report.theme import svg, theme

ACTIVE_NATS = 0.01  # a latent dimension is active if its KL per frame exceeds this
LATENT_DIMS = 6
LATENT_SEQUENCES = 3
SPLITS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
CLOCKS = ("epoch", "step", "seconds", "time", "elapsed")

BOUNDS = {"elbo": "ELBO", "iwae": "IWAE", "fivo": "FIVO", "exact": "exact log-likelihood"}
# key of a score, its name in the table, whether its absence is pointed out
SCORE_FIELDS = (
    ("nats_per_frame", "nats per frame, over all frames", True),
    ("nats_per_frame_by_sequence", "nats per frame, mean of sequences", True),
    ("nats_total", "nats in total", False),
    ("bound", "bound", True),
    ("particles", "particles K", True),
    ("kl", "KL, analytic or sampled", True),
    ("measure", "density or mass", True),
    ("first_frame", "first frame scored", True),
    ("frames", "frames", True),
    ("sequences", "sequences", True),
    ("split", "split", True),
    ("data", "data", False),
    ("data_sha256", "data, SHA-256", True),
    ("seed", "seed", True),
)
METRICS = {
    "nats_per_frame": "nats per frame",
    "kl_per_frame": "KL, nats per frame",
    "kl_weight": "weight of the KL",
    "lr": "learning rate",
}


def setting_section(setting: Mapping[str, Any]) -> Section | None:
    """What was run: single values in a card of their own, each group of values in another."""
    if not setting:
        return None
    single = {key: entry for key, entry in setting.items() if not isinstance(entry, Mapping)}
    groups = {key: entry for key, entry in setting.items() if isinstance(entry, Mapping) and entry}
    cards = [html.definitions("run", single)] if single else []
    cards += [
        html.definitions(str(key).replace("_", " "), entry, as_code=str(key) in ("options", "config"))
        for key, entry in groups.items()
    ]
    return Section("setting", "Setting", "", f'<div class="cards">{"".join(cards)}</div>')


def score_title(score: Mapping[str, Any]) -> str:
    """A score in short: its split, its bound and the number of particles."""
    bound = str(score.get("bound", "bound not stated"))
    parts = [str(score.get("split") or score.get("data") or ""), BOUNDS.get(bound, bound)]
    title = " · ".join(part for part in parts if part)
    particles = score.get("particles")
    return f"{title}, K = {particles}" if particles and bound != "exact" else title


def score_section(scores: Sequence[Mapping[str, Any]], kind: str) -> Section | None:
    """The scores as a table, one column each, with everything that a comparison needs to know."""
    if not scores:
        return None
    measure = "mass" if kind in ("binary", "categorical") else "density"
    scores = [{"measure": measure, **score} for score in scores]
    known = {key for key, _, _ in SCORE_FIELDS}
    others = dict.fromkeys(key for score in scores for key in score if key not in known)
    rows = [
        (
            "main" if key.startswith("nats_per_frame") else "",
            name,
            [score_cell(score, key, required) for score in scores],
        )
        for key, name, required in SCORE_FIELDS
        if required or any(key in score for score in scores)
    ]
    rows += [
        ("", html.escape(str(key).replace("_", " ")), [score_cell(score, key, False) for score in scores])
        for key in others
    ]
    heads = ["", *(html.escape(score_title(score)) for score in scores)]
    lead = (
        "A score is the negative of a bound on log p(x), in nats per frame: lower is better. "
        "Compare two scores only where bound, "
        "K, average, first frame, density or mass and data agree."
    )
    if measure == "density":
        lead += (
            " The data are continuous: the score is that of a density, depends on their units "
            "and may be negative."
        )
    return Section("scores", "Scores", lead, html.table(heads, rows, "Scores of this run"))


def score_cell(score: Mapping[str, Any], key: str, required: bool) -> str:
    if key not in score:
        return '<span class="none">not stated</span>' if required else ""
    entry = score[key]
    if entry is None:
        return '<span class="none">none</span>'
    if key == "bound":
        return html.escape(BOUNDS.get(str(entry), entry))
    if key.startswith("nats") and isinstance(entry, int | float | np.number):
        return html.fixed(float(entry), 1 if key == "nats_total" else 4)
    if isinstance(entry, str) and html.HASH.fullmatch(entry):
        return f'<code title="{entry}">{entry[:12]}…</code>'
    if not isinstance(entry, str | Mapping) and isinstance(entry, Iterable):
        values = list(entry)
        return f"{len(values)} values" if len(values) > 6 else html.value(values)
    return html.value(entry)


def history_section(history: Sequence[Mapping[str, Any]]) -> Section | None:
    """A chart for each quantity that was recorded, with a line for each split."""
    clock = next((key for key in CLOCKS if any(finite(row.get(key)) for row in history)), None)
    metrics: dict[str, dict[str, list[tuple[float, float]]]] = {}
    left_out: dict[str, int] = {}
    for index, row in enumerate(history):
        x: Any = row.get(clock) if clock else index
        if not finite(x):
            continue
        for key, y in row.items():
            if key in CLOCKS or not isinstance(y, int | float | np.number) or isinstance(y, bool):
                continue
            split, metric = split_of(key)
            if finite(y):
                metrics.setdefault(metric, {}).setdefault(split, []).append((float(x), float(y)))
            else:
                left_out[metric] = left_out.get(metric, 0) + 1
    cards = [
        _curve_card(metric, metrics[metric], clock or "row", left_out.get(metric, 0))
        for metric in sorted(metrics, key=priority)
    ]
    if not cards:
        return None
    lead = "One chart for each quantity recorded in training. A dot marks the smallest validation value."
    return Section("training", "Training", lead, f'<div class="cards">{"".join(cards)}</div>')


def _curve_card(metric: str, points: dict[str, list[tuple[float, float]]], clock: str, left_out: int) -> str:
    series = {}
    for split in sorted(
        points, key=lambda s: list(figures.SPLIT_COLOURS).index(s) if s in figures.SPLIT_COLOURS else 9
    ):
        x, y = np.array(sorted(points[split])).T
        series[split] = (x, y)
    name = METRICS.get(metric, metric.replace("_", " "))
    minimised = any(word in metric for word in ("nats", "loss", "nll"))
    mark = "valid" if minimised and "valid" in series else None
    with theme():
        picture = svg(figures.curve(series, clock, name, mark), f"curve-{metric}")
    words = {"train": "train", "valid": "valid", "test": "test", "": "value"}
    keys = [("line", _colour(split), words[split]) for split in series]
    trends = []
    for split, (x, y) in series.items():
        change = f"from {html.number(y[0])} to {html.number(y[-1])}" if len(y) > 1 else html.number(y[0])
        trend = f"{split}: {change}" if split else change
        if split == mark:
            trend += f", smallest {html.number(y.min())} at {clock} {html.number(x[int(np.argmin(y))])}"
        trends.append(trend)
    caption = f"{name[0].upper()}{name[1:]} by {clock}; {'; '.join(trends)}."
    if left_out:
        caption += (
            f" {left_out} {'value was' if left_out == 1 else 'values were'} NaN or infinite and left out."
        )
    legend = html.legend(*keys) if list(series) != [""] else ""
    return html.card(name, picture, caption, f"Line chart. {caption}", keys=legend, wide=False)


def _colour(split: str) -> str:
    return {"train": "blue", "valid": "orange", "test": "green"}.get(split, "purple")


def split_of(key: str) -> tuple[str, str]:
    """("valid", "loss") of "valid/loss", "val_loss" or "valid.loss"; ("", key) of any other key."""
    for separator in ("/", "_", "."):
        head, found, tail = key.partition(separator)
        if found and tail and head in SPLITS:
            return SPLITS[head], tail
    return "", key


def priority(metric: str) -> tuple[int, str]:
    """Scores first, then the loss, the KL, the rest, and the schedules."""
    if metric in ("kl_weight", "lr"):
        return 4, metric
    return next(
        (
            i
            for i, word in enumerate(("nats_per_frame", "loss", "kl"))
            if word in metric and (i or "kl" not in metric)
        ),
        3,
    ), metric


def finite(x: object) -> bool:
    return isinstance(x, int | float | np.number) and not isinstance(x, bool) and bool(np.isfinite(x))


def kl_section(kl_per_dim: np.ndarray) -> Section:
    """KL per latent dimension as bars, and the count of active units."""
    active = int((kl_per_dim > ACTIVE_NATS).sum())
    with theme():
        picture = svg(figures.kl_bars(kl_per_dim, ACTIVE_NATS), "kl")
    count = f"{active} of {len(kl_per_dim)} dimensions are active"
    caption = (
        "KL from prior to posterior of each latent dimension, in nats per frame, largest first; "
        f"{html.number(kl_per_dim.sum())} "
        f"nats per frame in all. {count}: their KL exceeds {ACTIVE_NATS} nats per frame (dashed line). "
        "The chart of active units in training counts something else: coordinates whose posterior mean varies "
        "(variance above 0.01), which a prior that moves also causes."
    )
    keys = html.legend(
        ("bar", "blue", "active"), ("bar", "muted", "inactive"), ("dashed", "orange", "threshold")
    )
    top = int(np.argmax(kl_per_dim))
    alt = (
        f"Bar chart. {count}; the largest KL is {html.number(kl_per_dim[top])} nats per frame, of "
        f"dimension {top}."
    )
    card = html.card(f"{active} active units of {len(kl_per_dim)}", picture, caption, alt, keys=keys)
    body = f'<div class="cards">{card}</div>'
    lead = "What the latent variables carry: how far the posterior moves away from the prior."
    return Section("kl", "KL per dimension", lead, body)


def latent_section(
    latents: Sequence[tuple[np.ndarray, np.ndarray]],
    kl_per_dim: np.ndarray | None,
    frame_seconds: float | None,
) -> Section:
    """Posterior means over time of the most active dimensions, with two standard deviations."""
    activity = kl_per_dim
    if activity is None:
        activity = np.mean([mean.var(0) for mean, _ in latents], axis=0)
    dims = np.argsort(-activity, kind="stable")[:LATENT_DIMS].tolist()
    by = "variance of their mean" if kl_per_dim is None else "KL"
    cards = []
    for index, (mean, stddev) in enumerate(latents[:LATENT_SEQUENCES]):
        time = np.arange(len(mean)) * (frame_seconds or 1.0)
        with theme():
            unit = "time (s)" if frame_seconds else "frame"
            picture = svg(figures.latents(time, mean, stddev, dims, unit), f"latents-{index}")
        caption = (
            f"Posterior mean of z over {len(mean)} frames and a band of two standard deviations on "
            f"either side: the {len(dims)} "
            f"of {mean.shape[1]} dimensions with the largest {by}."
        )
        alt = f"Line charts of latent dimensions {', '.join(map(str, dims))}. {caption}"
        keys = html.legend(("line", "blue", "posterior mean"), ("area", "blue", "± 2 standard deviations"))
        cards.append(html.card(f"sequence {index}", picture, caption, alt, keys=keys))
    lead = "What the model infers about the hidden sequence, frame by frame."
    if len(latents) > LATENT_SEQUENCES:
        lead += f" The first {LATENT_SEQUENCES} of {len(latents)} sequences."
    return Section("latents", "Latent trajectories", lead, f'<div class="cards">{"".join(cards)}</div>')


def note_section(log: Sequence[object]) -> Section | None:
    """The notes of the run, one line each."""
    if not log:
        return None
    items = "".join(f"<li>{html.escape(note)}</li>" for note in log)
    return Section("notes", "Notes", "", f'<ul class="card notes">{items}</ul>')
