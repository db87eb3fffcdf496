"""LGSSM: the linear-Gaussian state-space model, whose posterior is exact."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dynavae.batch import Sequences
from dynavae.closed_forms import ExactStep
from dynavae.distributions import MultivariateNormal
from dynavae.exact import em, kalman
from dynavae.exact._algebra import gaussian_log_density, matvec, semidefinite_cholesky, symmetric
from dynavae.exact.joseph import joseph_gain
from dynavae.exact.likelihood import log_likelihood
from dynavae.exact.linear_gaussian import observed_emission
from dynavae.exact.local_level import local_level
from dynavae.exact.simulation import Completed, complete
from dynavae.exact.stationary import stationary_state
from dynavae.model import Evidence, Frame, Past, Present, SequentialLVM
from dynavae.models._moments import Moments
from dynavae.tree import tree_map


class LGSSM(Moments, SequentialLVM):
    r"""Linear-Gaussian state-space model (Kalman filter and smoother): the oracle of every estimator.

    .. math::
        p(z_1) &= \mathcal N(m_0, P_0), \qquad p(z_t \mid z_{t-1}) = \mathcal N(A z_{t-1} + B u_t + b, Q) \\
        p(x_t \mid z_t) &= \mathcal N(C z_t + D u_t + d, R), \qquad
        q(z \mid x) = \prod_t p(z_t \mid z_{t-1}, x_{t:T}) \;\text{exactly}

    The posterior fuses the transition with the backward message :math:`p(x_{t:T} \mid z_t)`, so every sampled
    path has weight log p(x): the ELBO with a sampled KL *is* the likelihood, whatever the number of paths,
    with values and coordinates missing. The control u_t drives the step into z_t; none enters z_1.

    Reads: ``p(z_t | z_{t-1})  p(x_t | z_t)  q(z_t | x_{t:T}, z_{t-1})``

    References: Kalman 1960; Rauch, Tung and Striebel 1965; Roweis and Ghahramani, A Unifying Review of Linear
    Gaussian Models, 1999.
    Differs from the references: covariances are held by Cholesky factors with a softplus diagonal. Fitted by gradient, or
    by EM in closed form (`fit(..., objective="em")`), see :mod:`dynavae.exact.em`.
    Not this model: for a non-linear transition or emission, see :class:`DKF`.

    Args:
        x_dim: features of one observation.
        z_dim: state dimensions.
        control_dim: known inputs per frame.
        noise: "full" or "diagonal" covariance R of the observations.
        min_scale: floor of the diagonal of R's Cholesky factor: a coordinate that never changes has no density.
        start: "random"; "data": `fit` starts at random parameters on the scale of the training data; or "local_level": it
            starts from one state per coordinate, with moments of the training data
            (:func:`~dynavae.exact.local_level.local_level`); it needs z_dim = x_dim.
        state_noise: "full" or "diagonal" covariance Q.
        stationary: the first state is that of a chain that has run for ever: m0 and P0 follow from A, b and Q.
        known: what is not to be learned, by name: nested lists of the shape of m0, A, b, C, d, B or D, with a number where
            an entry is held and None where it is learned; for P0, Q and R a whole matrix, or a list of variances (numbers
            or None) of a diagonal one. Such as ``{"A": [[1, 1], [0, None]], "C": [[1, 0]], "Q": [None, 0]}``. Variances
            below the floor of the factors are raised to it.
        min_state_scale: floor of the diagonals of the Cholesky factors of P0 and Q.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, z_dim).

    Example:
        >>> from dynavae import score
        >>> model, x = LGSSM(x_dim=3, z_dim=2), torch.randn(4, 10, 3)
        >>> a, b = score(model, x, kl="sample"), score(model, x, bound="exact")
        >>> abs(a.nats_per_frame - b.nats_per_frame) < 1e-4
        True
    """

    exact = True
    full_precision = True
    closed_form_em = True
    variants = {  # noqa: RUF012
        "diagonal": {"noise": "diagonal"},
        "stationary": {"stationary": True, "state_noise": "diagonal"},
        "known": {"known": {"C": [[1.0, None, 0.0]] * 4, "Q": [None, 0.09, None], "b": [0.0, None, 0.0]}},
    }

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 4,
        control_dim: int = 0,
        noise: str = "full",
        min_scale: float = 1e-4,
        start: str = "random",
        state_noise: str = "full",
        stationary: bool = False,
        known: dict[str, Any] | None = None,
        min_state_scale: float = 1e-4,
    ) -> None:
        super().__init__(x_dim, z_dim, {"emission": "gaussian", "scale": "fixed"}, control_dim)
        if start not in ("random", "data", "local_level"):
            raise ValueError(f"start should be 'random', 'data' or 'local_level'; got {start!r}.")
        if start == "local_level" and z_dim != x_dim:
            raise ValueError(
                f"start='local_level' has one state per coordinate: z_dim should be x_dim = {x_dim}; got {z_dim}."
            )
        self.start = start
        self.create_parameters(
            x_dim, z_dim, control_dim, noise, state_noise, min_scale, min_state_scale, stationary, known
        )

    def expectation(self, batch: Sequences) -> em.Expected:
        x, observed, control = _time_first(batch)
        diagonal = self.kinds["R"] == "diagonal"
        return em.expect(self.parameters_in_moments, x, observed, control, batch.lengths, diagonal)

    @torch.no_grad()
    def maximisation(self, statistics: em.Expected) -> None:
        free = {}
        for name in kalman.LinearGaussian._fields:
            known = self._known(name)
            if known is not None:
                mask = known.isnan()
                free[name] = torch.diag(mask) if name in self.kinds and known.ndim == 1 else mask
        diagonal = [name for name, kind in self.kinds.items() if kind == "diagonal"]
        floor, floor_R = (1.0001 * self.floors[name] ** 2 for name in "QR")
        new = em.maximise(
            self.parameters_in_moments, statistics, free, diagonal, self.stationary, floor, floor_R
        )
        own = ("m0", "P0") if self.stationary else ()
        self.set_moments(**{k: v for k, v in new._asdict().items() if v is not None and k not in own})

    def calibrate(self, sequences: Iterable[tuple[Tensor, Tensor]]) -> bool:
        """Start from moments of training data, if `start` says so: (T, x_dim) values and masks of each sequence."""
        return self.em_start(list(sequences), torch.Generator().manual_seed(0))

    def em_start(self, sequences: list[tuple[Tensor, Tensor]], generator: torch.Generator) -> bool:
        if self.start == "random":
            return False
        if self.start == "local_level":
            moments = local_level(sequences)._asdict()
        else:
            moments = random_start(sequences, self.z_dim, generator)
        own = ("m0", "P0") if self.stationary else ()
        self.set_moments(**{k: v for k, v in moments.items() if v is not None and k not in own})
        return True

    def evidence(self, seen: Evidence) -> kalman.Information:
        """Messages p(x_{t:T} | z_t) in information form."""
        observed = seen.frame.observed
        valid = torch.arange(len(seen.frame.x), device=seen.lengths.device).unsqueeze(-1) < seen.lengths
        mask = valid.unsqueeze(-1).expand_as(seen.frame.x)
        mask = mask if observed is None else mask & observed
        return kalman.backward_information(self.parameters_in_moments, seen.frame.x, mask, seen.frame.control)

    def initial(self, lead: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self.value("m0").expand(*lead, -1), self.zeros(
            lead, 1
        )  # mean of z_t before control; whether t > 1

    def absorb(self, past: Past, z: Tensor) -> Tensor:
        return z

    def update(self, present: Present, u: Any) -> tuple[Tensor, Tensor]:
        z = present.h
        return z @ self.value("A").mT + self.value("b"), torch.ones_like(z[..., :1])

    def prior(self, past: Past) -> MultivariateNormal:
        loc, started = past.h
        if self.B is not None:
            loc = loc + started * (past.control @ self.value("B").mT)
        P0, Q = self._factor("P0"), self._factor("Q")
        started = started[..., :1, :, :]  # the same for all particles: no covariance is computed K times
        return MultivariateNormal(loc, torch.where(started.unsqueeze(-1) > 0, Q, P0))

    def likelihood(self, present: Present) -> MultivariateNormal:
        loc = present.h @ self.value("C").mT + self.value("d")
        if self.D is not None:
            loc = loc + present.control @ self.value("D").mT
        R = self._factor("R")
        return MultivariateNormal(loc, R.expand(*loc.shape, -1))

    def posterior(self, past: Past, e: kalman.Information) -> MultivariateNormal:
        p = self.prior(past)
        fused = kalman.condition(p.loc, p.scale_tril @ p.scale_tril.mT, e)
        return MultivariateNormal(fused.mean, torch.linalg.cholesky(fused.covariance))

    def _filtered(self, batch: Sequences) -> kalman.Filtered:
        return kalman.kalman_filter(self.parameters_in_moments, *_time_first(batch))

    def exact_log_likelihood(self, batch: Sequences) -> Tensor:
        return log_likelihood(self.parameters_in_moments, *_time_first(batch))

    def exact_paths(self, batch: Sequences, noise_z: Tensor, noise_x: Tensor) -> Completed:
        """Samples and means of z_1:T and of what is missing of x, given noise (T, K, B, .): time leads."""
        x, observed, control = _time_first(batch)
        return complete(self.parameters_in_moments, x, noise_z, noise_x, observed, control)

    def exact_observations(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        """Means and standard deviations (B, T, x_dim) of a fresh x_t given what was observed up to t."""
        filtered, control = self._filtered(batch), _time_first(batch)[2]
        p_x = kalman.predictive_observation(
            self.parameters_in_moments, filtered.mean, filtered.covariance, control
        )
        return _moments(p_x)

    def exact_filter(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        return _moments(self._filtered(batch))

    def exact_smooth(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        return _moments(kalman.kalman_smoother(self.parameters_in_moments, self._filtered(batch)))

    def _factor(self, name: str) -> Tensor:
        if name != "P0" or not self.stationary or not torch.compiler.is_compiling():
            return super()._factor(name)
        P0 = stationary_state(self.value("A"), self._covariance("Q")).covariance
        return torch.linalg.cholesky(P0)  # with no check, which is a branch on values

    def exact_start(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        z = self.z_dim
        return (
            self.value("m0").expand(batch, -1),
            self._covariance("P0").expand(batch, z, z),
            self.zeros((batch,), 1),
        )

    def exact_step(self, belief: tuple[Tensor, Tensor, Tensor], frame: Frame) -> ExactStep:
        """Kalman's predict and update; the belief is mean, covariance, and whether there was a step before."""
        params = self.parameters_in_moments
        mean, covariance, started = belief
        moved = mean @ params.A.mT + self.value("b")
        if params.B is not None:
            moved = moved + frame.control @ params.B.mT
        first = started > 0
        m0 = torch.where(first, moved, params.m0)
        spread = params.A @ covariance @ params.A.mT + params.Q
        P0 = torch.where(first.unsqueeze(-1), 0.5 * (spread + spread.mT), params.P0)
        one = Frame(*(None if a is None else a.unsqueeze(0) for a in frame))
        observed = torch.ones_like(one.x, dtype=torch.bool) if one.observed is None else one.observed
        update = _traced_update if torch.compiler.is_compiling() else kalman.kalman_filter
        f = update(params._replace(m0=m0, P0=P0), one.x, observed, one.control)
        S = symmetric(params.C @ P0 @ params.C.mT + params.R)
        loc = m0 @ params.C.mT + _offset(params, frame.control)
        p_x = MultivariateNormal(loc.unsqueeze(0), torch.linalg.cholesky(S).unsqueeze(0))
        stddev = f.covariance[0].diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        after = f.mean[0], f.covariance[0], torch.ones_like(started)
        return ExactStep(
            after, f.mean[0], stddev, f.log_likelihood[0], p_x, torch.zeros_like(f.log_likelihood)
        )

    def exact_draw(self, belief: tuple[Tensor, Tensor, Tensor], noise: Tensor) -> Tensor:
        mean, covariance, _ = belief
        return MultivariateNormal(mean, semidefinite_cholesky(covariance, "the belief")).sample(noise)


