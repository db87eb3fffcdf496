"""What is read out of .npz and .gz files, and a sentence where such a file is damaged."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DAMAGE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, RuntimeError, ValueError,
)  # fmt: skip
"""What a wrong byte makes of reading: a flag is read as a password, a length as a place before the file, and so on."""

COPY = "copy or download it again"


def arrays_of(content: bytes, path: Path, remedy: str = COPY) -> dict[str, NDArray[Any]]:
    """All arrays of an .npz file, each checked against its checksum, without unpickling anything.

    Args:
        content: of the file.
        path: what the file is called.
        remedy: what to do about damage.

    Raises:
        ValueError: the file is cut short, or a byte of it is wrong.
        TypeError: an array of objects.
    """
    try:
        with zipfile.ZipFile(
            io.BytesIO(content)
        ) as archive:  # numpy reads an array no further than it is long
            if (bad := archive.testzip()) is not None:
                raise ValueError(f"wrong checksum in {bad}")
            if any(entry.comment for entry in archive.infolist()):  # numpy writes none: it is the next entry
                raise ValueError("its list of arrays is torn")
    except DAMAGE as error:
        raise _damaged(path, error, remedy) from error
    arrays = {}
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        for key in archive.files:
            try:
                arrays[key] = archive[key]
            except ValueError as error:
                if "allow_pickle" not in str(error):
                    raise _damaged(path, error, remedy) from error
                raise TypeError(
                    f"{key!r} of {path.name} is an object array, which would have to be unpickled; save "
                    "sequences of different lengths as train_x = numpy.concatenate(sequences), train_lengths."
                ) from error
    return arrays


def gunzipped(content: bytes, path: Path) -> bytes:
    """What a .gz file holds.

    Raises:
        ValueError: the file is empty, cut short, or a byte of it is wrong.
    """
    try:
        if not content:
            raise EOFError("it is empty")
        return gzip.decompress(content)
    except DAMAGE as error:
        raise _damaged(path, error, COPY) from error


def _damaged(path: Path, error: Exception, remedy: str) -> ValueError:
    return ValueError(f"{path} is damaged: {str(error).rstrip('.') or 'it ends too soon'}; {remedy}.")
