"""Train, validation and test sets that belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynavae.data.dataset import SequenceDataset
from dynavae.data.schema import Schema

SPLITS = ("train", "valid", "test")
KINDS = ("binary", "real", "categorical", "power")
"""What the values are, hence which emission suits them: 0/1, real, class indices, power spectra (>= 0)."""


@dataclass(frozen=True)
class DataSplits:
    """The splits of one data set and what is known about its values.

    Attributes:
        name: short name, such as "jsb".
        train, valid, test: a :class:`SequenceDataset`, or None where the source has no such split.
        kind: "binary", "real", "categorical" or "power" (see ``KINDS``).
        meta: what else is known, e.g. ``lowest_midi`` (MIDI note of column 0) and ``frame_seconds``.
        sha256: hash of the source file, to be quoted next to any figure; empty if made in memory.

    Raises:
        ValueError: no split at all, splits of different ``x_dim`` or ``control_dim``, or an unknown kind.

    Example:
        >>> import numpy as np
        >>> from dynavae.data import DataSplits, SequenceDataset
        >>> toy = DataSplits("toy", train=SequenceDataset([np.zeros((5, 2))]))
        >>> toy.available, toy.split("train").frames
        (('train',), 5)
    """

    name: str
    train: SequenceDataset | None = None
    valid: SequenceDataset | None = None
    test: SequenceDataset | None = None
    kind: str = "real"
    meta: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind should be one of {', '.join(KINDS)}; got {self.kind!r}.")
        if not self.available:
            raise ValueError(
                f"{self.name!r} has no split; give at least one of train, valid, test as a SequenceDataset."
            )
        for what in ("x_dim", "control_dim"):
            sizes = {name: getattr(self.split(name), what) for name in self.available}
            if len(set(sizes.values())) > 1:
                found = ", ".join(f"{name} {size}" for name, size in sizes.items())
                raise ValueError(f"all splits of {self.name!r} should have the same {what}; got {found}.")
        for name in self.available:  # a scaling that a set has stays, where these splits know of none
            schema = {"schema": self.meta["schema"]} if "schema" in self.meta else {}
            self.split(name).about = {**self.split(name).about, "kind": self.kind, **schema}

    @property
    def available(self) -> tuple[str, ...]:
        """Names of the splits that exist."""
        return tuple(name for name in SPLITS if getattr(self, name) is not None)

    @property
    def x_dim(self) -> int:
        """Features of one observation."""
        return self.split(self.available[0]).x_dim

    @property
    def control_dim(self) -> int:
        """Features of one control input; 0 without controls."""
        return self.split(self.available[0]).control_dim

    @property
    def schema(self) -> Schema | None:
        """Columns, units and scaling of a table; None for other data."""
        return Schema.from_dict(self.meta["schema"]) if "schema" in self.meta else None

    def origin(self, split: str, name: str) -> tuple[str, float]:
        """The id of a sequence in the user's file, and the time of its first frame."""
        found = self.meta.get("rows", {}).get(split, {}).get(name, (name, 0.0))
        return str(found[0]), float(found[1])

    def joined(self) -> DataSplits:
        """All sequences of all splits as one, "test"; what it is for: filling every gap of a file."""
        x: list[NDArray[Any]] = []
        control: list[NDArray[Any]] = []
        rows: dict[str, list[Any]] = {}
        for split in self.available:
            data = self.split(split)
            x, control = x + data.x, control + (data.control or [])
            rows |= {f"{split} {name}": list(self.origin(split, name)) for name in data.names}
        whole = SequenceDataset(x, control or None, list(rows))
        return DataSplits(
            self.name,
            test=whole,
            kind=self.kind,
            meta={**self.meta, "rows": {"test": rows}},
            sha256=self.sha256,
        )

    def split(self, name: str) -> SequenceDataset:
        """The split of that name.

        Raises:
            ValueError: there is no such split; the sentence names those that exist.
        """
        found = getattr(self, name) if name in SPLITS else None
        if found is None:
            note = self.meta.get("note")
            raise ValueError(
                f"data set {self.name!r} has no {name!r} split; available: {', '.join(self.available)}."
                + (f" {note}" if note else "")
            )
        return found


def check_shares(valid: float, test: float) -> None:
    """Refuse shares that leave nothing to train on."""
    if not (valid >= 0 and test >= 0 and valid + test < 1):
        raise ValueError(f"valid and test should be shares >= 0 with a sum below 1; got {valid} and {test}.")


