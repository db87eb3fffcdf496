"""What commands are given and what they leave behind: numbers, splits, ids, errors by column, scores of these weights."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dynavae import cli, results, resume
from dynavae.commands import errors
from dynavae.data import DataSplits, Schema, SequenceDataset
from dynavae.report import write_comparison
from dynavae.runs import Run, table

QUIET = ["--progress", "false", "--tensorboard", "false", "--threads", "1"]
OFFSET = 1.7e9


def fit(data: str, out: Path, *more: str, model: str = "LGSSM", epochs: int = 1) -> str:
    arguments = ["fit", "--model", model, "--model.z_dim", "2", "--data", data, "--out", str(out)]
    assert cli.main([*arguments, "--epochs", str(epochs), *QUIET, *more]) == 0
    return str(out)


def rows_of(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def stored(path: str):
    return json.loads(Path(path).read_text())


@pytest.fixture(scope="module")
def units(tmp_path_factory):
    """A run on columns of very different units: a clock of 10^9 seconds that wobbles by less than one, and micrograms."""
    folder = tmp_path_factory.mktemp("units")
    rows = [
        f"{s},{t},{OFFSET + math.sin(t / 3 + s):.6f},{1e-6 * math.cos(t / 4 + s):.6e}"
        for s in range(1, 9)
        for t in range(30)
    ]
    path = folder / "units.csv"
    path.write_text("\n".join(["id,time,clock,dose", *rows]) + "\n")
    return fit(str(path), folder / "run", "--objective", "em", epochs=3)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    x = np.random.default_rng(0).choice(4, (20, 12, 1), p=[0.7, 0.1, 0.1, 0.1])
    np.savez(folder / "classes.npz", x=x)
    return fit(str(folder / "classes.npz"), folder / "run", "--kind", "categorical", model="VRNN")


@pytest.fixture
def own_npz(tmp_path):
    """Arrays without a test part."""
    x = np.random.default_rng(0).normal(size=(8, 10, 2)).cumsum(1)
    np.savez(tmp_path / "own.npz", train=x[:6], valid=x[6:])
    return str(tmp_path / "own.npz")


# --- results are of the weights that are there ----------------------------------------------------------------------


def test_a_replaced_run_takes_its_results_with_it(own_npz, tmp_path, capsys):
    out = fit(own_npz, tmp_path / "run")
    for command in (
        ["evaluate", out, "--split", "valid", "--bounds", "[elbo]"],
        ["forecast", out, "--split", "valid", "--horizon", "3", "--samples", "3"],
        ["impute", out, "--split", "valid", "--hide", "0.3", "--samples", "3"],
        ["generate", out, "--length", "4"],
        ["report", out, "--horizon", "3", "--samples", "3"],
    ):
        assert cli.main(command) == 0
    of_users = [Path(out, "notes.txt"), Path(out, "samples", "mine.wav")]
    for path in of_users:
        path.write_text("mine")
    derived = [path for pattern in resume.DERIVED for path in Path(out).glob(pattern)]
    assert len(derived) >= 12
    assert cli.main(["fit", "--model", "VAE", "--model.z_dim", "2", "--data", own_npz, "--out", out, "--epochs", "1",
                     "--resume", "false", *QUIET]) == 0  # fmt: skip
    left = {str(path.relative_to(out)) for path in Path(out).rglob("*") if path.is_file()}
    assert left == {
        *("run.json", "training.json", "metrics.csv", "kl_dim.csv", "notes.txt", "samples/mine.wav"),
        *("best/config.json", "best/model.safetensors", "checkpoints/last.ckpt"),
    }
    assert Run.open(out).scores() == []
    capsys.readouterr()


def test_a_folder_without_a_run_keeps_what_it_holds(own_npz, tmp_path, capsys):
    mine = tmp_path / "run" / "forecast.csv"
    mine.parent.mkdir()
    mine.write_text("mine")
    for more in ([], ["--resume", "false"]):
        mine.write_text("mine")
        fit(own_npz, mine.parent, *more)
        assert mine.exists() == (not more)  # a second run replaces the first, with its results
    capsys.readouterr()


def test_scores_are_those_of_the_best_weights(own_npz, tmp_path, capsys):
    out = fit(own_npz, tmp_path / "run", "--objective", "em")
    evaluate = ["evaluate", out, "--split", "valid", "--bounds"]
    assert cli.main([*evaluate, "[exact, elbo]"]) == 0
    run = Run.open(out)
    assert [s["weights_sha256"] for s in run.scores()] == 2 * [run.weights_sha256()]
    assert run.score_notes() == []
    before = f"{run.scores()[0]['nats_per_frame']:.4f}".replace("-", "−")
    assert cli.main(["report", out, "--horizon", "3", "--samples", "3"]) == 0
    assert before in Path(out, "report.html").read_text()
    assert cli.main(["fit", "--resume", "true", "--out", out, "--epochs", "20", *QUIET]) == 0
    assert Run.open(out).settings["best"]["epoch"] > 1
    assert Run.open(out).scores() == []
    assert cli.main(["report", out, "--horizon", "3", "--samples", "3"]) == 0
    page = Path(out, "report.html").read_text()
    assert before not in page
    assert "2 of the scores in scores.json left out" in page
    assert cli.main([*evaluate, "[elbo]"]) == 0
    assert [s["bound"] for s in stored(f"{out}/scores.json")] == ["elbo"]
    assert len(Run.open(out).scores()) == 1
    capsys.readouterr()


def test_a_comparison_leaves_out_scores_of_other_weights(own_npz, tmp_path, capsys):
    one = fit(own_npz, tmp_path / "one", "--objective", "em")
    assert cli.main(["evaluate", one, "--split", "valid", "--bounds", "[exact]"]) == 0
    two = tmp_path / "two"
    shutil.copytree(one, two)
    unmarked = [{k: v for k, v in s.items() if k != "weights_sha256"} for s in stored(f"{one}/scores.json")]
    (two / "scores.json").write_text(json.dumps(unmarked))
    assert Run.open(two).scores() == []
    page = write_comparison(tmp_path / "c.html", [one, two], horizon=3, samples=3).read_text()
    assert "Not scored yet: two" in page
    assert "1 of the scores in scores.json left out" in page
    capsys.readouterr()


def test_a_resume_that_changes_nothing_keeps_the_scores(own_npz, tmp_path, capsys):
    out = fit(own_npz, tmp_path / "run", "--objective", "em", epochs=2)
    assert cli.main(["evaluate", out, "--split", "valid", "--bounds", "[exact]"]) == 0
    assert cli.main(["fit", "--resume", "true", "--out", out, *QUIET]) == 0
    assert len(Run.open(out).scores()) == 1
    capsys.readouterr()


# --- digits ---------------------------------------------------------------------------------------------------------


def test_a_large_offset_costs_no_digits(units, capsys):
    assert cli.main(["impute", units, "--hide", "0.2", "--samples", "50"]) == 0
    rows = [r for r in rows_of(f"{units}/imputed.csv") if r["column"] == "clock"]
    truth, mean = (np.array([float(r[k]) for r in rows]) for k in ("truth", "mean"))
    assert np.ptp(truth) > 0.5
    ids, frames = (np.array([int(r[k]) for r in rows]) for k in ("id", "time"))
    np.testing.assert_allclose(truth - OFFSET, np.sin(frames / 3 + ids), atol=1e-5)
    error = np.abs(mean - truth).mean()
    assert error < 0.3
    clock = stored(f"{units}/imputed.json")["columns"][0]
    assert clock["mae"] == pytest.approx(error, rel=1e-3)
    assert clock["mae"] < clock["mae_of_mean"] < 2
    assert np.load(f"{units}/imputed.npz")["x"].dtype == np.float64
    capsys.readouterr()


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (1 / 3, 1.0, "0.333333"),
        (-20 / 3, 1.0, "-6.66667"),
        (200 / 3, 1.0, "66.66667"),
        (1e-9 / 3, 1.0, "3.33333e-10"),
        (OFFSET + 0.1234567, 0.5, "1700000000.123457"),
        (OFFSET, 1e-300, "1700000000"),
        (OFFSET + 1, 0.0, "1.7e+09"),
        (0.0, 1.0, "0"),
        (math.nan, 1.0, ""),
        (math.inf, 1.0, ""),
    ],
)
def test_digits_of_a_deviation(value, spread, text):
    assert results.written(value, spread) == text


def test_the_spread_is_that_of_the_scaling_or_of_the_values():
    data = SequenceDataset([np.zeros((3, 2), np.float32)])
    values = {
        "mean": np.array([[[5.0, 1.0], [5.0, np.nan]]]),
        "truth": np.array([[[7.0, 3.0], [7.0, np.nan]]]),
    }
    assert results.spreads(DataSplits("a", test=data), values) == [1.0, 1.0]
    schema = Schema(("a", "b"), mean=(0.0, 0.0), stddev=(4.0, 0.5))
    scaled = DataSplits("a", test=data, meta={"schema": schema.to_dict()})
    assert results.spreads(scaled, values) == [4.0, 0.5]


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("forecast RUN --samples 0", "samples should be 1 or more"),
        ("forecast RUN --horizon -3", "horizon should be 1 or more (frames to forecast); got -3."),
        ("forecast RUN --context 0", "context should be 1 or more"),
        ("forecast RUN --seed -1", "seed should be 0 or more"),
        ("impute RUN --hide 0.1 --samples 0", "samples should be 1 or more"),
        ("impute RUN --hide 0.1 --samples -2", "samples should be 1 or more"),
        ("generate RUN --length 0", "length should be 1 or more"),
        ("generate RUN --seed 99999999999999999999", "seed should be below 2**63"),
        ("report RUN --sequences 0", "sequences should be 1 or more (sequences to show); got 0."),
        ("report RUN --horizon 0", "horizon should be 1 or more"),
        ("evaluate RUN --batch_size -1", "batch_size should be 1 or more (sequences at a time); got -1."),
        ("evaluate RUN --bounds [iwae-]", "a bound looks like elbo, iwae-100 or fivo-64"),
        ("evaluate RUN --bounds [elbo,iwae-0]", "with 1 particle or more; got 'iwae-0'."),
        ("evaluate RUN --bounds [iwae--5]", "got 'iwae--5'."),
        ("fit --model VAE --data DATA --out OUT --threads 0", "threads should be 1 or more"),
        ("fit --model VAE --data DATA --out OUT --seed -1", "seed should be 0 or more"),
        ("fit --model VAE --data DATA --out OUT --split_seed -1", "split_seed should be 0 or more"),
        ("fit --model VAE --data DATA --out OUT --accelerator abacus", "auto, cpu or gpu; got 'abacus'."),
    ],
)
def test_numbers_that_mean_nothing_get_a_sentence(units, tmp_path, capsys, arguments, sentence):
    given = {"RUN": units, "DATA": Run.open(units).settings["data"]["source"], "OUT": str(tmp_path / "out")}
    assert cli.main([given.get(word, word) for word in arguments.split()]) == 1
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.out == ""  # nothing was begun
    assert not (tmp_path / "out").exists()


def test_an_accelerator_that_is_not_there_gets_a_sentence(units, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    data = Run.open(units).settings["data"]["source"]
    out = str(tmp_path / "out")
    assert cli.main(["fit", "--model", "VAE", "--data", data, "--out", out, "--accelerator", "gpu"]) == 1
    assert f"needs a GPU, and this torch ({torch.__version__}) sees none" in capsys.readouterr().err
    assert not Path(out).exists()


# --- splits ---------------------------------------------------------------------------------------------------------


def test_an_unknown_split_is_refused_as_evaluate_does(units, tmp_path, capsys):
    said = []
    for command in ("evaluate", "report"):
        assert cli.main([command, units, "--split", "foo"]) == 1
        said.append(capsys.readouterr().err.partition(": ")[2])
    assert said[0] == said[1] == "data set 'units' has no 'foo' split; available: train, valid, test.\n"
    assert not Path(units, "report.html").exists()


def test_pictures_say_which_split_they_show(own_npz, tmp_path, capsys):
    out = fit(own_npz, tmp_path / "run")
    options = ["--horizon", "3", "--samples", "3", "--sequences", "1"]
    assert cli.main(["report", out, *options]) == 0
    page = Path(out, "report.html").read_text()
    assert "own valid 0" in page
    assert "own test" not in page
    assert "the data have no test split: pictures show valid." in page
    assert cli.main(["report", out, "--split", "train", *options]) == 0
    page = Path(out, "report.html").read_text()
    assert "own train 0" in page
    assert "have no test split" not in page
    two = tmp_path / "two"
    shutil.copytree(out, two)
    assert cli.main(["report", out, str(two), "--split", "foo", "--out", str(tmp_path / "c.html")]) == 1
    assert "data set 'own' has no 'foo' split; available: train, valid." in capsys.readouterr().err


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "name"),
    [(["forecast", "--horizon", "4"], "forecast"), (["impute", "--hide", "0.2"], "imputed")],
)
def test_each_column_has_its_own_error(units, capsys, command, name):
    assert cli.main([command[0], units, *command[1:], "--samples", "20"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in out.splitlines()}
    columns = {c["column"]: c for c in stored(f"{units}/{name}.json")["columns"]}
    assert lines["column"][:4] == ["column", "values", "mae", "crps"]
    for column, found in columns.items():
        rows = [r for r in rows_of(f"{units}/{name}.csv") if r["column"] == column and r["truth"]]
        mae = np.mean([abs(float(r["mean"]) - float(r["truth"])) for r in rows])
        assert found["values"] == len(rows)
        assert found["mae"] == pytest.approx(mae, rel=1e-3)
        assert lines[column][2] == f"{found['mae']:.4g}"
    assert 0 < columns["dose"]["mae"] < 1e-5
    whole = stored(f"{units}/{name}.json")
    counts = np.array([c["values"] for c in columns.values()])
    assert whole["mae"] == pytest.approx(np.average([c["mae"] for c in columns.values()], weights=counts))
    assert (whole["split"], whole["data"]) == ("test", "units")
    assert f"{name}.json" in lines["written"]


def test_classes_are_right_or_wrong(classes, capsys):
    assert cli.main(["forecast", classes, "--horizon", "4", "--samples", "20"]) == 0
    out = capsys.readouterr().out
    assert "error_rate" in out
    assert not any(word in out for word in ("mae", "crps", "coverage"))
    rows = rows_of(f"{classes}/forecast.csv")
    wrong = np.mean([float(r["mean"]) != float(r["truth"]) for r in rows])
    assert stored(f"{classes}/forecast.json")["error_rate"] == pytest.approx(wrong)
    assert cli.main(["impute", classes, "--hide", "0.3", "--samples", "20"]) == 0
    assert "mae" not in capsys.readouterr().out
    rows = rows_of(f"{classes}/imputed.csv")
    found = stored(f"{classes}/imputed.json")
    assert found["error_rate"] == pytest.approx(
        np.mean([float(r["mean"]) != float(r["truth"]) for r in rows])
    )
    assert found["error_rate_of_mode"] == pytest.approx(np.mean([float(r["truth"]) != 0 for r in rows]))


def test_many_columns_are_in_the_file():
    columns = [{"column": str(d), "values": 1, "mae": 0.5} for d in range(30)]
    text = errors.printed({"mae": 0.5}, columns, "forecast.json")
    assert text == table([{"mae": 0.5}], digits=4) + "\nthe errors of each of 30 columns: forecast.json"
    assert len(errors.printed({"mae": 0.5}, columns[:20], "forecast.json").splitlines()) == 23
    assert errors.printed({"mae": 0.5}, columns[:1], "forecast.json") == table([{"mae": 0.5}], digits=4)


def test_nothing_known_is_no_error():
    splits = DataSplits("a", test=SequenceDataset([np.zeros((3, 2))]))
    truth, known = np.full((1, 3, 2), np.nan), np.zeros((1, 3, 2), dtype=bool)
    found = errors.of_mean(splits, np.zeros((1, 3, 2)), truth)
    assert errors.in_all(found, known) == {}
    assert errors.by_column(splits, found, known) == [{"column": c, "values": 0} for c in "01"]


# --- ids ------------------------------------------------------------------------------------------------------------


def test_ids_may_be_numbers(units, tmp_path, capsys):
    data = Run.open(units).settings["data"]["source"]
    out = fit(data, tmp_path / "run", "--valid", "[3]", "--test", "[7, '8']", "--objective", "em")
    splits = Run.open(out).data()
    assert [splits.origin("test", name)[0] for name in splits.test.names] == ["7", "8"]
    assert Run.open(out).settings["data"]["options"]["valid"] == ["3"]
    again = ["fit", "--resume", "true", "--out", out, "--epochs", "2", *QUIET]
    assert cli.main([*again, "--valid", "[3]", "--test", "[7, 8]"]) == 0
    assert cli.main([*again, "--valid", "[4]"]) == 1
    assert "contradicts" in capsys.readouterr().err
    assert (
        cli.main(["fit", "--model", "VAE", "--data", data, "--out", str(tmp_path / "x"), "--test", "[99]"])
        == 1
    )
    assert "test: units.csv has no sequence '99'" in capsys.readouterr().err
