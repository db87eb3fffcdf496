"""A folder of MIDI files as piano rolls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynavae.data.dataset import SequenceDataset
from dynavae.data.rows import folder_sha256, split_folders
from dynavae.data.splits import DataSplits, divided, refuse_lists
from dynavae.data.windows import windows

MIDI = (".mid", ".midi")


def load_midi(
    path: str | Path,
    *,
    frame_seconds: float = 0.5,
    lowest_midi: int = 21,
    keys: int = 88,
    window: int | None = None,
    valid: float | Sequence[str] = 0.1,
    test: float | Sequence[str] = 0.1,
    seed: int = 0,
    name: str | None = None,
    whole: bool = False,
) -> DataSplits:
    """Read a folder of ``.mid`` files as piano rolls, one sequence per file (needs the extra ``music``).

    Args:
        path: the folder; folders train, valid and test in it are the splits.
        frame_seconds: duration of a frame; 0.5 is a quarter note at 120 beats per minute.
        lowest_midi, keys: the note of column 0, and the number of columns.
        window: cut pieces into windows of so many frames; those without a note stay.
        valid, test: for a folder without splits, the shares of the files (at least one each; 0 for none; of windows, where
            there are fewer than three files), or lists of files, without .mid. With a list for one of them, a share of the
            other counts as none.
        seed: of the draw by share.
        name: of the data set; the folder's name by default.
        whole: everything that the folder does not assign to a split itself becomes "test".

    Raises:
        ValueError: no MIDI file, one without a note, or a note outside of the columns; the sentence names the file.
        ImportError: ``pretty_midi`` is not installed.
    """
    path = Path(path)
    folders = split_folders(path)
    options = (frame_seconds, lowest_midi, keys, window)
    if folders:
        refuse_lists(valid, test, path.name)
        sets = {split: _rolls(folder, *options)[0] for folder, split in folders.items()}
    else:
        data, files = _rolls(path, *options)
        sets = divided(data, valid, test, seed, whole, path.name, files)
    meta = {"lowest_midi": lowest_midi, "frame_seconds": frame_seconds}
    return DataSplits(name or path.stem, **sets, kind="binary", meta=meta, sha256=folder_sha256(path))


def midi_files(folder: Path) -> list[Path]:
    """The MIDI files right in a folder."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in MIDI)


def _rolls(
    folder: Path, frame_seconds: float, lowest_midi: int, keys: int, window: int | None
) -> tuple[SequenceDataset, list[str]]:
    """The pieces of a folder, and for each the file that it is from."""
    from dynavae.music import from_midi

    x, names, files = [], [], []
    for file in midi_files(folder):
        try:
            roll = from_midi(file, frame_seconds, lowest_midi, keys)
        except (ValueError, OSError, EOFError, KeyError) as error:
            raise ValueError(f"{file}: {error}") from error
        if not len(roll):
            raise ValueError(f"{file} holds no pitched note; leave it out.")
        spans = windows(len(roll), window)
        x += [roll[a:b] for a, b in spans]
        names += [file.stem] if len(spans) == 1 else [f"{file.stem} {a}" for a, _ in spans]
        files += [file.stem] * len(spans)
    if not x:
        raise ValueError(f"{folder} holds no .mid file.")
    return SequenceDataset(x, names=names), files