def shuffled(n: int, valid: float, test: float, seed: int, where: str) -> dict[str, list[int]]:
    """Which of n sequences belong to which split: shuffled once, then cut; at least one for every share above 0."""
    check_shares(valid, test)
    n_valid, n_test = (max(1, round(share * n)) if share > 0 else 0 for share in (valid, test))
    if n_valid + n_test >= n:
        raise ValueError(
            f"{where} holds {n} sequence(s), too few to split into train, valid={valid} and "
            f"test={test}; cut long sequences into more, or pass valid=0, test=0."
        )
    order = np.random.default_rng(seed).permutation(n).tolist()
    return {
        "train": sorted(order[n_valid + n_test :]),
        "valid": sorted(order[:n_valid]),
        "test": sorted(order[n_valid : n_valid + n_test]),
    }


def lists_of(valid: float | Sequence[str], test: float | Sequence[str]) -> dict[str, list[str]]:
    """Those of the two that are lists of names, not shares."""
    found = {}
    for split, wanted in (("valid", valid), ("test", test)):
        if isinstance(wanted, str) or not isinstance(wanted, int | float | Iterable):
            raise TypeError(f"{split} should be a share such as 0.1, or a list of names; got {wanted!r}.")
        if not isinstance(wanted, int | float):
            found[split] = list(map(str, wanted))
    return found


def by_name(names: Sequence[str], lists: Mapping[str, Sequence[str]], where: str) -> list[str]:
    """The split of each name: the one whose list has it, else train."""
    for split, wanted in lists.items():
        for name in wanted:
            if name not in names:
                shown = ", ".join(list(dict.fromkeys(names))[:10])
                raise ValueError(f"{split}: {where} has no sequence {name!r}; it has {shown}.")
    chosen = {name: split for split, wanted in lists.items() for name in wanted}
    if len(chosen) < sum(map(len, lists.values())):
        raise ValueError("valid and test should not share an id.")
    if chosen.keys() >= set(names):
        raise ValueError(f"valid and test name every sequence of {where}: none is left to train on.")
    return [chosen.get(name, "train") for name in names]


def refuse_lists(valid: float | Sequence[str], test: float | Sequence[str], where: str) -> None:
    """Shares mean nothing where the data have splits; lists of names would contradict them."""
    for split in lists_of(valid, test):
        raise ValueError(
            f"{split} lists sequences, but {where} says itself which are train, valid and test; leave {split} out."
        )


def divided(
    data: SequenceDataset,
    valid: float | Sequence[str],
    test: float | Sequence[str],
    seed: int,
    whole: bool,
    where: str,
    names: Sequence[str] | None = None,
) -> dict[str, SequenceDataset]:
    """The splits of data that have none: all of it test, or as lists of names say, or drawn by share.

    Args:
        data: all sequences.
        valid, test: shares, or lists of names. With a list for one of them, a share of the other counts as none.
        seed: of the draw.
        whole: all of it is test.
        where: what the data are called.
        names: that the lists speak of, one for each sequence; by default those of the data. Sequences of one name are
            drawn together, where there are three names or more.
    """
    if whole:
        return {"test": data}
    if lists := lists_of(valid, test):
        chosen = by_name(data.names if names is None else names, lists, where)
        parts = {split: [i for i, s in enumerate(chosen) if s == split] for split in SPLITS}
    else:
        assert isinstance(valid, int | float) and isinstance(test, int | float)
        groups = list(dict.fromkeys(names or ()))
        if len(groups) < 3:  # nothing to keep together, or too few to draw from
            parts = shuffled(len(data), valid, test, seed, where)
        else:
            drawn = shuffled(len(groups), valid, test, seed, where)
            chosen = by_name(names, {s: [groups[i] for i in drawn[s]] for s in ("valid", "test")}, where)  # type: ignore[arg-type]
            parts = {split: [i for i, s in enumerate(chosen) if s == split] for split in SPLITS}
    return {split: data.select(indices) for split, indices in parts.items() if indices}


def kind_of(asked: str | None, arrays: Iterable[NDArray[Any]], where: str) -> str:
    """The kind asked for, if the values allow it; else "binary" if all values are 0 or 1, else "real"."""
    arrays = list(arrays)

    def every(rule: Callable[[NDArray[Any]], NDArray[np.bool_]]) -> bool:
        return all(bool((rule(x) | np.isnan(x)).all()) for x in arrays)

    binary = every(lambda x: (x == 0) | (x == 1))
    if asked == "binary" and not binary:
        raise ValueError(
            f"{where} holds values other than 0 and 1, so its kind cannot be 'binary'; use 'real'."
        )
    if asked == "power" and not every(lambda x: x >= 0):
        raise ValueError(f"{where} holds negative values, so its kind cannot be 'power'; use 'real'.")
    return asked or ("binary" if binary else "real")
