"""Schedules of training: pure functions of the epoch, counted in fractions.

Epoch 2.5 is half-way through the third epoch. Nothing is remembered, so a resumed run continues exactly.
"""

from __future__ import annotations

import math

import numpy as np

Real = int | float
Row = dict[str, Real]
"""Figures of one epoch."""


def ramp(epoch: Real, start: Real, end: Real) -> float:
    """0 before `start`, 1 from `end`, linear in between; a jump if the two coincide.

    Example:
        >>> ramp(5, 0, 10), ramp(2, 3, 4), ramp(3, 3, 3)
        (0.5, 0.0, 1.0)
    """
    if epoch >= end:
        return 1.0
    return max(0.0, (epoch - start) / (end - start)) if end > start else 0.0


def kl_weight(epoch: Real, warmup: Real, start: Real = 0.0) -> float:
    """Weight of the KL: from `start` at epoch 0, linearly to 1 at epoch `warmup`; 1 without warm-up.

    Source: Bowman et al. 2016, arXiv 1511.06349.

    Example:
        >>> kl_weight(0, 10), kl_weight(2.5, 10), kl_weight(10, 10), kl_weight(0, 0), kl_weight(5, 10, start=0.5)
        (0.0, 0.25, 1.0, 1.0, 0.75)
    """
    return start + (1 - start) * ramp(epoch, 0.0, warmup)


def learning_rate(
    epoch: Real,
    epochs: Real,
    lr: Real,
    schedule: str = "constant",
    warmup: Real = 0.0,
    decay: Real = 0.99,
    decay_start: Real = 0.0,
) -> float:
    """The learning rate after `epoch` of `epochs`.

    Args:
        epoch: where training is.
        epochs: where it ends; only the cosine asks.
        lr: the highest rate.
        schedule: "constant"; "exponential" (times `decay` per epoch); "cosine" (to 0 at the last epoch).
        warmup: epochs over which the rate grows linearly from 0.
        decay: factor per epoch of the exponential.
        decay_start: epoch from which the rate falls; not before the warm-up has ended.

    Example:
        >>> learning_rate(1, 10, 0.01, warmup=2), learning_rate(4, 10, 0.01, "exponential", decay=0.5, decay_start=2)
        (0.005, 0.0025)
        >>> learning_rate(5, 10, 0.01, "cosine")
        0.005
    """
    start = max(warmup, decay_start)
    after = max(0.0, epoch - start)
    if schedule == "exponential":
        factor = decay**after
    elif schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * min(1.0, after / (epochs - start)))) if epochs > start else 1.0
    else:
        factor = 1.0
    return lr * factor * (min(1.0, epoch / warmup) if warmup else 1.0)


def seed_for(*parts: int) -> int:
    """One seed from several numbers, such as (seed, epoch, step): unrelated streams for unequal parts.

    Example:
        >>> seed_for(0, 1) == seed_for(0, 1), seed_for(0, 1) == seed_for(1, 0)
        (True, False)
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]) >> 1
