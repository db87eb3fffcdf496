"""The user's own data as one ``.npz`` file: arrays only, nothing pickled.

=====================  ======================================================================================
array                  content
=====================  ======================================================================================
``<split>``            dense (B, T, x_dim); NaN = missing; optionally with ``<split>_lengths`` (B,)
``<split>_x``          ragged (frames, x_dim), one sequence after another; needs ``<split>_lengths`` (B,)
``<split>_control``    optional, of the same form as the values: (B, T, control_dim) or (frames, control_dim)
``<split>_observed``   optional, True where observed: of the shape of the values, or without the last axis
``<split>_names``      optional, (B,) strings
``kind``, ``name``     optional strings
=====================  ======================================================================================

``<split>`` is train, valid or test; any of them may be absent. A file without splits holds one set as ``x``
(and ``lengths``, ``control``, ``observed``, ``names``) and is split by share or by name. Other arrays are ignored.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynavae.data.archives import arrays_of
from dynavae.data.dataset import PreciseDataset, SequenceDataset
from dynavae.data.music import load_bits
from dynavae.data.schema import Schema
from dynavae.data.splits import SPLITS, DataSplits, divided, kind_of, lists_of, refuse_lists
from dynavae.files import write_arrays

PARTS = ("x", "lengths", "control", "observed", "names")
Arrays = Mapping[str, NDArray[Any]]


def load_npz(
    path: str | Path,
    *,
    kind: str | None = None,
    valid: float | Sequence[str] = 0.1,
    test: float | Sequence[str] = 0.1,
    seed: int = 0,
    name: str | None = None,
    standardize: bool = False,
    schema: Schema | None = None,
    whole: bool = False,
) -> DataSplits:
    """Read train, valid and test sequences from an ``.npz`` file (its layout: see the head of this module).

    Args:
        path: the file. Piano rolls packed as bits, as the music sets are distributed, are read too.
        kind: "binary", "real", "categorical" or "power"; by default what the file says, else "binary" if the
            only values are 0 and 1, else "real".
        valid, test: for a file without splits, the shares of the sequences (at least one each; 0 for none), or lists of
            their names. With a list for one of them, a share of the other counts as none.
        seed: of the shuffle before a split by share.
        name: of the data set; the file's name by default.
        standardize: each feature to mean 0 and standard deviation 1 over the observed training values, computed in float64.
        schema: a scaling to use again, instead.
        whole: everything that the file does not assign to a split itself becomes "test".

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an ``.npz``, or a damaged one, no usable arrays, shapes that do not fit, or any rule that
            :class:`SequenceDataset` checks. The sentence begins with the file and the split.
        TypeError: object arrays, or values that are not numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the path of an .npz file.")
    content = path.read_bytes()
    if not (content.startswith(b"PK") or zipfile.is_zipfile(io.BytesIO(content))):
        raise ValueError(
            f"{path} is not an .npz archive; write it with numpy.savez(path, train=..., valid=...)."
        )
    arrays = arrays_of(content, path)
    if any(f"{split}_bits" in arrays for split in SPLITS):
        if kind not in (None, "binary"):
            raise ValueError(f"{path.name} holds piano rolls, whose kind is 'binary'; got kind={kind!r}.")
        refuse_lists(valid, test, path.name)
        return load_bits(path, name or path.stem)
    _check_names(arrays, path)
    scale = standardize or schema is not None
    store = PreciseDataset if scale else SequenceDataset
    sets: dict[str, SequenceDataset] = {}
    meta = json.loads(_text(arrays, "meta_json") or "{}")
    for split in SPLITS:
        if split in arrays or f"{split}_x" in arrays:
            parts = {part: arrays[f"{split}_{part}"] for part in PARTS if f"{split}_{part}" in arrays}
            if split in arrays and "x" in parts:
                raise ValueError(f"{path.name} holds both {split} and {split}_x; keep one of them.")
            if split in arrays:
                parts["x"] = arrays[split]
            sets[split] = _dataset(parts, f"{path.name}, {split}", store)
    if sets:
        refuse_lists(valid, test, path.name)
    else:
        if "x" not in arrays:
            raise ValueError(
                f"{path.name} holds no sequences: found {', '.join(arrays) or 'no array'}; expected train, "
                "valid, test (B, T, x_dim), or train_x (frames, x_dim) with train_lengths, or a single x."
            )
        data = _dataset({part: arrays[part] for part in PARTS if part in arrays}, path.name, store)
        sets = divided(data, valid, test, seed, whole, path.name)
        drawn: dict[str, Any] = lists_of(valid, test) or {"valid": valid, "test": test, "seed": seed}
        meta = {**meta, "split": "all of it is test" if whole else drawn}
    found = kind_of(kind or _text(arrays, "kind"), [x for data in sets.values() for x in data.x], path.name)
    if scale:
        sets, meta = _scaled(sets, meta, schema)
    return DataSplits(
        name or _text(arrays, "name") or path.stem,
        **sets,
        kind=found,
        meta=meta,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def save_npz(path: str | Path, splits: DataSplits) -> None:
    """Write splits in the ragged form, so that ``load(path)`` gives them back, ``meta`` included.

    Raises:
        OSError: the file could not be written; what was there before is untouched.
        ValueError: ``path`` does not end in .npz.
        TypeError: ``meta`` is not representable in JSON.

    Example:
        >>> import tempfile, numpy as np
        >>> from dynavae.data import DataSplits, SequenceDataset, load, save_npz
        >>> toy = DataSplits("toy", train=SequenceDataset([np.ones((5, 2)), np.zeros((3, 2))]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_npz(folder + "/toy.npz", toy)
        ...     load(folder + "/toy.npz").train
        SequenceDataset(2 sequences, 8 frames, x_dim=2)
    """
    if Path(path).suffix != ".npz":
        raise ValueError(f"the path should end in .npz; got {path}.")
    arrays: dict[str, Any] = {"name": splits.name, "kind": splits.kind, "meta_json": json.dumps(splits.meta)}
    for split in splits.available:
        data = splits.split(split)
        arrays[f"{split}_x"] = np.concatenate(data.x)
        arrays[f"{split}_lengths"] = data.lengths
        arrays[f"{split}_names"] = np.array(data.names)
        if data.control is not None:
            arrays[f"{split}_control"] = np.concatenate(data.control)
    write_arrays(Path(path), **arrays)


def _scaled(
    sets: dict[str, SequenceDataset], meta: dict[str, Any], schema: Schema | None
) -> tuple[dict[str, SequenceDataset], dict[str, Any]]:
    """The sets standardised by a schema, or by one fitted on the training set, which `meta` then holds."""
    first = next(iter(sets.values()))
    if schema is None:
        schema = Schema(tuple(meta.get("x_names") or map(str, range(first.x_dim))))
        schema = schema.fitted(sets["train"].x if "train" in sets else first.x)
    for split, data in sets.items():
        if len(schema.columns) != data.x_dim:
            raise ValueError(f"the scaling is of {len(schema.columns)} features, {split} has {data.x_dim}.")
    scaled = {
        split: SequenceDataset([schema.standardise(x) for x in data.x], data.control, data.names)
        for split, data in sets.items()
    }
    return scaled, {**meta, "schema": schema.to_dict(), "x_names": list(schema.columns)}


def _check_names(arrays: Arrays, path: Path) -> None:
    """Refuse array names that are most likely misspelt: they would be ignored silently."""
    for key in arrays:
        head, _, part = key.partition("_")
        if head in ("val", "validation", "dev"):
            raise ValueError(
                f"{path.name} holds {key!r}; did you mean {'_'.join(filter(None, ('valid', part)))!r}?"
            )
        if (
            head in SPLITS
            and part
            and part not in PARTS
            and (near := difflib.get_close_matches(part, PARTS, n=1))
        ):
            raise ValueError(f"{path.name} holds {key!r}; did you mean {f'{head}_{near[0]}'!r}?")


def _dataset(parts: Arrays, where: str, store: type[SequenceDataset]) -> SequenceDataset:
    """One set from its arrays, dense or ragged; errors begin with where they were found."""
    try:
        x = parts["x"]
        lengths = _lengths(parts, x)
        if (observed := parts.get("observed")) is not None:
            x = _hide(x, observed)
        control = parts.get("control")
        if control is not None and control.shape[: x.ndim - 1] != x.shape[:-1]:
            raise ValueError(
                f"control should have shape {(*x.shape[:-1], 'control_dim')}; got {control.shape}."
            )
        names = parts.get("names")
        return store(
            _cut(x, lengths),
            None if control is None else _cut(control, lengths),
            None if names is None else [str(name) for name in names],
        )
    except (ValueError, TypeError) as error:
        sentence = f"{where}: {error}"
        raise (TypeError(sentence) if isinstance(error, TypeError) else ValueError(sentence)) from error


def _lengths(parts: Arrays, x: NDArray[Any]) -> NDArray[np.int64]:
    """Steps of each sequence, checked against dense (B, T, x_dim) or ragged (frames, x_dim) values."""
    lengths = parts.get("lengths")
    if x.ndim not in (2, 3):
        raise ValueError(
            f"values should have shape (B, T, x_dim), or (frames, x_dim) with lengths; got {x.shape}."
        )
    if lengths is None:
        if x.ndim == 2:
            raise ValueError(
                f"values have shape {x.shape} = (frames, x_dim) but there are no lengths; "
                "save the lengths of the sequences too, or one sequence as x[None]."
            )
        return np.full(len(x), x.shape[1], dtype=np.int64)
    if lengths.ndim != 1 or lengths.dtype.kind not in "ui":
        raise ValueError(
            f"lengths should be whole numbers of shape (B,); got {lengths.dtype} {lengths.shape}."
        )
    if (lengths < 0).any():
        raise ValueError(f"lengths should not be negative; got {int(lengths.min())}.")
    if x.ndim == 2 and int(lengths.sum()) != len(x):
        raise ValueError(
            f"lengths should sum to {len(x)}, the frames of the values; got {int(lengths.sum())}."
        )
    if x.ndim == 3 and (len(lengths) != len(x) or (lengths > x.shape[1]).any()):
        raise ValueError(
            f"lengths should be {len(x)} numbers up to {x.shape[1]}, as values have shape {x.shape}."
        )
    return lengths.astype(np.int64)


def _hide(x: NDArray[Any], observed: NDArray[Any]) -> NDArray[Any]:
    """x with NaN where it is not observed; x itself where everything is."""
    if observed.shape not in (x.shape, x.shape[:-1]):
        raise ValueError(f"observed should have shape {x.shape} or {x.shape[:-1]}; got {observed.shape}.")
    if not np.isin(observed, (0, 1)).all():
        raise ValueError(f"observed should hold True and False (or 1 and 0); got dtype {observed.dtype}.")
    seen = np.broadcast_to(
        observed.astype(bool).reshape(*observed.shape, *[1] * (x.ndim - observed.ndim)), x.shape
    )
    return x if seen.all() else np.where(seen, x, np.nan)


def _cut(values: NDArray[Any], lengths: NDArray[np.int64]) -> list[NDArray[Any]]:
    """The sequences of dense or ragged values, without padding."""
    if values.ndim == 3:
        return [row[:length] for row, length in zip(values, lengths, strict=True)]
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _text(arrays: Arrays, key: str) -> str | None:
    """A string stored as an array without axes; None if there is none."""
    array = arrays.get(key)
    return str(array) if array is not None and array.shape == () and array.dtype.kind == "U" else None
