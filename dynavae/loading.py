"""Batches for training: sequences of like length together, in an order that is a function of the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dynavae.batch import Sequences
from dynavae.data.dataset import SequenceDataset
from dynavae.data.splits import DataSplits
from dynavae.parallel import Share, processes, rank
from dynavae.schedules import seed_for


class Batch:
    """Some sequences of a data set, with their row numbers: noise can be fixed per sequence.

    With several processes it holds this one's rows (in training padded to the steps of the whole batch) and a
    `share` that says which; a process without any row (no `rows`, no `frames`) holds a sequence that should not count.
    """

    __slots__ = ("frames", "rows", "sequences", "share")

    def __init__(
        self, sequences: Sequences, rows: list[int], frames: int | None = None, share: Share | None = None
    ) -> None:
        self.sequences, self.rows, self.share = sequences, rows, share
        self.frames = sequences.frames if frames is None else frames

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Batch:
        return Batch(self.sequences.to(device=device, dtype=dtype), self.rows, self.frames, self.share)


def to_data(data: Any, what: str = "train") -> SequenceDataset | Sequences:
    """A data set from itself, from `Sequences`, or from an array (B, T, x_dim) or list of (T_i, x_dim)."""
    if isinstance(data, SequenceDataset | Sequences):
        return data
    if isinstance(data, DataSplits):
        raise TypeError(
            f"{what} should be one set of sequences; got {type(data).__name__}, which holds several: "
            "pass splits.train and splits.valid."
        )
    return Sequences.from_arrays(data)


class Piece(NamedTuple):
    """Frames `start` to `stop` of one sequence of a data set."""

    row: int
    start: int
    stop: int


def pieces(lengths: Any, crop: int, rng: np.random.Generator) -> list[Piece]:
    """Every sequence cut into as few pieces of at most `crop` frames as there can be, at random places.

    All pieces of a sequence but the first and the last have `crop` frames; these two share the rest at random.

    Example:
        >>> [p.stop - p.start for p in pieces([10, 3], 4, np.random.default_rng(0))]
        [4, 4, 2, 3]
    """
    found = []
    for row, length in enumerate(int(n) for n in lengths):
        count = -(-length // crop)
        first = int(rng.integers(length - (count - 1) * crop, crop + 1)) if count > 1 else length
        cuts = [0, *range(first, length, crop), length]
        found += [Piece(row, start, stop) for start, stop in pairwise(cuts)]
    return found


class LengthBuckets(Sampler[list[Any]]):
    """Lists of indices, one per batch: like lengths together, to pad little, and a new order every epoch.

    Sequences are sorted by their length times a random factor, cut into batches, and the batches shuffled.

    Args:
        lengths: of all sequences.
        batch_size: sequences per batch; one batch may be smaller.
        seed: with the epoch, decides the order.
        jitter: the factor is in [1 - jitter, 1 + jitter].
        crop: make batches of :func:`pieces` of at most so many frames, new ones every epoch.
    """

    def __init__(
        self,
        lengths: Any,
        batch_size: int,
        seed: int = 0,
        jitter: float = 0.1,
        crop: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size should be at least 1; got {batch_size}.")
        if crop is not None and crop < 1:
            raise ValueError(f"crop is the frames of a piece, at least 1; got {crop}.")
        self.lengths, self.crop = np.asarray(lengths, dtype=np.float64), crop
        self.size = len(self.lengths) if crop is None else int(np.ceil(self.lengths / crop).sum())
        self.batch_size, self.seed, self.jitter, self.epoch = batch_size, seed, jitter, 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch is next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[Any]]:
        rng = np.random.default_rng(seed_for(self.seed, self.epoch))
        lengths, cut = self.lengths, None
        if self.crop is not None:
            cut = pieces(lengths, self.crop, rng)
            lengths = np.array([piece.stop - piece.start for piece in cut])
        factor = rng.uniform(1 - self.jitter, 1 + self.jitter, len(lengths))
        order = np.argsort(lengths * factor)
        sizes = np.full(len(self), self.batch_size)
        sizes[rng.integers(len(self))] -= len(self) * self.batch_size - len(
            order
        )  # the smaller one: anywhere
        cuts = np.split(order, np.cumsum(sizes)[:-1])
        rows = [cuts[i].tolist() for i in rng.permutation(len(cuts))]
        return iter(rows if cut is None else [[cut[i] for i in batch] for batch in rows])


class Turns(Sampler[tuple[list[Any], int, int]]):
    """What Lightning iterates over: batches, each with this process's rank and the number of processes.

    Args:
        batches: lists of rows or pieces, the same in every process; a :class:`LengthBuckets` learns the epoch.
    """

    def __init__(self, batches: LengthBuckets | list[list[int]]) -> None:
        self.batches, self.epoch, self.start = batches, 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch is next."""
        if epoch != self.epoch:
            self.resume(epoch)

    def resume(self, epoch: int, start: int = 0) -> None:
        """Continue within an epoch: leave out its first `start` batches."""
        self.epoch, self.start = epoch, start
        if isinstance(self.batches, LengthBuckets):
            self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[list[Any], int, int]]:
        for rows in list(self.batches)[self.start :]:
            yield rows, rank(), processes()


