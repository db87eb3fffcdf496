"""Polyphonic music: four collections as 88-key piano rolls, with the splits the literature uses.

Reference: Boulanger-Lewandowski, Bengio, Vincent, Modeling Temporal Dependencies in High-Dimensional
Sequences: Application to Polyphonic Music Generation and Transcription, 2012, arXiv:1206.6392.

Column 0 is MIDI note 21 (A0), column 87 is note 108 (C8). A 1 means the note sounds in that frame; a held
note and a repeated one look the same. Published figures are nats per frame, mostly total nats / total frames
of the split.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynavae.data.archives import arrays_of, gunzipped
from dynavae.data.dataset import SequenceDataset
from dynavae.data.splits import SPLITS, DataSplits

KEYS = 88
LOWEST_MIDI = 21
QUARTER_NOTE = 0.5  # seconds at 120 beats per minute
ASSETS = Path(__file__).parent / "assets"

SHA256 = {
    "JSB_Chorales.npz": "44476ea035248b410de87528cbf2934217726d4c9677b6572feba6a8b1f37eec",
    "Nottingham.npz": "527b10db6a193d763e3e107ffdc660a9346997f17751b6f2b14d6e71a0b2471e",
    "MuseData.npz": "450310b6c61435e8157c7db87d2022ad2d640054acf7d35dcde4c806d0174a8f",
    "Piano_midi.npz": "39964b93d088e4c6fc84303506ca228399c8a6d1f6d1a6bf0a6f1db4f0d08618",
    "jsb-chorales-16th-separated.json.gz": "2060fd7a05c1c27ab4a0aa5741d0926ea8569d460050b5660f3ffd6138823951",
}
"""The files whose counts were checked; ``meta["verified"]`` says whether the file at hand is one of them."""


def load_jsb(*, folder: str | Path | None = None) -> DataSplits:
    """Bach chorales on a quarter-note grid: 229 / 76 / 77 sequences; ships with the package."""
    path = ASSETS / "JSB_Chorales.npz" if folder is None else find("JSB_Chorales.npz", folder)
    return load_bits(path, name="jsb")


def load_nottingham(*, folder: str | Path | None = None) -> DataSplits:
    """Folk tunes with chords: 694 / 173 / 170 sequences.

    Exact duplicates are left in, as in the literature: train 267 = test 99, train 201 = valid 3,
    train 91 = train 112.
    """
    return load_bits(find("Nottingham.npz", folder), name="nottingham")


def load_muse(*, folder: str | Path | None = None) -> DataSplits:
    """Orchestral and piano classics (MuseData): 524 / 135 sequences, and a test split if the file has one."""
    return load_bits(find("MuseData.npz", folder), name="muse")


def load_piano(*, folder: str | Path | None = None) -> DataSplits:
    """Classical piano (Piano-midi.de): 87 / 12 sequences, and a test split if the file has one."""
    return load_bits(find("Piano_midi.npz", folder), name="piano")


def load_jsb16(*, folder: str | Path | None = None) -> DataSplits:
    """The same chorales on a sixteenth-note grid, from four voices: 229 / 76 / 77 sequences.

    Not a finer reading of "jsb": that set is transposed against this one, so never mix the two.
    Two voices on one note give one key.
    """
    path = find("jsb-chorales-16th-separated.json.gz", folder)
    content = path.read_bytes()
    voices: dict[str, list[list[list[int]]]] = json.loads(gunzipped(content, path))
    rolls = {
        split: [_voices_to_keys(np.array(s), split, i) for i, s in enumerate(voices[split])]
        for split in SPLITS
    }
    return _splits("jsb16", path.name, content, rolls, frame_seconds=QUARTER_NOTE / 4)


def find(file: str, folder: str | Path | None = None, part: str = "music") -> Path:
    """The path of a file of a data set: in ``folder``, else in the folder named by DYNAVAE_DATA, else near by.

    Everywhere it is looked for under the folder ``part``, then beside it.

    Raises:
        FileNotFoundError: it is nowhere; the sentence says which file is needed and how to set DYNAVAE_DATA.
    """
    named = folder if folder is not None else os.environ.get("DYNAVAE_DATA")
    roots = [Path("data"), Path("../shared/data")] if named is None else [Path(named).expanduser()]
    candidates = [root / path for root in roots for path in (Path(part) / file, Path(file))]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"this data set needs the file {part}/{file}, which does not ship with the package; looked for "
        f"{', '.join(map(str, candidates))}. Set the environment variable DYNAVAE_DATA to the folder "
        f"that holds {part}/{file}: export DYNAVAE_DATA=/path/to/data"
    )


def load_bits(path: Path, name: str) -> DataSplits:
    """Read piano rolls packed as bits: ``<split>_bits`` (frames, 11) uint8 and ``<split>_lengths`` per split.

    Raises:
        ValueError: the file is damaged, or its arrays do not fit together; the sentence says how.
    """
    content = path.read_bytes()
    arrays = arrays_of(content, path)
    lowest = int(arrays.get("lowest_midi", LOWEST_MIDI))
    rolls = {split: _unpack(arrays, split, path.name) for split in SPLITS if f"{split}_bits" in arrays}
    return _splits(name, path.name, content, rolls, frame_seconds=QUARTER_NOTE, lowest_midi=lowest)


def _unpack(arrays: Mapping[str, NDArray[Any]], split: str, file: str) -> list[NDArray[np.uint8]]:
    """The piano rolls (T_i, 88) of one split."""
    bits, lengths = arrays[f"{split}_bits"], arrays.get(f"{split}_lengths")
    if bits.ndim != 2 or bits.shape[1] * 8 != KEYS or bits.dtype != np.uint8:
        raise ValueError(
            f"{split}_bits of {file} should be uint8 of shape (frames, {KEYS // 8}); "
            f"got {bits.dtype} {bits.shape}."
        )
    if lengths is None or lengths.ndim != 1 or int(lengths.sum()) != len(bits):
        found = "no such array" if lengths is None else f"shape {lengths.shape}, sum {int(lengths.sum())}"
        raise ValueError(
            f"{split}_lengths of {file} should be 1-D and sum to {len(bits)} frames; got {found}."
        )
    return np.split(np.unpackbits(bits, axis=1), np.cumsum(lengths)[:-1])


def _voices_to_keys(voices: NDArray[np.int64], split: str, i: int) -> NDArray[np.uint8]:
    """MIDI numbers (T, voices), -1 = silent, as a piano roll (T, 88)."""
    sounding = voices >= 0
    keys = voices - LOWEST_MIDI
    if ((keys < 0) | (keys >= KEYS))[sounding].any():
        raise ValueError(
            f"{split} sequence {i} has a note outside MIDI {LOWEST_MIDI} to {LOWEST_MIDI + KEYS - 1}."
        )
    roll = np.zeros((len(voices), KEYS), dtype=np.uint8)
    t, voice = np.nonzero(sounding)
    roll[t, keys[t, voice]] = 1
    return roll


def _splits(
    name: str,
    file: str,
    content: bytes,
    rolls: Mapping[str, list[NDArray[np.uint8]]],
    frame_seconds: float,
    lowest_midi: int = LOWEST_MIDI,
) -> DataSplits:
    """Piano rolls per split, with what is known about the file they came from."""
    sha256 = hashlib.sha256(content).hexdigest()
    meta: dict[str, Any] = {
        "lowest_midi": lowest_midi,
        "frame_seconds": frame_seconds,
        "file": file,
        "verified": sha256 == SHA256.get(file),
    }
    if "test" not in rolls:
        meta["note"] = f"The file {file} at hand carries no test sequences: evaluate on 'valid', and say so."
    sets = {
        split: SequenceDataset(x, names=[f"{split}-{i}" for i in range(len(x))]) for split, x in rolls.items()
    }
    return DataSplits(name, **sets, kind="binary", meta=meta, sha256=sha256)
