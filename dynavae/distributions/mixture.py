"""Mixtures of Gaussians, of all coordinates together: diagonal ones, and ones with full covariances."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynavae.distributions.factorised import LOG_2PI
from dynavae.distributions.multivariate import MultivariateNormal


def _chosen(log_weights: Tensor, noise: Tensor) -> Tensor:
    """The component (...) that a standard normal (..., 1) chooses."""
    below = log_weights.softmax(-1).cumsum(-1) < torch.special.ndtr(noise)
    return below.sum(-1).clamp(max=log_weights.shape[-1] - 1)


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
        index = _chosen(self.logits, choice[..., :1])[..., None, None]
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

    def complete(self, x: Tensor, observed: Tensor, noise: Tensor | None = None) -> Tensor:
        """A sample given the observed coordinates, which keep their values; without noise, the mean given these.

        They weigh the components, of which each has independent coordinates.
        """
        given = self._replace(logits=self.component_log_prob(x, observed))
        return torch.where(observed, x, given.mean if noise is None else given.sample(noise))

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        value = torch.logsumexp(self.component_log_prob(x, observed), -1)
        if observed is None:
            return value
        return torch.where(observed.any(-1), value, 0.0)  # where nothing is observed: exactly 0

    def kl(self, other: Any) -> Tensor | None:
        return None


class MultivariateMixture(NamedTuple):
    r""":math:`\sum_m w_m\, \mathcal N(x; \mu_m, L_m L_m^\top)`, M components with full covariances.

    The last axes of `log_weights` are (M,), of `loc` (M, dim), of `scale_tril` (M, dim, dim). The weights are taken as they
    are: where they sum to less than one, so does the density. A sample takes dim + 1 standard normals, the last of which
    chooses the component: it is no differentiable function of the parameters.

    Example:
        >>> eye = torch.eye(1).expand(2, 1, 1)
        >>> p = MultivariateMixture(torch.tensor([0.5, 0.5]).log(), torch.tensor([[-1.0], [1.0]]), eye)
        >>> p.mean, p.log_prob(torch.zeros(1))
        (tensor([0.]), tensor(-1.4189))
    """

    log_weights: Tensor
    loc: Tensor
    scale_tril: Tensor

    @property
    def mean(self) -> Tensor:
        return (self._weights * self.loc).sum(-2)

    @property
    def stddev(self) -> Tensor:
        apart = (self.loc - self.mean.unsqueeze(-2)).square()
        return (self._weights * (self.scale_tril.square().sum(-1) + apart)).sum(-2).sqrt()

    @property
    def _weights(self) -> Tensor:
        return self.log_weights.softmax(-1).unsqueeze(-1)

    def sample(self, noise: Tensor) -> Tensor:
        normal, choice = noise[..., :-1], noise[..., -1:]
        index = _chosen(self.log_weights, choice)
        drawn = self.loc + (self.scale_tril @ normal.unsqueeze(-1).unsqueeze(-3)).squeeze(-1)
        index = index[..., None, None].expand(*index.shape, 1, drawn.shape[-1])
        return torch.gather(drawn.expand(*index.shape[:-2], *drawn.shape[-2:]), -2, index).squeeze(-2)

    def component_log_prob(self, x: Tensor) -> Tensor:
        """Log-density with each component (..., M), its weight included."""
        return self.log_weights + MultivariateNormal(self.loc, self.scale_tril).log_prob(x.unsqueeze(-2))

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        if observed is not None and not bool(observed.all()):
            raise ValueError("a MultivariateMixture is of latents, which are not observed in part.")
        return torch.logsumexp(self.component_log_prob(x), -1)

    def kl(self, other: Any) -> Tensor | None:
        return None
