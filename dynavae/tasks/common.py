"""What the tasks share: batches of any kind of data, seeds, and paths through resampled particles."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dynavae.batch import Sequences
from dynavae.model import SequentialLVM
from dynavae.noise import Noise, draw_by_sequence
from dynavae.scan import Trajectory

MEMORY_BUDGET = 2**25
"""Numbers that one tensor of a scan may hold; batches are made smaller to respect it."""


class Source(NamedTuple):
    """Any data a task accepts, as batches; and what a report must say of it."""

    batches: list[tuple[list[int], Any]]  # row numbers, and a function that gives the Sequences
    size: int
    frames: int
    sha256: str
    name: str
    split: str
    names: tuple[str, ...]
    steps: int
    x_dim: int


def positive(**numbers: int) -> None:
    """Raise a sentence if one of them is below 1."""
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} should be at least 1; got {value}.")


def source(data: Any, split: str | None = None, batch_size: int = 64, numbers_per_frame: int = 1) -> Source:
    """Sequences, a data set, data splits with a split name, an array or a list of arrays.

    `numbers_per_frame` is how many numbers the largest tensor of the run holds per frame of one sequence.
    """
    positive(batch_size=batch_size)
    name = ""
    if hasattr(data, "available") and hasattr(data, "split"):  # DataSplits
        if split is None:
            raise ValueError(f"which split? Pass split= one of {', '.join(data.available)}.")
        name, digest, data = data.name, data.sha256, data.split(split)
    else:
        digest = ""
    if not hasattr(data, "batch_indices") and not isinstance(data, Sequences):
        data = Sequences.from_arrays(data)
    lengths = np.asarray(data.lengths.cpu() if isinstance(data, Sequences) else data.lengths)
    order = np.argsort(lengths, kind="stable")
    rows: list[list[int]] = []
    for i in order.tolist():  # sorted by length: little padding, and a bounded number of padded frames
        room = max(1, min(batch_size, MEMORY_BUDGET // max(1, int(lengths[i]) * numbers_per_frame)))
        if not rows or len(rows[-1]) >= room:
            rows.append([])
        rows[-1].append(i)

    def take(index: list[int]) -> Sequences:
        return data[index] if isinstance(data, Sequences) else data.batch(index)

    return Source(
        [(index, take) for index in rows],
        len(lengths),
        int(lengths.sum()),
        digest or data.sha256(),
        name,
        split or "",
        tuple(data.names),
        int(lengths.max()),
        int(data.x_dim),
    )


def batches(model: SequentialLVM, src: Source) -> Iterator[tuple[list[int], Sequences]]:
    """(row numbers, Sequences) with the device and type of the model."""
    like = next(model.parameters())
    for index, take in src.batches:
        batch = take(index).to(device=like.device, dtype=like.dtype)
        model.emission.check(batch.x, "x", batch.observed)
        yield index, batch


def seeds(seed: int, rows: list[int], block: int = 0) -> list[int]:
    """One seed per sequence (and block of particles), whatever batch it is in."""
    return [
        int.from_bytes(hashlib.sha256(f"{seed}:{row}:{block}".encode()).digest()[:7], "big") for row in rows
    ]


def noise(
    model: SequentialLVM,
    batch: Sequences,
    particles: int,
    seed: int,
    rows: list[int],
    block: int = 0,
    *,
    x: bool = False,
    resample: bool = False,
) -> Noise:
    """Noise of these rows, sequence by sequence."""
    needs_x = x or (bool(model.autoregressive) and not batch.complete)
    return draw_by_sequence(
        model, batch.lengths, particles, seeds(seed, rows, block), x=needs_x, resample=resample
    )


@contextlib.contextmanager
def evaluating(model: SequentialLVM) -> Iterator[None]:
    """Evaluation mode without gradients; the mode is restored afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def last_valid(values: Tensor, valid: Tensor) -> Tensor:
    """values (T, K, B) at each sequence's last frame: (K, B)."""
    last = (valid.sum(0) - 1).expand(1, values.shape[1], -1)
    return torch.gather(values, 0, last)[0]


def trace(trajectory: Trajectory, uniform: Tensor) -> Tensor:
    """Ancestral lines of K equally weighted particles: indices (T, K, B) into each step's particles.

    Without resampling these are whole paths drawn by their importance weights.
    """
    from dynavae.resampling import systematic

    steps = len(trajectory.z)
    if trajectory.ancestors is None:
        log_w = trajectory.log_w.sum(0) + trajectory.log_w_static
        index = systematic(log_w, uniform)
        return index.expand(steps, -1, -1)
    assert trajectory.log_weight is not None
    index = systematic(trajectory.log_weight[-1], uniform)
    lines = [index]
    for t in range(steps - 2, -1, -1):
        index = torch.gather(trajectory.ancestors[t], 0, index)
        lines.append(index)
    return torch.stack(lines[::-1])


def along(values: Tensor, lines: Tensor | None) -> Tensor:
    """Values (T, K, B, d) followed along ancestral lines (T, K, B)."""
    if lines is None:
        return values
    return torch.gather(
        values.expand(*lines.shape, -1), 1, lines.unsqueeze(-1).expand(*lines.shape, values.shape[-1])
    )


def batch_first(values: Tensor) -> Tensor:
    """(T, K, B, d) to (K, B, T, d)."""
    return values.permute(1, 2, 0, 3)


def scatter(parts: list[tuple[list[int], Tensor]], size: int, steps: int, batch_axis: int) -> Tensor:
    """Put results of batches back in the order of the data, padded with NaN to `steps` frames.

    Each part has its batch on `batch_axis` and time on the axis after it.
    """
    first = parts[0][1]
    shape = list(first.shape)
    shape[batch_axis], shape[batch_axis + 1] = size, steps
    out = first.new_full(shape, torch.nan)
    for rows, value in parts:
        index = torch.tensor(rows, device=first.device)
        view = out.narrow(batch_axis + 1, 0, value.shape[batch_axis + 1])
        view.index_copy_(batch_axis, index, value)
    return out
