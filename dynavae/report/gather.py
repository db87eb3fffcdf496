"""From a run directory to what `write_report` shows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dynavae import tasks
from dynavae.data import DataSplits
from dynavae.data.splits import SPLITS
from dynavae.models import KVAE
from dynavae.results import to_units
from dynavae.runs import Run
from dynavae.scan import scan
from dynavae.tasks.common import evaluating, noise


def gather(run: Run, split: str, sequences: int, horizon: int, samples: int, seed: int) -> dict[str, Any]:
    """Arguments of :func:`dynavae.report.write_report` for a run: everything recomputed from its best weights.

    Raises:
        ValueError: the data have no such split.
    """
    model, splits = run.model(), run.data()
    shown, note = shown_split(splits, split)
    chosen = splits.split(shown)
    rows = list(range(min(sequences, len(chosen))))
    batch = chosen.batch(rows)
    settings, binary = run.settings, splits.kind == "binary"
    reconstructed = tasks.reconstruct(model, batch, samples=8, seed=seed)
    smoothed = tasks.smooth(model, batch, samples=50, seed=seed)
    latents, reconstructions = [], []
    for i, array in enumerate(batch.arrays()):
        n = len(array)
        latents.append({"mean": smoothed.mean[i, :n].numpy(), "stddev": smoothed.stddev[i, :n].numpy()})
        reconstructions.append(
            {
                "name": f"{splits.name} {shown} {chosen.names[i]}",
                "data": array,
                "mean": reconstructed.mean[i, :n].numpy(),
                "observed": batch.observed[i, :n].numpy(),
            }
        )
    content: dict[str, Any] = {
        "title": f"{settings['model']} on {splits.name}",
        "setting": _setting(run),
        "scores": [_score(s) for s in run.scores()],
        "history": [{k: v for k, v in row.items() if k != "updates"} for row in run.history()],
        "kl_per_dim": kl_per_dimension(model, chosen, seed),
        "latents": latents,
        "reconstructions": reconstructions,
        "forecasts": forecasts(model, chosen, rows, horizon, samples, seed),
        "kind": "real" if binary and not model.emission.discrete else splits.kind,
        "meta": splits.meta,
        "log": [*run.notes(), *run.score_notes(), *note],
    }
    if not model.control_dim:
        length = int(np.median(chosen.lengths))
        content["samples"] = list(tasks.generate(model, 4, length, seed=seed).x.numpy())
    content["imputations"] = imputations(model, batch, seed)
    if isinstance(model, KVAE):
        content["dynamics"] = dynamics(model, chosen)
    if model.w_dim:
        content["log"] = [*content["log"], _sequence_latent(model, chosen, seed)]
    for found in ("reconstructions", "forecasts", "imputations"):
        content[found] = shown_in_units(splits, content[found])
    if "samples" in content:
        content["samples"] = [to_units(splits, x) for x in content["samples"]]
    return content


def shown_split(splits: DataSplits, split: str) -> tuple[str, list[str]]:
    """The split that pictures show, and a sentence if it is another than asked: data without test show what they have.

    Raises:
        ValueError: there is no such split.
    """
    if split == SPLITS[-1] and split not in splits.available:
        instead = splits.available[-1]
        return instead, [f"the data have no {split} split: pictures show {instead}."]
    splits.split(split)
    return split, []


VALUES = ("data", "mean", "context", "truth", "samples", "lower", "upper")
"""What is shown in the units of the data."""


def shown_in_units(splits: DataSplits, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reconstructions, forecasts or imputations in the units of the data."""
    return [
        {k: to_units(splits, v) if k in VALUES and v is not None else v for k, v in item.items()}
        for item in items
    ]


SAID_ELSEWHERE = ("model", "density", "weights_sha256")
"""What the table of scores need not say: the page is about one model with its best weights."""


def _score(score: dict[str, Any]) -> dict[str, Any]:
    shown = {k: v for k, v in score.items() if k not in SAID_ELSEWHERE and v not in (None, "")}
    if "kl" not in shown:
        shown["kl"] = "does not apply"
    return {**shown, "measure": score.get("density")}


def _setting(run: Run) -> dict[str, Any]:
    s = run.settings
    return {
        "model": s["model"],
        "data": s["data"]["name"],
        "parameters": s["parameters"],
        "seed": s["seed"],
        "training time": f"{s.get('seconds', float('nan')):.0f} s",
        "options": s["options"],
        "training": {k: v for k, v in s["training"].items() if v is not None},
        "data set": {"sha256": s["data"]["sha256"], "kind": s["data"]["kind"], **s["data"]["splits"]},
        "environment": s["environment"],
    }


