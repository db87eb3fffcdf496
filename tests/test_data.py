"""The data layer: what ships, what is loaded from disk, and what a user's own file may hold."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dynavae.batch import Sequences
from dynavae.data import DATASETS, DataSplits, SequenceDataset, load, load_npz, save_npz
from dynavae.data.music import ASSETS, SHA256, find

JSB_BITS = ASSETS / "JSB_Chorales.npz"

# name: {split: (sequences, frames, shortest, longest, notes per frame, share of frames that equal the one
# before, empty frames)}
STATISTICS = {
    "jsb": {
        "train": (229, 13807, 25, 129, 3.898, 0.127, 18),
        "valid": (76, 4602, 32, 144, 3.870, 0.145, 29),
        "test": (77, 4725, 32, 160, 3.887, 0.107, 17),
    },
    "piano": {
        "train": (87, 75911, 111, 3857, 3.044, 0.254, 4917),
        "valid": (12, 8540, 209, 1637, 3.235, 0.164, 251),
    },
    "muse": {
        "train": (524, 245202, 9, 3457, 3.493, 0.222, 12962),
        "valid": (135, 82755, 63, 3723, 3.479, 0.241, 4412),
    },
    "nottingham": {
        "train": (694, 176561, 40, 1788, 3.961, 0.366, 487),
        "valid": (173, 45513, 96, 1473, 3.959, 0.351, 51),
        "test": (170, 44463, 63, 1793, 3.990, 0.367, 19),
    },
}
FILES = {"nottingham": "Nottingham.npz", "muse": "MuseData.npz", "piano": "Piano_midi.npz"}


def load_or_skip(name: str) -> DataSplits:
    try:
        return load(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def ragged(*lengths: int, x_dim: int = 2, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(length, x_dim)).astype(np.float32) for length in lengths]


# Music


@pytest.mark.parametrize("name", STATISTICS)
def test_music_matches_the_published_counts(name: str) -> None:
    splits = load_or_skip(name)
    if name != "jsb" and not splits.meta["verified"]:
        pytest.skip(f"{splits.meta['file']} is not the file that was measured")
    assert splits.available == tuple(STATISTICS[name])
    assert (splits.name, splits.kind, splits.x_dim) == (name, "binary", 88)
    assert splits.meta["verified"]
    assert splits.sha256 == SHA256[splits.meta["file"]]
    assert (splits.meta["lowest_midi"], splits.meta["frame_seconds"]) == (21, 0.5)
    for split, (sequences, frames, shortest, longest, notes, repeated, empty) in STATISTICS[name].items():
        data = splits.split(split)
        assert (len(data), data.frames) == (sequences, frames)
        assert (data.lengths.min(), data.lengths.max()) == (shortest, longest)
        assert all(x.dtype == np.uint8 and x.max() <= 1 for x in data.x)
        assert sum(int(x.sum()) for x in data.x) / frames == pytest.approx(notes, abs=5e-4)
        equal = sum(int((x[1:] == x[:-1]).all(1).sum()) for x in data.x)
        assert equal / (frames - sequences) == pytest.approx(repeated, abs=5e-4)
        assert sum(int((~x.any(1)).sum()) for x in data.x) == empty


def test_jsb_needs_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DYNAVAE_DATA", str(tmp_path))
    splits = load("jsb")
    keys = np.flatnonzero(np.concatenate(splits.split("train").x).any(0)) + splits.meta["lowest_midi"]
    assert (keys.min(), keys.max()) == (43, 96)
    assert splits.split("test").names[:2] == ("test-0", "test-1")


def test_the_shipped_file_names_its_licence() -> None:
    assert "JSB_Chorales.npz" in (ASSETS / "LICENSES.md").read_text()


@pytest.mark.parametrize("name", ["muse", "piano"])
def test_music_without_a_test_split_says_so(name: str) -> None:
    splits = load_or_skip(name)
    assert splits.test is None
    with pytest.raises(
        ValueError, match=r"no 'test' split; available: train, valid\. The file .* evaluate on 'valid'"
    ):
        splits.split("test")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_music_file_is_named(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DYNAVAE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"needs the file music/{FILES[name]}.*export DYNAVAE_DATA="):
        load(name)


def test_music_is_found_through_the_variable_or_the_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a" / "music").mkdir(parents=True)
    target = tmp_path / "a" / "music" / "Nottingham.npz"
    shutil.copy(JSB_BITS, target)
    monkeypatch.setenv("DYNAVAE_DATA", str(tmp_path / "a"))
    assert find("Nottingham.npz") == target
    monkeypatch.delenv("DYNAVAE_DATA")
    monkeypatch.chdir(tmp_path)
    assert find("Nottingham.npz", folder="a").resolve() == target
    assert find("Nottingham.npz", folder="a/music").resolve() == target
    splits = load("nottingham", folder="a")  # another file under that name: loaded, but not verified
    assert splits.split("train").frames == 13807
    assert splits.meta["verified"] is False


def test_music_with_a_test_split_only(tmp_path: Path) -> None:
    with np.load(JSB_BITS) as archive:
        np.savez(
            tmp_path / "MuseData.npz", test_bits=archive["test_bits"], test_lengths=archive["test_lengths"]
        )
    splits = load("muse", folder=tmp_path)
    assert splits.available == ("test",)
    assert splits.split("test").sha256() == load("jsb").split("test").sha256()
    with pytest.raises(ValueError, match="no 'train' split; available: test"):
        splits.split("train")


def test_packed_music_is_read_by_path() -> None:
    splits = load(JSB_BITS)
    assert splits.name == "JSB_Chorales"
    assert splits.split("valid").sha256() == load("jsb").split("valid").sha256()
    with pytest.raises(ValueError, match="holds piano rolls, whose kind is 'binary'; got kind='real'"):
        load(JSB_BITS, kind="real")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"valid_lengths": np.array([3, 4])},
            r"valid_lengths of .* should be 1-D and sum to 4602 frames; got .* sum 7",
        ),
        (
            {"valid_bits": np.zeros((5, 12), np.uint8)},
            r"valid_bits of .* shape \(frames, 11\); got uint8 \(5, 12\)",
        ),
    ],
)
def test_damaged_music_is_refused(change: dict[str, np.ndarray], match: str, tmp_path: Path) -> None:
    with np.load(JSB_BITS) as archive:
        np.savez(tmp_path / "JSB_Chorales.npz", **{**{key: archive[key] for key in archive.files}, **change})
    with pytest.raises(ValueError, match=match):
        load("jsb", folder=tmp_path)


def test_jsb16_is_the_same_chorales_transposed() -> None:
    fine, coarse = load_or_skip("jsb16"), load("jsb")
    assert fine.meta["verified"]
    assert fine.meta["frame_seconds"] == 0.125
    assert [len(fine.split(s)) for s in fine.available] == [229, 76, 77]
    keys = np.flatnonzero(np.concatenate(fine.split("train").x).any(0)) + fine.meta["lowest_midi"]
    assert (keys.min(), keys.max()) == (36, 81)
    assert all(fine.split(s).frames == 4 * coarse.split(s).frames for s in fine.available)


# SequenceDataset


def test_dataset_properties() -> None:
    data = SequenceDataset(ragged(5, 3, 4), control=ragged(5, 3, 4, x_dim=1), names=["a", "b", "c"])
    assert (len(data), data.frames, data.x_dim, data.control_dim) == (3, 12, 2, 1)
    assert data.lengths.tolist() == [5, 3, 4]
    assert repr(data) == "SequenceDataset(3 sequences, 12 frames, x_dim=2, control_dim=1)"
    assert data[1]["name"] == "b"
    assert data[1]["x"].shape == (3, 2)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (bool, np.uint8),
        (np.uint8, np.uint8),
        (np.int64, np.float32),
        (np.float16, np.float32),
        (float, np.float32),
    ],
)
def test_dataset_dtypes(given: type, kept: type) -> None:
    data = SequenceDataset([np.ones((4, 2), dtype=given)])
    assert data.x[0].dtype == kept
    assert data.batch().x.dtype == torch.float32


def test_dataset_takes_tensors_and_dense_arrays() -> None:
    x = np.stack(ragged(4, 4))
    expected = SequenceDataset(list(x)).sha256()
    assert SequenceDataset(x).sha256() == expected
    assert SequenceDataset(torch.as_tensor(x)).sha256() == expected
    assert SequenceDataset(x.tolist()).sha256() == expected


def test_batch_pads_and_keeps_what_is_missing() -> None:
    x = ragged(5, 3, 4)
    x[0][2, 1] = np.nan
    data = SequenceDataset(x, control=ragged(5, 3, 4, x_dim=1))
    batch = data.batch([2, 0])
    assert isinstance(batch, Sequences)
    assert batch.lengths.tolist() == [4, 5]
    assert batch.names == ("2", "0")
    assert batch.control is not None
    assert batch.control.shape == (2, 5, 1)
    assert not batch.observed[1, 2, 1]
    for array, i in zip(batch.arrays(), (2, 0), strict=True):
        np.testing.assert_array_equal(array, x[i])


def test_data_loader_collates() -> None:
    data = SequenceDataset(ragged(5, 3, 4))
    loader = DataLoader(data, batch_size=2, collate_fn=data.collate)
    assert [batch.frames for batch in loader] == [8, 4]


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batches_cover_every_sequence_once(sort: bool, batch_size: int) -> None:
    data = SequenceDataset(ragged(5, 3, 4, 9, 1))
    batches = list(data.batches(batch_size, sort=sort))
    assert all(len(batch) <= batch_size for batch in batches)
    names = [name for batch in batches for name in batch.names]
    assert sorted(names) == sorted(data.names)
    assert names == (["4", "1", "2", "0", "3"] if sort else list(data.names))
    with pytest.raises(ValueError, match="batch_size should be at least 1; got 0"):
        data.batch_indices(0)


def test_sha256_is_of_the_content() -> None:
    x, u = ragged(5, 3), ragged(5, 3, x_dim=1)
    data = SequenceDataset(x, control=u, names=["a", "b"])
    assert data.sha256() == SequenceDataset(x, control=u).sha256() == data.batch().sha256()
    assert data.sha256() != SequenceDataset(x).sha256()
    assert data.sha256() != data.select([1, 0]).sha256()
    gap = [array.copy() for array in x]
    gap[0][1, 1] = np.nan
    assert (
        SequenceDataset(gap).sha256() == SequenceDataset(gap).batch().sha256() != SequenceDataset(x).sha256()
    )
    bits = np.ones((4, 3), dtype=np.uint8)
    assert SequenceDataset([bits]).sha256() == SequenceDataset([bits.astype(float)]).sha256()


BAD_SEQUENCES = {
    "empty": ([], r"empty data set \(0 sequences\)"),
    "one-dimensional": ([np.zeros(4)], r"x\[0\] should have shape \(T, x_dim\).*got \(4,\).*x\[:, None\]"),
    "four-dimensional": ([np.zeros((4, 2, 2))], r"x\[0\] should have shape .*got \(4, 2, 2\)"),
    "length 0": (
        [*ragged(2, 2, 2), np.zeros((0, 2))],
        r"sequence 3 has length 0; drop it, or give every sequence at least one observed step\.",
    ),
    "x_dim 0": ([np.zeros((4, 0))], r"x\[0\] has shape \(4, 0\): x_dim is 0"),
    "infinite": (
        [np.array([[0.0, 1.0], [0.0, -np.inf]])],
        r"x\[0\] is infinite in float32 at t=1, feature 1",
    ),
    "too large": ([np.array([[1e300]])], r"x\[0\] is infinite in float32 at t=0, feature 0; clip or rescale"),
    "all missing": ([*ragged(2), np.full((3, 2), np.nan)], r"sequence 1 is missing altogether \(all 3 steps"),
    "unequal x_dim": ([*ragged(2), np.zeros((3, 5))], r"same x_dim; x\[0\] has 2 features, x\[1\] has 5"),
}


@pytest.mark.parametrize("case", BAD_SEQUENCES)
def test_bad_sequences_are_refused_with_a_sentence(case: str) -> None:
    x, match = BAD_SEQUENCES[case]
    with pytest.raises(ValueError, match=match):
        SequenceDataset(x)


@pytest.mark.parametrize("x", [np.array([["a"]]), np.array([[1 + 1j]]), np.array([[None]])])
def test_what_is_not_a_number_is_refused(x: np.ndarray) -> None:
    with pytest.raises(TypeError, match=r"x\[0\] should hold real numbers; got dtype"):
        SequenceDataset([x])


@pytest.mark.parametrize(
    ("control", "match"),
    [
        (ragged(5), r"control should have one array for each of 2 sequences; got 1"),
        (ragged(5, 4), r"control\[1\] should have shape \(3, control_dim\).*got \(4, 2\)"),
        (
            [np.zeros((5, 1)), np.zeros((3, 2))],
            r"same control_dim; control\[0\] has 1 features, control\[1\] has 2",
        ),
        ([np.zeros((5, 1)), np.array([[0.0], [np.nan], [0.0]])], r"control\[1\] is NaN or infinite at t=1"),
    ],
)
def test_bad_controls_are_refused(control: list[np.ndarray], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SequenceDataset(ragged(5, 3), control=control)


def test_names_have_to_fit() -> None:
    with pytest.raises(ValueError, match="one entry for each of 2 sequences; got 1"):
        SequenceDataset(ragged(5, 3), names=["a"])


# DataSplits


def test_splits_check_themselves() -> None:
    train = SequenceDataset(ragged(5))
    with pytest.raises(ValueError, match=r"same x_dim; got train 2, valid 3"):
        DataSplits("toy", train=train, valid=SequenceDataset(ragged(5, x_dim=3)))
    with pytest.raises(ValueError, match=r"same control_dim; got train 0, test 1"):
        DataSplits("toy", train=train, test=SequenceDataset(ragged(5), control=ragged(5, x_dim=1)))
    with pytest.raises(ValueError, match=r"kind should be one of binary, real, .*; got 'integer'"):
        DataSplits("toy", train=train, kind="integer")
    with pytest.raises(ValueError, match="'toy' has no split"):
        DataSplits("toy")
    with pytest.raises(ValueError, match="no 'validation' split; available: train"):
        DataSplits("toy", train=train).split("validation")


# The user's own .npz


def write(path: Path, **arrays: object) -> Path:
    np.savez(path / "own.npz", **arrays)  # type: ignore[arg-type]
    return path / "own.npz"


def test_dense_and_ragged_forms_agree(tmp_path: Path) -> None:
    x, u = ragged(5, 3), ragged(5, 3, x_dim=1)
    padded, padded_u = np.full((2, 5, 2), np.inf), np.full((2, 5, 1), np.nan)  # padding may hold anything
    for i in range(2):
        padded[i, : len(x[i])], padded_u[i, : len(u[i])] = x[i], u[i]
    splits = load(
        write(
            tmp_path,
            train=padded,
            train_lengths=np.array([5, 3]),
            train_control=padded_u,
            train_names=np.array(["a", "b"]),
            valid_x=np.concatenate(x),
            valid_lengths=np.array([5, 3]),
            valid_control=np.concatenate(u),
            time=np.arange(5),
        )
    )
    assert (splits.name, splits.kind, splits.available) == ("own", "real", ("train", "valid"))
    assert splits.split("train").names == ("a", "b")
    assert splits.split("train").sha256() == splits.split("valid").sha256() == SequenceDataset(x, u).sha256()
    assert len(splits.sha256) == 64


@pytest.mark.parametrize("whole_frames", [True, False])
def test_observed_marks_what_is_missing(whole_frames: bool, tmp_path: Path) -> None:
    x = np.stack(ragged(4, 4))
    x[1, 2] = np.inf  # never looked at: it is not observed
    observed = np.ones((2, 4) if whole_frames else (2, 4, 2), dtype=bool)
    observed[1, 2] = False
    data = load(write(tmp_path, test=x, test_observed=observed)).split("test")
    assert np.isnan(data.x[1]).sum() == 2
    assert np.isnan(data.x[1][2]).all()


@pytest.mark.parametrize(
    ("values", "kind"),
    [([[0, 1]], "binary"), ([[0.0, np.nan]], "binary"), ([[0, 2]], "real"), ([[0.5, 1]], "real")],
)
def test_kind_is_guessed(values: list[list[float]], kind: str, tmp_path: Path) -> None:
    assert load(write(tmp_path, train=np.array([values]))).kind == kind


def test_kind_can_be_given_if_the_values_allow_it(tmp_path: Path) -> None:
    path = write(tmp_path, train=np.array([[[0.0, 1.0], [2.0, 3.0]]]))
    assert load(path, kind="power").kind == "power"
    with pytest.raises(ValueError, match=r"own\.npz holds values other than 0 and 1"):
        load(path, kind="binary")
    with pytest.raises(ValueError, match=r"own\.npz holds negative values"):
        load(write(tmp_path, train=np.array([[[-1.0]]])), kind="power")
    with pytest.raises(ValueError, match="kind should be one of"):
        load(path, kind="integer")


def test_a_single_set_is_split_by_ratio(tmp_path: Path) -> None:
    x = ragged(*range(1, 21))
    path = write(tmp_path, x=np.concatenate(x), lengths=np.arange(1, 21))
    splits = load(path, valid=0.1, test=0.2, seed=3)
    assert [len(splits.split(name)) for name in splits.available] == [14, 2, 4]
    names = [name for split in splits.available for name in splits.split(split).names]
    assert sorted(map(int, names)) == list(range(20))
    assert splits.meta["split"] == {"valid": 0.1, "test": 0.2, "seed": 3}
    again, other = load(path, valid=0.1, test=0.2, seed=3), load(path, valid=0.1, test=0.2, seed=4)
    assert again.split("test").names == splits.split("test").names != other.split("test").names
    assert load(path, valid=0.0, test=0.0).available == ("train",)


def test_a_single_set_is_split_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, x=np.stack(ragged(4, 4, 4)), names=np.array(["a", "b", "c"]))
    splits = load(path, valid=["c"], test=["a"])
    assert {s: splits.split(s).names for s in splits.available} == {
        "train": ("b",),
        "valid": ("c",),
        "test": ("a",),
    }
    assert splits.meta["split"] == {"valid": ["c"], "test": ["a"]}
    np.testing.assert_array_equal(splits.split("valid").x[0], np.stack(ragged(4, 4, 4))[2].astype(np.float32))
    assert load(path, test=["b"]).available == ("train", "test")  # the share of the other counts as none
    unnamed = write(tmp_path, x=np.stack(ragged(4, 4, 4)))
    assert load(unnamed, valid=["2"], test=0.3).split("train").names == ("0", "1")


@pytest.mark.parametrize(
    ("lists", "error", "match"),
    [
        ({"test": ["d"]}, ValueError, r"test: own\.npz has no sequence 'd'; it has 0, 1, 2\."),
        ({"valid": ["0"], "test": ["0"]}, ValueError, "valid and test should not share an id"),
        (
            {"valid": ["0", "1"], "test": ["2"]},
            ValueError,
            r"name every sequence of own\.npz: none is left to train on",
        ),
        ({"valid": "abc"}, TypeError, "valid should be a share such as 0.1, or a list of names; got 'abc'"),
    ],
)
def test_bad_lists_are_refused(
    lists: dict[str, object], error: type[Exception], match: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        load(write(tmp_path, x=np.stack(ragged(4, 4, 4))), **lists)


def test_lists_do_not_contradict_a_file_with_splits(tmp_path: Path) -> None:
    path = write(tmp_path, train=np.stack(ragged(4, 4)), test=np.stack(ragged(4, 4)))
    assert len(load(path, valid=0.5, test=0.9).split("train")) == 2
    for source in (path, ASSETS / "JSB_Chorales.npz"):
        with pytest.raises(
            ValueError, match=r"\.npz says itself which are train, valid and test; leave valid out"
        ):
            load(source, valid=["0"])


@pytest.mark.parametrize("n", [1, 4])
def test_a_single_set_may_be_test_as_a_whole(n: int, tmp_path: Path) -> None:
    path = write(tmp_path, x=np.stack(ragged(*[4] * n)), names=np.array(list("abcd")[:n]))
    splits = load(path, whole=True, valid=["a"], kind="real")
    assert (splits.available, splits.split("test").names) == (("test",), tuple("abcd")[:n])
    assert splits.meta["split"] == "all of it is test"
    parted = write(tmp_path, train=np.ones((1, 2, 1)), valid=np.ones((1, 2, 1)))
    assert load(parted, whole=True).available == ("train", "valid")


@pytest.mark.parametrize(
    ("ratios", "match"),
    [
        ({}, r"own\.npz holds 2 sequence\(s\), too few to split.*pass valid=0, test=0"),
        ({"valid": 0.6, "test": 0.4}, r"shares >= 0 with a sum below 1; got 0\.6 and 0\.4"),
        ({"valid": -0.1}, "shares >= 0"),
    ],
)
def test_bad_ratios_are_refused(ratios: dict[str, float], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        load(write(tmp_path, x=np.stack(ragged(4, 4))), **ratios)


def test_save_npz_round_trips(tmp_path: Path) -> None:
    x = ragged(5, 3)
    x[1][0, 0] = np.nan
    toy = DataSplits(
        "toy",
        train=SequenceDataset(x, control=ragged(5, 3, x_dim=1), names=["a", "b"]),
        test=SequenceDataset(ragged(4), control=ragged(4, x_dim=1)),
        kind="real",
        meta={"frame_seconds": 0.1},
    )
    save_npz(tmp_path / "toy_file.npz", toy)
    back = load(tmp_path / "toy_file.npz")
    assert (back.name, back.kind, back.meta, back.available) == ("toy", "real", toy.meta, ("train", "test"))
    for split in back.available:
        assert back.split(split).sha256() == toy.split(split).sha256()
        assert back.split(split).names == toy.split(split).names


def test_save_npz_keeps_piano_rolls_small(tmp_path: Path) -> None:
    jsb = load("jsb")
    save_npz(tmp_path / "jsb.npz", jsb)
    back = load(tmp_path / "jsb.npz")
    assert back.kind == "binary"
    assert back.meta == jsb.meta
    assert back.split("test").x[0].dtype == np.uint8
    assert back.split("test").sha256() == jsb.split("test").sha256()
    with pytest.raises(ValueError, match=r"should end in \.npz"):
        save_npz(tmp_path / "jsb", jsb)


BAD_FILES = {
    "nothing usable": ({"foo": np.zeros(3)}, "holds no sequences: found foo; expected train, valid, test"),
    "wrong ndim": (
        {"train": np.zeros((2, 3, 4, 5))},
        r"own\.npz, train: values should have shape .*got \(2, 3, 4, 5\)",
    ),
    "no lengths": ({"train": np.zeros((9, 4))}, r"own\.npz, train: values have shape \(9, 4\) .*no lengths"),
    "lengths too long": (
        {"train": np.zeros((2, 3, 4)), "train_lengths": np.array([3, 4])},
        r"lengths should be 2 numbers up to 3",
    ),
    "lengths sum": (
        {"train_x": np.zeros((9, 4)), "train_lengths": np.array([3, 4])},
        r"lengths should sum to 9, the frames of the values; got 7",
    ),
    "negative length": (
        {"train_x": np.zeros((9, 4)), "train_lengths": np.array([10, -1])},
        r"lengths should not be negative; got -1",
    ),
    "fractional lengths": (
        {"train_x": np.zeros((9, 4)), "train_lengths": np.array([4.5, 4.5])},
        r"lengths should be whole numbers of shape \(B,\); got float64",
    ),
    "length 0": (
        {"train_x": np.zeros((9, 4)), "train_lengths": np.array([4, 0, 5])},
        r"own\.npz, train: sequence 1 has length 0; drop it",
    ),
    "empty set": ({"train": np.zeros((0, 3, 4))}, r"own\.npz, train: got an empty data set"),
    "empty ragged set": (
        {"train_x": np.zeros((0, 4)), "train_lengths": np.zeros(0, dtype=int)},
        r"own\.npz, train: got an empty data set",
    ),
    "infinite": ({"train": np.full((1, 2, 1), np.inf)}, r"own\.npz, train: x\[0\] is infinite"),
    "all missing": (
        {"train": np.full((1, 2, 1), np.nan)},
        r"own\.npz, train: sequence 0 is missing altogether",
    ),
    "not observed": (
        {"train": np.ones((2, 3, 1)), "train_observed": np.array([[1, 1, 1], [0, 0, 0]])},
        r"own\.npz, train: sequence 1 is missing altogether",
    ),
    "observed shape": (
        {"train": np.ones((2, 3, 4)), "train_observed": np.ones((2, 4))},
        r"observed should have shape \(2, 3, 4\) or \(2, 3\); got \(2, 4\)",
    ),
    "observed values": (
        {"train": np.ones((2, 3, 4)), "train_observed": np.full((2, 3), 0.5)},
        r"observed should hold True and False",
    ),
    "control shape": (
        {"train": np.ones((2, 3, 4)), "train_control": np.ones((2, 4, 1))},
        r"control should have shape \(2, 3, 'control_dim'\); got \(2, 4, 1\)",
    ),
    "twice": (
        {"train": np.ones((2, 3, 4)), "train_x": np.ones((6, 4))},
        r"holds both train and train_x; keep one of them",
    ),
    "misspelt part": (
        {"train": np.ones((1, 2, 1)), "train_obsreved": np.ones((1, 2))},
        "did you mean 'train_observed'",
    ),
    "misspelt split": ({"train": np.ones((1, 2, 1)), "val_x": np.ones((1, 2))}, "did you mean 'valid_x'"),
    "unequal splits": (
        {"train": np.ones((1, 2, 1)), "test": np.ones((1, 2, 3))},
        "same x_dim; got train 1, test 3",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_with_a_sentence(case: str, tmp_path: Path) -> None:
    arrays, match = BAD_FILES[case]
    with pytest.raises(ValueError, match=match):
        load(write(tmp_path, **arrays))


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    objects = np.empty(2, dtype=object)
    objects[:] = ragged(3, 4)
    with pytest.raises(
        TypeError, match=r"'train' of own\.npz is an object array.*train_x = numpy\.concatenate"
    ):
        load(write(tmp_path, train=objects))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere\.npz"):
        load("nowhere.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.npz is not an \.npz archive; write it with numpy\.savez"):
        load_npz(tmp_path / "text.npz")
    np.save(tmp_path / "array.npy", np.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"array\.npy is not an \.npz archive"):
        load(tmp_path / "array.npy")


def test_unknown_names_and_options_are_named() -> None:
    with pytest.raises(
        ValueError, match=re.escape("unknown data set 'notingham'; did you mean 'nottingham'?")
    ):
        load("notingham")
    with pytest.raises(ValueError, match=rf"Give one of {', '.join(DATASETS)}, or a path to an \.npz file"):
        load("timit")
    with pytest.raises(
        ValueError, match=r"unknown option 'foldr' for load\('jsb'\); did you mean 'folder'\?"
    ):
        load("jsb", foldr=os.curdir)
