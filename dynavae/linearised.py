r"""A proposal for particle filters that looks at x_t: the prior of z_t updated by a linearised likelihood.

.. math::
    q(z_t \mid z_{<t}, x_{\le t}) \propto N(z_t; \mu_t, \Sigma_t)\; N(x_t; h(\mu_t) + H (z_t - \mu_t), R + \Omega)

with :math:`N(\mu_t, \Sigma_t)` the prior of each particle and h the mean of the likelihood, linearised as in
:mod:`dynavae.exact.nonlinear`. Where h is linear and the likelihood Gaussian with a constant covariance it is the locally
optimal proposal :math:`p(z_t \mid z_{t-1}, x_t)`.

References: Doucet, Godsill and Andrieu, On Sequential Monte Carlo Sampling Methods for Bayesian Filtering, 2000. Van der
Merwe et al., The Unscented Particle Filter, 2000.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynavae.distributions import MultivariateNormal, Normal
from dynavae.exact._algebra import matvec, semidefinite_cholesky, symmetric
from dynavae.exact.joseph import joseph_update
from dynavae.exact.nonlinear import METHODS, SigmaPoints
from dynavae.model import Evidence, Past, Present, SequentialLVM


class Seen(NamedTuple):
    """What the proposal reads: x and which of it was observed, (T, B, x_dim)."""

    x: Tensor
    observed: Tensor


class LinearisedProposal:
    """z_t from the extended or unscented Kalman update of each particle's own prior.

    For models whose prior and likelihood are Gaussian. The posterior network is not read, so an untrained one does no harm.

    Args:
        method: "extended", "unscented", or :class:`~dynavae.exact.nonlinear.SigmaPoints`.

    Raises:
        ValueError: for another method.

    Example:
        >>> from dynavae import Resampling, Sequences, scan
        >>> from dynavae.models import DKF
        >>> model, batch = DKF(x_dim=2, z_dim=3, h_dim=8), Sequences.from_arrays(torch.randn(4, 6, 2))
        >>> scan(model, batch, particles=10, propose=LinearisedProposal("extended")).z.shape
        torch.Size([6, 10, 4, 3])
    """

    needs_prior = True

    def __init__(self, method: str | SigmaPoints = "unscented") -> None:
        if not callable(method) and method not in METHODS:
            raise ValueError(f"method should be 'extended', 'unscented' or SigmaPoints(...); got {method!r}.")
        self.linearise = METHODS[method] if isinstance(method, str) else method

    def evidence(self, model: SequentialLVM, seen: Evidence) -> Seen:
        """x itself, frames after a sequence's end as missing."""
        x, observed = seen.frame.x, seen.frame.observed
        valid = torch.arange(len(x), device=x.device).unsqueeze(-1) < seen.lengths
        mask = valid.unsqueeze(-1).expand_as(x)
        return Seen(x, mask if observed is None else mask & observed)

    def __call__(
        self, model: SequentialLVM, past: Past, e: Seen, informed: Tensor | None
    ) -> MultivariateNormal:
        mean, P = _moments(past.prior, "prior")

        def emitted(z: Tensor) -> Tensor:
            return model.likelihood(_present(model, past, z)).mean

        C, x, observed = self.linearise(emitted, mean, P), e.x, e.observed
        _, R = _moments(model.likelihood(_present(model, past, mean)), "likelihood")
        both = observed.unsqueeze(-1) & observed.unsqueeze(-2)
        R = torch.where(both, R + C.spread, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))
        H = torch.where(observed.unsqueeze(-1), C.G, 0.0)
        K, P, _ = joseph_update(P, H, symmetric(R))
        mean = mean + matvec(K, torch.where(observed, x - C.mean, 0.0))
        return MultivariateNormal(mean, semidefinite_cholesky(P, "the proposal's covariance"))


def _present(model: SequentialLVM, past: Past, z: Tensor) -> Present:
    return Present(past.x, model.absorb(past, z), past.control, past.w)


def _moments(p: Any, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(p, MultivariateNormal):
        return p.loc, (p.scale_tril @ p.scale_tril.mT).expand(*p.loc.shape, p.loc.shape[-1])
    if not isinstance(p, Normal):
        raise TypeError(f"LinearisedProposal needs a Gaussian {name}; got {type(p).__name__}.")
    return p.mean, torch.diag_embed(p.stddev.square().expand_as(p.mean))
