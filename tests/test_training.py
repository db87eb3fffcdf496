"""Training: losses, schedules, files, resume, and what happens when it goes wrong."""

from __future__ import annotations

import csv
import inspect
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dynavae import DKF, DSAE, HMM, LGSSM, MODELS, RVAE, SRNN, VAE, VRNN, Sequences, fit, load, score
from dynavae.callbacks import Recorder
from dynavae.data import SequenceDataset
from dynavae.diagnostics import Totals, first_nonfinite
from dynavae.learner import Learner
from dynavae.loading import Batch, LengthBuckets, loader
from dynavae.loss import Loss, seeded
from dynavae.noise import draw
from dynavae.objectives import elbo
from dynavae.scan import scan
from dynavae.schedules import kl_weight, learning_rate, ramp
from dynavae.testing import sequences, small
from dynavae.training import FitResult, calibrate
from dynavae.watch import Watch

QUIET: dict[str, Any] = dict(progress=False, accelerator="cpu", tensorboard=False)


def binary(sequences: int = 12, steps: int = 8, x_dim: int = 4) -> Tensor:
    """Patterns that alternate: x_t is x_{t-1} reversed, so that the past predicts the present."""
    first = torch.rand(sequences, 1, x_dim) < 0.5
    pair = torch.cat([first, ~first], 1)
    return pair.repeat(1, (steps + 1) // 2, 1)[:, :steps].float()


def ragged(*lengths: int, x_dim: int = 4) -> Sequences:
    return Sequences.from_arrays([torch.randn(n, x_dim) for n in lengths])


def vrnn(**options: Any) -> VRNN:
    return VRNN(
        4, 3, 5, **{"x_layers": (6,), "z_layers": (6,), "memory": "gru", "emission": "bernoulli", **options}
    )


def loss_and_grad(loss: Loss, batch: Sequences, seed: int = 0) -> tuple[float, Tensor]:
    loss.model.zero_grad()
    total = 0.0
    for part in loss.parts(batch, seed=seed):
        part.loss.backward()
        total += part.loss.item()
    grads = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in loss.model.parameters()]
    return total, torch.cat(grads)


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


# --- fit ------------------------------------------------------------------------------------------------


def test_the_bound_improves() -> None:
    x = binary(24)
    model = SRNN(4, 3, 8, memory="gru", emission="bernoulli")
    before = score(model, x).nats_per_frame
    result = fit(model, x, epochs=12, batch_size=6, lr=1e-2, **QUIET)
    losses = [row["train/loss"] for row in result.history]
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]
    assert score(model, x).nats_per_frame < 0.7 * before
    assert isinstance(result, FitResult) and result.model is model and not model.training
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.best == result.history[-1] and result.seconds > 0
    assert "SRNN" in repr(result) and "at epoch 12 of 12" in repr(result)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains(name: str) -> None:
    known = inspect.signature(MODELS[name]).parameters
    sizes = {k: v for k, v in {"x_dim": 4, "z_dim": 3, "h_dim": 5}.items() if k in known}
    model = MODELS[name](**sizes)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = ragged(6, 4, 5)
    result = fit(model, data, data, epochs=1, batch_size=2, **QUIET)
    assert math.isfinite(result.history[0]["train/loss"])
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    kl = "sample" if model.exact or model.discrete_latent else "analytic"
    assert result.best["valid/nats_per_frame"] == pytest.approx(
        score(model, data, kl=kl).nats_per_frame, abs=1e-5
    )


@pytest.mark.parametrize("objective", ["elbo", "iwae", "renyi", "fivo"])
def test_every_objective_trains(objective: str) -> None:
    x = binary()
    more = {"alpha": 0.5} if objective == "renyi" else {}
    result = fit(vrnn(), x, x, epochs=2, objective=objective, particles=3, **more, **QUIET)
    assert result.history[1]["train/loss"] < result.history[0]["train/loss"] + 0.5
    if objective != "renyi":
        same = score(result.model, x, bound=objective, particles=3).nats_per_frame
        assert result.best["valid/nats_per_frame"] == pytest.approx(same, abs=1e-5)


def test_data_of_any_kind() -> None:
    arrays = [np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32) for n in (5, 3, 4)]
    arrays[0][1, 2] = np.nan
    losses = []
    for data in (arrays, Sequences.from_arrays(arrays), SequenceDataset(arrays)):
        torch.manual_seed(0)
        losses.append(fit(vrnn(emission="gaussian"), data, epochs=1, **QUIET).history[0]["train/loss"])
    assert losses[0] == losses[1] == losses[2]


