"""The command line as a user types it, on a small data set of their own."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import dynavae
from dynavae import cli
from dynavae.models import MODELS
from dynavae.runs import Run


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """A user's .npz: real values, gaps, three splits."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "own.npz"
    x = rng.normal(size=(16, 14, 2)).cumsum(1)
    x[:, 5:7, 0] = np.nan
    np.savez(path, train=x[:10], valid=x[10:12], test=x[12:])
    return str(path)


@pytest.fixture(scope="module")
def fitted(own_data, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("runs") / "vrnn")
    small = ["--model.z_dim", "2", "--model.h_dim", "4", "--model.x_layers", "[4]", "--model.z_layers", "[4]"]
    status = cli.main(["fit", "--model", "VRNN", *small, "--data", own_data, "--out", out, "--epochs", "2",
                       "--batch_size", "4", "--progress", "false", "--tensorboard", "false"])  # fmt: skip
    assert status == 0
    return out


def run(arguments, capsys):
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_fit_leaves_a_run_that_python_reads(fitted, own_data):
    settings = json.loads(Path(f"{fitted}/run.json").read_text())
    assert settings["model"] == "VRNN"
    assert settings["options"]["x_dim"] == 2
    assert settings["options"]["emission"] == "gaussian"  # from the data: real values
    assert settings["data"]["source"] == own_data
    assert settings["training"]["epochs"] == 2
    model = dynavae.load(f"{fitted}/best")
    assert (model.x_dim, model.z_dim, model.training) == (2, 2, False)


def test_evaluate_writes_an_honest_score(fitted, capsys):
    status, out, _ = run(["evaluate", fitted, "--bounds", "[elbo, iwae-5, fivo-4]"], capsys)
    assert status == 0
    assert "nats_per_frame" in out
    score = json.loads(Path(f"{fitted}/score.json").read_text())
    needed = "model data data_sha256 split bound particles nats_per_frame average frames first_frame"
    assert set(needed.split()) <= set(score)
    assert (score["bound"], score["split"], score["frames"]) == ("elbo", "test", 4 * 14)
    scores = json.loads(Path(f"{fitted}/scores.json").read_text())
    assert [(s["bound"], s["particles"]) for s in scores] == [("elbo", 1), ("iwae", 5), ("fivo", 4)]
    assert (
        run(["evaluate", fitted, "--bounds", "[elbo]"], capsys)[0] == 0
    )  # again: replaces, keeps the others
    assert len(json.loads(Path(f"{fitted}/scores.json").read_text())) == 3


def test_generate_forecast_impute(fitted, capsys):
    assert run(["generate", fitted, "--batch", "3", "--length", "5"], capsys)[0] == 0
    assert np.load(f"{fitted}/samples/samples.npz")["x"].shape == (3, 5, 2)
    status, out, _ = run(["forecast", fitted, "--horizon", "4", "--samples", "6"], capsys)
    assert status == 0
    assert "mae" in out
    future = np.load(f"{fitted}/forecast.npz")
    assert future["samples"].shape == (6, 4, 4, 2)
    rows = list(csv.DictReader(Path(f"{fitted}/forecast.csv").read_text().splitlines()))
    assert len(rows) == 4 * 4 * 2
    assert set(rows[0]) == {"id", "time", "column", "mean", "q05", "q50", "q95", "truth"}
    status, out, _ = run(["impute", fitted, "--samples", "6"], capsys)
    assert status == 0
    rows = list(csv.DictReader(Path(f"{fitted}/imputed.csv").read_text().splitlines()))
    assert len(rows) == 4 * 2  # two frames of one feature in each of four sequences
    assert all(row["truth"] == "" and float(row["q05"]) <= float(row["q95"]) for row in rows)
    status, out, _ = run(["impute", fitted, "--samples", "6", "--hide", "0.3"], capsys)
    assert status == 0
    assert "mae_of_mean" in out


@pytest.mark.parametrize("n", [1, 12])
def test_another_npz_is_all_test(fitted, n, tmp_path, capsys):
    out, other = tmp_path / "run", str(tmp_path / "other.npz")
    shutil.copytree(fitted, out)
    x = np.random.default_rng(1).normal(size=(n, 9, 2))
    x[:, 4] = np.nan
    np.savez(other, x=x)
    assert cli.main(["evaluate", str(out), "--data", other, "--bounds", "[elbo]"]) == 0
    score = json.loads((out / "score.json").read_text())
    assert (score["split"], score["sequences"], score["frames"]) == ("test", n, 9 * n)
    assert cli.main(["impute", str(out), "--data", other, "--samples", "2"]) == 0
    assert np.load(out / "imputed.npz")["x"].shape == x.shape
    assert cli.main(["forecast", str(out), "--data", other, "--horizon", "3", "--samples", "2"]) == 0
    assert np.load(out / "forecast.npz")["mean"].shape == (n, 3, 2)
    capsys.readouterr()


