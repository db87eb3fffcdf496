"""Signs that training goes wrong, each said once, in a sentence with what to try."""

from __future__ import annotations

import logging
import math
from typing import Any

from dynavae.schedules import Real, Row

log = logging.getLogger("dynavae")

GRACE = 5
"""Epochs at full KL weight before a collapse is said."""
ABOVE, FOR = 0.1, 3
"""The validation bound is lost if it stays this share (of the best, or of 1 nat if that is more) above the best,
for so many epochs."""
GRADIENT = 100.0
"""The gradient explodes if its mean norm is so many times that of the quietest epoch."""
FAR = 10.0
"""Training is lost, and the KL explodes, at so many times what the data cost before training; ten times that in
warm-up."""


class Watch:
    """Looks at the figures of each epoch; remembers what it said.

    Attributes:
        notes: sentences, in the order in which they were said.

    Example:
        >>> watch = Watch(speak=False)
        >>> for epoch, nats in enumerate([5.0, 3.0, 4.0, 4.1, 4.3], 1):
        ...     watch.look({"epoch": epoch, "valid/nats_per_frame": nats, "train/loss": 5 - epoch})
        >>> watch.notes[0][:66]
        'epoch 5: the validation bound has been worse than its best (epoch '
    """

    def __init__(self, speak: bool = True) -> None:
        self.speak = speak
        self.notes: list[str] = []
        self._said: list[str] = []
        self._best: Row = {}
        self._above = self._far = 0
        self._first: Real | None = None
        self._quiet: Real | None = None

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "speak"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def begin(self, nats: Real | None = None, norm: Real | None = None) -> None:
        """What the first update found, before anything could go wrong: nats per frame, norm of the gradient."""
        self._first = nats if self._first is None else self._first
        self._quiet = norm if self._quiet is None else self._quiet

    def note(self, sentence: str) -> None:
        """Keep a sentence, and say it."""
        self.notes.append(sentence)
        if self.speak:
            log.warning("%s", sentence)

    def look(self, row: Row, settled: Real = 0.0) -> None:
        """Judge an epoch.

        Args:
            row: its figures, as in `metrics.csv`.
            settled: the epoch from which all schedules have reached their end.
        """
        for what, sentence in (
            ("collapse", self._collapse(row, settled)),
            ("divergence", self._lost(row, settled) or self._divergence(row, settled)),
            ("validation", self._undefined(row)),
            ("gradient", self._gradient(row)),
            ("kl", self._kl(row, settled)),
        ):
            if sentence and what not in self._said:
                self._said.append(what)
                self.note(f"epoch {row['epoch']}: {sentence}")

    def _collapse(self, row: Row, settled: Real) -> str:
        if row.get("valid/active_units") != 0 or row["epoch"] < settled + GRACE:
            return ""
        return (
            "no latent coordinate is active (the posterior ignores x). Try kl_warmup, free_bits, or a "
            "weaker decoder."
        )

    def _lost(self, row: Row, settled: Real) -> str:
        nats = row.get("valid/nats_per_frame", row.get("train/nats_per_frame"))
        if nats is None or self._first is None or row["epoch"] < settled:
            return ""
        self._far = self._far + 1 if nats > self._first + FAR * max(1.0, abs(self._first)) else 0
        if self._far < FOR:
            return ""
        return (
            f"the bound, {nats:.4g} nats per frame, has been far worse than before training ({self._first:.4g}) for "
            f"{FOR} epochs: training diverges. Try a lower learning rate, a smaller gradient_clip, or lr_warmup."
        )

    def _undefined(self, row: Row) -> str:
        nats = row.get("valid/nats_per_frame", 0.0)
        if math.isfinite(nats):
            return ""
        return (
            f"the validation bound is {nats}, though the training loss is finite: this epoch cannot be the best. Look for "
            "values in the validation data far from those of training, or raise min_scale of the emission."
        )

    def _divergence(self, row: Row, settled: Real) -> str:
        nats = row.get("valid/nats_per_frame")
        if nats is None or not math.isfinite(nats) or row["epoch"] < settled:
            return ""
        if not self._best or nats < self._best["nats"]:
            self._best = {"nats": nats, "epoch": row["epoch"], "loss": row.get("train/loss", 0.0)}
        best = self._best["nats"]
        self._above = self._above + 1 if nats > best + ABOVE * max(1.0, abs(best)) else 0
        if self._above < FOR:
            return ""
        lost = (
            f"the validation bound has been worse than its best (epoch {self._best['epoch']}, {best:.4g} nats per "
            f"frame) by a wide margin for {FOR} epochs, now {nats:.4g}"
        )
        if row.get("train/loss", 0.0) < self._best["loss"]:
            return (
                f"{lost}, while the training loss still falls: overfitting. The best weights are kept; try patience, "
                "weight_decay, dropout, or a smaller model."
            )
        return (
            f"{lost}, and the training loss rises too: training diverges. The best weights are kept; try a lower "
            "learning rate, a smaller gradient_clip, or lr_warmup."
        )

    def _gradient(self, row: Row) -> str:
        norm = row.get("grad_norm")
        if norm is None:
            return ""
        quiet, self._quiet = self._quiet, norm if self._quiet is None else min(norm, self._quiet)
        if quiet is None or norm <= GRADIENT * max(quiet, 1e-3):
            return ""
        return (
            f"the norm of the gradient, {norm:.3g}, is {norm / max(quiet, 1e-3):.0f} times what it was: it explodes. "
            "Try a lower learning rate, a smaller gradient_clip, a higher min_scale of the emission, or truncate."
        )

    def _kl(self, row: Row, settled: Real) -> str:
        kl = row.get("train/kl_per_frame")
        if self._first is None:
            self._first = row.get("train/nats_per_frame")
        if kl is None or self._first is None:
            return ""
        limit = FAR * max(1.0, abs(self._first)) * (1 if row["epoch"] >= settled else 10)
        if kl <= limit:
            return ""
        return (
            f"the KL, {kl:.4g} nats per frame, is far above what the latents can explain: it explodes. Try a larger "
            "kl_start or a shorter kl_warmup, a lower learning rate, or a smaller gradient_clip."
        )