def test_frozen_parameters_stay_and_then_learn() -> None:
    x = binary()
    model = vrnn()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(model, x, epochs=2, freeze=["rnn", "p_z.linear.bias"], freeze_until=2, calibrate=False, **QUIET)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("rnn", "p_z.linear.bias")), name
    fit(model, x, epochs=2, batch_size=2, freeze="rnn", freeze_until=1.2, calibrate=False, **QUIET)
    assert not torch.equal(model.rnn.rnn.weight_hh_l0, before["rnn.rnn.weight_hh_l0"])
    with pytest.raises(
        ValueError, match=r"freeze names 'lstm', but VRNN has only the parts phi_x, phi_z, rnn"
    ):
        fit(model, x, epochs=1, freeze=["lstm"], **QUIET)
    with pytest.raises(ValueError, match="freeze_until should be 0 or more; got -1"):
        fit(model, x, epochs=1, freeze=["rnn"], freeze_until=-1, **QUIET)


def test_float64_model() -> None:
    x = binary().double()
    result = fit(vrnn().double(), x, epochs=1, **QUIET)
    assert next(result.model.parameters()).dtype == torch.float64


def test_validation_does_not_depend_on_the_batches() -> None:
    model, data = VRNN(4, 3, 5), ragged(9, 3, 6, 4, 7)
    terms = Loss(model.eval())
    figures = []
    for batch_size in (1, 2, 5):
        totals = Totals()
        for batch in loader(data, batch_size):
            terms.evaluate(batch, totals, seed=3)
        figures.append(totals)
    for name in ("nats", "kl", "reconstruction"):
        assert [f.per_frame(name) for f in figures] == pytest.approx(
            [figures[0].per_frame(name)] * 3, rel=1e-5
        )
    expected = score(model, data, seed=3).nats_per_frame
    assert figures[0].per_frame("nats") == pytest.approx(expected, rel=1e-5)
    assert figures[0].per_frame("kl_dim").sum().item() == pytest.approx(figures[1].per_frame("kl"), rel=1e-5)
    assert len({f.active_units() for f in figures}) == 1


def test_the_best_weights_are_a_copy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = binary()
    model = vrnn()
    result = fit(model, x, x, epochs=6, batch_size=4, lr=0.5, out_dir=tmp_path, gradient_clip=None, **QUIET)
    figures = [row["valid/nats_per_frame"] for row in result.history]
    epoch = int(np.argmin(figures)) + 1
    assert epoch < 6, "this learning rate should make the last epoch worse than the best"
    assert result.best["epoch"] == epoch
    assert score(model, x).nats_per_frame == pytest.approx(min(figures), abs=1e-5)
    best = load(tmp_path / "best")
    assert all(torch.equal(v, best.state_dict()[k]) for k, v in model.state_dict().items())
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert any(not torch.equal(v, last[f"model.{k}"]) for k, v in model.state_dict().items())


def test_early_stop_counts_after_the_warm_up() -> None:
    x = torch.rand(4, 5, 4).round()  # noise: nothing to learn
    options: dict[str, Any] = dict(epochs=30, lr=0.3, patience=2, gradient_clip=None, **QUIET)
    first = fit(vrnn(), x, torch.rand(4, 5, 4).round(), **options)
    stopped = len(first.history)
    assert stopped < 30 and stopped == first.best["epoch"] + 2
    second = fit(vrnn(), x, torch.rand(4, 5, 4).round(), kl_warmup=8, **options)
    assert 10 <= len(second.history) < 30


def test_without_validation_the_last_weights_stay(tmp_path: Path) -> None:
    model = vrnn()
    result = fit(model, binary(), epochs=2, out_dir=tmp_path, **QUIET)
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(v, last[f"model.{k}"]) for k, v in model.state_dict().items())
    best = load(tmp_path / "best")
    assert all(torch.equal(v, best.state_dict()[k]) for k, v in model.state_dict().items())
    assert result.best["epoch"] == 2