class _Rows(Dataset[Batch]):
    """A data set that is asked for whole batches."""

    def __init__(self, data: SequenceDataset | Sequences, pad: bool) -> None:
        self.data = (
            data.to("cpu") if isinstance(data, Sequences) else data
        )  # batches go to the device one by one
        self.pad, self.lengths = pad, np.asarray(self.data.lengths)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, turn: tuple[list[Any], int, int]) -> Batch:  # type: ignore[override]
        found, rank, processes = turn
        wanted = [p if isinstance(p, Piece) else Piece(p, 0, int(self.lengths[p])) for p in found]
        if processes == 1:
            return Batch(self._take(wanted), [p.row for p in wanted])
        lengths = [p.stop - p.start for p in wanted]
        index = list(range(rank, len(wanted), processes))
        mine = [wanted[i] for i in index]
        share = Share(index, len(wanted), sum(lengths), processes)
        batch = self._take(mine or wanted[:1])
        if self.pad:  # as many frames, and chunks of frames, in every process
            batch = _padded(batch, max(lengths))
        return Batch(batch, [p.row for p in mine], sum(lengths[i] for i in index), share)

    def _take(self, wanted: list[Piece]) -> Sequences:
        rows = [p.row for p in wanted]
        batch = self.data[rows] if isinstance(self.data, Sequences) else self.data.batch(rows)
        whole = all(p.stop - p.start == self.lengths[p.row] for p in wanted)
        return batch if whole else _cut(batch, wanted)


def _cut(batch: Sequences, wanted: list[Piece]) -> Sequences:
    """One piece of each sequence."""
    start = torch.tensor([p.start for p in wanted])
    lengths = torch.tensor([p.stop - p.start for p in wanted])
    steps = torch.arange(int(lengths.max()))
    inside = steps < lengths.unsqueeze(-1)
    index = (start.unsqueeze(-1) + steps).clamp(max=batch.steps - 1)
    row = torch.arange(len(wanted)).unsqueeze(-1)

    def piece(values: torch.Tensor) -> torch.Tensor:
        taken = values[row, index]
        keep = inside.reshape(*inside.shape, *[1] * (values.ndim - 2))
        return torch.where(keep, taken, torch.zeros((), dtype=values.dtype))

    control = None if batch.control is None else piece(batch.control)
    return Sequences(piece(batch.x), piece(batch.observed), lengths, control, batch.names)


def _padded(batch: Sequences, steps: int) -> Sequences:
    """The same sequences with more padding."""

    def pad(values: torch.Tensor) -> torch.Tensor:
        more = values.new_zeros(len(values), steps - values.shape[1], *values.shape[2:])
        return torch.cat([values, more], 1)

    control = None if batch.control is None else pad(batch.control)
    return Sequences(pad(batch.x), pad(batch.observed), batch.lengths, control, batch.names)


def loader(
    data: Any,
    batch_size: int = 32,
    *,
    shuffle: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    crop: int | None = None,
) -> DataLoader[Any]:
    """Batches for a :class:`~dynavae.learner.Learner`, in training (`shuffle`, maybe `crop`) or in validation.

    Example:
        >>> batch = next(iter(loader([np.ones((5, 2)), np.zeros((3, 2))], batch_size=2)))
        >>> batch.rows, batch.sequences.x.shape
        ([1, 0], torch.Size([2, 5, 2]))
    """
    rows = _Rows(to_data(data), pad=shuffle)
    batches: LengthBuckets | list[list[int]]
    if shuffle:
        batches = LengthBuckets(rows.lengths, batch_size, seed, crop=crop)
    else:
        order = np.argsort(rows.lengths, kind="stable")
        batches = [order[i : i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    return DataLoader(
        rows,
        batch_size=None,
        sampler=Turns(batches),  # type: ignore[arg-type]
        num_workers=num_workers,
        generator=torch.Generator(),  # or each pass would draw from the caller's random numbers
        persistent_workers=num_workers > 0,
    )
