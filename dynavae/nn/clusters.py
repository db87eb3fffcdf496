"""Where the EM of a mixture begins: soft clusters of frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynavae.nn.emissions import Emission

FRAMES = 5000
"""Frames that centers are found from."""


def soft_clusters(x: Tensor, observed: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Responsibilities (N, number) of frames (N, n): k-means++ and a few of Lloyd's iterations, softened.

    Coordinates are standardised; a missing one counts as its mean. Every frame belongs a little to each cluster, so that
    none starts with a single frame.

    Reference: Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, 2007.
    """
    seen = observed.double()
    x = torch.where(observed, x, 0.0).double()
    count = seen.sum(0).clamp(min=1)
    mean = x.sum(0) / count
    e = torch.where(observed, x - mean, 0.0)
    e = e / (e.square().sum(0) / count).sqrt().clamp(min=1e-12)
    index = torch.randperm(len(e), generator=generator)[:FRAMES].to(e.device)
    few = e[index]
    centers = few[:1]
    for _ in range(number - 1):
        distance = torch.cdist(few, centers).amin(-1).square().cumsum(0)
        at = torch.rand((), generator=generator, dtype=torch.float64).to(e.device) * distance[-1]
        centers = torch.cat([centers, few[torch.searchsorted(distance, at).clamp(max=len(few) - 1)][None]])
    for _ in range(10):
        nearest = torch.cdist(few, centers).argmin(-1)
        total = torch.zeros_like(centers).index_add_(0, nearest, few)
        size = few.new_zeros(number).index_add_(0, nearest, torch.ones_like(few[:, 0])).unsqueeze(-1)
        centers = torch.where(size > 0, total / size.clamp(min=1), centers)
    nearest = torch.cdist(e, centers).argmin(-1)
    return 0.9 * torch.nn.functional.one_hot(nearest, number).double() + 0.1 / number


def clusters_of(
    emission: Emission, sequences: Sequence[tuple[Tensor, Tensor]], number: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """All frames x, observed (N, x_dim), and their responsibilities (N, number); classes count as one-hot codes."""
    x = torch.cat([x for x, _ in sequences])
    observed = torch.cat([seen for _, seen in sequences])
    code = emission.encode(x)
    mask = observed.repeat_interleave(code.shape[-1] // x.shape[-1], -1)
    return x, observed, soft_clusters(code, mask, number, generator)