def test_the_files_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = binary()
    options: dict[str, Any] = dict(epochs=2, out_dir=tmp_path, lr=2e-3, accelerator="cpu")
    result = fit(vrnn(), x, x, **options)
    assert "loss=" in capsys.readouterr().err
    rows = read_csv(tmp_path / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for name in ("train/loss", "train/nats_per_frame", "train/kl_per_frame", "train/reconstruction_per_frame",
                 "valid/nats_per_frame", "valid/kl_per_frame", "valid/active_units", "kl_weight", "lr",
                 "frames_per_second"):  # fmt: skip
        assert float(rows[1][name]) == result.history[1][name], name
    kl = read_csv(tmp_path / "kl_dim.csv")
    total = sum(float(kl[0][f"kl_{i}"]) for i in range(3))
    assert total == pytest.approx(result.history[0]["valid/kl_per_frame"], rel=1e-5)
    assert list((tmp_path / "tensorboard").glob("events*"))
    run = json.loads((tmp_path / "training.json").read_text())
    assert run["options"]["lr"] == 2e-3 and run["train"]["frames"] == 96 and run["model"] == "VRNN"
    config = json.loads((tmp_path / "best" / "config.json").read_text())
    assert config["epoch"] == result.best["epoch"] and config["training"]["epochs"] == 2
    with pytest.raises(FileExistsError, match="already holds a run"):
        fit(vrnn(), x, x, **options)
    again = fit(vrnn(), x, x, resume=False, progress=False, **options)
    assert len(again.history) == 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"truncate": 3},
        {"objective": "iwae", "kl_warmup": 3, "hide_rate": 0.2},
        {"ema": 0.9},
        {"ema": 0.7, "truncate": 3},
        {"crop": 3},
    ],
)
def test_a_resumed_run_repeats_an_uninterrupted_one(tmp_path: Path, options: dict[str, Any]) -> None:
    data = ragged(8, 6, 7, 4, 5, 9, 3)
    common: dict[str, Any] = dict(
        batch_size=3, seed=5, lr_schedule="exponential", lr_decay=0.8, patience=4, **options, **QUIET
    )

    def model() -> VRNN:
        torch.manual_seed(1)
        return vrnn(emission="gaussian", dropout=0.2)

    whole = fit(model(), data, data, epochs=4, out_dir=tmp_path / "whole", **common)
    fit(model(), data, data, epochs=2, out_dir=tmp_path / "parts", **common)
    torch.rand(17)  # the caller's random numbers should not matter
    parts = fit(model(), data, data, epochs=4, out_dir=tmp_path / "parts", resume=True, **common)
    assert [row["epoch"] for row in parts.history] == [1, 2, 3, 4]
    for a, b in zip(whole.history, parts.history, strict=True):
        for name in a.keys() - {"seconds", "frames_per_second"}:
            assert a[name] == b[name], (a["epoch"], name)
    assert all(torch.equal(v, parts.model.state_dict()[k]) for k, v in whole.model.state_dict().items())
    over = fit(model(), data, data, epochs=4, out_dir=tmp_path / "parts", resume=True, **common)
    assert over.best == parts.best and len(over.history) == 4
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        fit(model(), data, data, epochs=4, out_dir=tmp_path / "other", resume=True, **common)


@pytest.mark.parametrize("truncate", [None, 3])
def test_the_average_of_the_weights_is_what_is_validated_and_kept(
    tmp_path: Path, truncate: int | None
) -> None:
    x, seen = binary(), []

    def trained(valid: Any, **options: Any) -> FitResult:
        torch.manual_seed(0)
        return fit(vrnn(), x, valid, epochs=3, batch_size=4, lr=0.05, truncate=truncate, **options, **QUIET)

    before = Learner.on_before_optimizer_step

    def spy(learner: Learner, *rest: Any) -> None:
        seen.append({k: v.clone() for k, v in learner.model.state_dict().items()})
        before(learner, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "on_before_optimizer_step", spy)
        last = trained(None).model.state_dict()
    averaged = trained(None, ema=0.6).model.state_dict()
    assert len(seen) == 9  # 3 updates in each of 3 epochs
    expected = seen[0]
    for n, weights in enumerate([*seen[1:], last], 1):
        d = min(0.6, (1 + n) / (10 + n))
        expected = {k: d * v + (1 - d) * weights[k] for k, v in expected.items()}
    for name, value in averaged.items():
        assert torch.allclose(value, expected[name], atol=1e-6), name
        assert not torch.equal(value, last[name]), name
    result = trained(x, ema=0.6, out_dir=tmp_path)
    same = score(load(tmp_path / "best"), x).nats_per_frame
    assert result.best["valid/nats_per_frame"] == pytest.approx(same, abs=1e-5)
    if result.best["epoch"] == 3:  # validation on the way has changed nothing
        assert all(torch.equal(v, averaged[k]) for k, v in result.model.state_dict().items())


