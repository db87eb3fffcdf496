r"""Slow features: the linear functions of a series that vary least from one frame to the next."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FRAMES = 20_000
"""So many frames are enough: sequences are taken evenly from the data until they have as many."""


class SlowFeatures(NamedTuple):
    """What `slow_features` found, in float64."""

    mean: Float[Tensor, " x_dim"]
    weights: Float[Tensor, "x_dim dim"]
    slowness: Float[
        Tensor, " dim"
    ]  # mean square of a step of each feature, smallest first; 2 for white noise

    def __call__(
        self, x: Float[Tensor, "*batch x_dim"], observed: Bool[Tensor, "*batch x_dim"] | None = None
    ) -> Float[Tensor, "*batch dim"]:
        """Features of frames; a value that is not observed counts as the mean."""
        centred = x.double() - self.mean
        return (centred if observed is None else torch.where(observed, centred, 0.0)) @ self.weights


def slow_features(
    sequences: Iterable[tuple[Float[Tensor, "_ x_dim"], Bool[Tensor, "_ x_dim"]]],
    dim: int,
    components: int = 100,
) -> SlowFeatures:
    r"""Uncorrelated features of mean 0 and variance 1, the slowest first.

    .. math::
        y_t = W^\top (x_t - \mu), \qquad \min_W \sum_i \mathbb E\,(y_{t,i} - y_{t-1,i})^2 \quad \text{such that} \quad
        \mathbb E\, y_t y_t^\top = I

    For a ball in a box the two slowest are monotone in its horizontal and vertical position, though every pixel is
    far from linear in them: a map of the box without folds.

    Args:
        sequences: values, and whether they were observed, of each sequence. A missing value counts as the mean, a step to or
            from one does not count.
        dim: number of features.
        components: first the frames are reduced to so many principal components, which keeps noise from posing as slow.

    Raises:
        ValueError: more features than the frames have independent coordinates, or no two frames in a row.

    Reference: Wiskott and Sejnowski, Slow Feature Analysis: Unsupervised Learning of Invariances, Neural Computation
    14, 2002.
    Differs from the paper: linear functions of x only, without its quadratic expansion.

    Example:
        >>> t = torch.arange(400, dtype=torch.float64)
        >>> slow, fast = torch.sin(t / 40), torch.sin(3 * t)
        >>> x = torch.stack([slow + fast, slow - fast, fast], -1)
        >>> found = slow_features([(x, torch.ones_like(x, dtype=torch.bool))], dim=1)
        >>> y = found(x)[:, 0]
        >>> abs(torch.corrcoef(torch.stack([y, slow]))[0, 1]).item() > 0.999
        True
    """
    pairs = list(sequences)
    total = sum(len(x) for x, _ in pairs)
    pairs = pairs[:: max(1, -(-total // FRAMES))]
    seen = torch.cat([m for _, m in pairs])
    x = torch.where(seen, torch.cat([x for x, _ in pairs]).double(), 0.0)
    first = torch.cat([torch.arange(len(p)) == 0 for p, _ in pairs])
    mean = x.sum(0) / seen.sum(0).clamp(min=1)
    x = torch.where(seen, x - mean, 0.0)
    whiten = _whitening(x[seen.any(-1)], components)
    if whiten.shape[1] < dim:
        raise ValueError(
            f"{dim} slow features were asked for, but the frames have {whiten.shape[1]} independent coordinates: ask for "
            "fewer, or give more frames."
        )
    steps = torch.where(seen[1:] & seen[:-1], x[1:] - x[:-1], 0.0)[
        ~first[1:] & (seen[1:] & seen[:-1]).any(-1)
    ]
    if len(steps) == 0:
        raise ValueError("slow features need two observed frames in a row in some sequence; there are none.")
    moved = steps @ whiten
    slowness, rotation = torch.linalg.eigh(moved.T @ moved / len(steps))
    return SlowFeatures(mean, whiten @ rotation[:, :dim], slowness[:dim])


def _whitening(x: Tensor, components: int) -> Tensor:
    """Weights (x_dim, at most `components`) of principal components of unit variance."""
    if min(x.shape) <= components:
        _, sizes, axes = torch.linalg.svd(x, full_matrices=False)
        axes = axes.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, sizes, axes = torch.svd_lowrank(x, q=components + 10, niter=6)
    sizes, axes = sizes[:components], axes[:, :components]
    independent = sizes > 1e-6 * sizes.max().clamp(min=1e-12)
    return axes[:, independent] / (sizes[independent] / max(len(x), 1) ** 0.5)
