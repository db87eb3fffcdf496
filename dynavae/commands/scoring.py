"""`dynavae evaluate`: the bounds of a run."""

from __future__ import annotations

from typing import Any

from dynavae import results, tasks
from dynavae.commands.checks import check_numbers, parse_bound
from dynavae.files import write_json
from dynavae.model import SequentialLVM
from dynavae.runs import Run, table


def evaluate(
    run: str,
    bounds: list[str] | None = None,
    data: str | None = None,
    split: str = "test",
    batch_size: int = 64,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """Score a run: `bounds` such as elbo, iwae-100, fivo-64, exact. Writes score.json and scores.json.

    Scores of the same weights that answer other questions stay in scores.json; those of earlier weights do not.

    Args:
        run: run directory, made by dynavae fit --out; or a saved model, with `data`.
        bounds: such as [elbo, iwae-100, fivo-64, exact]; a number is how many particles.
        data: another data set or file; default: that of the run.
        split: which part of the data.
        batch_size: sequences at a time.
        seed: of the noise.
        device: auto (a GPU, if torch sees one), cpu, cuda or cuda:1.
    """
    check_numbers(batch_size=batch_size, seed=seed)
    asked = {text: parse_bound(text) for text in bounds or []}
    opened = Run.open(run, exported=True)
    weights = opened.weights_sha256()
    net, splits = opened.model(device), opened.data(data)
    asked = asked or {text: parse_bound(text) for text in _all_bounds(net)}
    found = []
    for text, (bound, particles) in asked.items():
        kl = "sample" if net.exact else "auto"
        scored = tasks.score(
            net, splits, bound, particles, split=split, kl=kl, batch_size=batch_size, seed=seed
        ).to_dict()
        scored = {**results.in_units(scored, splits, split), "weights_sha256": weights}
        found.append(scored)
        print(f"  {text}: {scored['nats_per_frame']:.4f} nats per frame", flush=True)
    write_json(opened.directory / "score.json", found[0])
    others = [s for s in opened.scores() if not any(_same_question(s, f) for f in found)]
    write_json(opened.directory / "scores.json", found + others)
    columns = [
        "model",
        "data",
        "split",
        "bound",
        "particles",
        "nats_per_frame",
        "nats_per_frame_by_sequence",
        "frames",
        "sequences",
        "first_frame",
    ]
    if splits.schema is not None and splits.schema.standardized:
        columns.insert(6, "nats_per_frame_in_units")
        print("  nats_per_frame: of standardised values; nats_per_frame_in_units: in the units of the file")
    return (
        table(found, columns) + f"\nwritten to {opened.directory}: score.json (the first), scores.json (all)"
    )


def _all_bounds(net: SequentialLVM) -> list[str]:
    """Those that say something of a model, where none was asked for."""
    exact = ["exact"] if net.exact else []
    return [*exact, "elbo", "iwae-100", *(["fivo-64"] if net.per_step_likelihood else [])]


def _same_question(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a.get(k) == b.get(k) for k in ("bound", "particles", "split", "data_sha256"))
