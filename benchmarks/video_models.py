"""The models that `benchmarks/kvae.py` compares, the settings that its search tries, and their training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import dynavae
from dynavae.data import DataSplits

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "kvae"
SEARCH = ROOT / "benchmarks" / "results" / "kvae_search.json"

NETS: dict[str, Any] = dict(emission="bernoulli", activation="relu")
FRAMES: dict[str, Any] = dict(x_layers=(256, 128), decoder_layers=(128, 256), **NETS)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "KVAE": ("KVAE", dict(layers=(256, 128), **NETS)),
    "KVAE, convolutions": (
        "KVAE",
        dict(image=(32, 32), layers=(32, 32, 32), decoder_layers=(32, 32, 32), **NETS),
    ),
    "VAE": ("VAE", dict(z_dim=2, layers=(256, 128), **NETS)),
    "DKF": ("DKF", dict(z_dim=8, h_dim=64, inference="ST-LR", transition_dim=64, **FRAMES)),
    "VRNN": ("VRNN", dict(z_dim=8, h_dim=64, **FRAMES)),
}
FIXED: dict[str, dict[str, Any]] = {
    "KVAE": dict(kl_start=0.1, kl_warmup=1.5, gradient_clip=150.0, freeze=("a_0", "rnn", "to_weights")),
    "VAE": dict(kl_start=0.2, kl_warmup=3, gradient_clip=10.0),
    "DKF": dict(kl_start=0.2, kl_warmup=3, gradient_clip=10.0, hide_rate=0.3, score_hidden=True),
    "VRNN": dict(kl_start=0.2, kl_warmup=3, gradient_clip=10.0),
}
"""What the search does not vary: the DKF learns to fill, the KVAE is trained as in its publication but for the warm-up."""

CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "KVAE": [dict(lr=0.005, beta=3.3333), dict(lr=0.003, beta=3.3333), dict(lr=0.005, beta=1.0)],
    **{
        name: [dict(lr=0.003, beta=1.0), dict(lr=0.001, beta=1.0), dict(lr=0.003, beta=3.3333)]
        for name in ("VAE", "DKF", "VRNN")
    },
}
CANDIDATES["DKF"].append(dict(lr=0.003, beta=1.0, hide_rate=0.0, score_hidden=False))
"""For each a first one, another learning rate and another weight of the KL; the DKF also without hidden frames."""

SIZES: dict[str, list[dict[str, Any]]] = {
    "KVAE": [dict(z_dim=2, state_dim=4), dict(z_dim=3, state_dim=6), dict(z_dim=4, state_dim=8)],
    "VAE": [dict(z_dim=2), dict(z_dim=3), dict(z_dim=4)],
}
"""Tried where more moves than one ball (pong), with the training chosen on the box."""


def family(name: str) -> str:
    """The model whose search a row's settings come from."""
    return name.split(",")[0]


def best(data: str, name: str) -> dict[str, Any]:
    """What the search found: the candidate with the fewest wrong pixels; {} where there was no search."""
    if not SEARCH.is_file():
        raise FileNotFoundError(f"{SEARCH} is not there: run `python benchmarks/kvae.py --search` first.")
    records = json.loads(SEARCH.read_text())
    own = [r for r in records if (r["data"], r["model"]) == (data, family(name))]
    return min(own, key=lambda r: r["wrong_pixels"])["setting"] if own else {}


def trained(
    name: str,
    data: str,
    splits: DataSplits,
    epochs: int,
    seed: int,
    training: dict[str, Any],
    sizes: dict[str, Any],
    starts: int = 1,
) -> tuple[Any, Path]:
    """The best epoch of a model on the validation split; from runs/kvae if it is there.

    Args:
        starts: initial weights that are tried for one epoch; training begins anew from those with the best validation bound.
    """
    kind, options = MODELS[name]
    options = {**options, **sizes}
    fixed = dict(lr_warmup=0.5, progress=False, tensorboard=False, seed=seed, **FIXED[family(name)])
    fixed |= training
    if "freeze" in fixed:  # a quarter of the time
        fixed["freeze_until"] = epochs / 4

    def start(i: int) -> Any:
        torch.manual_seed(seed + 100 * i)
        return dynavae.MODELS[kind](x_dim=splits.x_dim, control_dim=splits.control_dim, **options)

    said = "".join(f"-{k}{v}" for k, v in {**training, **sizes}.items())
    folder = RUNS / f"{data}-{name.replace(', ', '-')}-{epochs}-{seed}{said}"
    bounds: list[float] = []
    if starts > 1:
        tried = folder.with_name(f"{folder.name}-starts.json")
        if not tried.is_file():
            for i in range(starts):
                made = dynavae.fit(
                    start(i), splits.train, splits.valid, epochs=1, lr_schedule="constant", **fixed
                )
                bounds.append(round(made.best["valid/nats_per_frame"], 2))
            tried.write_text(json.dumps(bounds))
        bounds = json.loads(tried.read_text())
    first = bounds.index(min(bounds)) if bounds else 0
    folder = folder if first == 0 else folder.with_name(f"{folder.name}-start{first}")
    if not (folder / "done.json").is_file():
        made = dynavae.fit(
            start(first),
            splits.train,
            splits.valid,
            epochs=epochs,
            out_dir=folder,
            lr_schedule="cosine",
            resume=(folder / "training.json").is_file(),
            **fixed,
        )
        done = dict(training_seconds=round(made.seconds), best_epoch=int(made.best["epoch"]))
        (folder / "done.json").write_text(json.dumps(done))
    if bounds:
        done = json.loads((folder / "done.json").read_text())
        (folder / "done.json").write_text(json.dumps({**done, "starts": bounds}))
    return dynavae.load(folder / "best"), folder
