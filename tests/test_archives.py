"""Damaged .npz and .gz files: whichever byte is wrong, the answer is a sentence that names the file."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from dynavae import cli
from dynavae.data import load, load_npz
from dynavae.data.archives import arrays_of, gunzipped
from dynavae.data.music import ASSETS

WORDS = b"a text that repeats itself, " * 20


def damaged(content: bytes) -> dict[str, bytes]:
    """A wrong byte in the middle, in the first quarter and near the end; and cut short."""
    found = {"half": content[: len(content) // 2], "but one": content[:-1], "signature": content[:3]}
    for where, place in {"middle": len(content) // 2, "quarter": len(content) // 4, "end": -9}.items():
        wrong = bytearray(content)
        wrong[place] ^= 255
        found[where] = bytes(wrong)
    return found


def flips(content: bytes) -> list[bytes]:
    """One wrong byte, at every place."""
    return [content[:i] + bytes([content[i] ^ 255]) + content[i + 1 :] for i in range(len(content))]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_no_byte_of_an_npz_escapes(save, tmp_path):
    path, x = tmp_path / "own.npz", np.random.default_rng(0).normal(size=(1, 20, 2))
    save(path, x=x, lengths=np.array([20]))
    content, refused = path.read_bytes(), 0
    for wrong in [*flips(content), *(content[:i] for i in range(len(content)))]:
        try:
            found = arrays_of(wrong, path)  # of an unused byte, such as the date
            assert list(found) == ["x", "lengths"] and np.array_equal(found["x"], x)
        except ValueError as error:
            assert str(error).startswith(f"{path} is damaged: ")
            assert str(error).endswith("; copy or download it again.")
            refused += 1
    assert refused > 1.5 * len(content)


def test_no_byte_of_a_gz_escapes(tmp_path):
    content = gzip.compress(WORDS)
    for wrong in [*flips(content), *(content[:i] for i in range(len(content)))]:
        try:
            assert gunzipped(wrong, tmp_path / "a.gz") == WORDS
        except ValueError as error:
            assert str(error).startswith(f"{tmp_path / 'a.gz'} is damaged: ")
    with pytest.raises(ValueError, match=r"a.gz is damaged: it is empty; copy or download it again\.$"):
        gunzipped(b"", tmp_path / "a.gz")


@pytest.mark.parametrize("how", damaged(bytes(100)))
def test_the_users_npz(how, tmp_path, capsys):
    np.savez(tmp_path / "own.npz", train=np.random.default_rng(0).normal(size=(4, 50, 2)))
    path = tmp_path / "own.npz"
    path.write_bytes(damaged(path.read_bytes())[how])
    with pytest.raises(ValueError, match=r"own\.npz is damaged: .+; copy or download it again\.$"):
        load_npz(path)
    assert cli.main(["fit", "--model", "VAE", "--data", str(path), "--out", str(tmp_path / "run")]) == 1
    assert f"dynavae fit: {path} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("how", damaged(bytes(100)))
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("jsb", "JSB_Chorales.npz"),
        ("jsb16", "jsb-chorales-16th-separated.json.gz"),
        ("pm25", "pm25_missing.txt.gz"),
        ("physionet", "physionet2012_set_a.npz"),
    ],
)
def test_data_sets_by_name(name, file, how, tmp_path):
    content = (ASSETS / "JSB_Chorales.npz").read_bytes() if file.endswith(".npz") else gzip.compress(WORDS)
    for beside in (file, "pm25_ground.txt.gz"):
        (tmp_path / beside).write_bytes(damaged(content)[how])
    with pytest.raises(ValueError, match=rf"{file} is damaged: .+; copy or download it again\.$"):
        load(name, folder=tmp_path)


def test_a_damaged_cache_is_to_be_deleted(tmp_path):
    small = dict(train=2, valid=2, test=2, steps=5, folder=tmp_path)
    whole = load("pendulum", **small)
    path: Path = min(tmp_path.glob("*.npz"))
    path.write_bytes(damaged(path.read_bytes())["middle"])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged: .+; delete it, and it is made again\.$"):
        load("pendulum", **small)
    path.unlink()
    assert load("pendulum", **small).sha256 == whole.sha256
