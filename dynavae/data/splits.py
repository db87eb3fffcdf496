"""Train, validation and test sets that belong together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dynavae.data.dataset import SequenceDataset

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
