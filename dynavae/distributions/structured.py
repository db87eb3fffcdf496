"""Distributions made of others: several latents of one step, one of two kinds; and how to handle any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynavae import tree
from dynavae.distributions.factorised import (
    Bernoulli,
    Categorical,
    Laplace,
    Normal,
    PowerSpectrum,
    StudentT,
)
from dynavae.distributions.mixture import GaussianMixture, MultivariateMixture
from dynavae.distributions.multivariate import MultivariateNormal
from dynavae.distributions.nade import NADE


class Product(NamedTuple):
    """Independent blocks side by side on the last axis: several latents of one step, once all are known."""

    parts: tuple[Any, ...]
    sizes: tuple[int, ...]

    @property
    def mean(self) -> Tensor:
        return tree.cat(*[p.mean for p in self.parts])

    @property
    def stddev(self) -> Tensor:
        return tree.cat(*[p.stddev for p in self.parts])

    def sample(self, noise: Tensor) -> Tensor:
        blocks = noise.split(self.sizes, -1)
        return tree.cat(*[p.sample(n) for p, n in zip(self.parts, blocks, strict=True)])

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        blocks = x.split(self.sizes, -1)
        masks = [None] * len(blocks) if observed is None else observed.split(self.sizes, -1)
        return sum(p.log_prob(b, m) for p, b, m in zip(self.parts, blocks, masks, strict=True))

    def kl(self, other: Any) -> Tensor | None:
        if not isinstance(other, Product) or self.sizes != other.sizes:
            return None
        terms = [p.kl(q) for p, q in zip(self.parts, other.parts, strict=True)]
        return None if any(t is None for t in terms) else tree.cat(*terms)


class Chain:
    r"""Several latents of one step, each given those before it: :math:`\prod_i p(z^i \mid z^{<i})`.

    Args:
        steps: functions of the preceding latents (z^1, ..., z^{i-1}), each returning a distribution.
        sizes: coordinates of each latent.

    A chain is what `prior` and `posterior` may return; :meth:`at` turns it into a plain
    :class:`Product` once z is known, which is what the engine records, scores and stacks.
    """

    def __init__(self, steps: list[Callable[..., Any]], sizes: list[int]) -> None:
        self.steps, self.sizes = steps, tuple(sizes)

    def sample_at(self, noise: Tensor) -> tuple[Tensor, Product]:
        blocks: list[Tensor] = []
        parts = []
        for step, n in zip(self.steps, noise.split(self.sizes, -1), strict=True):
            parts.append(step(*blocks))
            blocks.append(parts[-1].sample(n))
        return tree.cat(*blocks), Product(tuple(parts), self.sizes)

    def at(self, z: Tensor) -> Product:
        blocks = z.split(self.sizes, -1)
        return Product(tuple(step(*blocks[:i]) for i, step in enumerate(self.steps)), self.sizes)


class Either(NamedTuple):
    """One of two distributions of different kinds, chosen by a mask over the leading axes."""

    mask: Tensor
    first: Any
    second: Any

    def _choose(self, a: Tensor, b: Tensor) -> Tensor:
        extra = max(a.ndim, b.ndim) - self.mask.ndim
        return torch.where(self.mask.reshape(*self.mask.shape, *[1] * max(extra, 0)), a, b)

    @property
    def mean(self) -> Tensor:
        return self._choose(self.first.mean, self.second.mean)

    @property
    def stddev(self) -> Tensor:
        return self._choose(self.first.stddev, self.second.stddev)

    def sample(self, noise: Tensor) -> Tensor:
        return self._choose(self.first.sample(noise), self.second.sample(noise))

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        return self._choose(self.first.log_prob(x, observed), self.second.log_prob(x, observed))

    def kl(self, other: Any) -> Tensor | None:
        first, second = self.first.kl(other), self.second.kl(other)
        return None if first is None or second is None else self._choose(first, second)


def either(mask: Tensor, first: Any, second: Any) -> Any:
    """`first` where `mask` is True, else `second`; one plain distribution if both are of one kind."""
    if tree.same_structure(first, second):
        return tree.where(mask, first, second)
    return Either(mask, first, second)


def sample_at(d: Any, noise: Tensor) -> tuple[Tensor, Any]:
    """A sample, and the distribution it came from as a plain, stackable tree."""
    return d.sample_at(noise) if isinstance(d, Chain) else (d.sample(noise), d)


def at(d: Any, z: Tensor) -> Any:
    """The distribution with its inner conditions resolved at z."""
    return d.at(z) if isinstance(d, Chain) else d


OWN_AXES: dict[type, tuple[int, ...]] = {
    Normal: (1, 1),
    Laplace: (1, 1),
    StudentT: (1, 1, 1),
    Bernoulli: (1,),
    Categorical: (2,),
    PowerSpectrum: (1,),
    MultivariateNormal: (1, 2),
    GaussianMixture: (1, 2, 2),
    MultivariateMixture: (1, 2, 3),
}
"""Axes of each parameter that belong to one draw; whatever leads is time, particles, batch."""


def expand(d: Any, lead: tuple[int, ...]) -> Any:
    """The same distribution with all parameters expanded to leading axes `lead`, so that it can be stacked.

    A conditional that reads no z has no particle axis, and a scale that reads nothing has no axes at all.

    Example:
        >>> p = expand(Normal(torch.zeros(2, 3), torch.ones(3)), (5, 2))
        >>> p.loc.shape, p.scale.shape
        (torch.Size([5, 2, 3]), torch.Size([5, 2, 3]))
    """
    if isinstance(d, Product):
        return Product(tuple(expand(part, lead) for part in d.parts), d.sizes)
    if isinstance(d, Either):
        return Either(d.mask.expand(lead), expand(d.first, lead), expand(d.second, lead))
    if isinstance(d, NADE):
        return d.expand(lead)
    own = OWN_AXES.get(type(d))
    if own is None or all(
        a.ndim - k == len(lead) and a.shape[:-k] == lead for a, k in zip(d, own, strict=True)
    ):
        return d
    dim = d[0].shape[-1]  # a scale may be one number for all coordinates
    shapes = [(*lead, dim) if k == 1 else (*lead, *a.shape[-k:]) for a, k in zip(d, own, strict=True)]
    return type(d)(*(a.expand(shape) for a, shape in zip(d, shapes, strict=True)))


def completed(p: Any, x: Tensor, observed: Tensor, noise: Tensor | None = None) -> Tensor:
    """x where it was observed; elsewhere a draw of p given what was observed of the same frame, or without noise its mean.

    Example:
        >>> p = MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.0], [0.8, 0.6]]))
        >>> completed(p, torch.tensor([2.0, 0.0]), torch.tensor([True, False]))
        tensor([2.0000, 1.6000])
    """
    if hasattr(p, "complete"):  # its coordinates depend on each other
        return p.complete(x, observed, noise)
    return torch.where(observed, x, p.mean if noise is None else p.sample(noise))


def completed_frames(p: Any, x: Tensor, observed: Tensor, noise: Tensor | None = None) -> Tensor:
    """:func:`completed` of all frames, x (T, 1, B, x_dim), on all paths of p (T, K, B): (T, K, B, x_dim).

    Coordinates that depend on each other are completed a frame at a time, and only where a frame was observed in part: each
    takes a system of equations of its own.
    """
    whole = p.mean if noise is None else p.sample(noise)
    out = torch.where(observed, x, whole)
    if not hasattr(p, "complete"):
        return out
    partly = (observed.any(-1) & ~observed.all(-1)).flatten(1).any(1)
    frames, steps = tree.unbind(_over_time(p, len(out)), len(out)), list(out.unbind())
    for t in partly.nonzero().flatten().tolist():
        found = frames[t].complete(x[t], observed[t], None if noise is None else noise[t])
        steps[t] = found.expand_as(steps[t])
    return torch.stack(steps)


def _over_time(p: Any, steps: int) -> Any:
    """The same with a time axis on every parameter (T, K, B, ...), and one particle where all are alike."""
    own = OWN_AXES.get(type(p))
    if own is None:
        return p
    parts = []
    for a, k in zip(p, own, strict=True):
        a = a.reshape((1,) * (3 + k - a.ndim) + a.shape)
        parts.append((a[:, :1] if a.stride(1) == 0 else a).expand(steps, *[-1] * (k + 2)))
    return type(p)(*parts)


REPARAMETERIZED: tuple[type, ...] = (Normal, Laplace, StudentT, PowerSpectrum, MultivariateNormal)
"""Kinds whose samples carry pathwise gradients."""
