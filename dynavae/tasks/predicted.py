"""The distribution of x_t one step ahead, as a mixture over particles."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dynavae.distributions import Categorical


class Predicted(NamedTuple):
    r"""p(x_t | x_<t), one step ahead, as the mixture :math:`\sum_k W_k\, p_k(x_t)` over particles.

    Each component has its own draw of z_t from the prior: with few particles the mixture is narrower than the
    distribution. For an exact model the mixture is exact.
    """

    components: Any  # distributions with leading axes (K, B)
    log_weights: Float[Tensor, "K B"]  # normalised
    noise: Float[Tensor, "N K B x_noise"]  # behind the samples, N of each component

    @property
    def mean(self) -> Float[Tensor, "B x_dim"]:
        """Of x_t; for classes, the most probable one."""
        if isinstance(self.components, Categorical):
            return self._pooled.mean
        return (self._weights * self.components.mean).sum(0)

    @property
    def stddev(self) -> Float[Tensor, "B x_dim"]:
        """Of x_t, between and within components; for classes, the probability of another one than `mean`."""
        if isinstance(self.components, Categorical):
            return self._pooled.stddev
        apart = (self.components.mean - self.mean).square()
        return (self._weights * (self.components.stddev.square() + apart)).sum(0).sqrt()

    @property
    def samples(self) -> Float[Tensor, "S B x_dim"]:
        """N draws of each component: S = N K, weighted by `weights`."""
        return self.components.sample(self.noise).flatten(0, 1)

    @property
    def weights(self) -> Float[Tensor, "S B"]:
        """Of the samples; each sequence's sum to one."""
        n = len(self.noise)
        return (self.log_weights.exp() / n).expand(n, -1, -1).flatten(0, 1)

    def quantile(self, q: float) -> Float[Tensor, "B x_dim"]:
        """The smallest sample that at least a share q of the weight does not exceed."""
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile is a share from 0 to 1; got {q}.")
        values, order = self.samples.sort(0)
        below = torch.gather(self.weights.unsqueeze(-1).expand_as(values), 0, order).cumsum(0) < q
        index = below.sum(0, keepdim=True).clamp(max=len(values) - 1)
        return torch.gather(values, 0, index)[0]

    def log_prob(self, x: Float[Tensor, "B x_dim"], observed: Tensor | None = None) -> Float[Tensor, " B"]:
        """Log-density of the mixture at any x (B, x_dim), nats."""
        return torch.logsumexp(self.log_weights + self.components.log_prob(x, observed), 0)

    @property
    def _weights(self) -> Tensor:
        return self.log_weights.exp().unsqueeze(-1)

    @property
    def _pooled(self) -> Categorical:
        return Categorical((self._weights.unsqueeze(-1) * self.components.probs).sum(0).log())
