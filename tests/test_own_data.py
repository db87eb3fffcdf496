"""A user's own files: every format, time grids, splits, scaling, and results in the user's units, ids and times."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dynavae import cli, music
from dynavae.data import Schema, load, save_npz
from dynavae.data.grid import fill, infer_step, to_grid
from dynavae.data.schema import parse_step, parse_times
from dynavae.data.windows import windows
from dynavae.loss import Loss
from dynavae.models import DKF, LGSSM, VRNN
from dynavae.runs import Run


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def series(n: int, gaps: tuple[int, ...] = (), ids: str = "", start: int = 0) -> str:
    """Rows of `day,a,b` or `id,day,a,b`, with rows left out."""
    head = ("id," if ids else "") + "day,a,b"
    rows = [head]
    for name in ids or " ":
        for t in range(n):
            if t not in gaps:
                first = f"{name}," if ids else ""
                rows.append(f"{first}{t + start},{100 + 10 * math.sin(t + ord(name)):.4f},{t % 7}")
    return "\n".join(rows) + "\n"


# --- formats --------------------------------------------------------------------------------------------


def test_one_long_csv_with_ids_dates_and_gaps(tmp_path):
    text = "station,date,pm,note\n"
    for s in ("n", "s"):
        for d in range(1, 31):
            if d != 5:
                text += f"{s},2024-05-{d:02d},{'NA' if d == 3 else d},x\n"
    splits = load(write(tmp_path / "air.csv", text), id_column="station", columns=["pm"], standardize=False)
    assert splits.train.names == ("n", "s")
    assert splits.train.x[0].shape == (24, 1)
    assert np.isnan(splits.train.x[0][[2, 4], 0]).all()  # the NA, and the row that is not there
    assert splits.train.x[0][5, 0] == 6
    assert splits.schema.unit == "seconds"
    assert splits.schema.step == 86400
    assert splits.schema.time(splits.origin("train", "s")[1], 4) == "2024-05-05"
    assert splits.origin("test", "s") == ("s", parse_times(["2024-05-28"], "")[0][0])


@pytest.mark.parametrize("missing", ["", "NA", "NaN", "nan", "null", "n/a", "None"])
def test_what_is_missing(tmp_path, missing):
    path = write(tmp_path / "x.csv", f"a,b\n1,2\n{missing},3\n5,4\n")
    x = load(path, valid=0, test=0, standardize=False).train.x[0]
    assert np.isnan(x[1, 0])
    assert np.isfinite(x[1, 1])


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters_byte_order_marks_and_index_columns(tmp_path, delimiter):
    text = "\ufeff" + ",a,b\n0,1,2\n1,3,4\n".replace(",", delimiter)
    x = load(write(tmp_path / "x.csv", text), valid=0, test=0, standardize=False).train.x[0]
    assert x.tolist() == [[1, 2], [3, 4]]


def test_a_folder_has_a_sequence_per_file(tmp_path):
    for i in range(10):
        write(tmp_path / "many" / f"s{i}.csv", series(5 + i))
    splits = load(tmp_path / "many", time_column="day", seed=1)
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (8, 1, 1)
    names = [*splits.train.names, *splits.valid.names, *splits.test.names]
    assert sorted(names) == sorted(f"s{i}" for i in range(10))
    again = load(tmp_path / "many", time_column="day", seed=1)
    assert again.test.names == splits.test.names
    assert again.sha256 == splits.sha256
    assert {load(tmp_path / "many", time_column="day", seed=s).test.names for s in range(8)} != {
        splits.test.names
    }


def test_folders_and_files_named_as_splits(tmp_path):
    for split, n in (("train", 3), ("val", 1), ("test", 2)):
        for i in range(n):
            write(tmp_path / "folders" / split / f"{i}.csv", series(6))
        write(tmp_path / "files" / f"{split}.csv", series(6, ids="abc"[:n]))
    for source in ("folders", "files"):
        splits = load(tmp_path / source, time_column="day")
        assert [len(splits.split(s)) for s in ("train", "valid", "test")] == [3, 1, 2]
    write(tmp_path / "files" / "other.csv", series(6))
    with pytest.raises(ValueError, match=r"other.csv beside its splits"):
        load(tmp_path / "files")


def test_parquet_is_read_like_csv(tmp_path):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    path = write(tmp_path / "x.csv", series(30, (4,), "ab"))
    frame = pd.read_csv(path)
    frame["day"] = pd.Timestamp("2024-01-01") + pd.to_timedelta(frame["day"], unit="D")
    frame.to_parquet(tmp_path / "x.parquet")
    a, b = load(path, time_column="day"), load(tmp_path / "x.parquet", time_column="day")
    for x, y in zip(a.train.x, b.train.x, strict=True):
        np.testing.assert_array_equal(x, y)
    assert b.schema.written(b.origin("train", "a")[1]).startswith("2024-01-01")


def test_a_folder_of_midi_files(tmp_path):
    pytest.importorskip("pretty_midi")
    rolls = [np.eye(88, dtype=np.uint8)[20 + i : 30 + i] for i in range(4)]
    for i, roll in enumerate(rolls):
        music.to_midi(roll, tmp_path / f"{i}.mid", 0.25, 21)
    splits = load(tmp_path, frame_seconds=0.25, valid=0.25, test=0.25)
    assert (len(splits.train), splits.kind, splits.x_dim) == (2, "binary", 88)
    found = {
        n: x for s in splits.available for n, x in zip(splits.split(s).names, splits.split(s).x, strict=True)
    }
    for i, roll in enumerate(rolls):
        np.testing.assert_array_equal(found[str(i)], roll)
    assert splits.meta["frame_seconds"] == 0.25
    drawn = load(tmp_path, frame_seconds=0.25, window=4)  # all windows of a file go to one split
    whose = {s: {name.split()[0] for name in drawn.split(s).names} for s in drawn.available}
    assert sum(map(len, whose.values())) == len(set().union(*whose.values()))
    named = load(tmp_path, frame_seconds=0.25, window=4, valid=["3"], test=["0", "2"])
    assert named.valid.names == ("3 0", "3 4", "3 8")  # all pieces of a file
    assert {n.split()[0] for n in named.test.names} == {"0", "2"}
    assert {n.split()[0] for n in named.train.names} == {"1"}
    with pytest.raises(ValueError, match=r"valid: .* has no sequence '3\.mid'; it has 0, 1, 2, 3\."):
        load(tmp_path, valid=["3.mid"])
    with pytest.raises(ValueError, match="none is left to train on"):
        load(tmp_path, valid=["0", "1"], test=["2", "3"], window=2)
    for i, split in enumerate(("train", "train", "valid", "test")):
        (tmp_path / split).mkdir(exist_ok=True)
        (tmp_path / f"{i}.mid").rename(tmp_path / split / f"{i}.mid")
    assert len(load(tmp_path, valid=0.5, whole=True).train) == 2
    with pytest.raises(ValueError, match="says itself which are train, valid and test; leave test out"):
        load(tmp_path, test=["3"])


def test_another_folder_of_midi_files_is_all_test(tmp_path):
    pytest.importorskip("pretty_midi")
    run = Run.create(tmp_path / "run", {"data": {"source": "jsb", "kind": "binary", "options": {}}})
    (tmp_path / "own").mkdir()
    for n in (1, 2):
        music.to_midi(np.eye(88, dtype=np.uint8)[20:30], tmp_path / "own" / f"{n}.mid")
        splits = run.data(str(tmp_path / "own"))
        assert (splits.available, len(splits.test), splits.test.frames) == (("test",), n, 10 * n)


def test_npz_can_be_standardised(tmp_path):
    x = np.random.default_rng(0).normal(5, 3, (10, 8, 2))
    np.savez(tmp_path / "x.npz", x=x)
    plain, scaled = load(tmp_path / "x.npz"), load(tmp_path / "x.npz", standardize=True)
    np.testing.assert_allclose(scaled.schema.to_units(scaled.test.x[0]), plain.test.x[0], rtol=1e-5)
    assert np.concatenate(scaled.train.x).mean(0) == pytest.approx([0, 0], abs=1e-5)
    save_npz(tmp_path / "y.npz", scaled)
    assert load(tmp_path / "y.npz").schema == scaled.schema


# --- times and grids --------------------------------------------------------------------------------------


def test_irregular_times_are_put_on_the_grid(tmp_path):
    path = write(tmp_path / "x.csv", "time,v\n0.2,1\n0.9,3\n2.5,7\n7.1,9\n")
    with pytest.raises(ValueError, match=r"times of x.csv are irregular .* choose the step"):
        load(path)
    splits = load(path, step=1, valid=0, test=0, standardize=False)
    np.testing.assert_array_equal(splits.train.x[0][:, 0], [2, np.nan, 7, np.nan, np.nan, np.nan, np.nan, 9])
    assert splits.schema.time(splits.origin("train", "x")[1], 7) == "7"


def test_almost_regular_times_give_the_step():
    jitter = np.arange(20) + 0.05 * np.random.default_rng(0).uniform(-1, 1, 20)
    assert infer_step([jitter], "x", "number") == pytest.approx(1, abs=0.05)
    assert infer_step([np.array([0.0, 2, 4, 5, 7, 9])], "x", "number") == 1  # more rows left out than not
    with pytest.raises(ValueError, match="irregular"):
        infer_step([np.array([0, 1, 2.5, 3, 7.7])], "x", "number")


def test_rows_in_any_order_and_monthly_dates(tmp_path):
    rows = [f"{2000 + m // 12}-{m % 12 + 1:02d}-01,{m}" for m in range(40) if m != 7]
    splits = load(
        write(tmp_path / "m.csv", "\n".join(["date,v", *rows[::-1]])), valid=0, test=0, standardize=False
    )
    x = splits.train.x[0][:, 0]
    np.testing.assert_array_equal(x, [m if m != 7 else np.nan for m in range(40)])
    assert splits.schema.unit == "months"
    assert splits.schema.time(splits.origin("train", "m")[1], 40) == "2003-05-01"


def test_a_grid_with_too_many_cells_is_refused():
    with pytest.raises(ValueError, match="choose a larger step"):
        to_grid(np.array([0.0, 1e9]), np.ones((2, 1)), 1.0, False, "x")


@pytest.mark.parametrize(
    ("step", "sentence"),
    [("3parsec", "step should be a positive"), (-1, "step should be"), ("1h", "step should be")],
)
def test_bad_steps(step, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse_step(step, "number")


def test_dates():
    seconds, unit, style = parse_times(["2024-05-01T13:00:00Z", "2024-05-01T15:00:00+02:00"], "t")
    assert seconds[0] == seconds[1]
    assert (unit, style) == ("seconds", "T")
    assert Schema(("x",), unit="seconds", style="T").written(seconds[0]) == "2024-05-01T13:00:00"
    assert parse_times(["2014/05/01 01:00:00"], "t")[0][0] == parse_times(["2014-05-01 01:00"], "t")[0][0]
    with pytest.raises(ValueError, match="numbers or ISO dates"):
        parse_times(["1.5.2024"], "t")
    with pytest.raises(ValueError, match="t is empty in row 2"):
        parse_times(["1", " "], "t")


def test_windows():
    assert windows(10, 4, 2) == [(0, 4), (2, 6), (4, 8), (6, 10)]
    assert windows(11, 4) == [(0, 4), (4, 8), (8, 11)]
    for bad in ((10, None, 2), (10, 4, 5), (10, 0, None)):
        with pytest.raises(ValueError, match="window"):
            windows(*bad)


@pytest.mark.parametrize("length", range(1, 12))
@pytest.mark.parametrize(("window", "stride"), [(3, None), (4, 1), (5, 2), (5, 5)])
def test_windows_cover_every_frame(length, window, stride):
    spans = windows(length, window, stride)
    assert {t for a, b in spans for t in range(a, b)} == set(range(length))
    assert all(0 < b - a <= window for a, b in spans)


def test_long_sequences_are_cut_and_keep_their_times(tmp_path):
    path = write(tmp_path / "x.csv", series(100, tuple(range(20, 30))))
    splits = load(path, time_column="day", window=10, stride=5, standardize=False)
    assert splits.train.frames > 80  # overlapping
    assert "x 20" not in splits.train.names  # nothing was seen in 20 to 30
    assert splits.valid.frames == splits.test.frames == 10
    assert splits.origin("train", "x 35") == ("x", 35.0)
    whole = load(path, time_column="day", standardize=False)
    np.testing.assert_array_equal(splits.train.x[splits.train.names.index("x 35")], whole.train.x[0][35:45])


# --- splits, controls, scaling ------------------------------------------------------------------------------


def test_splits_by_column_ids_and_time(tmp_path):
    parts = zip("abcd", ["train", "train", "val", "test"], strict=True)
    rows = ["id,part,v"] + [f"{i},{p},{k}" for i, p in parts for k in range(4)]
    path = write(tmp_path / "x.csv", "\n".join(rows))
    splits = load(path, split_column="part")
    assert (splits.train.names, splits.valid.names, splits.test.names) == (("a", "b"), ("c",), ("d",))
    splits = load(path, columns=["v"], valid=["a"], test=["c", "b"])
    assert (splits.train.names, splits.valid.names, splits.test.names) == (("d",), ("a",), ("b", "c"))
    one = load(write(tmp_path / "y.csv", series(50)), time_column="day", valid=0.2, test=0.1)
    assert (one.train.frames, one.valid.frames, one.test.frames) == (35, 10, 5)
    assert one.origin("test", "y")[1] == 45


def test_controls_are_filled_and_scaled(tmp_path):
    text = "v,u\n" + "".join(f"{k},{k % 3 if k != 4 else ''}\n" for k in range(20))
    splits = load(write(tmp_path / "x.csv", text), controls=["u"])
    assert (splits.x_dim, splits.control_dim) == (1, 1)
    u = splits.train.control[0][:, 0]
    assert u[4] == u[3]
    assert u.mean() == pytest.approx(0, abs=1e-6)
    assert fill(np.array([[np.nan], [2.0], [np.nan]]))[:, 0].tolist() == [2, 2, 2]


def test_scaling_reads_observed_training_values_only(tmp_path):
    rows = ["id,t,v"] + [
        f"{i},{t},{v}" for i, v in zip("abcd", (1, 3, 1000, -1000), strict=True) for t in range(3)
    ]
    path = write(tmp_path / "x.csv", "\n".join([*rows, "a,3,"]))
    splits = load(path, valid=["c"], test=["d"])
    assert (splits.schema.mean, splits.schema.stddev) == ((2.0,), (1.0,))
    assert splits.valid.x[0][0, 0] == 998
    back = splits.schema.to_units(splits.test.x[0])
    np.testing.assert_array_equal(back[:, 0], [-1000] * 3)
    assert Schema.from_dict(json.loads(json.dumps(splits.schema.to_dict()))) == splits.schema


def test_only_real_values_are_scaled(tmp_path):
    path = write(tmp_path / "x.csv", "v\n" + "0\n1\n1\n" * 10)
    splits = load(path)
    assert (splits.kind, splits.schema.standardized) == ("binary", False)
    assert set(splits.train.x[0].ravel()) == {0, 1}
    assert load(path, kind="power").schema.standardized is False
    assert load(path, kind="real").schema.standardized is True
    with pytest.raises(ValueError, match="cannot be 'binary'"):
        load(write(tmp_path / "y.csv", "v\n" + "0\n1\n2\n" * 10), kind="binary")


def test_large_values_keep_their_digits(tmp_path):
    path = write(tmp_path / "x.csv", "v\n" + "".join(f"{1e9 + k}\n" for k in range(20)))
    x = load(path, valid=0, test=0)
    np.testing.assert_allclose(
        x.schema.to_units(x.train.x[0].astype(np.float64))[:, 0], 1e9 + np.arange(20), atol=1e-5
    )


# --- sentences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ("a,wind\n1,NE\n2,S\n", {}, r"column 'wind' of x.csv holds text \('NE' in row 1\)"),
        ("a,b\n1,inf\n2,3\n", {}, "column 'b' of x.csv is infinite in row 1"),
        ("a,b\n1,2\n3\n", {}, "x.csv has 1 cells in line 3, but 2 column names"),
        ("1,2\n3,4\n", {}, "starts with numbers; expected a header"),
        ("a,a\n1,2\n", {}, "two columns named 'a'"),
        ("a\n", {}, "expected a header with column names, then rows"),
        ("a,b\n1,2\n", {"columns": ["aa"]}, "columns: x.csv has no column 'aa'; did you mean 'a'"),
        ("a,b\n1,2\n", {"id_column": "station"}, "id_column: x.csv has no column 'station'"),
        ("a,b\n1,2\n", {"step": 2}, "needs a time_column"),
        ("a,b\n1,\n2,\n", {"valid": 0, "test": 0}, "column 'b' has no value in the training part"),
        ("a,b\n1,\n2,\n", {"columns": ["b"]}, "has no value in b; drop it"),
        ("a,b\n1,\n2,\n", {"controls": ["b"]}, "control 'b' of sequence 'x' of x.csv has no value at all"),
        ("id,a\nu,1\nv,2\n", {"test": ["w"]}, "test: x.csv has no sequence 'w'; it has u, v"),
        ("id,a\nu,1\nv,2\n", {"test": ["u", "v"]}, "none is left to train on"),
        ("id,a\nu,1\nv,2\n", {"valid": ["u"], "test": ["u"]}, "should not share an id"),
        ("id,a\n,1\nv,2\n", {}, "column 'id' of x.csv is empty in some rows"),
        ("a,p\n1,train\n2,later\n", {"split_column": "p"}, "should say train, valid or test; got 'later'"),
        ("a,b\n1,2\n", {"valid": 0.7, "test": 0.5}, "shares >= 0 with a sum below 1"),
        ("a,b\n1,2\n", {"windows": 3}, "unknown option 'windows' .* did you mean 'window'"),
    ],
)  # fmt: skip
def test_bad_tables_get_a_sentence(tmp_path, text, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        load(write(tmp_path / "x.csv", text), **options)


def test_paths_that_hold_nothing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match="holds no table"):
        load(tmp_path)
    monkeypatch.setenv("DYNAVAE_DATA", str(tmp_path))
    for name in ("pm25", "physionet"):
        with pytest.raises(
            FileNotFoundError, match=r"timeseries/.* Set the environment variable DYNAVAE_DATA"
        ):
            load(name)


def test_pm25_hides_what_the_ground_file_has():
    try:
        seen, ground = load("pm25"), load("pm25", ground=True)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert (seen.x_dim, seen.test.frames) == (36, 2928)
    hidden = sum(
        int((np.isnan(a) & ~np.isnan(b)).sum()) for a, b in zip(seen.test.x, ground.test.x, strict=True)
    )
    assert hidden == 20434
    assert not any(
        (np.isnan(b) & ~np.isnan(a)).any() for a, b in zip(seen.test.x, ground.test.x, strict=True)
    )
    physionet = load("physionet")
    assert (physionet.x_dim, physionet.train.x[0].shape[0]) == (35, 48)


# --- a run on own data: results in the user's units ----------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Two stations with gaps, and a run of an LGSSM on them."""
    folder = tmp_path_factory.mktemp("own")
    path = write(folder / "air.csv", series(60, (3, 4, 57), "ns", start=1000))
    out = str(folder / "run")
    arguments = ["fit", "--model", "LGSSM", "--model.z_dim", "2", "--data", path, "--time_column", "day",
                 "--window", "12", "--stride", "6", "--test", "0.2", "--out", out, "--epochs", "2", "--progress", "false",
                 "--tensorboard", "false"]  # fmt: skip
    assert cli.main(arguments) == 0
    return folder, out