def _traced_update(
    params: kalman.LinearGaussian, x: Tensor, observed: Tensor, control: Tensor | None
) -> kalman.Filtered:
    """`kalman_filter` of one frame (1, B, .) as a graph: in Joseph form, without the checks, which branch on values."""
    dtype = x.dtype
    params, x, control = tree_map(Tensor.double, (params, x, control))
    C, R, y, seen = observed_emission(params, x, observed, _offset(params, control))
    m, P = params.m0.unsqueeze(0), params.P0.unsqueeze(0)
    e, PC = y - matvec(C, m), P @ C.mT
    L = torch.linalg.cholesky(symmetric(C @ PC + R))
    K, after = joseph_gain(P, PC, C, R, L)
    found = kalman.Filtered(m + matvec(K, e), after, m, P, gaussian_log_density(e, L, seen))
    return tree_map(lambda a: a.to(dtype), found)


def _offset(params: kalman.LinearGaussian, control: Tensor | None) -> Tensor:
    """D u_t + d."""
    assert params.d is not None
    return params.d if params.D is None or control is None else matvec(params.D, control) + params.d


def _time_first(batch: Sequences) -> tuple[Tensor, Tensor, Tensor | None]:
    x, observed = batch.x.transpose(0, 1), batch.observed.transpose(0, 1)
    return x, observed, None if batch.control is None else batch.control.transpose(0, 1)


