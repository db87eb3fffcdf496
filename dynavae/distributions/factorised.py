"""Distributions whose coordinates are independent."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

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


class _ItakuraSaito(torch.autograd.Function):
    """y + x e^-y and x e^-y. Frames of speech are wide: the backward is one pass over them in place of four."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        ratio = torch.neg(y).exp_().mul(x)
        return y + ratio, ratio

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor | None]:
        y, x, ratio = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone wants second derivatives
            ratio = x * torch.exp(-y)
        by_x = grad * torch.exp(-y) if ctx.needs_input_grad[1] else None
        return _like(torch.addcmul(grad, grad, ratio, value=-1), y), by_x if by_x is None else _like(by_x, x)


def _like(grad: Tensor, a: Tensor) -> Tensor:
    """Summed over the axes along which `a` was broadcast."""
    return grad.sum_to_size(a.shape)


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
        y = self.log_variance
        terms, _ = _ItakuraSaito.apply(y, x)
        count = y.shape[-1] if observed is None else observed.sum(-1, dtype=y.dtype)
        return -total(terms, observed) - math.log(math.pi) * count  # the constant joins after the sum

    def kl(self, other: Any) -> Tensor | None:
        return None