def test_the_callers_random_numbers_are_left_alone() -> None:
    x, model = binary(), vrnn()
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    fit(model, x, x, epochs=1, **QUIET)
    assert torch.equal(torch.rand(2), expected)


def test_ctrl_c_arrives_and_keeps_the_last_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    def interrupt(self: Recorder, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "on_train_batch_end", interrupt, raising=False)
    handler, x = signal.getsignal(signal.SIGINT), binary()
    with pytest.raises(KeyboardInterrupt):
        fit(vrnn(), x, epochs=3, out_dir=tmp_path, **QUIET)
    assert signal.getsignal(signal.SIGINT) == handler
    monkeypatch.undo()
    assert len(fit(vrnn(), x, epochs=3, out_dir=tmp_path, resume=True, **QUIET).history) == 3


# --- the loss -------------------------------------------------------------------------------------------


def test_the_loss_is_minus_the_bound_per_frame() -> None:
    model, data = VRNN(4, 3, 5).eval(), ragged(6, 3)
    (part,) = Loss(model).parts(data, seed=2)

    with seeded(2, torch.device("cpu")):
        noise = draw(model, 6, 1, 2)
    expected = -elbo(scan(model, data, noise=noise)).sum().item() / 9
    assert part.loss.item() == pytest.approx(expected)
    assert part.sums["nats"] == pytest.approx(part.sums["kl"] + part.sums["reconstruction"])


def test_chunks_of_an_exact_model_where_a_sequence_has_ended() -> None:
    """Its messages read to the end of each sequence, also in a chunk after it."""
    torch.manual_seed(0)
    data = Sequences.from_arrays([torch.randn(6, 2), torch.randn(2, 2)])
    model = HMM(2, 2)
    parts = list(Loss(model, objective="elbo", truncate=3).parts(data))
    assert len(parts) == 2
    assert all(math.isfinite(part.sums["nats"]) for part in parts)


@pytest.mark.parametrize("objective", ["elbo", "iwae", "renyi", "fivo"])
@pytest.mark.parametrize("truncate", [1, 3, 20])
def test_chunks_add_up_to_the_whole(objective: str, truncate: int, float64: None) -> None:
    model, data = VRNN(4, 3, 5), ragged(7, 4, 2)
    options: dict[str, Any] = dict(
        objective=objective, particles=3, beta=0.7 if objective in ("elbo", "iwae") else 1
    )
    whole, whole_grad = loss_and_grad(Loss(model, **options), data)
    cut, cut_grad = loss_and_grad(Loss(model, truncate=truncate, **options), data)
    assert cut == pytest.approx(whole, rel=1e-10)
    assert torch.allclose(whole_grad, cut_grad) == (truncate >= 7)
    sums = [{k: 0.0 for k in ("loss", "nats")} for _ in range(2)]
    for total, chunk in zip(sums, (None, truncate), strict=True):
        for part in Loss(model, truncate=chunk, **options).parts(data):
            for name in total:
                total[name] += part.sums[name]
    assert sums[1] == pytest.approx(sums[0], rel=1e-10)


@pytest.mark.parametrize("model", [VAE(4, 3), DKF(4, 3, 5), SRNN(4, 3, 5), DSAE(4, 3, 5), LGSSM(4, 3)])
def test_truncated_training_of_models_that_look_ahead(model: Any) -> None:
    result = fit(model, ragged(7, 4, 2), epochs=1, truncate=3, **QUIET)
    assert math.isfinite(result.history[0]["train/loss"])


@pytest.mark.parametrize("truncate", [None, 4])
def test_scheduled_sampling(truncate: int | None) -> None:
    model, x = vrnn(), binary()
    data = Sequences.from_arrays(x)
    terms = Loss(
        model, scheduled_sampling=1.0, scheduled_sampling_start=1, scheduled_sampling_end=3, truncate=truncate
    )
    assert [terms.sampling_at(e) for e in (0, 1, 2, 3, 9)] == [0, 0, 0.5, 1, 1]

    def loss(epoch: float) -> float:
        return sum(part.loss.item() for part in terms.parts(data, epoch=epoch, seed=1))

    plain = Loss(model, truncate=truncate)
    assert loss(0.5) == sum(part.loss.item() for part in plain.parts(data, seed=1))
    assert loss(2.5) != loss(0.5)
    # At probability 1 nothing of x reaches the generative part: the loss is that of free running.

    with seeded(1, torch.device("cpu")):
        free = torch.rand(12, 8) < 1
        noise = draw(model, 8, 1, 12, x=True)
    run = scan(model, data, free=free, noise=noise)
    assert loss(9) == pytest.approx(-elbo(run).sum().item() / data.frames, rel=1e-5)


