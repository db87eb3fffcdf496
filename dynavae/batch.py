"""Sequences: a padded batch of observations with lengths, an observed mask and controls.

The one place where the caller's arrays are validated. Whatever is missing or padded is recorded in
`observed` and its value is replaced by zero here, once, before any arithmetic: nothing that a caller
left out can leak into a number or a gradient afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """A batch of sequences of unequal length, padded to the longest, with missing values marked.

    Build one with :meth:`from_arrays`; the bare constructor trusts its arguments.

    Attributes:
        x: observations (B, T, \\*x_shape); what is missing or padded holds 0.
        observed: True where a value was really seen, same shape as `x`.
        lengths: frames of each sequence (B,); frames after it are padding.
        control: known inputs (B, T, control_dim), or None.
        names: one name per sequence.
    """

    x: Float[Tensor, "B T *x_shape"]
    observed: Bool[Tensor, "B T *x_shape"]
    lengths: Int[Tensor, " B"]
    control: Float[Tensor, "B T control_dim"] | None = None
    names: tuple[str, ...] = field(default=())

    @classmethod
    def from_arrays(
        cls,
        x: Any,
        lengths: Any = None,
        observed: Any = None,
        control: Any = None,
        names: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Sequences:
        """Validate and pad arrays; NaN in `x` means missing.

        Args:
            x: one array (B, T, x_dim), or a list of arrays (T_i, x_dim).
            lengths: frames of each sequence when `x` is one array; default: all T.
            observed: False where missing, of the shape of `x`, or (B, T) for whole frames; a list of
                (T_i, x_dim) or (T_i,) when `x` is a list. NaN values are missing in any case.
            control: known inputs, (B, T, control_dim) or a list of (T_i, control_dim); never missing.
            names: one name per sequence; default "0", "1", ...
            dtype: floating type of the result; default: that of a floating tensor, else torch's default.

        Raises:
            ValueError: an empty set, a sequence without frames or without any observed value, infinite
                values, or shapes that do not fit together.
            TypeError: values that are not numbers.

        Example:
            >>> s = Sequences.from_arrays([[[1.0], [float("nan")]], [[3.0]]])
            >>> s.x.squeeze(-1), s.lengths
            (tensor([[1., 0.],
                    [3., 0.]]), tensor([2, 1]))
            >>> s.observed.squeeze(-1)
            tensor([[ True, False],
                    [ True, False]])
        """
        arrays, controls, masks = _as_lists(x, lengths, control, observed)
        device = next((a.device for a in arrays if isinstance(a, Tensor)), torch.device("cpu"))
        if dtype is None:
            float_tensor = next((a for a in arrays if isinstance(a, Tensor) and a.is_floating_point()), None)
            dtype = float_tensor.dtype if float_tensor is not None else torch.get_default_dtype()
        values = [_tensor(a, f"sequence {i} of x", dtype, device) for i, a in enumerate(arrays)]
        seen = [_observed(v, m, i) for i, (v, m) in enumerate(zip(values, masks, strict=True))]
        _check(values, seen)
        n, steps = len(values), max(len(v) for v in values)
        padded = values[0].new_zeros(n, steps, *values[0].shape[1:])
        mask = torch.zeros(padded.shape, dtype=torch.bool, device=device)
        for i, (v, m) in enumerate(zip(values, seen, strict=True)):
            padded[i, : len(v)] = torch.where(m, v, 0.0)
            mask[i, : len(v)] = m
        u = None if controls is None else _pad_controls(controls, values, steps, dtype, device)
        names = tuple(str(i) for i in range(n)) if names is None else tuple(map(str, names))
        if len(names) != n:
            raise ValueError(f"names should hold one name for each of the {n} sequences; got {len(names)}.")
        frames = torch.tensor([len(v) for v in values], device=device)
        return cls(padded, mask, frames, u, names)

    @property
    def steps(self) -> int:
        """T, the length after padding."""
        return self.x.shape[1]

    @property
    def x_dim(self) -> int:
        """Features of one frame, flattened."""
        return int(np.prod(self.x.shape[2:]))

    @property
    def frames(self) -> int:
        """Frames of all sequences together, padding not counted."""
        return self._known("frames", lambda: int(self.lengths.sum()))

    @property
    def longest(self) -> int:
        """Frames of the longest sequence; T may be more."""
        return self._known("longest", lambda: int(self.lengths.max()))

    @property
    def ragged(self) -> bool:
        """Whether a sequence is shorter than T."""
        return self._known("ragged", lambda: bool((self.lengths < self.steps).any()))

    @property
    def complete(self) -> bool:
        """Whether every value of every sequence was seen (padding aside)."""

        def look() -> bool:
            seen = (
                self.observed.flatten(2).view(torch.uint8).amin(-1).bool()
            )  # `all` takes seven times as long
            return bool((seen | ~self.valid).all())

        return self._known("complete", look)

    def _known(self, name: str, look: Callable[[], Any]) -> Any:
        """What was found on the CPU before the sequences were moved; a GPU would have to finish its work to answer."""
        return vars(self)["_facts"][name] if "_facts" in vars(self) else look()

    @property
    def valid(self) -> Bool[Tensor, "B T"]:
        """True at the frames of each sequence, False at padding."""
        return torch.arange(self.steps, device=self.x.device) < self.lengths[:, None]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Sequences:
        """Some of the sequences, padded to the longest of them."""
        rows = torch.arange(len(self))[index.cpu() if isinstance(index, Tensor) else index].reshape(-1)
        if len(rows) == 0:
            raise ValueError(f"the selection {index!r} leaves none of the {len(self)} sequences.")
        names = tuple(self.names[i] for i in rows.tolist()) if self.names else ()
        rows = rows.to(self.x.device)
        lengths = self.lengths[rows]
        steps = int(lengths.max())
        u = None if self.control is None else self.control[rows, :steps]
        return Sequences(self.x[rows, :steps], self.observed[rows, :steps], lengths, u, names)

    def __iter__(self) -> Iterator[Sequences]:
        return (self[i] for i in range(len(self)))

    def to(self, *args: Any, **kwargs: Any) -> Sequences:
        """Move to a device or a floating type, as `Tensor.to`."""
        x = self.x.to(*args, **kwargs)
        u = None if self.control is None else self.control.to(*args, **kwargs)
        moved = Sequences(x, self.observed.to(x.device), self.lengths.to(x.device), u, self.names)
        if self.x.is_cpu and not x.is_cpu:
            vars(moved)["_facts"] = {n: getattr(self, n) for n in ("frames", "longest", "ragged", "complete")}
        return moved

    def hide(self, hidden: Bool[Tensor, "B T *x_shape"]) -> Sequences:
        """The same sequences with more values missing, where `hidden` is True."""
        seen = self.observed & ~hidden
        return Sequences(torch.where(seen, self.x, 0.0), seen, self.lengths, self.control, self.names)

    def arrays(self) -> list[np.ndarray]:
        """One array (T_i, \\*x_shape) per sequence, NaN where missing."""
        x = torch.where(self.observed, self.x, torch.nan).cpu().numpy()
        return [row[:n] for row, n in zip(x, self.lengths.tolist(), strict=True)]

    def sha256(self) -> str:
        """A hash of the content that padding does not change."""
        digest = hashlib.sha256()
        for i, array in enumerate(self.arrays()):
            digest.update(np.ascontiguousarray(array, dtype=np.float64).tobytes())
            if self.control is not None:
                u = self.control[i, : len(array)].cpu().numpy()
                digest.update(np.ascontiguousarray(u, dtype=np.float64).tobytes())
        return digest.hexdigest()


def _as_lists(x: Any, lengths: Any, control: Any, observed: Any) -> tuple[list, list | None, list]:
    """Bring one padded array, or a list of arrays, to lists with one entry per sequence."""
    if isinstance(x, np.ndarray | Tensor):
        if x.ndim < 3:
            raise ValueError(
                f"x should have shape (B, T, x_dim) = (batch, time, x_dim); got {tuple(x.shape)}. "
                "For one sequence (T, x_dim) pass [x]; for one feature per frame add an axis: x[..., None]."
            )
        n, steps = x.shape[:2]
        ends = [steps] * n if lengths is None else [int(v) for v in lengths]
        if len(ends) != n or any(not 0 <= e <= steps for e in ends):
            raise ValueError(f"lengths should hold {n} numbers from 1 to {steps}; got {ends}.")

        def cut(a: Any, what: str) -> list:
            if tuple(a.shape[:2]) != (n, steps):
                raise ValueError(f"{what} should start with (B, T) = {(n, steps)}; got {tuple(a.shape)}.")
            return [row[:e] for row, e in zip(a, ends, strict=True)]

        masks = [None] * n if observed is None else cut(observed, "observed")
        return cut(x, "x"), None if control is None else cut(control, "control"), masks
    if not isinstance(x, list | tuple):
        hint = " For one sequence pass [x]." if hasattr(x, "to_numpy") else ""
        raise TypeError(
            f"x should be an array (B, T, x_dim) or a list of arrays (T_i, x_dim); got {type(x).__name__}.{hint}"
        )
    if lengths is not None:
        raise ValueError(
            "lengths goes with one padded array (B, T, x_dim); a list of arrays carries its own."
        )
    masks = [None] * len(x) if observed is None else list(observed)
    for what, other in (("control", control), ("observed", masks)):
        if other is not None and len(other) != len(x):
            raise ValueError(
                f"{what} should hold one array for each of the {len(x)} sequences; got {len(other)}."
            )
    return list(x), None if control is None else list(control), masks


def _tensor(array: Any, what: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A floating tensor, or a sentence about what is not a number; what a masked array masks is missing."""
    if isinstance(array, np.ma.MaskedArray):
        array = np.ma.filled(array.astype(float), np.nan)
    elif hasattr(array, "to_numpy"):  # a table of pandas
        array = array.to_numpy(copy=True)  # what pandas gives may be read-only
    try:
        return torch.as_tensor(array, device=device).to(dtype)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} should hold numbers in a regular array; {error}") from None


