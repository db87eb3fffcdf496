"""Distributions as named tuples of tensors: light enough for the inner loop, stackable along time.

Every distribution factorises over, or lives on, the last axis. Its randomness is always standard
normal noise given by the caller, so that one block of noise, drawn before the time loop, decides every
sample: `sample(noise)` is a differentiable function of the parameters where `reparameterized` is true.
`log_prob(x, observed)` sums over the observed coordinates only: the exact marginal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from dynavae import tree

LOG_2PI = math.log(2 * math.pi)


def total(terms: Tensor, observed: Tensor | None) -> Tensor:
    """Sum over the last axis, over observed coordinates only."""
    return (terms if observed is None else torch.where(observed, terms, 0.0)).sum(-1)


class Normal(NamedTuple):
    r"""Diagonal Gaussian :math:`\mathcal N(\mu, \mathrm{diag}\,\sigma^2)`.

    Example:
        >>> p = Normal(torch.zeros(3), torch.ones(3))
        >>> p.log_prob(torch.zeros(3)), p.kl(p).sum()
        (tensor(-2.7568), tensor(0.))
    """

    loc: Tensor
    scale: Tensor

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def stddev(self) -> Tensor:
        return self.scale

    def sample(self, noise: Tensor) -> Tensor:
        return torch.addcmul(self.loc, self.scale, noise)

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        terms = -0.5 * (((x - self.loc) / self.scale) ** 2 + LOG_2PI) - self.scale.log()
        return total(terms, observed)

    def kl(self, other: Any) -> Tensor | None:
        r"""KL(self ‖ other) of each coordinate; None without a closed form."""
        if not isinstance(other, Normal):
            return None
        ratio = self.scale / other.scale
        distance = (self.loc - other.loc) / other.scale
        return 0.5 * (ratio**2 + distance**2 - 1) - ratio.log()


def standard_normal(lead: tuple[int, ...] | torch.Size, dim: int, like: Tensor) -> Normal:
    """N(0, I) on `dim` coordinates, with the device and type of `like`."""
    zero = like.new_zeros(()).expand(*lead, dim)
    return Normal(zero, like.new_ones(()).expand(*lead, dim))


class Laplace(NamedTuple):
    """Independent Laplace coordinates: density exp(-|x - loc| / scale) / (2 scale)."""

    loc: Tensor
    scale: Tensor

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def stddev(self) -> Tensor:
        return self.scale * math.sqrt(2)

    def sample(self, noise: Tensor) -> Tensor:
        tail = torch.special.log_ndtr(-noise.abs()) + math.log(2)  # log of a uniform, exact in the tails
        return self.loc - self.scale * noise.sign() * tail

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        return total(-(x - self.loc).abs() / self.scale - (2 * self.scale).log(), observed)

    def kl(self, other: Any) -> Tensor | None:
        return None


class StudentT(NamedTuple):
    """Independent Student-t coordinates with location, scale and `df` degrees of freedom.

    Two standard normals per coordinate (the last axis of the noise is twice as long) give one sample, by
    Bailey's polar method: t = sqrt(df (u^(-2/df) - 1)) cos(2 pi v).
    """

    loc: Tensor
    scale: Tensor
    df: Tensor

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def stddev(self) -> Tensor:
        return self.scale * (self.df / (self.df - 2).clamp(min=1e-3)).sqrt()

    def sample(self, noise: Tensor) -> Tensor:
        a, b = noise.chunk(2, -1)
        log_u = torch.special.log_ndtr(a)
        radius = (self.df * torch.expm1(-2 / self.df * log_u)).sqrt()
        return self.loc + self.scale * radius * torch.cos(2 * math.pi * torch.special.ndtr(b))

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        half = self.df / 2
        constant = torch.lgamma(half + 0.5) - torch.lgamma(half) - 0.5 * (math.pi * self.df).log()
        square = ((x - self.loc) / self.scale) ** 2 / self.df
        return total(constant - self.scale.log() - (half + 0.5) * torch.log1p(square), observed)

    def kl(self, other: Any) -> Tensor | None:
        return None


class Bernoulli(NamedTuple):
    """Independent binary coordinates, from logits."""

    logits: Tensor

    @property
    def mean(self) -> Tensor:
        return self.logits.sigmoid()

    @property
    def stddev(self) -> Tensor:
        return (self.mean * (1 - self.mean)).sqrt()

    def sample(self, noise: Tensor) -> Tensor:
        return (torch.special.ndtr(noise) < self.mean).to(self.logits.dtype)

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        return total(x * self.logits - softplus(self.logits), observed)

    def kl(self, other: Any) -> Tensor | None:
        if not isinstance(other, Bernoulli):
            return None
        return self.mean * (self.logits - other.logits) - softplus(self.logits) + softplus(other.logits)


class Categorical(NamedTuple):
    """Independent coordinates with classes 0 ... C-1, from logits (..., d, C); x holds class numbers."""

    logits: Tensor

    @property
    def probs(self) -> Tensor:
        return self.logits.softmax(-1)

    @property
    def mean(self) -> Tensor:
        """The most probable class of each coordinate (a mean of class numbers means nothing)."""
        return self.logits.argmax(-1).to(self.logits.dtype)

    @property
    def stddev(self) -> Tensor:
        """The probability that the class differs from `mean`."""
        return 1 - self.probs.amax(-1)

    def sample(self, noise: Tensor) -> Tensor:
        below = self.probs.cumsum(-1) < torch.special.ndtr(noise).unsqueeze(-1)
        return below.sum(-1).clamp(max=self.logits.shape[-1] - 1).to(self.logits.dtype)

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        log_p = self.logits.log_softmax(-1)
        lead = torch.broadcast_shapes(x.shape, log_p.shape[:-1])
        index = x.long().clamp(0, log_p.shape[-1] - 1).expand(lead).unsqueeze(-1)
        return total(torch.gather(log_p.expand(*lead, -1), -1, index).squeeze(-1), observed)

    def kl(self, other: Any) -> Tensor | None:
        if not isinstance(other, Categorical):
            return None
        log_q, log_p = self.logits.log_softmax(-1), other.logits.log_softmax(-1)
        return torch.where(log_q > -torch.inf, log_q.exp() * (log_q - log_p), 0.0).sum(-1)

    def one_hot(self, x: Tensor) -> Tensor:
        return one_hot(x.long(), self.logits.shape[-1]).to(self.logits.dtype)


class PowerSpectrum(NamedTuple):
    r"""Power :math:`|s|^2` of a zero-mean circular complex Gaussian coefficient with variance :math:`e^y`.

    .. math:: \log p(s) = -\log \pi - y - |s|^2 e^{-y},

    a density of the complex coefficient s, which is the Itakura-Saito divergence of the power and e^y up
    to a term free of the model. It takes no logarithm of the data: digital silence is harmless.
    """

    log_variance: Tensor

    @property
    def mean(self) -> Tensor:
        return self.log_variance.exp()

    @property
    def stddev(self) -> Tensor:
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        return -torch.special.log_ndtr(noise) * self.mean

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        terms = -math.log(math.pi) - self.log_variance - x * torch.exp(-self.log_variance)
        return total(terms, observed)

    def kl(self, other: Any) -> Tensor | None:
        return None


class MultivariateNormal(NamedTuple):
    r"""Gaussian with a full covariance :math:`L L^\top`, L lower triangular."""

    loc: Tensor
    scale_tril: Tensor

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def stddev(self) -> Tensor:
        return self.scale_tril.square().sum(-1).sqrt().expand_as(self.loc)

    def sample(self, noise: Tensor) -> Tensor:
        return self.loc + (self.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """Of the observed coordinates: the sub-block of the covariance, exactly."""
        difference, factor, constant = x - self.loc, self.scale_tril, x.new_tensor(LOG_2PI * x.shape[-1])
        if observed is not None and not bool(observed.all()):
            eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
            block = observed.unsqueeze(-1) & observed.unsqueeze(-2)
            factor = torch.linalg.cholesky(torch.where(block, factor @ factor.mT, eye))
            difference = torch.where(observed, difference, 0.0)
            constant = LOG_2PI * observed.to(x.dtype).sum(-1)
        whitened = torch.linalg.solve_triangular(factor, difference.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * (whitened.square().sum(-1) + constant) - log_det

    def kl(self, other: Any) -> Tensor | None:
        """The whole divergence, as one coordinate."""
        if not isinstance(other, MultivariateNormal):
            return None
        solve = torch.linalg.solve_triangular
        ratio = solve(other.scale_tril, self.scale_tril.expand(*self.loc.shape, -1), upper=False)
        distance = solve(other.scale_tril, (self.loc - other.loc).unsqueeze(-1), upper=False)
        log_ratio = ratio.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        squares = ratio.square().sum((-2, -1)) + distance.square().sum((-2, -1))
        return (0.5 * (squares - self.loc.shape[-1]) - log_ratio).unsqueeze(-1)


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
    own = OWN_AXES.get(type(d))
    if own is None or all(
        a.ndim - k == len(lead) and a.shape[:-k] == lead for a, k in zip(d, own, strict=True)
    ):
        return d
    dim = d[0].shape[-1]
    shapes = [(*lead, dim) if k == 1 else (*lead, *a.shape[-2:]) for a, k in zip(d, own, strict=True)]
    return type(d)(*(a.expand(shape) for a, shape in zip(d, shapes, strict=True)))


REPARAMETERIZED: tuple[type, ...] = (Normal, Laplace, StudentT, PowerSpectrum, MultivariateNormal)
"""Kinds whose samples carry pathwise gradients."""
