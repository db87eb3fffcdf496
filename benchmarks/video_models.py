"""The models that `benchmarks/kvae.py` compares, the settings that its search tries, and their training."""

from __future__ import annotations

import inspect
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
    "KVAE": ("KVAE", dict(layers=(256, 128), h_dim=64, **NETS)),
    "KVAE, convolutions": (
        "KVAE",
        dict(image=(32, 32), layers=(32, 32, 32), decoder_layers=(32, 32, 32), **NETS),
    ),
    "VAE": ("VAE", dict(z_dim=2, layers=(256, 128), **NETS)),
    "DKF": ("DKF", dict(z_dim=8, h_dim=64, inference="ST-LR", transition_dim=64, **FRAMES)),
    "VRNN": ("VRNN", dict(z_dim=8, h_dim=64, **FRAMES)),
    "VRNN, 64 units": ("VRNN", FRAMES),
}
SMALLER: dict[str, dict[str, Any]] = {"VRNN, 64 units": dict(z_dim=8, h_dim=64)}
"""The size nearest to the KVAE's: what the search chose for the VRNN has a fifth more parameters."""
FIXED: dict[str, dict[str, Any]] = {
    "KVAE": dict(kl_start=0.1, kl_warmup=1.5, gradient_clip=150.0),
    "VAE": dict(kl_start=0.2, kl_warmup=3, gradient_clip=10.0),
    "DKF": dict(kl_start=0.2, kl_warmup=3, gradient_clip=10.0, hide_rate=0.3, score_hidden=True),
    "VRNN": dict(kl_start=0.2, kl_warmup=3, gradient_clip=10.0),
}
"""What the search does not vary."""
PUBLISHED = dict(start="random", mixtures=3)
"""A KVAE as it was published, whose dynamics are the same for all in the first quarter of the training."""

MIXED = dict(mixtures=5, offsets=True)
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "KVAE": [
        dict(lr=0.003, beta=3.3333, **PUBLISHED),
        dict(lr=0.003, beta=3.3333),
        dict(lr=0.003, beta=3.3333, **MIXED),
        dict(lr=0.003, beta=3.3333, **MIXED, learn_noise=True),
        dict(lr=0.005, beta=3.3333, **MIXED, learn_noise=True),
        dict(lr=0.003, beta=3.3333, **MIXED, learn_noise=True, h_dim=128),
        dict(lr=0.005, beta=3.3333, **MIXED, learn_noise=True, h_dim=128),
        dict(lr=0.008, beta=3.3333, **MIXED, learn_noise=True, h_dim=128),
    ],
    **{
        name: [dict(lr=0.003, beta=1.0), dict(lr=0.001, beta=1.0), dict(lr=0.003, beta=3.3333)]
        for name in ("VAE", "DKF", "VRNN")
    },
}
CANDIDATES["VAE"] += [
    dict(lr=0.005, beta=3.3333),
    dict(lr=0.003, beta=10.0),
    dict(lr=0.003, beta=3.3333, z_dim=4),
]
CANDIDATES["DKF"] += [
    dict(lr=0.003, beta=1.0, hide_rate=0.0, score_hidden=False),
    dict(lr=0.001, beta=3.3333),
    dict(lr=0.001, beta=1.0, z_dim=16),
]
CANDIDATES["VRNN"] += [
    dict(lr=0.005, beta=3.3333),
    dict(lr=0.003, beta=10.0),
    dict(lr=0.003, beta=3.3333, z_dim=16, h_dim=128),
    dict(lr=0.005, beta=3.3333, z_dim=16, h_dim=128),
    dict(lr=0.008, beta=3.3333, z_dim=16, h_dim=128),
]
"""Eight for the KVAE and the VRNN, six for the others: learning rates, weights of the KL, sizes; the DKF also without hidden
frames, the KVAE as it was published and with what this library adds, one by one."""

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
) -> tuple[Any, Path]:
    """The best epoch of a model on the validation split; from runs/kvae if it is there."""
    kind, options = MODELS[name]
    known = inspect.signature(dynavae.MODELS[kind]).parameters
    options = {**options, **{k: v for k, v in training.items() if k in known}, **sizes}
    fixed = dict(lr_warmup=0.5, progress=False, tensorboard=False, seed=seed, **FIXED[family(name)])
    fixed |= {k: v for k, v in training.items() if k not in known}
    if options.get("start") == "random":
        fixed |= dict(freeze=("a_0", "rnn", "to_weights"), freeze_until=epochs / 4)
    said = "".join(f"-{k}{v}" for k, v in {**training, **sizes}.items())
    folder = RUNS / f"{data}-{name.replace(', ', '-')}-{epochs}-{seed}{said}"
    if not (folder / "done.json").is_file():
        torch.manual_seed(seed)
        made = dynavae.fit(
            dynavae.MODELS[kind](x_dim=splits.x_dim, control_dim=splits.control_dim, **options),
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
    return dynavae.load(folder / "best"), folder
