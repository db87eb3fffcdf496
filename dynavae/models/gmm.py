"""Gaussian mixture: one component for each frame, whose posterior is exact."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from dynavae.batch import Sequences
from dynavae.closed_forms import ExactStep
from dynavae.distributions import Categorical, MultivariateNormal
from dynavae.model import Evidence, Frame, Past, Present, SequentialLVM
from dynavae.nn import EmissionHead
from dynavae.nn.estimation import emission_of_states, estimate, log_share, start_from_clusters, statistics


class Expected(NamedTuple):
    """Sums over frames: log p(x), expected counts of the components (S,), and of their Gaussians."""

    log_likelihood: Tensor
    count: Tensor
    emission: tuple[Any, ...]


class GMM(SequentialLVM):
    r"""Gaussian mixture model of every frame on its own, with S components.

    .. math::
        p(z_t = k) = \pi_k, \qquad p(x_t \mid z_t = k) = \mathcal N(\mu_k, \Sigma_k), \qquad
        q(z \mid x) = \prod_t p(z_t \mid x_t) \;\text{exactly}

    Fitted by EM, from clusters, exactly whatever is missing; or by gradient.

    Reads: ``p(z_t | )  p(x_t | z_t)  q(z_t | x_t)``

    Reference: Dempster, Laird and Rubin, Maximum Likelihood from Incomplete Data via the EM Algorithm, 1977; Ghahramani and
    Jordan, Supervised Learning from Incomplete Data via an EM Approach, 1994 (missing coordinates).
    Differs from the references: eigenvalues of the covariances have a floor.
    Not this model: for components that follow each other, see :class:`HMM`.

    Args:
        x_dim: features of one observation.
        states: S, components.
        covariance: "full", "diagonal", "spherical" or "tied" (one full matrix for all).
        min_scale: floor of the standard deviation in any direction.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, 1).

    Example:
        >>> from dynavae import fit_em
        >>> _ = torch.manual_seed(0)
        >>> x = torch.cat([torch.randn(1, 50, 2), torch.randn(1, 50, 2) + 9], 1)
        >>> model = GMM(x_dim=2, states=2)
        >>> _ = fit_em(model, x, iterations=20, progress=False)
        >>> model.log_weights.exp()
        tensor([0.5000, 0.5000], grad_fn=<ExpBackward0>)
    """

    causal = True
    mean_field = True
    exact = True
    full_precision = True
    closed_form_em = True
    discrete_latent = True
    variants = {  # noqa: RUF012
        "diagonal": {"covariance": "diagonal"},
        "spherical": {"covariance": "spherical"},
        "tied": {"covariance": "tied"},
    }

    def __init__(
        self, x_dim: int, states: int = 8, covariance: str = "full", min_scale: float = 1e-3
    ) -> None:
        emission = {"emission": "multivariate_gaussian", "covariance": covariance, "min_scale": min_scale}
        super().__init__(x_dim, 1, emission)
        if states < 2:
            raise ValueError(f"a mixture needs at least 2 components; got states={states}.")
        self.states = states
        self.raw_weights = nn.Parameter(torch.zeros(states))
        self.p_x = EmissionHead(self.emission, states, x_dim)  # a linear map of a one-hot code: a table
        nn.init.normal_(self.p_x.linear.weight, std=0.5)

    @property
    def log_weights(self) -> Tensor:
        """log pi, (S,)."""
        return self.raw_weights.log_softmax(-1)

    @property
    def components(self) -> MultivariateNormal:
        """mu_k and Cholesky factors of Sigma_k."""
        return self.p_x(torch.eye(self.states, dtype=self.raw_weights.dtype, device=self.raw_weights.device))

    def latent_values(self, z: Tensor) -> Tensor:
        missing = z.isnan()
        codes = one_hot(z.nan_to_num(0).squeeze(-1).long(), self.states).to(z.dtype)
        return codes.masked_fill(missing, torch.nan)

    def features(self, frame: Frame) -> Tensor:
        """log p(x_t, z_t = k) of the observed coordinates, (..., S)."""
        mask = None if frame.observed is None else frame.observed.unsqueeze(-2)
        return self.log_weights + self.components.log_prob(frame.x.unsqueeze(-2), mask)

    def evidence(self, seen: Evidence) -> Tensor:
        return seen.u

    def initial(self, lead: tuple[int, ...]) -> Tensor:
        return self.zeros(lead, self.states)

    def absorb(self, past: Past, z: Tensor) -> Tensor:
        return one_hot(z.squeeze(-1).long(), self.states).to(past.h.dtype)

    def unroll(
        self, z: Tensor, u: Any, c: Any, control: Any, w: Any, h: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        codes = one_hot(z.squeeze(-1).long(), self.states).to(h.dtype)
        return codes, codes, codes[-1]  # the prior reads only the shape of past.h

    def prior(self, past: Past) -> Categorical:
        return Categorical(self.log_weights.expand_as(past.h).unsqueeze(-2))

    def likelihood(self, present: Present) -> Any:
        return self.p_x(present.h)

    def posterior(self, past: Past, e: Tensor) -> Categorical:
        return Categorical(e.unsqueeze(-2))

    def _joint(self, batch: Sequences) -> Tensor:
        return self.features(Frame(batch.x.flatten(2), batch.observed.flatten(2), None))

    def exact_log_likelihood(self, batch: Sequences) -> Tensor:
        return torch.where(batch.valid, self._joint(batch).logsumexp(-1), 0.0).sum(-1)

    def exact_filter(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        p = self._joint(batch).softmax(-1)
        return p, (p * (1 - p)).sqrt()

    def exact_smooth(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        return self.exact_filter(batch)

    def exact_start(self, batch: int) -> Tensor:
        return self.log_weights.expand(batch, -1)

    def exact_step(self, belief: Tensor, frame: Frame) -> ExactStep:
        """The posterior of one frame: no belief is carried on."""
        joint = self.features(frame)
        log_prob = joint.logsumexp(-1)
        log_p = joint - log_prob.unsqueeze(-1)
        p, loc, L = log_p.exp(), *self.components
        p_x = MultivariateNormal(loc.unsqueeze(1), L.unsqueeze(1))
        log_weights = self.log_weights.unsqueeze(-1).expand(-1, p.shape[0])
        return ExactStep(log_p, p, (p * (1 - p)).sqrt(), log_prob, p_x, log_weights)

    def exact_draw(self, belief: Tensor, noise: Tensor) -> Tensor:
        return Categorical(belief.unsqueeze(-2)).sample(noise)

    # --- EM -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def expectation(self, batch: Sequences) -> Expected:
        """Responsibilities, in float64."""
        p, keep = emission_of_states(self.p_x, self.states), batch.valid
        x, observed = batch.x.flatten(2)[keep].double(), batch.observed.flatten(2)[keep]
        joint = self.log_weights.double() + p.log_prob(x.unsqueeze(-2), observed.unsqueeze(-2))
        weights = joint.softmax(-1) * observed.any(-1, keepdim=True)  # a frame without values says nothing
        return Expected(
            joint.logsumexp(-1).sum(), weights.sum(0), statistics(self.emission, p, x, observed, weights)
        )

    @torch.no_grad()
    def maximisation(self, statistics: Expected) -> None:
        p = emission_of_states(self.p_x, self.states)
        self.raw_weights.copy_(log_share(statistics.count, self.raw_weights))
        estimate(self.p_x, p, statistics.emission)

    @torch.no_grad()
    def em_start(self, sequences: list[tuple[Tensor, Tensor]], generator: torch.Generator) -> bool:
        """Gaussians of clusters of frames."""
        self.raw_weights.zero_()
        start_from_clusters(self.p_x, sequences, self.states, generator)
        return True
