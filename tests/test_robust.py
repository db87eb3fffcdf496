"""Runs that are interrupted, killed, resumed, on a full disk, with damaged files, or that go wrong."""

from __future__ import annotations

import csv
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from dynavae import VRNN, Sequences, cli, files, fit, load
from dynavae import data as datasets
from dynavae.callbacks import Recorder
from dynavae.commands import prediction
from dynavae.report import write_comparison
from dynavae.resume import Checkpoints, damage
from dynavae.runs import Run
from dynavae.training import FitResult
from dynavae.watch import Watch

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
CLOCKS = {"seconds", "frames_per_second"}
QUIET: dict[str, Any] = dict(progress=False, accelerator="cpu", tensorboard=False)
COMMON: dict[str, Any] = dict(batch_size=3, seed=5, kl_warmup=2, hide_rate=0.1, **QUIET)


@pytest.fixture
def data() -> Sequences:
    return Sequences.from_arrays([torch.randn(n, 4) for n in (8, 6, 7, 4, 5, 9, 3)])


def model() -> VRNN:
    torch.manual_seed(1)
    return VRNN(4, 3, 5, dropout=0.2)


def train(data: Sequences, out: Path, epochs: int = 3, **options: Any) -> FitResult:
    return fit(model(), data, data, epochs=epochs, out_dir=out, **{**COMMON, **options})


