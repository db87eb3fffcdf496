"""LGSSM: the linear-Gaussian state-space model, whose posterior is exact."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dynavae.batch import Sequences
from dynavae.distributions import MultivariateNormal
from dynavae.exact import kalman
from dynavae.exact.likelihood import log_likelihood
from dynavae.exact.local_level import local_level
from dynavae.exact.simulation import Completed, complete
from dynavae.model import Evidence, ExactStep, Frame, Past, Present, SequentialLVM

FLOOR = 1e-4
"""Least diagonal of the Cholesky factors of P_0 and Q."""


class LGSSM(SequentialLVM):
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
    Differs from the references: covariances are held by Cholesky factors with a softplus diagonal.
    Not this model: for a non-linear transition or emission, see :class:`DKF`.

    Args:
        x_dim: features of one observation.
        z_dim: state dimensions.
        control_dim: known inputs per frame.
        noise: "full" or "diagonal" covariance R of the observations.
        min_scale: floor of the diagonal of R's Cholesky factor: a coordinate that never changes has no density.
        start: "random", or "local_level": `fit` then starts from one state per coordinate, with moments of the training
            data (:func:`~dynavae.exact.local_level.local_level`); it needs z_dim = x_dim.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, z_dim).

    Example:
        >>> from dynavae import score
        >>> model, x = LGSSM(x_dim=3, z_dim=2), torch.randn(4, 10, 3)
        >>> a, b = score(model, x, kl="sample"), score(model, x, bound="exact")
        >>> abs(a.nats_per_frame - b.nats_per_frame) < 1e-4
        True
    """

    exact = True
    variants = {"diagonal": {"noise": "diagonal"}}  # noqa: RUF012

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 4,
        control_dim: int = 0,
        noise: str = "full",
        min_scale: float = 1e-4,
        start: str = "random",
    ) -> None:
        super().__init__(x_dim, z_dim, {"emission": "gaussian", "scale": "fixed"}, control_dim)
        if noise not in ("full", "diagonal"):
            raise ValueError(f"noise should be 'full' or 'diagonal'; got {noise!r}.")
        if min_scale <= 0:
            raise ValueError(f"min_scale should be positive; got {min_scale}.")
        if start not in ("random", "local_level"):
            raise ValueError(f"start should be 'random' or 'local_level'; got {start!r}.")
        if start == "local_level" and z_dim != x_dim:
            raise ValueError(
                f"start='local_level' has one state per coordinate: z_dim should be x_dim = {x_dim}; got {z_dim}."
            )
        self.full, self.min_scale, self.start = noise == "full", min_scale, start
        self.m0 = nn.Parameter(torch.zeros(z_dim))
        self.A = nn.Parameter(0.9 * torch.eye(z_dim) + 0.05 * torch.randn(z_dim, z_dim) / math.sqrt(z_dim))
        self.b = nn.Parameter(torch.zeros(z_dim))
        self.C = nn.Parameter(torch.randn(x_dim, z_dim) / math.sqrt(z_dim))
        self.d = nn.Parameter(torch.zeros(x_dim))
        self.raw_P0, self.raw_Q = (nn.Parameter(_raw(z_dim, s)) for s in (1.0, 0.3))
        raw_R = _raw(x_dim, max(0.5, 1.5 * min_scale), min_scale)
        self.raw_R = nn.Parameter(raw_R if self.full else raw_R.diagonal().clone())
        self.B = nn.Parameter(0.1 * torch.randn(z_dim, control_dim)) if control_dim else None
        self.D = nn.Parameter(torch.zeros(x_dim, control_dim)) if control_dim else None

    @property
    def parameters_in_moments(self) -> kalman.LinearGaussian:
        """m_0, P_0, A, Q, C, R, B, D, b, d as matrices."""
        (P0, Q, R) = (L @ L.mT for L in self.factors)
        return kalman.LinearGaussian(self.m0, P0, self.A, Q, self.C, R, self.B, self.D, self.b, self.d)

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lower Cholesky factors of P_0, Q and R."""
        floor = self.min_scale
        R = _factor(self.raw_R, floor) if self.full else torch.diag(softplus(self.raw_R) + floor)
        return _factor(self.raw_P0), _factor(self.raw_Q), R

    @torch.no_grad()
    def set_moments(self, **values: Any) -> LGSSM:
        """Set m0, P0, A, Q, C, R, B, D, b, d by name; covariances positive definite.

        Example:
            >>> LGSSM(x_dim=1, z_dim=1).set_moments(Q=[[0.25]]).parameters_in_moments.Q
            tensor([[0.2500]], grad_fn=<MmBackward0>)
        """
        for name, value in values.items():
            covariance = name in ("P0", "Q", "R")
            target = getattr(self, f"raw_{name}" if covariance else name, None)
            if target is None:
                raise ValueError(
                    f"LGSSM has no parameter {name!r}; it has m0, P0, A, Q, C, R, b, d, and B, D with controls."
                )
            value = torch.as_tensor(value, dtype=target.dtype, device=target.device)
            if covariance:
                value = _unfactor(torch.linalg.cholesky(value), self.min_scale if name == "R" else FLOOR)
                value = value if target.ndim == 2 else value.diagonal()
            if value.shape != target.shape:
                raise ValueError(f"{name} should have shape {tuple(target.shape)}; got {tuple(value.shape)}.")
            target.copy_(value)
        return self

    def calibrate(self, sequences: Iterable[tuple[Tensor, Tensor]]) -> bool:
        """Start from moments of training data, if `start` says so: (T, x_dim) values and masks of each sequence."""
        if self.start == "random":
            return False
        moments = local_level(sequences)._asdict()
        self.set_moments(**{name: value for name, value in moments.items() if value is not None})
        return True

    def evidence(self, seen: Evidence) -> kalman.Information:
        """Messages p(x_{t:T} | z_t) in information form."""
        observed = seen.frame.observed
        valid = torch.arange(len(seen.frame.x), device=seen.lengths.device).unsqueeze(-1) < seen.lengths
        mask = valid.unsqueeze(-1).expand_as(seen.frame.x)
        mask = mask if observed is None else mask & observed
        return kalman.backward_information(self.parameters_in_moments, seen.frame.x, mask, seen.frame.control)

    def initial(self, lead: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self.m0.expand(*lead, -1), self.zeros(lead, 1)  # mean of z_t before control; whether t > 1

    def absorb(self, past: Past, z: Tensor) -> Tensor:
        return z

    def update(self, present: Present, u: Any) -> tuple[Tensor, Tensor]:
        z = present.h
        return z @ self.A.mT + self.b, torch.ones_like(z[..., :1])

    def prior(self, past: Past) -> MultivariateNormal:
        loc, started = past.h
        if self.B is not None:
            loc = loc + started * (past.control @ self.B.mT)
        P0, Q, _ = self.factors
        started = started[..., :1, :, :]  # the same for all particles: no covariance is computed K times
        return MultivariateNormal(loc, torch.where(started.unsqueeze(-1) > 0, Q, P0))

    def likelihood(self, present: Present) -> MultivariateNormal:
        loc = present.h @ self.C.mT + self.d
        if self.D is not None:
            loc = loc + present.control @ self.D.mT
        R = self.factors[2]
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

    def exact_filter(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        return _moments(self._filtered(batch))

    def exact_smooth(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        return _moments(kalman.kalman_smoother(self.parameters_in_moments, self._filtered(batch)))

    def exact_start(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        z = self.z_dim
        return (
            self.m0.expand(batch, -1),
            self.parameters_in_moments.P0.expand(batch, z, z),
            self.zeros((batch,), 1),
        )

    def exact_step(self, belief: tuple[Tensor, Tensor, Tensor], frame: Frame) -> ExactStep:
        """Kalman's predict and update; the belief is mean, covariance, and whether there was a step before."""
        params = self.parameters_in_moments
        mean, covariance, started = belief
        moved = mean @ self.A.mT + self.b
        if self.B is not None:
            moved = moved + frame.control @ self.B.mT
        first = started > 0
        m0 = torch.where(first, moved, params.m0)
        spread = self.A @ covariance @ self.A.mT + params.Q
        P0 = torch.where(first.unsqueeze(-1), 0.5 * (spread + spread.mT), params.P0)
        one = Frame(*(None if a is None else a.unsqueeze(0) for a in frame))
        observed = torch.ones_like(one.x, dtype=torch.bool) if one.observed is None else one.observed
        f = kalman.kalman_filter(params._replace(m0=m0, P0=P0), one.x, observed, one.control)
        ahead = kalman.predictive_observation(params, f.predicted_mean, f.predicted_covariance, one.control)
        p_x = MultivariateNormal(ahead.mean, torch.linalg.cholesky(ahead.covariance))
        stddev = f.covariance[0].diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        after = f.mean[0], f.covariance[0], torch.ones_like(started)
        return ExactStep(
            after, f.mean[0], stddev, f.log_likelihood[0], p_x, f.log_likelihood.new_zeros(1, len(mean))
        )

    def exact_draw(self, belief: tuple[Tensor, Tensor, Tensor], noise: Tensor) -> Tensor:
        mean, covariance, _ = belief
        return MultivariateNormal(mean, torch.linalg.cholesky(covariance)).sample(noise)


def _time_first(batch: Sequences) -> tuple[Tensor, Tensor, Tensor | None]:
    x, observed = batch.x.transpose(0, 1), batch.observed.transpose(0, 1)
    return x, observed, None if batch.control is None else batch.control.transpose(0, 1)


def _moments(belief: Any) -> tuple[Tensor, Tensor]:
    stddev = belief.covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return belief.mean.transpose(0, 1), stddev.transpose(0, 1)


def _factor(raw: Tensor, floor: float = FLOOR) -> Tensor:
    """A lower triangular factor with a positive diagonal."""
    return raw.tril(-1) + torch.diag(softplus(raw.diagonal()) + floor)


def _unfactor(L: Tensor, floor: float = FLOOR) -> Tensor:
    """The inverse of :func:`_factor`; a diagonal below the floor is raised to it."""
    return L.tril(-1) + torch.diag(torch.log(torch.expm1((L.diagonal() - floor).clamp(min=1e-12))))


def _raw(dim: int, scale: float, floor: float = FLOOR) -> Tensor:
    return _unfactor(scale * torch.eye(dim), floor)