def kl_per_dimension(model: Any, chosen: Any, seed: int) -> np.ndarray | None:
    """KL of each latent coordinate, nats per frame, over at most 64 sequences."""
    rows = list(range(min(64, len(chosen))))
    with evaluating(model):
        batch = chosen.batch(rows)
        run = scan(model, batch, noise=noise(model, batch, 1, seed, rows))
        if run.kl is None or run.kl.shape[-1] != model.z_dim or model.discrete_latent:
            return None
        return (run.kl.sum((0, 1, 2)) / batch.frames).cpu().numpy()


def forecasts(
    model: Any, chosen: Any, rows: list[int], horizon: int, samples: int, seed: int
) -> list[dict[str, Any]]:
    """The last `horizon` frames of each sequence from those before them."""
    out = []
    for i in rows:
        array = chosen.batch([i])
        context = array.steps - horizon
        if context < 1 or not bool(array.observed[:, :context].any()):
            continue
        control = array.control
        future = tasks.forecast(model, array, horizon, context, samples, control=control, seed=seed)
        values = array.arrays()[0]
        out.append(
            {
                "name": chosen.names[i],
                "context": values[:context],
                "truth": values[context:],
                "samples": future.samples[:, 0].numpy(),
            }
        )
    return out


def imputations(model: Any, batch: Any, seed: int, samples: int = 100) -> list[dict[str, Any]]:
    """The gaps filled; where nothing is missing, a gap is made: the second quarter of each sequence."""
    known = batch.arrays()
    if batch.complete:
        t = torch.arange(batch.steps)
        gap = (t >= batch.lengths[:, None] // 4) & (t < batch.lengths[:, None] // 2)
        batch = batch.hide(gap.unsqueeze(-1).expand_as(batch.x))
    filled = tasks.impute(model, batch, samples=samples, seed=seed)
    low, high = filled.quantile(0.05), filled.quantile(0.95)
    out = []
    for i, array in enumerate(known):
        n = len(array)
        out.append(
            {
                "name": batch.names[i],
                "data": array,
                "observed": filled.observed[i, :n].numpy(),
                "mean": filled.x[i, :n].numpy(),
                "lower": low[i, :n].numpy(),
                "upper": high[i, :n].numpy(),
            }
        )
    return out


def dynamics(model: KVAE, chosen: Any) -> dict[str, Any]:
    """The first sequence with its middle hidden: what the filter, the smoother and the dynamics alone make of it."""
    one = chosen.batch([0])
    t = torch.arange(one.steps)
    start, stop = min(4, one.steps // 2), max(one.steps - 4, one.steps // 2 + 1)
    gap, rest = (t >= start) & (t < stop), t >= start
    seen, begun = (one.hide(h[:, None].expand_as(one.x[0]).unsqueeze(0)) for h in (gap, rest))
    whole, states, ahead = (model.states(b) for b in (one, seen, begun))
    strips = {
        "truth": one.arrays()[0],
        "seen": seen.arrays()[0],
        **{
            title: model.decoded(a)[0].cpu().numpy()
            for title, a in (
                ("filtered", states.filtered_a),
                ("smoothed", states.smoothed_a),
                ("generated", ahead.filtered_a),
            )
        },
    }
    many = model.states(chosen.batch(range(min(200, len(chosen)))))
    keep = ~many.a.isnan().any(-1)
    return {
        "strips": strips,
        "hidden": gap.numpy(),
        "encoded": whole.a[0].numpy(),
        "filtered": states.filtered_a[0].numpy(),
        "smoothed": states.smoothed_a[0].numpy(),
        "points": many.a[keep].numpy() if model.z_dim == 2 and model.mixtures > 1 else None,
        "weights": many.weights[keep].numpy(),
    }


def _sequence_latent(model: Any, chosen: Any, seed: int) -> str:
    """What the latent of the sequence carries, in a sentence."""
    rows = list(range(min(64, len(chosen))))
    with evaluating(model):
        batch = chosen.batch(rows)
        run = scan(model, batch, noise=noise(model, batch, 1, seed, rows))
    if run.kl_w is None:
        return f"The latent w of each sequence has {model.w_dim} dimensions; its KL has no closed form."
    nats = float(run.kl_w.sum()) / len(rows)
    return (
        f"The latent w of each sequence ({model.w_dim} dimensions) carries {nats:.2f} nats per sequence, "
        f"{float(run.kl_w.sum()) / batch.frames:.4f} per frame, beside the KL per dimension of z."
    )
