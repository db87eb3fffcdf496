"""A mixture of diagonal Gaussians, of all coordinates together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynavae.distributions.factorised import LOG_2PI


class GaussianMixture(NamedTuple):
    r""":math:`\sum_m \pi_m\, \mathcal N(x; \mu_m, \mathrm{diag}\,\sigma_m^2)`, M components.

    The last axes of `logits` are (M,), those of `loc` and `scale` (M, x_dim). A sample takes 2 x_dim standard normals, one
    of which chooses the component: it is no differentiable function of the parameters.

    Example:
        >>> p = GaussianMixture(torch.zeros(2), torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))
        >>> p.mean, p.log_prob(torch.zeros(1))
        (tensor([0.]), tensor(-1.4189))
    """

    logits: Tensor
    loc: Tensor
    scale: Tensor

    @property
    def mean(self) -> Tensor:
        return (self._weights * self.loc).sum(-2)

    @property
    def stddev(self) -> Tensor:
        apart = (self.loc - self.mean.unsqueeze(-2)).square()
        return (self._weights * (self.scale.square() + apart)).sum(-2).sqrt()

    @property
    def _weights(self) -> Tensor:
        return self.logits.softmax(-1).unsqueeze(-1)

    def sample(self, noise: Tensor) -> Tensor:
        normal, choice = noise.chunk(2, -1)
        below = self.logits.softmax(-1).cumsum(-1) < torch.special.ndtr(choice[..., :1])
        index = below.sum(-1, keepdim=True).clamp(max=self.logits.shape[-1] - 1).unsqueeze(-1)
        lead = normal.shape[:-1]
        loc, scale = (
            torch.gather(a.expand(*lead, *a.shape[-2:]), -2, index.expand(*lead, 1, a.shape[-1])).squeeze(-2)
            for a in (self.loc, self.scale)
        )
        return loc + scale * normal

    def component_log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """Log-density with each component (..., M), its weight included."""
        white = (x.unsqueeze(-2) - self.loc) / self.scale
        terms = -0.5 * (white.square() + LOG_2PI) - self.scale.log()
        if observed is not None:
            terms = torch.where(observed.unsqueeze(-2), terms, 0.0)
        return self.logits.log_softmax(-1) + terms.sum(-1)

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        value = torch.logsumexp(self.component_log_prob(x, observed), -1)
        if observed is None:
            return value
        return torch.where(observed.any(-1), value, 0.0)  # where nothing is observed: exactly 0

    def kl(self, other: Any) -> Tensor | None:
        return None