def check_same(a: FitResult, b: FitResult) -> None:
    assert [row["epoch"] for row in b.history] == [row["epoch"] for row in a.history]
    for x, y in zip(a.history, b.history, strict=True):
        assert {k: v for k, v in x.items() if k not in CLOCKS} == {
            k: v for k, v in y.items() if k not in CLOCKS
        }
    assert b.best["epoch"] == a.best["epoch"]
    assert all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())
    assert a.out_dir is not None and b.out_dir is not None
    stored = load(b.out_dir / "best").state_dict()
    assert all(torch.equal(v, stored[k]) for k, v in a.model.state_dict().items())
    with (b.out_dir / "metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == [str(row["epoch"]) for row in a.history]
    assert not list(b.out_dir.rglob("*.part"))


# --- interruption ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", [2, 3, 4, 5])  # 3 updates an epoch
@pytest.mark.parametrize("options", [{}, {"truncate": 3}])
def test_an_interrupted_update_is_finished_and_saved(
    data: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int, options: dict[str, Any]
) -> None:
    whole = train(data, tmp_path / "whole", **options)
    after = Recorder.on_train_batch_end

    def press(self: Recorder, trainer: Trainer, *rest: Any) -> None:
        if trainer.global_step == update:
            signal.raise_signal(signal.SIGINT)
        after(self, trainer, *rest)

    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(Recorder, "on_train_batch_end", press)
    with pytest.raises(KeyboardInterrupt, match=f"saved .* epoch {(update + 2) // 3}, after update {update}"):
        train(data, tmp_path / "parts", **options)
    monkeypatch.undo()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    saved = torch.load(tmp_path / "parts" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == update
    torch.rand(17)
    check_same(whole, train(data, tmp_path / "parts", resume=True, **options))


def test_the_second_ctrl_c_stops_at_once(
    data: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(self: Recorder, trainer: Trainer, *_: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Recorder, "on_train_batch_end", press)
    with pytest.raises(KeyboardInterrupt, match="stopped without saving"):
        train(data, tmp_path)
    assert not Checkpoints(tmp_path).exist()


def test_without_a_directory_nothing_is_saved(data: Sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(self: Recorder, *_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Recorder, "on_train_epoch_start", press)
    with pytest.raises(KeyboardInterrupt, match="nothing was saved in epoch 1"):
        fit(model(), data, epochs=2, **COMMON)


def own_run(folder: Path) -> list[str]:
    x = np.random.default_rng(0).normal(size=(16, 10, 2)).astype(np.float32)
    np.savez(folder / "own.npz", train=x[:10], valid=x[10:13], test=x[13:])
    quiet = ["--progress", "false", "--tensorboard", "false", "--accelerator", "cpu"]
    return ["fit", "--model", "VAE", "--model.z_dim", "2", "--data", str(folder / "own.npz"), "--batch_size", "2",
            *quiet]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_run_that_goes_on(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = [*own_run(tmp_path), "--epochs", "100000", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "dynavae.cli", *command], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (out / "metrics.csv").exists():
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"{number.name}: saving after this update" in err and "Traceback" not in err
    assert f"Continue with: dynavae fit --resume true --out {out}" in err
    done = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    epochs = done // 5 + 2
    assert cli.main(["fit", "--resume", "true", "--out", str(out), "--epochs", str(epochs)]) == 0
    assert [row["epoch"] for row in Run.open(out).history()] == list(range(1, epochs + 1))


def kill_test(kills: int, folder: Path) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "kill_test.py")]
    command = [*script, "--kills", str(kills), "--out", str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} of {kills} killed runs ended as the run that was never killed." in done.stdout


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    command = [*own_run(tmp_path), "--epochs", "5", "--checkpoint_minutes", "0", "--out"]
    process = subprocess.Popen([sys.executable, "-m", "dynavae.cli", *command, str(out)], env=ENVIRONMENT)
    while process.poll() is None and not (out / "metrics.csv").exists():
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert cli.main(["fit", "--resume", "true", "--out", str(out)]) == 0
    assert cli.main([*command, str(whole)]) == 0
    a, b = (Run.open(folder) for folder in (whole, out))
    for x, y in zip(a.history(), b.history(), strict=True):
        assert {k: v for k, v in x.items() if k not in CLOCKS} == {
            k: v for k, v in y.items() if k not in CLOCKS
        }
    best = b.model().state_dict()
    assert all(torch.equal(v, best[k]) for k, v in a.model().state_dict().items())


@pytest.mark.slow
def test_three_killed_runs(tmp_path: Path) -> None:
    kill_test(3, tmp_path)


# --- files ----------------------------------------------------------------------------------------------


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["writing", "half-way", "syncing", "renaming"])
@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_a_failure_while_saving_loses_nothing(
    data: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, failing: int
) -> None:
    """The disk fills up at the n-th write of `where`; once there is room, the run goes on as if nothing had been."""
    out, calls = tmp_path / "run", [0]
    whole = train(data, tmp_path / "whole")
    owner, name = {
        "writing": (Trainer, "save_checkpoint"), "half-way": (Trainer, "save_checkpoint"), "syncing": (files, "_sync"),
        "renaming": (os, "replace"),
    }[where]  # fmt: skip
    original = getattr(owner, name)

    def sometimes(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == failing:
            if where == "half-way":
                original(*arguments, **options)
                path = Path(arguments[1])
                path.write_bytes(path.read_bytes()[:1000])
            full()
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, sometimes)
    with pytest.raises(
        OSError, match=r"could not be written: the disk is full. Free some space and do it again"
    ) as e:
        train(data, out, checkpoint_minutes=0.0)
    assert e.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert not list(out.rglob("*.part"))
    if not (out / "training.json").exists():  # not even begun
        check_same(whole, train(data, out))
    else:
        check_same(whole, train(data, out, resume=True))


RESULTS = {
    "forecast": (["--horizon", "2", "--samples", "3"], ["forecast.npz", "forecast.csv"]),
    "impute": (["--hide", "0.2", "--samples", "3"], ["imputed.npz", "imputed.csv"]),
    "generate": (["--batch", "2", "--length", "3"], ["samples/samples.npz"]),
    "evaluate": (["--bounds", "[elbo]"], ["score.json", "scores.json"]),
    "report": (["--horizon", "2", "--samples", "3"], ["report.html"]),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert cli.main([*own_run(folder), "--epochs", "1", "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.parametrize(("command", "failing"), [(c, i) for c in RESULTS for i in range(len(RESULTS[c][1]))])
def test_results_on_a_full_disk(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    command: str, failing: int,
) -> None:  # fmt: skip
    """A result that does not fit on the disk leaves the one before it, and no half."""
    out, (options, names) = tmp_path / "run", RESULTS[command]
    shutil.copytree(finished, out)
    (out / "samples").mkdir(exist_ok=True)
    path = out / names[failing]
    path.write_text("[]")  # an old result
    original = os.replace

    def sometimes(beside: Path, to: Path) -> None:
        full() if to == path else original(beside, to)

    monkeypatch.setattr(os, "replace", sometimes)
    assert cli.main([command, str(out), *options]) == 1
    monkeypatch.undo()
    assert f"{str(path)!r} could not be written: the disk is full. Free some space and do it again" in (
        capsys.readouterr().err
    )
    assert path.read_text() == "[]" and not list(out.rglob("*.part"))
    assert cli.main([command, str(out), *options]) == 0
    assert len(path.read_bytes()) > 2


def test_half_an_npz_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(file: Any, **arrays: Any) -> None:
        file.write(b"PK")
        full()

    splits, path = (
        datasets.DataSplits("a", test=datasets.SequenceDataset([np.ones((3, 2))])),
        tmp_path / "a.npz",
    )
    monkeypatch.setattr(np, "savez_compressed", half)
    with pytest.raises(OSError, match=r"a.npz' could not be written: the disk is full"):
        datasets.save_npz(path, splits)
    assert not os.listdir(tmp_path)
    monkeypatch.undo()
    datasets.save_npz(path, splits)
    assert datasets.load(path).available == ("test",)


def test_music_and_comparisons_on_a_full_disk(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "other")
    monkeypatch.setattr(files, "_sync", full)
    with pytest.raises(OSError, match=r"comparison.html' could not be written: the disk is full"):
        write_comparison(tmp_path / "comparison.html", [finished, tmp_path / "other"], horizon=2, samples=2)
    with pytest.raises(OSError, match=r"sample_0.wav' could not be written: the disk is full"):
        prediction._music(tmp_path, "sample", [np.eye(4)], {"frame_seconds": 0.1, "lowest_midi": 60})
    assert os.listdir(tmp_path) == ["other"]


def test_replacing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), files.replacing(path) as beside:
        beside.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with pytest.raises(PermissionError, match=r"writing there is not allowed. Change the permissions"):
        with files.replacing(path):
            raise PermissionError(errno.EACCES, "no")
    with pytest.raises(OSError, match=r"could not be written: Input/output error. What was saved before"):
        with files.replacing(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def spoil(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    else:  # one byte of the weights
        content[len(content) // 2] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "empty", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    data: Sequences, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole, out = train(data, tmp_path / "whole"), tmp_path / "run"
    train(data, out, epochs=2)
    spoil(out / "checkpoints" / "last.ckpt", how)
    assert damage(out / "checkpoints" / "last.ckpt") and not damage(out / "checkpoints" / "previous.ckpt")
    result = train(data, out, resume=True)
    check_same(whole, result)
    (said,) = [r.message for r in caplog.records]
    assert "last.ckpt is damaged" in said and "continued from the checkpoint before it, previous.ckpt" in said
    assert result.notes == (said,)
    assert json.loads((out / "training.json").read_text())["notes"] == [said]
    assert not damage(out / "checkpoints" / "previous.ckpt")
    for name in ("last.ckpt", "previous.ckpt"):
        spoil(out / "checkpoints" / name, how)
    with pytest.raises(ValueError, match=r"no whole checkpoint is left .* dynavae.load\('.*best'\)"):
        train(data, out, resume=True)


def test_a_kill_between_best_and_last(data: Sequences, tmp_path: Path) -> None:
    """The best weights of the checkpoint win over a newer best/."""
    whole, out = train(data, tmp_path / "whole"), tmp_path / "run"
    train(data, out, epochs=2)
    shutil.rmtree(out / "best")
    check_same(whole, train(data, out, resume=True))
    over = train(data, out, resume=True)  # already at its end
    check_same(whole, over)


def test_a_run_without_a_checkpoint_starts_again(
    data: Sequences, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, out = train(data, tmp_path / "whole"), tmp_path / "run"
    train(data, out, epochs=1)
    shutil.rmtree(out / "checkpoints")
    check_same(whole, train(data, out, resume=True))
    assert "no checkpoint yet to resume from: started at the beginning" in caplog.text


def test_directories_that_cannot_be_written(
    data: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(NotADirectoryError, match="file' is a file, but should be a directory"):
            train(data, out)

    def refused(*_: Any) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refused)
    with pytest.raises(
        PermissionError, match=r"writing there is not allowed. Change the permissions, or choose"
    ):
        train(data, tmp_path / "run")


def test_a_damaged_run_json(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"run.json is damaged: .* best/ may still be good"):
        Run.open(tmp_path)


# --- resuming another run -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.5}, r"lr=0.5 contradicts the run in .*, which was begun with 'the default'"),
        ({"batch_size": 2}, r"batch_size=2 contradicts the run in .* begun with 3: leave it as it was"),
    ],
)
def test_other_options(data: Sequences, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    train(data, tmp_path, epochs=1)
    with pytest.raises(ValueError, match=message):
        train(data, tmp_path, epochs=2, resume=True, **options)


def test_other_data_and_models(data: Sequences, tmp_path: Path) -> None:
    train(data, tmp_path, epochs=1)
    with pytest.raises(ValueError, match="was trained on other data: train differs in sha256"):
        train(data[[0, 1]], tmp_path, resume=True)
    with pytest.raises(ValueError, match="begun with valid some, not none"):
        fit(model(), data, out_dir=tmp_path, epochs=3, resume=True, **COMMON)
    with pytest.raises(ValueError, match="h_dim=6 contradicts the run"):
        fit(VRNN(4, 3, 6, dropout=0.2), data, data, out_dir=tmp_path, epochs=3, resume=True, **COMMON)
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"training.json is damaged .* delete it to resume without comparing"
    ):
        train(data, tmp_path, resume=True)
    with pytest.raises(ValueError, match="checkpoint_minutes should be 0 or more, or None; got -1"):
        train(data, tmp_path, checkpoint_minutes=-1.0)


def test_the_command_line_resumes_from_the_directory_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, out = own_run(tmp_path), str(tmp_path / "run")
    assert cli.main([*command, "--lr", "0.002", "--epochs", "2", "--out", out]) == 0
    assert cli.main(["fit", "--resume", "true", "--out", out, "--epochs", "3"]) == 0
    assert cli.main([*command, "--lr", "0.002", "--epochs", "3", "--out", str(tmp_path / "whole")]) == 0
    whole, parts = (Run.open(tmp_path / name) for name in ("whole", "run"))
    for a, b in zip(whole.history(), parts.history(), strict=True):
        assert {k: v for k, v in a.items() if k not in CLOCKS} == {
            k: v for k, v in b.items() if k not in CLOCKS
        }
    assert parts.settings["training"] == whole.settings["training"]
    assert parts.settings["options"] == whole.settings["options"]
    before = (tmp_path / "run" / "run.json").read_text()
    capsys.readouterr()
    for given, sentence in (
        (["--lr", "0.1"], "--lr 0.1 contradicts"),
        (["--data", "jsb"], "--data jsb contradicts"),
        (["--seed", "4"], "--seed 4 contradicts"),
        (["--model", "VRNN"], "--model VRNN contradicts"),
        (["--model", "VAE", "--model.z_dim", "5"], "--model.z_dim 5 contradicts"),
    ):
        assert cli.main(["fit", "--resume", "true", "--out", out, *given]) == 1
        err = capsys.readouterr().err
        assert sentence in err and "leave it out to resume that run" in err
    assert (tmp_path / "run" / "run.json").read_text() == before
    assert cli.main(["fit", "--resume", "true", "--out", str(tmp_path / "nowhere")]) == 1
    assert "there is no run to resume in" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


# --- what goes wrong in training ------------------------------------------------------------------------


def rows(**columns: list[float]) -> list[dict[str, float]]:
    count = len(next(iter(columns.values())))
    names = {"nats": "valid/nats_per_frame", "loss": "train/loss", "norm": "grad_norm", "kl": "train/kl_per_frame",
             "first": "train/nats_per_frame", "active": "valid/active_units"}  # fmt: skip
    return [{"epoch": i + 1, **{names[n]: v[i] for n, v in columns.items()}} for i in range(count)]


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            dict(nats=[3, 2, 3, 3, 3], loss=[3, 2, 3, 3, 3]),
            "epoch 5: .* training diverges. .* lower learning rate",
        ),
        (dict(nats=[3, 2, 3, 3, 3], loss=[3, 2, 1, 0, 0]), "epoch 5: .* overfitting. .* try patience"),
        (dict(norm=[2, 1, 500]), "epoch 3: the norm of the gradient, 500, is 500 times .* it explodes"),
        (dict(kl=[1, 1, 60], first=[5, 4, 4]), "epoch 3: the KL, 60 nats per frame, .* it explodes"),
        (
            dict(nats=[1, 900, 800, 700, 600], loss=[9, 9, 9, 9, 9], first=[1, 9, 9, 9, 9]),
            "epoch 4: .* than before",
        ),
        (dict(active=[0, 0, 0, 0, 0, 0]), "epoch 5: no latent coordinate is active"),
        (dict(nats=[3, 2, 2.1, 3, 2.1, 3, 2.1], loss=[3, 2, 3, 3, 3, 3, 3]), ""),
        (dict(nats=[3, 2, 1, 0, -5], loss=[3, 2, 3, 3, 3]), ""),
        (dict(norm=[2, 1, 90]), ""),
        (dict(kl=[1, 40, 40], first=[5, 4, 4]), ""),
        (dict(active=[0, 0, 1, 2, 1, 1]), ""),
    ],
)
def test_what_the_watch_says(columns: dict[str, list[float]], sentence: str, caplog: Any) -> None:
    import re

    watch, twice = Watch(), rows(**columns)
    for row in twice[:-1]:
        watch.look(row)
    resumed = Watch()
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    for row in [twice[-1], {**twice[-1], "epoch": 99}]:
        resumed.look(row)
    assert len(resumed.notes) == bool(sentence)
    assert [r.message for r in caplog.records] == resumed.notes
    if sentence:
        assert re.search(sentence, resumed.notes[0])


def test_the_kl_may_be_large_in_the_warm_up() -> None:
    for settled, count in ((0, 1), (5, 0)):
        watch = Watch(speak=False)
        for row in rows(kl=[1, 1, 60], first=[5, 4, 4]):
            watch.look(row, settled)
        assert len(watch.notes) == count


def test_a_diverging_run_says_so_in_the_run_and_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "dynavae")
    out = tmp_path / "run"
    wild = ["--lr", "3", "--gradient_clip", "1e6", "--epochs", "8", "--out", str(out)]
    assert cli.main([*own_run(tmp_path), *wild]) == 0
    notes = json.loads((out / "run.json").read_text())["notes"]
    assert notes and notes == [r.message for r in caplog.records]
    assert Run.open(out).notes() == notes
    assert cli.main(["report", str(out), "--horizon", "4"]) == 0
    assert notes[0][:40] in (out / "report.html").read_text()


def test_the_norm_of_the_gradient_is_recorded(data: Sequences, tmp_path: Path) -> None:
    norms: list[Tensor] = []
    net = model()

    def keep(self: Any, *_: Any) -> None:
        grads = [p.grad.flatten() for p in net.parameters() if p.grad is not None]
        norms.append(torch.cat(grads).norm())

    from dynavae.learner import Learner

    clip = Learner.on_before_optimizer_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "on_before_optimizer_step", lambda *a: (keep(*a), clip(*a)))
        result = fit(net, data, epochs=1, **COMMON)
    assert result.history[0]["grad_norm"] == pytest.approx(float(torch.stack(norms).mean()), rel=1e-5)
