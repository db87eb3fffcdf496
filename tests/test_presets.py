"""Presets: every file builds a model and parses, and the command line finds them by name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dynavae import MODELS, cli, presets
from dynavae.checkpoint import save_pretrained

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_parses_builds_and_says_what_to_expect(name: str) -> None:
    given = cli.fit_parser().parse_args(["--config", str(presets.path(name)), "--out", "x"], defaults=False)
    model, options = cli._model(given)
    assert name.startswith(model.lower()) and name.endswith(given.data)
    MODELS[model](x_dim=88, emission="bernoulli", **options)
    comment = presets.path(name).read_text().split("model:")[0]
    assert re.search(r"nats per frame", comment) and re.search(r"\d (min|s)\b", comment), comment
    assert "Source" in comment and "CPU" in comment, comment


def test_a_preset_trains_and_its_options_can_be_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    small = [
        "--model.h_dim",
        "4",
        "--model.z_dim",
        "2",
        "--epochs",
        "1",
        "--batch_size",
        "64",
        "--progress=false",
    ]
    quiet = ["--tensorboard", "false", "--accelerator", "cpu"]
    assert cli.main(["fit", "--out", str(out), *small, *quiet, "--preset", "srnn-jsb"]) == 0
    settings = json.loads((out / "run.json").read_text())
    assert settings["preset"] == "srnn-jsb" and settings["options"]["h_dim"] == 4
    assert settings["training"]["kl_start"] == 0.2 and settings["training"]["epochs"] == 1
    assert (
        cli.main(["fit", "--resume", "true", "--out", str(out), "--epochs", "2", *quiet, "--progress=false"])
        == 0
    )
    assert json.loads((out / "run.json").read_text())["preset"] == "srnn-jsb"


@pytest.mark.parametrize("arguments", [["--preset", "srn-jsb"], ["--preset=srn-jsb"]])
def test_an_unknown_preset_is_answered_with_the_names(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", *arguments, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "unknown preset 'srn-jsb'; did you mean 'srnn-jsb'?" in error
    assert all(name in error for name in presets.names())


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "presets", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [r["preset"] for r in found] == presets.names()
    assert all(r["model"] in MODELS and r["epochs"] > 0 and len(r["what"]) > 20 for r in found)


# --- evaluate: any run or saved model, any data ----------------------------------------------------------


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main(["evaluate", *arguments])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_a_saved_model_is_evaluated_on_any_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    model, folder = MODELS["DKF"](x_dim=3, z_dim=2, h_dim=4, emission="bernoulli"), str(tmp_path / "exported")
    save_pretrained(model, folder)
    x = (np.random.default_rng(0).random((6, 7, 3)) < 0.5).astype(np.uint8)
    np.savez(tmp_path / "own.npz", train=x[:2], valid=x[2:3], test=x[3:])
    data = ["--data", str(tmp_path / "own.npz")]
    status, text = evaluate(capsys, folder, *data, "--split", "train", "--bounds", "[elbo, iwae-5, fivo-4]")
    assert status == 0, text
    scores = json.loads(Path(folder, "scores.json").read_text())
    assert [(s["bound"], s["particles"], s["split"], s["frames"]) for s in scores] == [
        ("elbo", 1, "train", 14),
        ("iwae", 5, "train", 14),
        ("fivo", 4, "train", 14),
    ]
    assert evaluate(capsys, folder, *data)[0] == 0  # the test split
    status, text = evaluate(capsys, folder)
    assert (
        status == 1 and "holds a model and no record of its data (run.json): say which, with --data" in text
    )
    status, text = evaluate(capsys, folder, "--data", "jsb")
    assert status == 1 and "DKF was built for x_dim=3; the sequences have 88" in text
    status, text = evaluate(capsys, folder, *data, "--split", "tset")
    assert status == 1 and "test" in text
    status, text = evaluate(capsys, folder, *data, "--bounds", "[exact]")
    assert status == 1 and "DKF" in text


def test_a_python_run_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from dynavae import HMM, fit

    x = torch.bernoulli(torch.full((6, 5, 2), 0.4))
    model = HMM(x_dim=2, states=3, emission="bernoulli")
    fit(model, x, x, epochs=1, out_dir=tmp_path / "run", progress=False, accelerator="cpu", tensorboard=False)
    torch.save({}, tmp_path / "unrelated.pt")
    import numpy as np

    np.savez(tmp_path / "own.npz", test=x.numpy())
    for folder in ("run", "run/best"):
        status, text = evaluate(
            capsys, str(tmp_path / folder), "--data", str(tmp_path / "own.npz"), "--bounds", "[exact, elbo]"
        )
        assert status == 0 and "exact: " in text, text