def test_scheduled_sampling_trains_and_the_best_is_chosen_after_it() -> None:
    x = binary()
    result = fit(vrnn(), x, x, epochs=4, scheduled_sampling=0.5, scheduled_sampling_end=3, **QUIET)
    assert result.best["epoch"] >= 3
    with pytest.raises(ValueError, match="DKF reads no past x when it generates"):
        Loss(DKF(4, 3, 5), scheduled_sampling=0.5)


def test_hidden_frames_are_neither_read_nor_scored() -> None:
    model, data = VAE(4, 3).eval(), Sequences.from_arrays(torch.randn(2, 400, 4))
    (all_seen,) = Loss(model).parts(data)
    (half,) = Loss(model, hide_rate=0.5).parts(data)
    share = half.sums["reconstruction"] / all_seen.sums["reconstruction"]
    assert share == pytest.approx(0.5, abs=6 * math.sqrt(0.25 / 800) + 0.05)
    fit(vrnn(), binary(), epochs=1, hide_rate=0.5, **QUIET)


def test_free_bits() -> None:
    model, data = VRNN(4, 3, 5), ragged(6, 4)
    free = Loss(model, free_bits=50.0)
    (part,) = free.parts(data)
    assert part.sums["loss"] == pytest.approx(part.sums["reconstruction"] + 50 * 3 * data.frames, rel=1e-5)
    (plain,) = Loss(model, free_bits=1e-9).parts(data)
    assert plain.sums["loss"] == pytest.approx(plain.sums["nats"], rel=1e-5)
    assert part.sums["nats"] == pytest.approx(plain.sums["nats"])


def test_kl_weight_multiplies_the_kl() -> None:
    model, data = VRNN(4, 3, 5), ragged(6, 4)
    terms = Loss(model, beta=0.5, kl_warmup=10)
    for epoch, weight in ((0, 0.0), (5, 0.25), (10, 0.5), (99, 0.5)):
        (part,) = terms.parts(data, epoch=epoch)
        expected = part.sums["reconstruction"] + weight * part.sums["kl"]
        assert part.sums["loss"] == pytest.approx(expected, rel=1e-5)
        (path,) = Loss(model, objective="iwae", particles=1, beta=0.5, kl_warmup=10).parts(data, epoch=epoch)
        sampled = Loss(model, kl="sample", beta=0.5, kl_warmup=10)
        assert path.sums["loss"] == pytest.approx(
            next(iter(sampled.parts(data, epoch=epoch))).sums["loss"], rel=1e-5
        )


def test_the_kl_is_decided_once_and_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dynavae")
    terms = Loss(VRNN(4, 3, 5))
    for _ in range(2):
        next(terms.parts(ragged(3)))
    assert terms.kl_kind == "analytic" and [r.message for r in caplog.records] == ["KL of VRNN: analytic"]
    exact = Loss(LGSSM(4, 3), "elbo")
    next(exact.parts(ragged(6, 5)))
    assert exact.kl_kind == "sample"
    with pytest.raises(ValueError, match="free_bits needs an analytic KL"):
        next(Loss(LGSSM(4, 3), free_bits=0.1).parts(ragged(3)))


def test_the_sampled_elbo_of_an_exact_model_is_its_likelihood(float64: None) -> None:
    model, data = LGSSM(4, 3), ragged(6, 5)
    (part,) = Loss(model, "elbo").parts(data)
    assert part.sums["nats"] == pytest.approx(-model.exact_log_likelihood(data).sum().item(), rel=1e-8)


# --- schedules and batches ------------------------------------------------------------------------------


def test_schedules() -> None:
    assert [kl_weight(e, 4.0, 0.5) for e in (0, 2, 4, 5)] == [0.5, 0.75, 1.0, 1.0]
    assert ramp(0, 0, 0) == 1.0 and kl_weight(0, 0) == 1.0
    rates = [learning_rate(e, 10, 1.0, "cosine", warmup=2) for e in (1, 2, 6, 10)]
    assert rates == pytest.approx([0.5, 1.0, 0.5, 0.0])
    assert learning_rate(5, 10, 1.0, "exponential", decay=0.9, decay_start=3) == pytest.approx(0.81)


