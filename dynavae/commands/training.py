"""`dynavae fit`: a model for some data, trained into a run directory."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from dynavae import data as datasets
from dynavae.commands.checks import check_numbers
from dynavae.data import DataSplits
from dynavae.model import SequentialLVM
from dynavae.models import MODELS
from dynavae.parallel import main_process
from dynavae.resume import unfinished
from dynavae.runs import Run, check_accelerator, environment, table

EMISSION_OF_KIND = {
    "binary": "bernoulli",
    "real": "gaussian",
    "power": "power_spectrum",
    "categorical": "categorical",
}


def build(model: str, options: dict[str, Any], splits: DataSplits) -> SequentialLVM:
    """A model for this data: sizes and, unless given, the emission follow from it."""
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; choose one of {', '.join(MODELS)}.")
    known = inspect.signature(MODELS[model]).parameters
    options = {**options, "x_dim": splits.x_dim}
    if splits.control_dim:
        if "control_dim" not in known:
            raise ValueError(
                f"{model} takes no controls, but {splits.name} has {splits.control_dim}; choose another model."
            )
        options["control_dim"] = splits.control_dim
    if "emission" in known and "emission" not in options:
        emission: Any = EMISSION_OF_KIND[splits.kind]
        if splits.kind == "categorical":
            classes = int(max(np.nanmax(x) for x in splits.split(splits.available[0]).x)) + 1
            emission = {"emission": "categorical", "classes": classes}
        options["emission"] = emission
    return MODELS[model](**options)


def fit(
    model: str,
    options: dict[str, Any],
    data: str,
    out: str,
    seed: int = 0,
    threads: int | None = None,
    data_options: dict[str, Any] | None = None,
    preset: str | None = None,
    **training: Any,
) -> str:
    """Train a model on the train split, keep the weights that are best on the valid split."""
    from dynavae import training as trainer
    from dynavae.loss import default_objective

    check_numbers(threads=threads, seed=seed, split_seed=(data_options or {}).get("seed"))
    check_accelerator(training.get("accelerator", "auto"))
    if threads is not None:
        torch.set_num_threads(threads)
    if training.get("resume") is None and unfinished(out) and main_process():
        raise FileExistsError(
            f"there is a run in {out} already: continue it with --resume true, replace it with --resume false, "
            "or choose another --out."
        )
    splits = datasets.load(data, **(data_options or {}))
    torch.manual_seed(seed)
    net = build(model, options, splits)
    if training.get("objective") is None:
        training["objective"] = default_objective(net, **training)
    settings = {
        "model": model,
        "options": net.config,
        "parameters": sum(p.numel() for p in net.parameters()),
        "data": {
            "source": data,
            "options": data_options or {},
            "name": splits.name,
            "kind": splits.kind,
            "sha256": splits.sha256,
            "splits": {
                s: f"{len(splits.split(s))} sequences, {splits.split(s).frames} frames"
                for s in splits.available
            },
            **{key: splits.meta[key] for key in ("split", "step", "schema") if key in splits.meta},
        },
        "training": {k: v for k, v in training.items() if k not in ("progress", "resume")},
        "seed": seed,
        "threads": threads,
        "preset": preset,
        "environment": environment(),
    }
    if main_process():
        Run.create(out, settings)
        print(
            f"{model}, {settings['parameters']:,} parameters, on {splits.name}: {settings['data']['splits']}"
        )
        for line in describe(splits):
            print(line)
    result = trainer.fit(net, splits.split("train"), splits.valid, out_dir=out, seed=seed, **training)
    if not main_process():
        return ""
    settings |= {"seconds": round(result.seconds, 1), "best": result.best, "notes": list(result.notes)}
    Run.create(out, settings)
    columns = {
        "best epoch": "epoch",
        "valid nats/frame": "valid/nats_per_frame",
        "valid kl/frame": "valid/kl_per_frame",
        "active units": "valid/active_units",
        "train nats/frame": "train/nats_per_frame",
    }
    row = {
        "model": model,
        **{k: result.best.get(v) for k, v in columns.items()},
        "seconds": round(result.seconds),
    }
    return table([row]) + f"\nwritten to {out}"


def describe(splits: DataSplits) -> list[str]:
    """What was understood of a table, in a few lines."""
    schema = splits.schema
    if schema is None:
        return []
    x = np.concatenate([x for s in splits.available for x in splits.split(s).x])
    controls = f"; controls {', '.join(schema.controls)}" if schema.controls else ""
    grid = splits.meta.get("step", "rows in order")
    scaled = "standardised by the training part" if schema.standardized else "as they are"
    return [
        f"  columns {', '.join(schema.columns)}{controls}; ids {schema.id_column or '-'}, times {schema.time_column or '-'}",
        f"  grid {grid}, {100 * np.isnan(x).mean():.1f} % missing; split {splits.meta.get('split', '-')}; values {scaled}",
    ]
