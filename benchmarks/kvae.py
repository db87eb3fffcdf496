"""Missing and future frames of simulated videos: the KVAE against other models of its size.

    python benchmarks/kvae.py --data box                       # trains what is not yet in runs/kvae, then scores
    python benchmarks/kvae.py --data gravity polygon pong --models KVAE VAE --epochs 8

Every model has perceptrons of the same widths around its latents and sees the same training videos as often; the
best epoch on the validation split is kept. Scores are of the first 200 test videos: the share of pixels of unseen
frames that are wrong, after rounding the expected image. "VAE" fills a gap by straight lines between the codes of the frames
around it (after the last seen frame: along its last step). The KVAE has two rows: rounded means over 30 sampled
paths, as the other models, and the decoded smoothed mean of a_t, as in the paper; a third one draws straight lines
between its codes. Writes benchmarks/results/kvae.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dynavae
from dynavae import Sequences
from dynavae.data import DataSplits, load, true_states

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "kvae.json"
VIDEOS = 200
SAMPLES = 30
NETS: dict[str, Any] = dict(emission="bernoulli", activation="relu")
KVAE_TRAINING = dict(
    beta=3.3333,
    kl_start=0.1,
    kl_warmup=1.5,
    lr=0.005,
    gradient_clip=150.0,
    freeze=("a_0", "rnn", "to_weights"),
    freeze_until=5,
)
OTHERS = dict(lr=0.001, gradient_clip=10.0, kl_start=0.2, kl_warmup=3)
SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "KVAE": ("KVAE", dict(layers=(256, 128), **NETS), KVAE_TRAINING),
    "KVAE (beta 1)": (
        "KVAE",
        dict(layers=(256, 128), **NETS),
        {**KVAE_TRAINING, "beta": 1.0, "kl_start": 0.3, "kl_warmup": 4},
    ),
    "VAE": ("VAE", dict(z_dim=2, layers=(256, 128), **NETS), {**OTHERS, "lr": 0.003}),
    "DKF": (
        "DKF",
        dict(
            z_dim=8,
            h_dim=64,
            inference="ST-LR",
            transition_dim=64,
            x_layers=(256, 128),
            decoder_layers=(128, 256),
            **NETS,
        ),
        dict(OTHERS, hide_rate=0.3, score_hidden=True),
    ),
    "VRNN": (
        "VRNN",
        dict(z_dim=8, h_dim=64, x_layers=(256, 128), decoder_layers=(128, 256), **NETS),
        OTHERS,
    ),
}


def trained(name: str, data: str, splits: DataSplits, epochs: int, seed: int) -> tuple[Any, Path]:
    """The model, from runs/kvae if it is there."""
    folder = ROOT / "runs" / "kvae" / f"{data}-{name}-{epochs}-{seed}"
    if not (folder / "done.json").is_file():
        kind, options, training = SETTINGS[name]
        if "freeze_until" in training:  # a quarter of the time
            training = {**training, "freeze_until": epochs / 4}
        torch.manual_seed(seed)
        model = dynavae.MODELS[kind](x_dim=splits.x_dim, control_dim=splits.control_dim, **options)
        made = dynavae.fit(
            model,
            splits.train,
            splits.valid,
            epochs=epochs,
            out_dir=folder,
            seed=seed,
            lr_schedule="cosine",
            lr_warmup=0.5,
            progress=False,
            tensorboard=False,
            resume=(folder / "training.json").is_file(),
            **training,
        )
        said = dict(training_seconds=round(made.seconds), best_epoch=int(made.best["epoch"]))
        (folder / "done.json").write_text(json.dumps(said))
    return dynavae.load(folder / "best"), folder


def gaps(steps: int, number: int) -> dict[tuple[str, str], Tensor]:
    """{(task, gap): True where a frame is hidden (B, T)}."""
    random = torch.rand(number, steps, generator=torch.Generator().manual_seed(0))
    random[:, :4] = 1.0  # always seen, as in the paper
    t = torch.arange(steps)

    def span(first: int, last: int) -> Tensor:
        return ((t >= first) & (t < last)).expand(number, -1)

    return {
        ("impute", "random 50 %"): random < 0.5,
        ("impute", "random 80 %"): random < 0.8,
        ("impute", "contiguous 50 %"): span(4, 4 + steps // 2),
        ("impute", "contiguous 80 %"): span(3, 3 + 4 * steps // 5),
        ("generate", "after 4 frames"): span(4, steps),
    }


def lines(a: Tensor, hidden: Tensor) -> Tensor:
    """Codes (B, T, d) with straight lines where they are hidden, going on after the last seen one."""
    out = a.clone()
    t = np.arange(a.shape[1])
    for b in range(len(a)):
        seen = t[~hidden[b].numpy()]
        for i in range(a.shape[-1]):
            out[b, :, i] = torch.from_numpy(np.interp(t, seen, a[b, seen, i].numpy()))
        last, before = seen[-1], seen[-2]
        slope = (a[b, last] - a[b, before]) / (last - before)
        after = torch.arange(1, a.shape[1] - last)
        out[b, last + 1 :] = a[b, last] + after.unsqueeze(-1) * slope
    return out


@torch.no_grad()
def predictions(model: Any, name: str, batch: Sequences, hidden: Tensor, task: str) -> dict[str, Tensor]:
    """{row: expected image of every frame (B, T, x_dim)}."""
    seen = batch.hide(hidden.unsqueeze(-1).expand(-1, -1, batch.x_dim))
    if name == "VAE":
        a = model.q_z(model.encoder(batch.x)).loc
        return {"VAE, straight lines": model.p_x(model.decoder(lines(a, hidden))).mean}
    if task == "generate":
        first = int(hidden[0].nonzero()[0])
        ahead = dynavae.forecast(model, batch, horizon=batch.steps - first, context=first, samples=SAMPLES)
        rows = {name: torch.cat([batch.x[:, :first], ahead.mean], 1)}
    else:
        rows = {name: dynavae.impute(model, seen, samples=SAMPLES).x}
    if name.startswith("KVAE"):
        rows[f"{name}, smoothed mean"] = model.decoded(model.states(seen).smoothed_a)
        a = model.states(batch).a
        rows[f"{name}, straight lines"] = model.decoded(lines(a, hidden))
    return rows


def r2_position(model: Any, name: str, splits: DataSplits) -> float | None:
    """Share of the variance of the true position that is linear in the codes; fitted on validation videos."""
    if not name.startswith(("KVAE", "VAE")):
        return None
    codes, truth = {}, {}
    for split in ("valid", "test"):
        batch = splits.split(split).batch()
        with torch.no_grad():
            a = model.states(batch).a if name.startswith("KVAE") else model.q_z(model.encoder(batch.x)).loc
        codes[split] = np.concatenate([a.reshape(-1, a.shape[-1]), np.ones((a[..., 0].numel(), 1))], 1)
        truth[split] = true_states(splits, split)[..., :2].reshape(-1, 2)
    weights = np.linalg.lstsq(codes["valid"], truth["valid"], rcond=None)[0]
    error = truth["test"] - codes["test"] @ weights
    return float(1 - error.var(0).sum() / truth["test"].var(0).sum())


def records(data: str, name: str, epochs: int, seed: int) -> list[dict[str, Any]]:
    splits = load("box_gravity" if data == "gravity" else data)
    model, folder = trained(name, data, splits, epochs, seed)
    done = json.loads((folder / "done.json").read_text())
    start = time.perf_counter()
    bound = dynavae.score(model, splits, split="test")
    batch = splits.test.batch(range(VIDEOS))
    r2 = r2_position(model, name, splits)
    common = dict(
        data=data,
        neg_elbo=round(bound.nats_per_frame, 3),
        r2_position=None if r2 is None else round(r2, 4),
        seed=seed,
        split="test",
        data_sha256=splits.sha256,
        bound="elbo, complete test split, nats per frame",
        parameters=sum(p.numel() for p in model.parameters()),
        epochs=epochs,
        **done,
        videos=VIDEOS,
        paths=SAMPLES,
        hardware=f"{platform.machine()}, 1 thread",
        command=f"python benchmarks/kvae.py --data {data} --models {shlex.quote(name)} --epochs {epochs} --seed {seed}",
    )
    found = []
    for (task, gap), hidden in gaps(batch.steps, VIDEOS).items():
        for row, image in predictions(model, name, batch, hidden, task).items():
            wrong = ((image > 0.5) != (batch.x > 0.5)).double().mean(-1)[hidden]
            record = {"model": row, "task": task, "gap": gap, "wrong_pixels": round(float(wrong.mean()), 5)}
            found.append({**record, **common})
    print(f"{data} {name}: scored in {time.perf_counter() - start:.0f} s", flush=True)
    return found


def floors(data: str) -> list[dict[str, Any]]:
    """An image without anything that moves, and the last frame seen."""
    splits = load("box_gravity" if data == "gravity" else data)
    batch = splits.test.batch(range(VIDEOS))
    still = torch.from_numpy(np.concatenate(splits.train.x[:500])).float().mean(0) > 0.5
    found = []
    for (task, gap), hidden in gaps(batch.steps, VIDEOS).items():
        seen = torch.where(hidden, -1, torch.arange(batch.steps)).cummax(1).values
        held = torch.gather(batch.x, 1, seen.unsqueeze(-1).expand_as(batch.x))
        for row, image in (("no ball", still.expand_as(batch.x)), ("last frame seen", held > 0.5)):
            wrong = (image != (batch.x > 0.5)).double().mean(-1)[hidden]
            record = {
                "data": data,
                "model": row,
                "task": task,
                "gap": gap,
                "wrong_pixels": round(float(wrong.mean()), 5),
            }
            found.append(
                {**record, "neg_elbo": None, "r2_position": None, "seed": None, "split": "test",
                 "data_sha256": splits.sha256, "videos": VIDEOS, "command": f"python benchmarks/kvae.py --data {data}"}
            )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=["box"], choices=["box", "gravity", "polygon", "pong"])
    parser.add_argument("--models", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for data in options.data:
        for name in (None, *options.models):
            made = floors(data) if name is None else records(data, name, options.epochs, options.seed)
            kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
            new = {(r["data"], r["model"]) for r in made}
            kept = [r for r in kept if (r["data"], r["model"]) not in new] + made
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