def _moments(belief: Any) -> tuple[Tensor, Tensor]:
    stddev = belief.covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return belief.mean.transpose(0, 1), stddev.transpose(0, 1)


def random_start(
    sequences: list[tuple[Tensor, Tensor]], z_dim: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Slow states of variance one, of which random mixtures give each coordinate half of its variance."""
    x, seen = (torch.cat(parts) for parts in zip(*sequences, strict=True))
    count = seen.sum(0).clamp(min=1)
    mean = torch.where(seen, x, 0.0).double().sum(0) / count
    variance = (torch.where(seen, x - mean, 0.0).square().sum(0) / count).clamp(min=1e-6)
    draw = torch.randn(len(mean), z_dim, generator=generator, dtype=torch.float64)
    memory = 1 - 0.3 * torch.rand(z_dim, generator=generator, dtype=torch.float64)
    C = draw / draw.norm(dim=-1, keepdim=True) * (0.5 * variance).sqrt().unsqueeze(-1)
    eye = torch.eye(z_dim, dtype=torch.float64)
    A, Q = torch.diag(memory), torch.diag((1 - memory**2).clamp(min=0.02))
    return {
        "m0": 0 * memory,
        "P0": eye,
        "A": A,
        "Q": Q,
        "b": 0 * memory,
        "C": C,
        "d": mean,
        "R": torch.diag(0.5 * variance),
    }
