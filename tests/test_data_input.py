"""Data that look right and are not: large offsets, constant columns, forgotten ids, odd months, masks, wrong arguments."""

from __future__ import annotations

import csv
import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest

from dynavae import cli
from dynavae import data as datasets
from dynavae.data import Schema, SequenceDataset, load
from dynavae.data.schema import day_of_month, parse_times

OFFSET = 1.7e9
WAVE = OFFSET + np.sin(np.arange(600) / 10)


def write(path: Path, header: str, rows: list) -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")
    return path


# --- scaling ------------------------------------------------------------------------------------------------


def wave_in(kind: str, folder: Path) -> Path:
    """600 values far from zero: ten sequences of 60."""
    x, path = WAVE.reshape(10, 60, 1), folder / f"off.{kind.split()[0]}"
    if kind == "npz dense":
        np.savez(path, x=x)
    elif kind == "npz ragged":
        np.savez(path, x=x.reshape(-1, 1), lengths=np.full(10, 60))
    elif kind == "npz splits":
        np.savez(path, train=x[:8], valid=x[8:9], test=x[9:], test_observed=np.arange(60)[None] > 3)
    elif kind == "csv":
        write(path, "id,y", [(t // 60, f"{y:.9f}") for t, y in enumerate(WAVE)])
    else:
        pd = pytest.importorskip("pandas")
        pytest.importorskip("pyarrow")
        pd.DataFrame({"id": np.arange(600) // 60, "y": WAVE}).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["npz dense", "npz ragged", "npz splits", "csv", "parquet"])
def test_a_large_offset_is_taken_off_before_float32(kind, tmp_path):
    splits = load(wave_in(kind, tmp_path), standardize=True)
    assert splits.train.x[0].dtype == np.float32
    for split in splits.available:
        for name, x in zip(splits.split(split).names, splits.split(split).x, strict=True):
            back = splits.schema.to_units(x.astype(np.float64))[:, 0]
            first = 60 * (
                {"train": 0, "valid": 8, "test": 9}[split] + int(name) if "splits" in kind else int(name)
            )
            seen = ~np.isnan(back)
            assert seen.sum() >= 56
            np.testing.assert_allclose(back[seen], WAVE[first : first + 60][seen], rtol=0, atol=2e-6)
    assert np.concatenate(splits.train.x).std() == pytest.approx(1, abs=1e-4)


def test_the_scaling_of_a_run_is_applied_before_float32(tmp_path):
    schema = Schema(("y",), mean=(OFFSET,), stddev=(0.5,))
    path = wave_in("npz dense", tmp_path)
    test = load(path, schema=schema, whole=True).test
    np.testing.assert_allclose(test.x[1][:, 0], 2 * np.sin(np.arange(60, 120) / 10), atol=1e-5)
    assert type(test) is type(test.select([0])) is SequenceDataset


def test_windows_of_a_large_offset(tmp_path):
    path = write(tmp_path / "w.csv", "y", [(f"{y:.9f}",) for y in WAVE])
    splits = load(path, window=20, stride=10)
    x = splits.train.x[splits.train.names.index("w 10")]
    np.testing.assert_allclose(
        splits.schema.to_units(x.astype(np.float64))[:, 0], WAVE[10:30], rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("value", [0.0, 7.0, 0.1])
def test_a_column_that_stays_the_same_in_training_is_refused(value, tmp_path):
    rows = [(np.sin(t), value if t < 80 else t, t % 5) for t in range(100)]
    path = write(tmp_path / "x.csv", "a,b,c", rows)
    sentence = (
        rf"column 'b' \({value:g}\) stayed the same .* leave it out \(of a table with columns=\['a', 'c'\]\)"
    )
    with pytest.raises(ValueError, match=sentence):
        load(path)
    assert load(path, columns=["a", "c"]).x_dim == 2
    assert load(path, standardize=False).x_dim == 3  # nothing is scaled
    assert load(path, controls=["b"]).schema.control_stddev == (1.0,)
    assert set(load(path, controls=["b"]).train.control[0].ravel()) == {0.0}


def test_several_constant_columns_and_nothing_but_them(tmp_path):
    rows = [(1, 2, t) for t in range(30)]
    path = write(tmp_path / "x.csv", "a,b,c", rows)
    with pytest.raises(
        ValueError, match=r"columns 'a' \(1\), 'b' \(2\) stayed .* leave them out .*columns=\['c'\]"
    ):
        load(path)
    with pytest.raises(
        ValueError, match=r"every column is the same throughout the training part: 'a' \(1\), 'b' \(2\)"
    ):
        load(path, columns=["a", "b"])
    many = write(
        tmp_path / "many.csv", ",".join(f"c{i}" for i in range(20)), [(t, *[1] * 19) for t in range(30)]
    )
    with pytest.raises(ValueError, match=r"'c8' \(1\) and 11 more stayed the same .*columns=\['c0'\]"):
        load(many)
    np.savez(tmp_path / "x.npz", x=np.ones((10, 5, 2)) * [[range(2)]] * np.arange(5)[:, None])
    with pytest.raises(ValueError, match=r"column '0' \(0\) stayed the same"):
        load(tmp_path / "x.npz", standardize=True)


def test_kinds_that_are_not_scaled_may_be_constant(tmp_path):
    path = write(tmp_path / "x.csv", "a,b", [(t % 2, 1) for t in range(30)])
    assert load(path).kind == "binary"
    counts = write(tmp_path / "counts.csv", "a,b", [(t % 4, 3) for t in range(30)])
    for kind in ("categorical", "power"):
        assert load(counts, kind=kind).x_dim == 2


def test_splits_of_different_widths_cannot_be_scaled(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", train=rng.normal(size=(5, 5, 2)), test=rng.normal(size=(5, 5, 3)))
    with pytest.raises(ValueError, match="the scaling is of 2 features, test has 3"):
        load(tmp_path / "x.npz", standardize=True)


# --- rows of one time -----------------------------------------------------------------------------------------


def stores(path: Path, times: int = 40, labels: str = "0123456789", more: str = "") -> Path:
    rows = [(s, t, 10 * i + t % 7, *more) for i, s in enumerate(labels) for t in range(times)]
    return write(path, "store,time,sales" + ",other" * bool(more), rows)


@pytest.mark.parametrize("labels", ["0123456789", "abcd", "uv"])
def test_a_forgotten_id_column_is_asked_for(labels, tmp_path):
    path = stores(tmp_path / "s.csv", labels=labels)
    sentence = (
        rf"readings of s.csv have the very same 'time' as another .*, {len(labels)} for each time: "
        r"is 'store' the id_column\? Say so with id_column='store'"
    )
    with pytest.raises(ValueError, match=sentence):
        load(path, columns=["sales"])
    splits = load(path, id_column="store")
    ids = {splits.origin(s, name)[0] for s in splits.available for name in splits.split(s).names}
    assert ids == set(labels)
    assert splits.meta["x_names"] == ["sales"]


def test_two_stores_with_gaps_are_told_apart_too(tmp_path):
    rows = [(s, t, t + 10 * s) for s in (1, 2) for t in range(100) if (s + t) % 10]
    path = write(tmp_path / "x.csv", "store,time,v", rows)
    with pytest.raises(
        ValueError, match=r"160 of 180 readings .* 1\.8 for each time: is 'store' the id_column"
    ):
        load(path, columns=["v"])


def test_an_id_column_that_is_not_enough(tmp_path):
    rows = [(s, i, t, t * i) for s in "ab" for i in range(5) for t in range(20)]
    path = write(tmp_path / "x.csv", "id,item,time,v", rows)
    with pytest.raises(ValueError, match="does 'item' tell sequences apart as well as 'id'"):
        load(path, columns=["v"])


def test_readings_of_one_time_that_no_column_tells_apart(tmp_path):
    rng = np.random.default_rng(0)
    path = write(tmp_path / "x.csv", "time,v", [(t // 3, rng.normal()) for t in range(90)])
    with pytest.raises(
        ValueError,
        match=r"3 for each time: does a column say .* Or average the readings of one time beforehand",
    ):
        load(path)


def test_some_rows_of_one_time_are_averaged_with_a_warning(tmp_path):
    rows = [(t, t) for t in range(100)]
    path = write(tmp_path / "x.csv", "time,v", [*rows, *((t, t + 2) for t in range(10))])
    with pytest.warns(UserWarning, match="20 of 110 readings of x.csv have the very same 'time'") as said:
        x = load(path, standardize=False, valid=0, test=0).train.x[0]
    assert len(said) == 1
    np.testing.assert_array_equal(x[:, 0], [t + (t < 10) for t in range(100)])


def test_what_may_fall_into_one_cell_without_a_word(tmp_path):
    fine = write(tmp_path / "fine.csv", "time,v", [(t / 10, t) for t in range(1000)])
    apart = [(t, t, "") for t in range(50)] + [(t, "", -t) for t in range(50)]  # a column in each row
    wide = write(tmp_path / "wide.csv", "time,a,b", apart)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = load(fine, step=1, valid=0, test=0, standardize=False).train.x[0]
        y = load(wide, valid=0, test=0, standardize=False).train.x[0]
    np.testing.assert_allclose(x[:, 0], 10 * np.arange(100) + 4.5)
    np.testing.assert_array_equal(y, np.stack([np.arange(50), -np.arange(50)], 1))


# --- months -------------------------------------------------------------------------------------------------------


def dates(day: int, n: int = 60, every: int = 1) -> list[str]:
    """That day of each month from January 2024 on, or the last of a shorter month."""
    months = np.datetime64("2024-01") + every * np.arange(n)
    last = ((months + 1).astype("datetime64[D]") - months.astype("datetime64[D]")).astype(int)
    return [f"{m}-{min(day, k):02d}" for m, k in zip(months, last, strict=True)]


@pytest.mark.parametrize("step", [None, "month"])
@pytest.mark.parametrize("day", [1, 16, 28, 29, 30, 31])
def test_dates_of_one_day_of_the_month_keep_it(day, step, tmp_path):
    known, later = dates(day)[:50], dates(day)[50:]
    path = write(tmp_path / "m.csv", "date,v", [(d, k) for k, d in enumerate(known) if k != 7])
    splits = load(path, step=step, valid=0, test=0, standardize=False)
    schema, start = splits.schema, splits.origin("train", "m")[1]
    assert (schema.unit, schema.step, schema.day) == ("months", 1.0, day)
    np.testing.assert_array_equal(splits.train.x[0][:, 0], [k if k != 7 else np.nan for k in range(50)])
    assert [schema.time(start, k) for k in range(60)] == known + later
    assert Schema.from_dict(schema.to_dict()) == schema
    again = load(path, schema=schema, whole=True)
    assert [schema.time(again.origin("test", "m")[1], k) for k in range(60)] == known + later


@pytest.mark.parametrize(("every", "day"), [(3, 31), (6, 30), (12, 15), (12, 29)])
def test_quarters_and_years_keep_their_day(every, day, tmp_path):
    path = write(tmp_path / "q.csv", "date,v", list(zip(dates(day, 20, every), range(20), strict=True)))
    splits = load(path, valid=0, test=0)
    assert splits.schema.step == every
    start = splits.origin("train", "q")[1]
    assert [splits.schema.time(start, k) for k in range(30)] == dates(day, 30, every)


def test_days_of_the_month():
    def found(*texts: str) -> int | None:
        return day_of_month(parse_times(texts, "t")[0])

    assert found("2024-02-28", "2024-03-28") == 28
    assert found("2023-02-28", "2023-03-31", "2023-04-30") == 31
    assert found("2023-02-28", "2023-03-30") == 30
    assert found("2024-03-15", "2024-04-16") is None
    assert found("2024-03-15 12:00", "2024-04-15 12:00") is None


def test_a_step_of_a_month_takes_readings_of_any_day(tmp_path):
    days = [f"2024-{m:02d}-{d:02d}" for m in range(1, 7) for d in (20, 23 + m % 3)]
    path = write(tmp_path / "m.csv", "date,v", [(d, int(d[5:7])) for d in days])
    splits = load(path, step="month", valid=0, test=0, standardize=False)
    np.testing.assert_array_equal(splits.train.x[0][:, 0], range(1, 7))
    assert splits.schema.time(splits.origin("train", "m")[1], 6) == "2024-07-01"


def test_a_forecast_of_month_ends_is_of_month_ends(tmp_path, capsys):
    rng = np.random.default_rng(0)
    path = write(tmp_path / "month.csv", "date,y", [(d, f"{rng.normal():.3f}") for d in dates(31)])
    out = str(tmp_path / "run")
    assert cli.main(["fit", "--model", "LGSSM", "--objective", "em", "--data", str(path), "--epochs", "2", "--out", out,
                     "--progress", "false", "--tensorboard", "false"]) == 0  # fmt: skip
    assert cli.main(["forecast", out, "--horizon", "3", "--samples", "5", "--future", "true"]) == 0
    rows = csv.DictReader((tmp_path / "run" / "forecast.csv").read_text().splitlines())
    assert [row["time"] for row in rows] == ["2029-01-31", "2029-02-28", "2029-03-31"]
    capsys.readouterr()


# --- arguments ------------------------------------------------------------------------------------------------------


def test_a_column_is_not_its_own_control(tmp_path):
    path = write(tmp_path / "x.csv", "y,u", [(t, t % 3) for t in range(30)])
    with pytest.raises(ValueError, match="'y' is among both columns and controls"):
        load(path, columns=["y"], controls=["u", "y"])


def test_what_is_no_path():
    pd = pytest.importorskip("pandas")
    spec = importlib.util.spec_from_file_location("unchecked", datasets.__file__)
    unchecked = importlib.util.module_from_spec(spec)  # its annotations are not enforced
    spec.loader.exec_module(unchecked)
    for source in (pd.DataFrame({"y": [1.0, 2.0]}), np.zeros((3, 2)), None):
        sentence = rf"load takes .* got {type(source).__name__}\. Write a table to a file"
        with pytest.raises(TypeError, match=sentence):
            unchecked.load(source)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, bool])
def test_masked_values_are_missing(dtype):
    mask = np.zeros((2, 6, 3), dtype=bool)
    mask[:, 2:4], mask[1, 0, 1] = True, True
    x = np.ma.masked_array(np.ones((2, 6, 3), dtype=dtype), mask)
    for given in (x, list(x)):
        data = SequenceDataset(given)
        assert all(type(a) is np.ndarray and a.dtype == np.float32 for a in data.x)
        np.testing.assert_array_equal(np.stack(data.x), np.where(mask, np.nan, 1))
    bare = SequenceDataset(np.ma.masked_array(np.ones((2, 6, 3), dtype=dtype))).x[0]
    assert type(bare) is np.ndarray and bare.dtype == (np.uint8 if dtype in (np.uint8, bool) else np.float32)
    with pytest.raises(ValueError, match="controls cannot be missing"):
        SequenceDataset(np.ones((2, 6, 3)), control=x)
