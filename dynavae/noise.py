"""All randomness of a scan, drawn before the time loop as standard normal numbers.

Because every sample is a function of this noise, the fast and the slow path give the same numbers, and
noise drawn sequence by sequence makes a result independent of padding and of who shares the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dynavae.model import SequentialLVM


class Noise(NamedTuple):
    """Standard normals; None where a run does not need them."""

    z: Float[Tensor, "T K B z_noise"]
    x: Float[Tensor, "T K B x_noise"] | None
    w: Float[Tensor, "K B w_dim"] | None
    resample: Float[Tensor, "T K B"] | None

    def sequences(self, rows: Sequence[int], steps: int) -> Noise:
        """The noise of some sequences over the first `steps` frames."""
        rows = list(rows)
        return Noise(
            self.z[:steps, :, rows],
            None if self.x is None else self.x[:steps, :, rows],
            None if self.w is None else self.w[:, rows],
            None if self.resample is None else self.resample[:steps, :, rows],
        )


def draw(
    model: SequentialLVM,
    steps: int,
    particles: int,
    batch: int,
    *,
    x: bool = False,
    resample: bool = False,
    generator: torch.Generator | None = None,
) -> Noise:
    """One block for the whole batch: the fastest, for training."""
    like = next(model.parameters())
    device = like.device if generator is None else generator.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)

    lead = (steps, particles, batch)
    z = normal(*lead, model.z_noise_dim)
    w = normal(particles, batch, model.w_dim) if model.w_dim else None
    u = normal(*lead) if resample else None
    return Noise(z, normal(*lead, model.x_noise_dim) if x else None, w, u)  # x last: see draw_by_sequence


def draw_by_sequence(
    model: SequentialLVM,
    lengths: Tensor,
    particles: int,
    seeds: Sequence[int],
    *,
    x: bool = False,
    resample: bool = False,
) -> Noise:
    """Each sequence from its own seed: results do not depend on the batch that a sequence is in."""
    like = next(model.parameters())
    steps = int(lengths.max())

    def normal(generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=like.dtype)

    def padded(rows: list[Tensor]) -> Tensor:
        out = rows[0].new_zeros(steps, *rows[0].shape[1:2], len(rows), *rows[0].shape[2:])
        for b, row in enumerate(rows):
            out[: len(row), :, b] = row
        return out.to(like.device)

    z, ws, xs, rs = [], [], [], []
    for n, seed in zip(lengths.tolist(), seeds, strict=True):
        generator = torch.Generator().manual_seed(int(seed))
        z.append(normal(generator, n, particles, model.z_noise_dim))
        if model.w_dim:
            ws.append(normal(generator, particles, model.w_dim))
        if resample:
            rs.append(normal(generator, n, particles))
        if x:  # last: whether a batch needs it must not change what the others get
            xs.append(normal(generator, n, particles, model.x_noise_dim))
    w = torch.stack(ws, 1).to(like.device) if ws else None
    return Noise(padded(z), padded(xs) if x else None, w, padded(rs) if resample else None)