def test_lists_and_shares_on_the_command_line(tmp_path, capsys):
    np.savez(tmp_path / "own.npz", x=np.random.default_rng(1).normal(size=(5, 9, 2)), names=list("abcde"))
    command = ["fit", "--model", "VAE", "--model.z_dim", "2", "--data", str(tmp_path / "own.npz"), "--epochs", "1",
               "--progress", "false", "--tensorboard", "false"]  # fmt: skip
    for given, counts in {"[a]": (3, 1, 1), "0.4": (2, 2, 1)}.items():
        out = tmp_path / given
        test = "[b]" if given == "[a]" else "0.2"
        assert cli.main([*command, "--valid", given, "--test", test, "--out", str(out)]) == 0
        splits = Run.open(out).data()  # as run.json has them
        assert tuple(len(splits.split(s)) for s in splits.available) == counts
    assert cli.main([*command, "--valid", "[f]", "--out", str(tmp_path / "x")]) == 1
    assert "valid: own.npz has no sequence 'f'; it has a, b, c, d, e." in capsys.readouterr().err


def test_report_is_one_file(fitted, capsys):
    status, _, _ = run(["report", fitted, "--horizon", "4"], capsys)
    assert status == 0
    page = Path(f"{fitted}/report.html").read_text()
    assert "VRNN on" in page
    assert "Forecasts" in page
    assert "Imputation" in page or "imputation" in page


def test_list(capsys):
    status, out, _ = run(["list", "models", "--json"], capsys)
    assert status == 0
    records = json.loads(out)
    assert {r["model"] for r in records} == set(MODELS)
    vrnn = next(r for r in records if r["name"] == "VRNN")
    assert vrnn["tasks"]["filter"] is True
    assert vrnn["options"]["h_dim"] == 128
    for what in ("models", "data", "emissions"):
        assert run(["list", what], capsys)[0] == 0
    assert "bernoulli" in run(["list", "emissions"], capsys)[1]


def test_config_file(own_data, tmp_path, capsys):
    config = tmp_path / "fit.yaml"
    config.write_text(
        f"model:\n  class_path: dynavae.VAE\n  init_args: {{z_dim: 2, layers: [4]}}\ndata: {own_data}\n"
        "epochs: 1\nprogress: false\ntensorboard: false\n"
    )
    status, _, _ = run(
        ["fit", "--config", str(config), "--out", str(tmp_path / "run"), "--lr", "0.01"], capsys
    )
    assert status == 0
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["options"]["layers"] == [4]
    assert settings["training"]["lr"] == 0.01


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["fitt"], 2, "unknown command 'fitt'; did you mean 'fit'?"),
        (["fit", "--model", "VRN", "--out", "x"], 1, "unknown model 'VRN'; did you mean 'VRNN'?"),
        (["fit", "--model", "VRNN", "--model.zdim", "3", "--out", "x"], 1,
         "unknown option 'zdim' for VRNN; did you mean 'z_dim'?"),
        (["fit", "--model", "VRNN", "--data", "nowhere.npz", "--out", "x"], 1, "nowhere.npz"),
        (["evaluate", "nowhere"], 1, "nowhere is not a run: it has no run.json"),
        (["forecast", "nowhere"], 1, "is not a run"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(arguments, status, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, _, err = run(arguments, capsys)
    assert found == status
    assert sentence in err
    assert "Traceback" not in err


def test_an_existing_run_is_not_overwritten(fitted, own_data, capsys):
    before = Path(f"{fitted}/run.json").read_text()
    status, _, err = run(["fit", "--model", "VAE", "--data", own_data, "--out", fitted], capsys)
    assert status == 1
    assert "continue it with --resume true" in err
    assert Path(f"{fitted}/run.json").read_text() == before


def test_an_interrupted_fit_says_how_to_continue(own_data, tmp_path, capsys, monkeypatch):
    from dynavae import commands

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "fit", interrupted)
    arguments = ["fit", "--model", "VAE", "--data", own_data, "--out", str(tmp_path / "run")]
    status, _, err = run(arguments, capsys)
    assert status == 130
    assert f"Start again with: dynavae fit --model VAE --data {own_data}" in err


def test_bad_bounds_and_horizons_get_a_sentence(fitted, capsys):
    assert (
        "looks like elbo, iwae-100 or fivo-64" in run(["evaluate", fitted, "--bounds", "[iwae-x]"], capsys)[2]
    )
    assert "bound should be one of" in run(["evaluate", fitted, "--bounds", "[vae]"], capsys)[2]
    assert "no sequence of test is longer than 99" in run(["forecast", fitted, "--horizon", "99"], capsys)[2]
    assert "hide is a share" in run(["impute", fitted, "--hide", "2"], capsys)[2]


def test_the_package_is_a_program():
    """`python -m dynavae`, with its exit status."""
    command = [sys.executable, "-m", "dynavae"]
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == f"dynavae {dynavae.__version__}"
    assert subprocess.run([*command, "nothing"], capture_output=True).returncode == 2


def test_help_and_version(capsys):
    assert "usage: dynavae COMMAND" in run(["--help"], capsys)[1]
    assert dynavae.__version__ in run(["--version"], capsys)[1]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", "--help"])
    assert stopped.value.code == 0
    assert "--bounds" in capsys.readouterr().out
