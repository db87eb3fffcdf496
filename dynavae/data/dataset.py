"""A ragged list of sequences, as a torch data set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from dynavae.batch import Sequences


class SequenceDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Sequences of different lengths, kept unpadded.

    Bool and uint8 values (piano rolls) are kept as uint8, one byte per value; everything else becomes
    float32. Everything is checked here, once.

    Args:
        x: sequences of shape (T_i, x_dim), as a list of arrays or one array (B, T, x_dim). NaN = missing, and so is
            what a numpy masked array masks.
        control: exogenous inputs (T_i, control_dim), one for each sequence, without missing values.
        names: one name for each sequence; "0", "1", ... by default.

    Attributes:
        x: list of arrays (T_i, x_dim), uint8 or float32.
        control: list of float32 arrays (T_i, control_dim), or None.
        names: tuple of str.
        about: kind and schema of the splits it belongs to; kept with a model that is trained on it.

    Raises:
        ValueError: an empty set, a wrong shape, a sequence of length 0 or without any observed value,
            infinite values, sequences of different x_dim, controls or names that do not fit.
        TypeError: values that are not numbers.

    Example:
        >>> import numpy as np
        >>> from dynavae.data import SequenceDataset
        >>> data = SequenceDataset([np.ones((5, 2)), np.zeros((3, 2))], names=["a", "b"])
        >>> len(data), data.frames, data.x_dim, data.lengths.tolist()
        (2, 8, 2, [5, 3])
        >>> data.batch([1, 0]).x.shape
        torch.Size([2, 5, 2])
    """

    x: list[NDArray[Any]]
    control: list[NDArray[np.float32]] | None
    names: tuple[str, ...]
    about: dict[str, Any]
    _real: type[np.floating[Any]] = np.float32

    def __init__(
        self,
        x: Sequence[ArrayLike] | NDArray[Any] | torch.Tensor,
        control: Sequence[ArrayLike] | NDArray[Any] | torch.Tensor | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        if len(x) == 0:
            raise ValueError("got an empty data set (0 sequences); give at least one sequence.")
        self.x = [_observations(sequence, i, self._real) for i, sequence in enumerate(x)]
        _same_width("x", self.x)
        self.control = None if control is None else _controls(control, self.x)
        self.about = {}
        self.names = tuple(str(i) for i in range(len(self.x))) if names is None else tuple(map(str, names))
        if len(self.names) != len(self.x):
            raise ValueError(
                f"names should have one entry for each of {len(self.x)} sequences; got {len(self.names)}."
            )

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        control = f", control_dim={self.control_dim}" if self.control is not None else ""
        return f"SequenceDataset({len(self)} sequences, {self.frames} frames, x_dim={self.x_dim}{control})"

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sequence ``index`` as {"x": (T, x_dim), "control": (T, control_dim) or None, "name": str}."""
        control = None if self.control is None else self.control[index]
        return {"x": self.x[index], "control": control, "name": self.names[index]}

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps of each sequence, (B,)."""
        return np.array([len(sequence) for sequence in self.x], dtype=np.int64)

    @property
    def frames(self) -> int:
        """Steps of all sequences together."""
        return int(self.lengths.sum())

    @property
    def x_dim(self) -> int:
        """Features of one observation."""
        return int(self.x[0].shape[1])

    @property
    def control_dim(self) -> int:
        """Features of one control input; 0 without controls."""
        return 0 if self.control is None else int(self.control[0].shape[1])

    def select(self, indices: Iterable[int]) -> SequenceDataset:
        """The sequences at ``indices``, in that order, as a data set; arrays are shared, not copied."""
        indices = list(indices)
        control = None if self.control is None else [self.control[i] for i in indices]
        chosen = type(self)([self.x[i] for i in indices], control, [self.names[i] for i in indices])
        chosen.about = self.about
        return chosen

    @staticmethod
    def collate(items: Sequence[dict[str, Any]]) -> Sequences:
        """Pad what ``__getitem__`` returned into one float32 batch: the ``collate_fn`` of a ``DataLoader``.

        Example:
            >>> import numpy as np
            >>> from torch.utils.data import DataLoader
            >>> data = SequenceDataset([np.ones((5, 2)), np.zeros((3, 2))])
            >>> next(iter(DataLoader(data, batch_size=2, collate_fn=data.collate))).frames
            8
        """
        controls = [item["control"] for item in items]
        return Sequences.from_arrays(
            [item["x"] for item in items],
            control=None if controls[0] is None else controls,
            names=[item["name"] for item in items],
            dtype=torch.float32,
        )

    def batch(self, indices: Iterable[int] | None = None) -> Sequences:
        """The sequences at ``indices`` (all of them by default), padded to the longest, in float32."""
        chosen = range(len(self)) if indices is None else indices
        return self.collate([self[i] for i in chosen])

    def batch_indices(self, batch_size: int, sort: bool = True) -> list[list[int]]:
        """Cut the set into batches; with ``sort``, sequences of like length go together, to pad less.

        Every index occurs exactly once, so results can be put back into the order of the set.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size should be at least 1; got {batch_size}.")
        order = np.argsort(self.lengths, kind="stable") if sort else np.arange(len(self))
        return [order[start : start + batch_size].tolist() for start in range(0, len(self), batch_size)]

    def batches(self, batch_size: int, sort: bool = True) -> Iterator[Sequences]:
        """One pass over the set in padded batches (see :meth:`batch_indices`)."""
        for indices in self.batch_indices(batch_size, sort):
            yield self.batch(indices)

    def sha256(self) -> str:
        """Hash of the content (values, where they are missing, controls), not of names.

        Equals :meth:`Sequences.sha256` of the same sequences in float32.
        """
        digest = hashlib.sha256()
        for i, sequence in enumerate(self.x):
            values = sequence.astype(np.float64)
            values[np.isnan(values)] = np.nan  # NaN has many bit patterns: use one
            digest.update(values.tobytes())
            if self.control is not None:
                digest.update(self.control[i].astype(np.float64).tobytes())
        return digest.hexdigest()


class PreciseDataset(SequenceDataset):
    """The same with real values in float64: what a file holds, until it is standardised.

    Values such as 1.7e9 + sin(t) differ by less than float32 can tell apart.
    """

    _real = np.float64


def _observations(
    sequence: ArrayLike | torch.Tensor, i: int, real: type[np.floating[Any]] = np.float32
) -> NDArray[Any]:
    """Sequence i as a checked (T, x_dim) array of uint8 or of the type of real numbers."""
    array = _numbers(sequence, f"x[{i}]", real)
    if array.ndim != 2:
        scalar = " For a scalar series, give x[:, None]." if array.ndim == 1 else ""
        raise ValueError(
            f"x[{i}] should have shape (T, x_dim) = (time, features); got {array.shape}.{scalar}"
        )
    if array.shape[0] == 0:
        raise ValueError(
            f"sequence {i} has length 0; drop it, or give every sequence at least one observed step."
        )
    if array.shape[1] == 0:
        raise ValueError(f"x[{i}] has shape {array.shape}: x_dim is 0; give at least one feature.")
    if array.dtype == np.uint8:
        return array
    infinite = np.isinf(array)
    if infinite.any():
        t, k = (int(index) for index in np.argwhere(infinite)[0])
        raise ValueError(
            f"x[{i}] is infinite in {array.dtype} at t={t}, feature {k}; clip or rescale it, "
            "or write NaN where x is missing."
        )
    if np.isnan(array).all():
        raise ValueError(
            f"sequence {i} is missing altogether (all {len(array)} steps are NaN); drop it, "
            "or give every sequence at least one observed step."
        )
    return array


def _controls(
    control: Sequence[ArrayLike] | NDArray[Any] | torch.Tensor, x: list[NDArray[Any]]
) -> list[NDArray[Any]]:
    """The controls as checked (T_i, control_dim) arrays of float32."""
    if len(control) != len(x):
        raise ValueError(f"control should have one array for each of {len(x)} sequences; got {len(control)}.")
    arrays = [_numbers(sequence, f"control[{i}]").astype(np.float32) for i, sequence in enumerate(control)]
    for i, (u, sequence) in enumerate(zip(arrays, x, strict=True)):
        if u.ndim != 2 or len(u) != len(sequence) or u.shape[1] == 0:
            raise ValueError(
                f"control[{i}] should have shape ({len(sequence)}, control_dim), one row for each step "
                f"of x[{i}]; got {u.shape}."
            )
        if not np.isfinite(u).all():
            t = int(np.argwhere(~np.isfinite(u))[0, 0])
            raise ValueError(
                f"control[{i}] is NaN or infinite at t={t}; controls cannot be missing: fill them in."
            )
    _same_width("control", arrays)
    return arrays


def _numbers(
    values: ArrayLike | torch.Tensor, what: str, real: type[np.floating[Any]] = np.float32
) -> NDArray[Any]:
    """An array of uint8 (from bool and uint8) or `real` (from the other real numbers); what is masked is NaN."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asanyarray(values)
    if array.dtype.kind not in "buif":
        raise TypeError(
            f"{what} should hold real numbers; got dtype {array.dtype}. Convert it to float32 first."
        )
    array = _unmasked(array)
    if array.dtype.kind == "b" or array.dtype == np.uint8:
        return array.astype(np.uint8, copy=False)
    with np.errstate(over="ignore"):  # what overflows float32 is reported as infinite
        return array.astype(real, copy=False)


def _unmasked(array: NDArray[Any]) -> NDArray[Any]:
    """A plain array, NaN where a masked array masks: what is stored there is no observation."""
    if np.ma.is_masked(array):
        return np.where(np.ma.getmaskarray(array), np.nan, np.ma.getdata(array))
    return np.asarray(array)


def _same_width(what: str, arrays: list[NDArray[Any]]) -> None:
    """Refuse sequences that differ in their number of features."""
    for i, array in enumerate(arrays):
        if array.shape[1] != arrays[0].shape[1]:
            raise ValueError(
                f"all sequences should have the same {what}_dim; {what}[0] has {arrays[0].shape[1]} "
                f"features, {what}[{i}] has {array.shape[1]}."
            )