def _observed(value: Tensor, mask: Any, i: int) -> Tensor:
    """Where `value` was seen: not NaN, and not marked as missing by the caller."""
    seen = ~torch.isnan(value)
    if mask is None:
        return seen
    mask = torch.as_tensor(mask, device=value.device).bool()
    if mask.shape == value.shape[:1]:
        mask = mask.reshape(-1, *[1] * (value.ndim - 1))
    elif mask.shape != value.shape:
        raise ValueError(
            f"observed of sequence {i} should have the shape of x, {tuple(value.shape)}, "
            f"or {tuple(value.shape[:1])} for whole frames; got {tuple(mask.shape)}."
        )
    return seen & mask


def _check(values: list[Tensor], seen: list[Tensor]) -> None:
    """Every rule that an observed sequence must keep, each with a sentence that says how to mend it."""
    if not values:
        raise ValueError("there are no sequences: x is empty; give at least one sequence.")
    for i, (value, mask) in enumerate(zip(values, seen, strict=True)):
        if value.ndim < 2:
            raise ValueError(
                f"sequence {i} should have shape (T, x_dim); got {tuple(value.shape)}. "
                "For one feature per frame add an axis: x[:, None]."
            )
        if len(value) == 0:
            raise ValueError(
                f"sequence {i} has length 0; drop it, or give every sequence at least one observed step."
            )
        if value.shape[1:] != values[0].shape[1:]:
            raise ValueError(
                f"all sequences should have the same features: sequence 0 has {tuple(values[0].shape[1:])} "
                f"per frame, sequence {i} has {tuple(value.shape[1:])}."
            )
        if torch.isinf(torch.where(mask, value, 0.0)).any():
            t = int(torch.isinf(torch.where(mask, value, 0.0)).flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"sequence {i} holds an infinite value, first at t={t}; mark missing values as NaN "
                "and clip or rescale the rest."
            )
        if not mask.any():
            raise ValueError(
                f"sequence {i} has no observed value (all {len(value)} frames are missing); drop it, "
                "or generate from the model instead."
            )


def _pad_controls(controls: list, values: list[Tensor], steps: int, dtype: Any, device: Any) -> Tensor:
    """Controls (B, T, control_dim), zero after each sequence's end."""
    rows = [_tensor(u, f"control of sequence {i}", dtype, device) for i, u in enumerate(controls)]
    out = torch.zeros(len(rows), steps, rows[0].shape[-1], dtype=dtype, device=device)
    for i, (u, v) in enumerate(zip(rows, values, strict=True)):
        if u.ndim != 2 or len(u) != len(v) or u.shape[1] != out.shape[-1]:
            raise ValueError(
                f"control of sequence {i} should have shape (T, control_dim) = ({len(v)}, {out.shape[-1]}); "
                f"got {tuple(u.shape)}."
            )
        if not torch.isfinite(u).all():
            raise ValueError(
                f"control of sequence {i} holds NaN or inf; controls are known inputs: fill them."
            )
        out[i, : len(u)] = u
    return out