def test_learning_rate_and_kl_weight_of_a_run() -> None:
    result = fit(vrnn(), binary(8), epochs=4, batch_size=4, lr=1.0e-3, lr_warmup=2, kl_warmup=2, **QUIET)
    assert [row["lr"] for row in result.history] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3])
    assert [row["kl_weight"] for row in result.history] == pytest.approx([0.25, 0.75, 1.0, 1.0])
    assert [row["updates"] for row in result.history] == [2, 4, 6, 8]


def test_batches_have_like_lengths_and_change() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 203)
    buckets = LengthBuckets(lengths, 20, seed=1)
    epochs = []
    for epoch in (0, 1, 0):
        buckets.set_epoch(epoch)
        epochs.append(list(buckets))
    assert epochs[0] == epochs[2] != epochs[1]
    for batches in epochs:
        assert len(batches) == len(buckets) == 11
        assert sorted(i for rows in batches for i in rows) == list(range(203))
        padded = sum(len(rows) * lengths[rows].max() for rows in batches)
        assert padded < 1.2 * lengths.sum() < len(lengths) * lengths.max() / 1.5
    assert [len(rows) for rows in epochs[0]].count(20) == 10


@pytest.mark.parametrize("make", [Sequences.from_arrays, SequenceDataset])
def test_pieces_cover_every_frame_once_and_move(make: Any) -> None:
    arrays = [np.arange(n, dtype=np.float32)[:, None] + 100 * i for i, n in enumerate((9, 4, 12, 1))]
    arrays[0][2] = np.nan
    batches = loader(make(arrays), 3, shuffle=True, crop=4)
    places = []
    for epoch in range(6):
        batches.sampler.set_epoch(epoch)
        seen, starts = [], []
        for batch in batches:
            x = batch.sequences
            assert x.steps == int(x.lengths.max()) <= 4 and batch.frames == x.frames
            assert (x.x[~x.observed] == 0).all()
            for row, piece, known in zip(batch.rows, x.arrays(), x.observed, strict=True):
                first = int(np.nanmin(piece))
                assert first // 100 == row and np.diff(piece[~np.isnan(piece)]).max(initial=1) <= 2
                assert not known[len(piece) :].any()
                seen += piece[~np.isnan(piece)].tolist()
                starts.append(first)
        assert sorted(seen) == sorted(v for a in arrays for v in a.flatten().tolist() if not math.isnan(v))
        assert len(starts) == 3 + 1 + 3 + 1 and len(batches) == 3
        places.append(tuple(sorted(starts)))
    assert len(set(places)) > 1


def test_two_batches_of_one_size_in_parallel_workers() -> None:
    batches = list(loader(ragged(3, 5, 4), 2, shuffle=True, num_workers=0))
    assert all(isinstance(b, Batch) for b in batches) and sorted(i for b in batches for i in b.rows) == [
        0,
        1,
        2,
    ]


# --- where it begins, and what goes wrong ---------------------------------------------------------------


def test_calibrate_sets_the_marginal() -> None:
    x = 5 + 2 * torch.randn(20, 30, 2)
    x[..., 1] = x[..., 1] * 3 - 40
    x[:, ::3] = torch.nan
    model = VRNN(2, 2, 4)
    assert calibrate(model, x)
    with torch.no_grad():
        model.p_x.linear.weight.zero_()
    head = model.p_x(torch.zeros(4 + model.phi_z.out_dim))
    seen = x[~x[..., 0].isnan()]
    assert torch.allclose(head.mean, seen.mean(0), atol=1e-4)
    assert torch.allclose(head.stddev, seen.std(0, correction=0), rtol=1e-3)
    far = VRNN(1, 2, 4)
    calibrate(far, 1e4 * torch.randn(2, 50, 1))
    assert torch.isfinite(far.p_x(torch.zeros(4 + far.phi_z.out_dim)).stddev).all()
    assert not calibrate(LGSSM(2, 2), x)
    shared = VRNN(2, 2, 4, emission={"emission": "student_t", "scale": "shared"})
    assert calibrate(shared, x)
    binary_model = VRNN(2, 2, 4, emission="bernoulli")
    calibrate(binary_model, torch.tensor([[[1.0, 0.0], [1.0, 1.0]]]))
    assert torch.allclose(binary_model.p_x.linear.bias.sigmoid(), torch.tensor([0.9999, 0.5]), atol=1e-4)