def rows_of(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def test_the_schema_is_kept_with_the_run_and_the_checkpoint(fitted):
    folder, out = fitted
    data = json.loads(Path(out, "run.json").read_text())["data"]
    splits = load(folder / "air.csv", time_column="day", window=12, stride=6, test=0.2)
    assert Schema.from_dict(data["schema"]) == splits.schema
    assert data["options"] == {"time_column": "day", "window": 12, "stride": 6, "test": 0.2}
    assert json.loads(Path(out, "best", "config.json").read_text())["schema"] == data["schema"]


def test_imputed_and_forecast_come_back_as_the_user_wrote_them(fitted, capsys):
    folder, out = fitted
    assert cli.main(["impute", out, "--samples", "20", "--split", "all"]) == 0
    rows = rows_of(f"{out}/imputed.csv")
    assert set(rows[0]) == {"id", "time", "column", "mean", "q05", "q50", "q95", "truth"}
    assert {(r["id"], r["time"]) for r in rows} == {(i, t) for i in "ns" for t in ("1003", "1004", "1057")}
    assert len(rows) == 2 * 3 * 2  # once each, though training pieces overlap
    assert all(80 < float(r["mean"]) < 120 for r in rows if r["column"] == "a")
    assert all(float(r["q05"]) <= float(r["q50"]) <= float(r["q95"]) for r in rows)
    assert cli.main(["forecast", out, "--horizon", "4", "--samples", "20"]) == 0
    truth = {(r["id"], r["day"]): r for r in rows_of(str(folder / "air.csv"))}
    rows = rows_of(f"{out}/forecast.csv")
    assert {r["time"] for r in rows if r["id"] == "n"} == {"1056", "1057", "1058", "1059"}
    for r in rows:
        if r["truth"]:
            assert float(r["truth"]) == pytest.approx(
                float(truth[r["id"], r["time"]][r["column"]]), rel=1e-5, abs=1e-5
            )
    with np.load(f"{out}/forecast.npz") as stored:
        assert list(stored["columns"]) == ["a", "b"]
        assert 80 < stored["mean"][..., 0].mean() < 120
    assert cli.main(["forecast", out, "--horizon", "3", "--samples", "5", "--future", "true"]) == 0
    rows = rows_of(f"{out}/forecast.csv")
    assert {(r["id"], r["time"]) for r in rows} == {(i, t) for i in "ns" for t in ("1060", "1061", "1062")}
    assert all(r["truth"] == "" for r in rows)
    assert cli.main(["report", out, "--horizon", "4"]) == 0
    capsys.readouterr()


def test_a_score_in_the_users_units_is_that_of_the_raw_values(fitted, capsys):
    """An LGSSM on x / s has the density of one on x with C, d and R scaled: an exact check of the Jacobian."""
    import dynavae

    folder, out = fitted
    assert cli.main(["evaluate", out, "--bounds", "[exact]"]) == 0
    assert "nats_per_frame_in_units" in capsys.readouterr().out
    score = json.loads(Path(out, "score.json").read_text())
    assert score["standardized"] is True
    splits = load(folder / "air.csv", time_column="day", window=12, stride=6, test=0.2)
    model = dynavae.load(f"{out}/best").double()
    mean, stddev = torch.tensor(splits.schema.mean).double(), torch.tensor(splits.schema.stddev).double()
    m = model.parameters_in_moments
    model.set_moments(C=stddev[:, None] * m.C, d=stddev * m.d + mean, R=stddev[:, None] * m.R * stddev)
    raw = [splits.schema.to_units(x.astype(np.float64)) for x in splits.test.x]
    exact = dynavae.score(model, raw, bound="exact").nats_per_frame
    assert score["nats_per_frame_in_units"] == pytest.approx(exact, rel=1e-3)


def test_another_file_is_read_with_the_scaling_of_the_run(fitted, capsys):
    folder, out = fitted
    other = write(folder / "other.csv", series(20, (5,), "e", start=2000).replace("day,a,b", "day,a,b"))
    assert cli.main(["impute", out, "--data", other, "--samples", "5"]) == 0
    rows = rows_of(f"{out}/imputed.csv")
    assert {(r["id"], r["time"]) for r in rows} == {("e", "2005")}
    assert all(60 < float(r["mean"]) < 140 for r in rows if r["column"] == "a")
    assert cli.main(["evaluate", out, "--data", other, "--bounds", "[exact]"]) == 0
    assert cli.main(["forecast", out, "--data", other, "--horizon", "2", "--samples", "5"]) == 0
    capsys.readouterr()
    bad = write(folder / "bad.csv", series(20, ids="e").replace("day,a,b", "day,a,c"))
    assert cli.main(["evaluate", out, "--data", bad]) == 1
    assert "bad.csv has no column 'b'" in capsys.readouterr().err


def test_options_in_yaml_and_sentences_on_the_command_line(fitted, tmp_path, capsys):
    folder, _ = fitted
    config = write(
        tmp_path / "fit.yaml",
        f"model:\n  class_path: dynavae.VAE\n  init_args: {{z_dim: 2, layers: [4]}}\ndata: {folder}/air.csv\n"
        "time_column: day\ncolumns: [a]\nwindow: 6\nvalid: [n]\ntest: 0\nepochs: 1\nprogress: false\ntensorboard: false\n",
    )
    assert cli.main(["fit", "--config", config, "--out", str(tmp_path / "run")]) == 0
    data = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert data["options"]["valid"] == ["n"]
    assert data["schema"]["columns"] == ["a"]
    shared = ["fit", "--model", "VAE", "--out", str(tmp_path / "x")]
    assert cli.main([*shared, "--data", "jsb", "--window", "3"]) == 1
    assert "unknown option 'window' for load('jsb')" in capsys.readouterr().err


# --- training that hides values --------------------------------------------------------------------------------


def test_single_values_can_be_hidden_and_scored():
    from dynavae.batch import Sequences

    model, data = DKF(4, 2, 3).eval(), Sequences.from_arrays(torch.randn(2, 300, 4))
    share = {}
    (whole,) = Loss(model).parts(data)
    for hide in ("frames", "values"):
        (part,) = Loss(model, hide_rate=0.5, hide=hide).parts(data)
        share[hide] = part.sums["reconstruction"] / whole.sums["reconstruction"]
        (scored,) = Loss(model, hide_rate=0.5, hide=hide, score_hidden=True).parts(data)
        assert scored.sums["reconstruction"] / whole.sums["reconstruction"] == pytest.approx(1, abs=0.1)
    assert share["frames"] == pytest.approx(0.5, abs=0.15)
    assert share["values"] == pytest.approx(0.5, abs=0.1)
    chunks = list(Loss(model, hide_rate=0.5, score_hidden=True, truncate=100).parts(data))
    assert sum(c.sums["reconstruction"] for c in chunks) == pytest.approx(
        whole.sums["reconstruction"], rel=0.1
    )


def test_hiding_refuses_what_is_no_bound():
    with pytest.raises(ValueError, match="hide should be one of frames, values"):
        Loss(DKF(4, 2, 3), hide="columns")
    with pytest.raises(ValueError, match="score_hidden=True does nothing without a hide_rate above 0"):
        Loss(DKF(4, 2, 3), score_hidden=True)
    with pytest.raises(ValueError, match="score_hidden scores x that the posterior has not read"):
        Loss(VRNN(4, 2, 3), score_hidden=True)
    with pytest.raises(ValueError, match="not fivo"):
        Loss(LGSSM(4, 2), score_hidden=True, objective="fivo")
