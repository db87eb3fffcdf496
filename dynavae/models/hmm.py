"""HMM: a discrete Markov chain seen through any emission, whose posterior is exact."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from dynavae.batch import Sequences
from dynavae.closed_forms import ExactStep
from dynavae.distributions import Categorical
from dynavae.exact import hmm
from dynavae.exact.markov_chain import normalise
from dynavae.model import Evidence, Frame, Past, Present, SequentialLVM
from dynavae.nn import Emission, EmissionHead
from dynavae.nn.estimation import emission_of_states, estimate, log_share, start_from_clusters, statistics


class Expected(NamedTuple):
    """Sums over frames: log p(x), expected counts of first states (S,) and of transitions (S, S), and of the emission."""

    log_likelihood: Tensor
    initial: Tensor
    transition: Tensor
    emission: tuple[Any, ...]


class HMM(SequentialLVM):
    r"""Hidden Markov model with S states.

    .. math::
        p(z_1) = \pi, \qquad p(z_t \mid z_{t-1}) = A_{z_{t-1}, z_t}, \qquad p(x_t \mid z_t), \qquad
        q(z \mid x) = \prod_t p(z_t \mid z_{t-1}, x_{t:T}) \;\text{exactly}

    z_t is one class number. The posterior weighs each transition by the backward message
    :math:`p(x_{t:T} \mid z_t)`, so every sampled path has weight log p(x): its ELBO with a sampled KL is the
    likelihood, and so is its gradient, although z is discrete.

    Reads: ``p(z_t | z_{t-1})  p(x_t | z_t)  q(z_t | x_{t:T}, z_{t-1})``

    References: Rabiner, A Tutorial on Hidden Markov Models, 1989.
    Differs from the reference: nothing; observations that are missing, whole or in part, are left out exactly. Fitted by
    gradient, or by EM (Baum-Welch) with an emission that has an M-step: gaussian, multivariate_gaussian, gaussian_mixture,
    bernoulli, categorical, power_spectrum.
    Not this model: for states that move continuously, see :class:`LGSSM` and :class:`DKF`.

    Args:
        x_dim: features of one observation.
        states: S.
        emission: p(x_t | z_t); parameters are a table with a row per state. Coordinates are independent given the state,
            but for "multivariate_gaussian" (option covariance: full, diagonal, spherical, tied), and "gaussian_mixture".
        sticky: added to the initial log-probability of staying in a state.
        pseudo_count: added by EM to each expected count of first states and of transitions: a Dirichlet prior, so that EM
            raises log p(x) plus the log of that prior, and log p(x) alone may fall.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, 1).

    Example:
        >>> from dynavae import smooth
        >>> smooth(HMM(x_dim=2, states=3), torch.zeros(1, 5, 2)).mean.shape  # probabilities of the states
        torch.Size([1, 5, 3])
    """

    exact = True
    full_precision = True
    discrete_latent = True
    variants = {  # noqa: RUF012
        "bernoulli": {"emission": "bernoulli"},
        "categorical": {"emission": {"emission": "categorical", "classes": 3}},
        "full": {"emission": "multivariate_gaussian"},
        "tied": {"emission": {"emission": "multivariate_gaussian", "covariance": "tied"}},
        "mixture": {"emission": "gaussian_mixture"},
    }

    def __init__(
        self,
        x_dim: int,
        states: int = 8,
        emission: Emission | str | dict[str, Any] = "gaussian",
        sticky: float = 1.0,
        pseudo_count: float = 0.0,
    ) -> None:
        super().__init__(x_dim, 1, emission)
        if states < 2:
            raise ValueError(f"an HMM needs at least 2 states; got {states}.")
        if pseudo_count < 0:
            raise ValueError(f"pseudo_count should be 0 or more; got {pseudo_count}.")
        self.states, self.pseudo_count = states, pseudo_count
        self.closed_form_em = self.emission.closed_form_em
        self.raw_initial = nn.Parameter(torch.zeros(states))
        self.raw_transition = nn.Parameter(0.1 * torch.randn(states, states) + sticky * torch.eye(states))
        self.p_x = EmissionHead(self.emission, states, x_dim)  # a linear map of a one-hot code: a table
        nn.init.normal_(self.p_x.linear.weight, std=0.5)

    @property
    def log_initial(self) -> Tensor:
        """log pi, (S,)."""
        return self.raw_initial.log_softmax(-1)

    @property
    def log_transition(self) -> Tensor:
        """log A, rows sum to one, (S, S)."""
        return self.raw_transition.log_softmax(-1)

    def log_emission(self, x: Tensor, observed: Tensor | None) -> Tensor:
        """log p(x_t | z_t = k) of the observed coordinates, (..., S), from (..., x_dim)."""
        p = self.p_x(torch.eye(self.states, dtype=x.dtype, device=x.device))
        mask = None if observed is None else observed.unsqueeze(-2)
        return p.log_prob(x.unsqueeze(-2), mask)

    def latent_values(self, z: Tensor) -> Tensor:
        missing = z.isnan()
        codes = one_hot(z.nan_to_num(0).squeeze(-1).long(), self.states).to(z.dtype)
        return codes.masked_fill(missing, torch.nan)

    def evidence(self, seen: Evidence) -> Tensor:
        """Messages log p(x_{t:T} | z_t = k)."""
        log_emission = self.log_emission(seen.frame.x, seen.frame.observed)
        return hmm.backward_messages(self.log_transition, log_emission, seen.lengths)

    def initial(self, lead: tuple[int, ...]) -> Tensor:
        return self.log_initial.expand(*lead, -1)  # log p(z_t | z_{t-1})

    def absorb(self, past: Past, z: Tensor) -> Tensor:
        return one_hot(z.squeeze(-1).long(), self.states).to(z.dtype)

    def update(self, present: Present, u: Any) -> Tensor:
        return self.log_transition[present.h.argmax(-1)]

    def prior(self, past: Past) -> Categorical:
        return Categorical(past.h.unsqueeze(-2))

    def likelihood(self, present: Present) -> Any:
        return self.p_x(present.h)

    def posterior(self, past: Past, e: Tensor) -> Categorical:
        return Categorical((past.h + e).unsqueeze(-2))

    def _filtered(self, batch: Sequences) -> tuple[Any, Tensor, Tensor]:
        log_emission = self.log_emission(batch.x, batch.observed).transpose(0, 1)
        filtered = hmm.hmm_filter(self.log_initial, self.log_transition, log_emission, batch.lengths)
        return filtered, log_emission, batch.lengths

    def exact_log_likelihood(self, batch: Sequences) -> Tensor:
        return self._filtered(batch)[0].log_likelihood.sum(0)

    def exact_filter(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        return _moments(self._filtered(batch)[0].log_filtered)

    def exact_smooth(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        _, log_emission, lengths = self._filtered(batch)
        smoothed = hmm.hmm_smoother(self.log_initial, self.log_transition, log_emission, lengths)
        return _moments(smoothed.log_gamma)

    def exact_start(self, batch: int) -> tuple[Tensor, Tensor]:
        return self.log_initial.expand(batch, -1), self.zeros((batch,), 1)

    def exact_step(self, belief: tuple[Tensor, Tensor], frame: Frame) -> ExactStep:
        """One step of the forward algorithm; the belief is log p(z_t | x_<=t), and whether there was a step before."""
        log_p, started = belief
        moved = torch.logsumexp(log_p.unsqueeze(-1) + self.log_transition, -2)
        predicted = torch.where(started > 0, moved, self.log_initial)
        log_filtered, log_prob = normalise(predicted + self.log_emission(frame.x, frame.observed))
        p_x = self.p_x(torch.eye(self.states, dtype=log_p.dtype, device=log_p.device).unsqueeze(1))
        p = log_filtered.exp()
        after = log_filtered, torch.ones_like(started)
        return ExactStep(after, p, (p * (1 - p)).sqrt(), log_prob, p_x, predicted.mT)

    def exact_draw(self, belief: tuple[Tensor, Tensor], noise: Tensor) -> Tensor:
        return Categorical(belief[0].unsqueeze(-2)).sample(noise)

    def expectation(self, batch: Sequences) -> Expected:
        """The E-step of Baum and Welch, in float64: expected counts are derivatives of log p(x) by log-potentials."""
        with torch.no_grad():
            p = emission_of_states(self.p_x, self.states)
            x, observed = (a.flatten(2).transpose(0, 1) for a in (batch.x, batch.observed))
            log_b = p.log_prob(x.double().unsqueeze(-2), observed.unsqueeze(-2))
        with torch.inference_mode(False), torch.enable_grad():
            chain = [
                a.detach().double().clone().requires_grad_()
                for a in (self.log_initial, self.log_transition, log_b)
            ]
            log_likelihood = hmm.hmm_filter(*chain, batch.lengths).log_likelihood.sum()
            initial, transition, gamma = torch.autograd.grad(log_likelihood, chain, materialize_grads=True)
        valid = batch.valid.T
        return Expected(
            log_likelihood.detach(),
            initial,
            transition,
            statistics(self.emission, p, x[valid], observed[valid], gamma[valid]),
        )

    @torch.no_grad()
    def maximisation(self, statistics: Expected) -> None:
        p = emission_of_states(self.p_x, self.states)
        self.raw_initial.copy_(log_share(statistics.initial + self.pseudo_count, self.raw_initial))
        self.raw_transition.copy_(log_share(statistics.transition + self.pseudo_count, self.raw_transition))
        estimate(self.p_x, p, statistics.emission)

    @torch.no_grad()
    def em_log_prior(self) -> float:
        """Of the Dirichlet prior behind `pseudo_count`."""
        if not self.pseudo_count:
            return 0.0
        return self.pseudo_count * float(self.log_initial.sum() + self.log_transition.sum())

    @torch.no_grad()
    def em_start(self, sequences: list[tuple[Tensor, Tensor]], generator: torch.Generator) -> bool:
        """Emissions of clusters of frames; the chain as it was built."""
        start_from_clusters(self.p_x, sequences, self.states, generator)
        return True

    def most_probable_path(self, batch: Sequences) -> Tensor:
        """argmax over z_1:T of p(z, x), by the Viterbi algorithm, (B, T) class numbers."""
        _, log_emission, lengths = self._filtered(batch)
        return hmm.viterbi(self.log_initial, self.log_transition, log_emission, lengths).path.T


def _moments(log_p: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp().transpose(0, 1)
    return p, (p * (1 - p)).sqrt()