def test_where_a_nan_begins() -> None:
    model, data = VRNN(4, 3, 5), ragged(6, 5)
    run = scan(model, data)
    assert first_nonfinite(run) is None
    likelihood, prior = run.log_likelihood.clone(), run.log_prior.clone()
    likelihood[3, 0, 1] = torch.nan
    likelihood[4, 0, 0] = torch.inf
    broken = run._replace(log_likelihood=likelihood)
    assert first_nonfinite(broken, ["a", "b"]) == "log-likelihood is NaN first at t=3 (sequence 'b')"
    prior[3, 0, 0] = -torch.inf
    broken = broken._replace(log_prior=prior)
    assert first_nonfinite(broken) == "log p(z_t | .) is minus infinity first at t=3 (sequence 0)"
    assert "t=13" in str(first_nonfinite(broken, first_frame=10))
    static = scan(DSAE(4, 3, 5), data)
    assert static.log_proposal_w is not None
    static = static._replace(log_proposal_w=torch.full_like(static.log_proposal_w, torch.nan))
    assert first_nonfinite(static, ["a", "b"]) == "log q(w | x) is NaN (sequence 'a')"


class Poisoned(VRNN):
    """Its features are NaN wherever x is above 100."""

    def features(self, frame: Any) -> Tensor:
        return torch.where(frame.x.amax(-1, keepdim=True) > 100, torch.nan, super().features(frame))


@pytest.mark.parametrize("truncate", [None, 2])
def test_a_nan_is_reported(truncate: int | None) -> None:
    x = torch.randn(3, 6, 4)
    x[1, 4, 2] = 1000.0
    data = Sequences.from_arrays(x, names=["a", "b", "c"])
    message = r"log q\(z_t \| \.\) is NaN first at t=4 \(sequence 'b'\).*Raise min_scale"
    with pytest.raises(FloatingPointError, match=message):
        fit(Poisoned(4, 3, 5), data, epochs=1, truncate=truncate, **QUIET)


def test_a_gradient_that_is_not_finite_is_reported() -> None:
    model = vrnn()
    weight = model.decoder.net[0].weight if len(list(model.decoder.parameters())) else model.p_x.linear.weight
    weight.register_hook(lambda grad: grad * torch.inf)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="the gradient is not finite"):
        fit(model, binary(), epochs=1, calibrate=False, **QUIET)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_collapse_is_said_once_and_after_the_warm_up(caplog: pytest.LogCaptureFixture) -> None:
    x, model = binary(), vrnn()
    with torch.no_grad():  # q(z_t | .) = N(0, I), whatever x is, and no learning to speak of
        for p in model.q_z.parameters():
            p.zero_()
    result = fit(model, x, x, epochs=9, kl_warmup=2, lr=1e-12, **QUIET)
    assert [row["valid/active_units"] for row in result.history] == [0] * 9
    said = [r.message for r in caplog.records if "no latent coordinate is active" in r.message]
    assert len(said) == 1 and said[0].startswith("epoch 7:")
    assert fit(vrnn(), x, x, epochs=1, **QUIET).history[0]["valid/active_units"] > 0


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_in_mixed_precision(name: str) -> None:
    """Networks multiply in bfloat16; algebra, and whatever has a covariance, stays in float32."""
    cls = MODELS[name]
    joint = (
        {}
        if name in ("LGSSM", "GMM", "PPCA", "FactorAnalysis", "SLDS")
        else {"emission": "multivariate_gaussian"}
    )
    for options in ({}, joint) if joint else ({},):
        for missing in (False, True):
            losses = []
            for precision in ("32-true", "bf16-mixed"):
                model = small(cls, **options).float()
                data = sequences(model, (6, 5, 4), missing=missing).to(dtype=torch.float32)
                result = fit(model, data, data, epochs=1, batch_size=3, lr=1e-4, precision=precision, **QUIET)
                losses.append(result.history[0]["train/loss"])
            assert losses[0] == pytest.approx(losses[1], rel=0.05, abs=0.05), (options, missing)


