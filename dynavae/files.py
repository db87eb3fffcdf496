"""Files that appear whole or not at all, and sentences for a disk that refuses them."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dynavae.schedules import Row

PART = ".part"
"""Ending of a file that is still being written."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; once the block has ended well, it is on the disk and takes that name.

    Whatever happens on the way, `path` holds either all of the old or all of the new.

    Raises:
        OSError: with a sentence that names the file and says what to do; of the class and errno of the cause.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder, "a.txt")) as beside:
        ...         _ = beside.write_text("whole")
        ...     Path(folder, "a.txt").read_text(), len(os.listdir(folder))
        ('whole', 1)
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        yield beside
        _sync(beside)
        os.replace(beside, path)
        _sync(path.parent)
    except OSError as error:
        raise explained(error, path) from error
    finally:
        with contextlib.suppress(OSError):  # the error that counts is on its way already
            beside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file, or what a directory lists, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no directories
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explained(error: OSError, path: Path) -> OSError:
    """The same error as a sentence: which file, what is wrong, what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cause = "the disk is full"
        remedy = "Free some space and do it again (training continues with resume=True); what was saved before is untouched."
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        cause, remedy = "writing there is not allowed", "Change the permissions, or choose another directory."
    else:
        cause, remedy = error.strerror or str(error), "What was saved before is untouched."
    said = type(error)(f"{str(path)!r} could not be written: {cause}. {remedy}")
    said.errno = error.errno
    return said


def writable(directory: Path) -> Path:
    """Make a directory if need be, and find out now, not after the first epoch, whether files can be written.

    Raises:
        NotADirectoryError: it, or a parent, is a file.
        OSError: it is read-only, or the disk is full.
    """
    for part in (directory, *directory.parents):
        if part.exists() and not part.is_dir():
            raise NotADirectoryError(f"{str(part)!r} is a file, but should be a directory: choose another.")
    probe = directory / f".probe.{os.getpid()}{PART}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        raise explained(error, directory) from error
    return directory


def remove_parts(directory: Path) -> None:
    """Remove what a killed process left half-written."""
    for folder in (directory, directory / "best", directory / "checkpoints"):
        for part in folder.glob(f".*{PART}"):
            part.unlink(missing_ok=True)


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line per row; columns in the order in which they first occur."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, value: Any) -> Path:
    """JSON, whole or not at all; tensors become lists, what JSON cannot hold is written as text."""
    return write_text(path, json.dumps(value, indent=2, default=_plain) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Text, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
    return path


def write_arrays(path: Path, /, **arrays: Any) -> Path:
    """A compressed .npz, whole or not at all."""
    with replacing(path) as beside, beside.open("wb") as file:  # numpy adds .npz to other names
        np.savez_compressed(file, **arrays)
    return path


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # tensors, arrays, and their numbers
        return value.tolist()
    return list(value) if isinstance(value, tuple | set) else str(value)
