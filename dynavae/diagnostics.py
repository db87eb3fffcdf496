"""What went wrong, and whether the latents are used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynavae.objectives import factors
from dynavae.parallel import gathered
from dynavae.scan import Trajectory

ACTIVE = 0.01
"""A latent coordinate is active if its posterior mean varies over frames by more than this (a variance).

Source: Burda, Grosse and Salakhutdinov 2016, arXiv 1509.00519, section 5.2.
"""


def first_nonfinite(trajectory: Trajectory, names: Sequence[str] = (), first_frame: int = 0) -> str | None:
    """Where NaN or infinity first appears: factor, time step (counted from 0) and sequence, as a sentence.

    Within one step the factors are asked in the order in which they are computed: q(z_t), p(z_t), p(x_t), KL.

    Args:
        trajectory: what `scan` returned.
        names: a name per sequence; by default its number in the batch.
        first_frame: time step of the trajectory's first frame.

    Returns:
        None if everything is finite.
    """
    kl = trajectory.kl
    steps = (
        ("log q(z_t | .)", trajectory.log_proposal),
        ("log p(z_t | .)", trajectory.log_prior),
        ("log-likelihood", trajectory.log_likelihood),
        ("KL(q || p)", None if kl is None else kl.sum(-1)),
    )
    static = (
        ("log q(w | x)", trajectory.log_proposal_w),
        ("log p(w)", trajectory.log_prior_w),
        ("KL of w", None if trajectory.kl_w is None else trajectory.kl_w.sum(-1)),
    )

    def name(b: int) -> str:
        return f"sequence {names[b]!r}" if names else f"sequence {b}"

    for what, terms in static:
        if terms is not None and not bool(torch.isfinite(terms).all()):
            k, b = (int(i) for i in (~torch.isfinite(terms)).nonzero()[0])
            return f"{what} is {_kind(terms[k, b])} ({name(b)})"
    found = None
    for what, terms in steps:
        if terms is None or bool(torch.isfinite(terms).all()):
            continue
        t, k, b = (int(i) for i in (~torch.isfinite(terms)).nonzero()[0])  # sorted: the first in time
        if found is None or t < found[0]:
            found = t, f"{what} is {_kind(terms[t, k, b])} first at t={t + first_frame} ({name(b)})"
    return None if found is None else found[1]


def _kind(value: Tensor) -> str:
    number = value.item()
    return "NaN" if math.isnan(number) else ("infinite" if number > 0 else "minus infinity")


def explain(trajectory: Trajectory, names: Sequence[str], first_frame: int = 0) -> str:
    """`first_nonfinite` with what to do about it; for a loss that is not finite."""
    where = (
        first_nonfinite(trajectory, names, first_frame) or "every factor is finite, but their sum overflows"
    )
    return (
        f"{where}: the loss is not finite. Raise min_scale of the emission, lower the learning rate, set "
        "gradient_clip, or standardize x (fit keeps the last good state in checkpoints/last.ckpt)."
    )


def reconstruction_and_kl(trajectory: Trajectory, kl: str) -> tuple[Tensor, Tensor]:
    """E_q log p(x | z) and the KL, each (B,), of any trajectory: along the particles if they were resampled."""
    return factors(trajectory._replace(ancestors=None), kl)


class Totals:
    """Running sums over batches, in double precision, so that an average is exact whatever the batches were."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.frames = 0

    def add(self, frames: int = 0, **sums: Any) -> None:
        """Add sums over `frames` frames: numbers, or vectors."""
        self.frames += frames
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def merged(self) -> Totals:
        """The totals of all processes together, the same in each."""
        together = Totals()
        for frames, sums in gathered((self.frames, self.sums)):
            together.add(frames, **sums)
        return together

    def per_frame(self, name: str) -> Any:
        return self.sums[name] / self.frames

    def add_latents(self, trajectory: Trajectory) -> None:
        """KL, and spread of the posterior mean, of each latent coordinate."""
        if trajectory.kl is not None:
            self.add(kl_dim=trajectory.kl.mean(1).sum((0, 1)).cpu().double())
        if trajectory.q is not None:
            mean = trajectory.q.mean.mean(1).cpu().double()
            valid = trajectory.valid.cpu()
            mean = mean.expand(*valid.shape, -1)[valid]
            self.add(mean=mean.sum(0), square=mean.square().sum(0))

    def active_units(self) -> int | None:
        """Latent coordinates whose posterior mean varies (:data:`ACTIVE`)."""
        if "mean" not in self.sums:
            return None
        variance = self.per_frame("square") - self.per_frame("mean") ** 2
        return int((variance > ACTIVE).sum())