def test_a_validation_bound_that_is_not_a_number_is_never_the_best(caplog: pytest.LogCaptureFixture) -> None:
    recorder, learner = Recorder(None, patience=3), Learner(vrnn())
    better = [
        recorder._judge({"epoch": epoch, "valid/nats_per_frame": nats}, learner)
        for epoch, nats in enumerate([math.nan, math.nan, 5.0, math.nan, 4.0, math.inf, 4.5], 1)
    ]
    assert better == [True, False, True, False, True, False, False]
    assert recorder.best["epoch"] == 5 and recorder.waited == 2
    sampled = Recorder(None), Learner(vrnn(), scheduled_sampling=0.5, scheduled_sampling_end=3)
    better = [
        sampled[0]._judge({"epoch": epoch, "valid/nats_per_frame": nats}, sampled[1])
        for epoch, nats in enumerate([5.0, 4.0, math.nan, 6.0, -math.inf, 7.0], 1)
    ]
    assert better == [True, True, False, True, False, False]  # the first one after the ramp that is a number
    watch = Watch()
    for epoch, nats in enumerate([math.nan, 3.0, math.nan], 1):
        watch.look({"epoch": epoch, "valid/nats_per_frame": nats, "train/loss": 1.0})
    assert len(watch.notes) == 1
    assert watch.notes[0].startswith(
        "epoch 1: the validation bound is nan, though the training loss is finite"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "elb"}, "objective should be one of elbo, iwae, renyi, fivo, exact, em; got 'elb'"),
        ({"particles": 0}, "particles should be 1 or more"),
        ({"kl": "none"}, "kl should be one of auto"),
        ({"optimizer": "sgd"}, "optimizer should be one of adam, adamw"),
        ({"lr": 0.0}, "lr should be positive"),
        ({"lr_decay": 0.5}, "lr_decay belongs to lr_schedule='exponential'"),
        ({"kl_start": 2.0}, "kl_start should be between 0 and 1"),
        ({"hide_rate": 1.0}, "hide_rate is a share of the frames"),
        ({"hide": "values"}, "hide='values' does nothing without a hide_rate above 0"),
        ({"alpha": 0.5, "objective": "iwae"}, "alpha=0.5 does nothing without objective='renyi'"),
        ({"resample_threshold": 1.0}, "resample_threshold=1.0 does nothing without objective='fivo'"),
        ({"truncate": 0}, "truncate should be 1 or more"),
        (
            {"ema": 1.0},
            r"ema is the decay per update of a moving average, in \(0, 1\), such as 0.998; got 1.0",
        ),
        ({"free_bits": 0.1, "objective": "iwae"}, "free_bits needs objective='elbo'"),
        ({"objective": "fivo", "beta": 0.5}, "fivo has no KL to weigh"),
        ({"epochs": 0}, "epochs should be at least 1"),
        ({"patience": 3}, "patience counts epochs without a better validation bound"),
        ({"precision": "16-mixed"}, "precision should be one of 32-true"),
        ({"batch_size": 0}, "batch_size should be at least 1"),
        ({"crop": 0}, "crop is the frames of a piece, at least 1; got 0"),
        ({"resume": True}, "resume=True needs out_dir"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(vrnn(), binary(), **{"epochs": 1, **QUIET, **options})


def test_unknown_options_and_data_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="unknown option 'particle' for fit; did you mean 'particles'"):
        fit(vrnn(), binary(), particle=3, **QUIET)
    with pytest.raises(ValueError, match="VRNN was built for x_dim=4; the sequences have 3"):
        fit(vrnn(), binary(x_dim=3), **QUIET)
    with pytest.raises(
        ValueError, match=r"Bernoulli emission: values of train, sequence '0', should be from 0 to 1"
    ):
        fit(vrnn(), 2 * torch.ones(1, 3, 4), **QUIET)
    with pytest.raises(ValueError, match=r"class numbers from 0 to 2; .* with fractions"):
        fit(vrnn(emission={"emission": "categorical", "classes": 3}), torch.full((1, 3, 4), 0.5), **QUIET)
    with pytest.raises(ValueError, match="decodes x_t from z_1:T"):
        Loss(RVAE(4, 3, 5, decoder="noncausal"), truncate=5)


def test_a_model_in_evaluation_mode_is_trained_in_training_mode():
    """As after an earlier fit, or `dynavae.load`: dropout has to be on."""
    model = VRNN(x_dim=2, z_dim=2, h_dim=3, dropout=0.5).eval()
    modes = []
    model.phi_x.register_forward_hook(lambda module, *_: modes.append(module.training))
    fit(model, torch.randn(4, 5, 2), epochs=1, progress=False, accelerator="cpu")
    assert modes
    assert all(modes)
    assert not model.training
