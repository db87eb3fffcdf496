"""From a user's table to results and back: times to the digit, long outages, silent stations, known inputs, scaling."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import dynavae
from dynavae import cli
from dynavae import data as datasets
from dynavae.commands import errors
from dynavae.data import DataSplits, Schema, load
from dynavae.data.grid import infer_step
from dynavae.data.own import _with_values
from dynavae.runs import Run

QUIET = ["--progress", "false", "--tensorboard", "false", "--epochs", "1"]


def write(path: Path, rows: list[str]) -> str:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def rows_of(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def run_of(path: str, out: Path, *more: str) -> str:
    """A small LGSSM on a table."""
    arguments = ["fit", "--model", "LGSSM", "--model.z_dim", "2", "--data", path, "--out", str(out)]
    assert cli.main([*arguments, *QUIET, *more]) == 0
    return str(out)


# --- times --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "start", "frame", "text"),
    [
        (100, 1714521600100, 3, "1714521600400"),  # milliseconds since 1970
        (0.1, 1714521600.1, 2, "1714521600.3"),  # 10 Hz in seconds since 1970
        (0.001, 0.0, 7, "0.007"),
        (1.0, -3.0, 3, "0"),
        (1e9, 3e12, 1, "3001000000000"),
    ],
)
def test_times_come_back_to_the_digit(step, start, frame, text):
    assert Schema(("x",), unit="number", step=step).time(start, frame) == text


@pytest.mark.parametrize(("start", "step"), [(1714521600000, 100), (1714521600.0, 0.1)])
def test_fine_times_keep_all_windows_and_all_rows(tmp_path, capsys, start, step):
    times = [f"{start + k * step:.1f}".removesuffix(".0") for k in range(100)]
    values = [f"{t},{math.sin(k):.3f},{k % 5}" for k, t in enumerate(times) if k % 10 != 4]
    path = write(tmp_path / "fast.csv", ["time,a,b", *values])
    splits = load(path, window=10)
    assert sum(len(splits.split(s)) for s in splits.available) == 10
    out = run_of(path, tmp_path / "run", "--window", "10")
    assert cli.main(["impute", out, "--split", "all", "--samples", "5"]) == 0
    capsys.readouterr()
    assert [r["time"] for r in rows_of(f"{out}/imputed.csv")] == [t for t in times[4::10] for _ in "ab"]


HOURS = 3600.0 * np.arange(1000)


@pytest.mark.parametrize(
    ("times", "step"),
    [
        (HOURS + 360 * (np.arange(1000) >= 500), 3600.0),  # a clock set forward by 6 minutes
        (HOURS - 1440 * (np.arange(1000) >= 500), 3600.0),
        (HOURS + 87900 * (np.arange(1000) >= 300), 3600.0),  # a day of silence, then 25 minutes late
        (1714521600.0 + np.round(0.1 * np.arange(1000), 1), 0.1),
        (
            1714521600.0 + np.arange(200_000) / 30,
            0.03333333333,
        ),  # the nominal step would drift by a frame in an hour
    ],
)
def test_the_step_is_that_of_the_clock(times, step):
    assert infer_step([times], "a", "seconds") == step


# --- gaps ---------------------------------------------------------------------------------------------------------


def test_a_piece_without_values_joins_the_piece_before():
    x = np.arange(24.0)[:, None].repeat(2, 1)
    x[[0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15]] = np.nan
    spans = [(a, a + 4) for a in range(0, 24, 4)]
    assert _with_values(x, spans) == [(0, 16), (16, 20), (20, 24)]


def test_an_outage_longer_than_a_window_is_filled(tmp_path, capsys):
    silent = range(30, 55)
    rows = [f"{s},{t},{math.sin(t):.3f}" for s in "ns" for t in range(80) if t not in silent or s == "s"]
    path = write(tmp_path / "air.csv", ["id,t,a", *rows])
    out = run_of(path, tmp_path / "run", "--window", "8")
    assert cli.main(["impute", out, "--split", "all", "--samples", "5"]) == 0
    capsys.readouterr()
    filled = rows_of(f"{out}/imputed.csv")
    assert [(r["id"], r["time"]) for r in filled] == [("n", str(t)) for t in silent]
    assert all(math.isfinite(float(r["mean"])) for r in filled)


def test_every_gap_of_a_table_with_its_own_splits_is_filled(tmp_path, capsys):
    silent = range(10, 35)  # in train, longer than a window
    rows = [
        f"{t},{'' if t in silent else f'{math.sin(t):.3f}'},{'train' if t < 60 else 'valid' if t < 70 else 'test'}"
        for t in range(80)
    ]
    path = write(tmp_path / "air.csv", ["t,a,part", *rows])
    out = run_of(path, tmp_path / "run", "--window", "8", "--stride", "4", "--split_column", "part")
    assert cli.main(["impute", out, "--split", "all", "--samples", "5"]) == 0
    capsys.readouterr()
    assert [r["time"] for r in rows_of(f"{out}/imputed.csv")] == [str(t) for t in silent]


def test_samples_are_drawn_in_portions(tmp_path, capsys, monkeypatch):
    rows = [f"{s},{t},{math.sin(t):.3f}" for s in "abcdef" for t in range(20) if t % 7 != 3]
    out = run_of(write(tmp_path / "air.csv", ["id,t,a", *rows]), tmp_path / "run")
    found = []
    for most in (10**9, 1):  # all at once; one sequence at a time
        monkeypatch.setattr(errors, "MOST_SAMPLED", most)
        assert cli.main(["impute", out, "--split", "all", "--samples", "200", "--hide", "0.1"]) == 0
        assert "crps" in capsys.readouterr().out
        found.append(rows_of(f"{out}/imputed.csv"))
    assert [(r["id"], r["time"]) for r in found[0]] == [(r["id"], r["time"]) for r in found[1]]
    for r, s in zip(*found, strict=True):
        assert r["truth"] == s["truth"]
        assert float(r["mean"]) == pytest.approx(
            float(s["mean"]), abs=1e-4
        )  # exact smoother: free of samples
        assert float(r["q05"]) == pytest.approx(float(s["q05"]), abs=0.8)


def test_a_silent_station_is_left_out_of_the_forecast(tmp_path, capsys):
    rows = [
        f"{s},{t},{math.sin(t):.3f}" for s in "ns" for t in range(40) if s == "s" or not 32 <= t < 36 or t < 8
    ]
    path = write(tmp_path / "air.csv", ["id,t,a", *rows])
    out = run_of(path, tmp_path / "run", "--test", "0.2")  # frames 32 to 39; of n the first four are missing
    assert cli.main(["forecast", out, "--horizon", "4", "--samples", "5"]) == 0
    assert "without an observed value to forecast from: 1 (n)" in capsys.readouterr().out
    assert {r["id"] for r in rows_of(f"{out}/forecast.csv")} == {"s"}
    assert cli.main(["report", out, "--horizon", "4"]) == 0
    model, splits = dynavae.load(f"{out}/best"), Run.open(out).data()
    with pytest.raises(ValueError, match="sequence 'n' has no observed value within the context"):
        dynavae.forecast(model, splits, 4, 4, split="test")
    capsys.readouterr()


# --- known inputs -------------------------------------------------------------------------------------------------


def test_forecasts_follow_the_controls_that_the_file_has(tmp_path, capsys):
    """x_t = u_t + noise, so the forecast has to be the control to come."""
    generator = np.random.default_rng(0)
    u = generator.choice([-1.0, 1.0], 300)
    rows = [f"{t},{u[t] + 0.01 * generator.normal():.4f},{u[t]}" for t in range(290)]
    path = write(tmp_path / "driven.csv", ["t,a,u", *rows, *(f"{t},,{u[t]}" for t in range(290, 300))])
    out = run_of(
        path, tmp_path / "run", "--controls", "[u]", "--epochs", "60", "--lr", "0.05", "--window", "30"
    )
    assert cli.main(["forecast", out, "--future", "true", "--horizon", "10", "--samples", "20"]) == 0
    forecast = rows_of(f"{out}/forecast.csv")
    assert [r["time"] for r in forecast] == [str(t) for t in range(290, 300)]
    assert np.sign([float(r["mean"]) for r in forecast]).tolist() == u[290:].tolist()
    capsys.readouterr()
    assert cli.main(["forecast", out, "--future", "true", "--horizon", "11"]) == 1
    assert "reach 10 frames beyond its last value" in capsys.readouterr().err


def test_controls_to_come_do_not_count_as_a_share(tmp_path):
    rows = [*(f"{t},{t % 5},1" for t in range(100)), *(f"{t},,1" for t in range(100, 160))]
    splits = load(write(tmp_path / "a.csv", ["t,a,u", *rows]), controls=["u"])
    assert [splits.split(s).frames for s in ("train", "valid", "test")] == [80, 10, 70]
    assert np.isnan(splits.test.x[0][10:]).all()
    alone = load(tmp_path / "a.csv", controls=["u"], valid=0, test=0)
    assert alone.train.frames == 160


# --- scaling ------------------------------------------------------------------------------------------------------


def test_a_model_trained_in_python_keeps_the_scaling_of_its_table(tmp_path, capsys):
    first = write(tmp_path / "a.csv", ["t,a", *(f"{t},{100 + 10 * math.sin(t):.3f}" for t in range(60))])
    other = write(tmp_path / "b.csv", ["t,a", *(f"{t},{200 + math.sin(t):.3f}" for t in range(60))])
    splits = load(first, window=10)
    assert splits.train.select([0]).about == {"kind": "real", "schema": splits.meta["schema"]}
    torch.manual_seed(0)
    model = dynavae.LGSSM(x_dim=1, z_dim=2)
    out = tmp_path / "run"
    dynavae.fit(model, splits.train, splits.valid, epochs=1, out_dir=out, progress=False, tensorboard=False)
    stored = json.loads((out / "best" / "config.json").read_text())
    assert Schema.from_dict(stored["schema"]) == splits.schema
    run = Run.open(out, exported=True)
    assert run.schema == splits.schema
    assert run.data(other).test.x[0].mean() == pytest.approx(
        (200 - splits.schema.mean[0]) / splits.schema.stddev[0], 0.01
    )
    assert cli.main(["forecast", str(out), "--data", first, "--horizon", "3", "--samples", "5"]) == 0
    assert all(80 < float(r["mean"]) < 120 for r in rows_of(f"{out}/forecast.csv"))
    capsys.readouterr()


def test_a_model_without_a_record_of_scaling_takes_values_as_they_are(tmp_path, capsys):
    path = write(tmp_path / "a.csv", ["t,a", *(f"{t},{100 + t % 3}" for t in range(30))])
    dynavae.LGSSM(x_dim=1, z_dim=2).save_pretrained(tmp_path / "model")
    data = Run.open(tmp_path / "model", exported=True).data(path)
    assert data.test.x[0][:3, 0].tolist() == [100, 101, 102]
    assert "says nothing of a scaling" in capsys.readouterr().err


def test_a_set_known_by_name_keeps_its_scaling(tmp_path, monkeypatch):
    """Its loader takes no schema, only whether to scale."""

    def load_named(*, standardize: bool = True) -> DataSplits:
        schema = Schema(("a",)).fitted([np.array([[90.0], [110.0]])]) if standardize else Schema(("a",))
        x = [schema.standardise(np.array([[100.0], [120.0]]))]
        return DataSplits("named", test=datasets.SequenceDataset(x), meta={"schema": schema.to_dict()})

    monkeypatch.setitem(datasets.DATASETS, "named", load_named)
    model, schema = dynavae.LGSSM(x_dim=1, z_dim=2), load("named").schema
    scaled = model.save_pretrained(tmp_path / "scaled", extra={"schema": schema.to_dict(), "kind": "real"})
    plain = model.save_pretrained(tmp_path / "plain")
    assert Run.open(scaled, exported=True).data("named").test.x[0][:, 0].tolist() == [0, 2]
    assert Run.open(plain, exported=True).data("named").test.x[0][:, 0].tolist() == [100, 120]


def test_new_splits_of_old_sets_leave_them_their_scaling(tmp_path):
    splits = load(write(tmp_path / "a.csv", ["t,a", *(f"{t},{100 + t % 7}" for t in range(60))]), window=10)
    some = DataSplits("some", train=splits.train)
    assert some.train.about == {"kind": "real", "schema": splits.meta["schema"]}


# --- the score of a forecast --------------------------------------------------------------------------------------


def test_crps_is_that_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(7, 3, 2, generator=generator, dtype=torch.float64)
    truth = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    pairs = torch.stack([(a - b).abs() for a, b in itertools.product(samples, samples)]).mean(0)
    expected = (samples - truth).abs().mean(0) - pairs / 2
    torch.testing.assert_close(dynavae.crps(samples, truth), expected)
    torch.testing.assert_close(dynavae.crps(samples[:1], truth), (samples[0] - truth).abs())
    assert dynavae.crps([[1], [3]], [math.nan]).isnan().all()


def test_crps_of_many_samples_is_that_of_the_gaussian():
    """Gneiting and Raftery, 2007: sigma (y (2 Phi(y) - 1) + 2 phi(y) - 1 / sqrt(pi)), y = (x - mu) / sigma."""
    S = 200_000
    samples = 1 + 2 * torch.randn(S, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for x in (-2.0, 1.0, 4.5):
        y = torch.tensor((x - 1) / 2, dtype=torch.float64)
        normal = torch.distributions.Normal(y.new_zeros(()), y.new_ones(()))
        expected = 2 * (y * (2 * normal.cdf(y) - 1) + 2 * normal.log_prob(y).exp() - 1 / math.sqrt(math.pi))
        error = 5 * 2 * float(samples.std()) / math.sqrt(S)  # of the two means
        assert float(dynavae.crps(samples, [x])) == pytest.approx(float(expected), abs=error)


def test_crps_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"samples should have shape \(S, \*shape of truth\)"):
        dynavae.crps(torch.zeros(3, 2), torch.zeros(3))
