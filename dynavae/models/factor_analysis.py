"""Factor analysis and probabilistic PCA: linear-Gaussian models of single frames, whose posterior is exact."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dynavae.batch import Sequences
from dynavae.closed_forms import ExactStep
from dynavae.distributions import LOG_2PI, MultivariateNormal, Normal
from dynavae.exact.regression import Regression, solve, spread
from dynavae.model import Evidence, Frame, Past, Present, SequentialLVM
from dynavae.nn.heads import inverse_softplus


class Message(NamedTuple):
    """p(x_t | z) of the observed coordinates, as a function of z: exp(h'z - z'J z / 2 + log_c)."""

    J: Tensor
    h: Tensor
    log_c: Tensor


class Expected(NamedTuple):
    """Sums over frames: log p(x), and the regression of each coordinate on (z_t, u_t, 1)."""

    log_likelihood: Tensor
    emission: Regression


class FactorAnalysis(SequentialLVM):
    r"""Factor analysis: every frame on its own, a few common factors and noise of each coordinate.

    .. math::
        p(z_t) = \mathcal N(0, I), \qquad
        p(x_t \mid z_t) = \mathcal N(W z_t + D u_t + \mu, \Psi), \quad \Psi \;\text{diagonal}, \qquad
        q(z \mid x) = \prod_t p(z_t \mid x_t) \;\text{exactly}

    Fitted by EM, exactly whatever is missing, or by gradient. The log-likelihood costs a factorisation of z_dim x z_dim.

    Reads: ``p(z_t | N(0, I))  p(x_t | z_t)  q(z_t | x_t)``

    References: Rubin and Thayer, EM Algorithms for ML Factor Analysis, 1982; Roweis and Ghahramani, A Unifying Review of
    Linear Gaussian Models, 1999.
    Differs from the references: missing coordinates are left out exactly; control inputs.
    Not this model: for the same noise in all coordinates, see :class:`PPCA`; for factors that remember, :class:`LGSSM`.

    Args:
        x_dim: features of one observation.
        z_dim: factors.
        control_dim: known inputs per frame.
        min_scale: floor of the standard deviations of the noise: it keeps a coordinate from becoming a factor.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, z_dim).

    Example:
        >>> from dynavae import score
        >>> model, x = FactorAnalysis(x_dim=5, z_dim=2), torch.randn(4, 10, 5)
        >>> a, b = score(model, x, kl="sample"), score(model, x, bound="exact")
        >>> abs(a.nats_per_frame - b.nats_per_frame) < 1e-4
        True
    """

    causal = True
    mean_field = True
    exact = True
    full_precision = True
    closed_form_em = True
    isotropic = False

    def __init__(self, x_dim: int, z_dim: int = 4, control_dim: int = 0, min_scale: float = 1e-3) -> None:
        super().__init__(x_dim, z_dim, {"emission": "gaussian", "scale": "fixed"}, control_dim)
        if min_scale <= 0:
            raise ValueError(f"min_scale should be positive; got {min_scale}.")
        self.min_scale = min_scale
        self.W = nn.Parameter(torch.randn(x_dim, z_dim) / math.sqrt(z_dim))
        self.mu = nn.Parameter(torch.zeros(x_dim))
        scale = torch.full((1 if self.isotropic else x_dim,), max(0.5, 1.5 * min_scale))
        self.raw_scale = nn.Parameter(inverse_softplus(scale - min_scale))
        self.D = nn.Parameter(0.1 * torch.randn(x_dim, control_dim)) if control_dim else None

    @property
    def scale(self) -> Tensor:
        """Standard deviations of the noise (x_dim,)."""
        return (softplus(self.raw_scale) + self.min_scale).expand(self.x_dim)

    @torch.no_grad()
    def set_moments(self, W: Any = None, mu: Any = None, scale: Any = None) -> FactorAnalysis:
        """Set loadings (x_dim, z_dim), mean (x_dim,) and standard deviations of the noise ((x_dim,); one for PPCA)."""
        if scale is not None:
            raw = torch.as_tensor(scale, dtype=torch.float64) - self.min_scale
            scale = inverse_softplus(raw.clamp(min=1e-12)).reshape(-1)
        for name, value in (("W", W), ("mu", mu), ("raw_scale", scale)):
            if value is not None:
                target, value = getattr(self, name), torch.as_tensor(value)
                if value.shape != target.shape:
                    raise ValueError(
                        f"{name.removeprefix('raw_')} should have shape {tuple(target.shape)}; got {tuple(value.shape)}."
                    )
                target.copy_(value)
        return self

    def _message(self, frame: Frame) -> Message:
        """Of frames x (..., x_dim), what is missing left out."""
        e = frame.x - self.mu
        if self.D is not None:
            e = e - frame.control @ self.D.mT
        scale = self.scale
        white_W, white = self.W / scale.unsqueeze(-1), e / scale
        if frame.observed is None:
            J = (white_W.mT @ white_W).expand(*e.shape[:-1], -1, -1)
            constant = -0.5 * self.x_dim * LOG_2PI - scale.log().sum()
        else:
            white = torch.where(frame.observed, white, 0.0)
            seen = frame.observed.to(e.dtype)
            J = (seen @ (white_W.unsqueeze(-1) * white_W.unsqueeze(-2)).flatten(1)).unflatten(
                -1, (self.z_dim,) * 2
            )
            constant = -(seen @ (0.5 * LOG_2PI + scale.log()))
        return Message(J, white @ white_W, constant - 0.5 * white.square().sum(-1))

    def _posterior(self, e: Message) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and Cholesky factor of p(z_t | x_t), and log p(x_t)."""
        eye = torch.eye(self.z_dim, dtype=e.J.dtype, device=e.J.device)
        L = torch.linalg.cholesky(eye + e.J)
        inverse = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
        white = (inverse @ e.h.unsqueeze(-1)).squeeze(-1)
        mean = (inverse.mT @ white.unsqueeze(-1)).squeeze(-1)
        log_p = e.log_c + 0.5 * white.square().sum(-1) - L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return mean, torch.linalg.cholesky(inverse.mT @ inverse), log_p

    def evidence(self, seen: Evidence) -> Tensor:
        """J and h of each frame, side by side."""
        e = self._message(seen.frame)
        return torch.cat([e.J.flatten(-2), e.h], -1)

    def initial(self, lead: tuple[int, ...]) -> Tensor:
        return self.zeros(lead, self.z_dim)

    def absorb(self, past: Past, z: Tensor) -> Tensor:
        return z

    def unroll(
        self, z: Tensor, u: Any, c: Any, control: Any, w: Any, h: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return z, z, z[-1]  # the prior reads only the shape of past.h

    def prior(self, past: Past) -> MultivariateNormal:
        zero = past.h.new_zeros(()).expand_as(past.h)
        return MultivariateNormal(zero, torch.eye(self.z_dim).to(zero).expand(*zero.shape, -1))

    def likelihood(self, present: Present) -> Normal:
        loc = present.h @ self.W.mT + self.mu
        if self.D is not None:
            loc = loc + present.control @ self.D.mT
        return Normal(loc, self.scale.expand_as(loc))

    def posterior(self, past: Past, e: Tensor) -> MultivariateNormal:
        J, h = e.split([self.z_dim**2, self.z_dim], -1)
        message = Message(J.unflatten(-1, (self.z_dim, self.z_dim)), h, torch.zeros_like(h[..., 0]))
        return MultivariateNormal(*self._posterior(message)[:2])

    def _beliefs(self, batch: Sequences) -> tuple[Tensor, Tensor, Tensor]:
        x, observed = batch.x.flatten(2), None if batch.complete else batch.observed.flatten(2)
        return self._posterior(self._message(Frame(x, observed, batch.control)))

    def exact_log_likelihood(self, batch: Sequences) -> Tensor:
        return torch.where(batch.valid, self._beliefs(batch)[2], 0.0).sum(-1)

    def exact_filter(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        mean, L, _ = self._beliefs(batch)
        return mean, L.square().sum(-1).sqrt()

    def exact_smooth(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        return self.exact_filter(batch)

    def exact_start(self, batch: int) -> tuple[Tensor, Tensor]:
        zero = self.zeros((batch,), self.z_dim)
        return zero, torch.diag_embed(zero + 1)

    def exact_step(self, belief: tuple[Tensor, Tensor], frame: Frame) -> ExactStep:
        """The posterior of one frame: no belief is carried on."""
        mean, L, log_p = self._posterior(self._message(frame))
        loc = self.mu.expand_as(frame.x)
        if self.D is not None:
            loc = loc + frame.control @ self.D.mT
        S = self.W @ self.W.mT + torch.diag(self.scale.square())
        ahead = MultivariateNormal(loc.unsqueeze(0), torch.linalg.cholesky(S).expand(1, *loc.shape, -1))
        stddev = L.square().sum(-1).sqrt()
        return ExactStep((mean, L), mean, stddev, log_p, ahead, torch.zeros_like(log_p).unsqueeze(0))

    def exact_draw(self, belief: tuple[Tensor, Tensor], noise: Tensor) -> Tensor:
        return MultivariateNormal(*belief).sample(noise)

    # --- EM -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def expectation(self, batch: Sequences) -> Expected:
        """The E-step, in the type of the parameters; sums in float64."""
        mean, L, log_p = self._beliefs(batch)
        keep = batch.valid
        seen = batch.observed.flatten(2)[keep].double()
        mean, L, x = (a[keep].double() for a in (mean, L, batch.x.flatten(2)))
        parts = [
            mean,
            *([] if batch.control is None else [batch.control[keep].double()]),
            torch.ones_like(mean[:, :1]),
        ]
        w = torch.cat(parts, -1)
        D = self.mu.new_zeros(self.x_dim, 0) if self.D is None else self.D
        theta = torch.cat([self.W, D, self.mu.unsqueeze(-1)], -1).double()
        e = (x - w @ theta.mT) * seen
        C = torch.einsum("ni,njk->ijk", seen, L @ L.mT)
        W, z = self.W.double(), self.z_dim
        ww = torch.einsum("ni,nj,nk->ijk", seen, w, w)
        ww[:, :z, :z] += C
        ew = torch.einsum("ni,nj->ij", e, w)
        ew[:, :z] -= torch.einsum("ij,ijk->ik", W, C)
        ee = e.square().sum(0) + torch.einsum("ij,ijk,ik->i", W, C, W)
        stat = Regression(seen.sum(0), ww, ew[:, None], ee[:, None, None])
        return Expected(log_p[keep].double().sum(), stat)

    @torch.no_grad()
    def maximisation(self, statistics: Expected) -> None:
        stat = statistics.emission
        change = solve(stat, None, None)
        self.W += change[:, : self.z_dim]
        self.mu += change[:, -1]
        if self.D is not None:
            self.D += change[:, self.z_dim : -1]
        variance = spread(stat, change).flatten()
        if self.isotropic:
            variance = (variance * stat.count).sum(0, keepdim=True) / stat.count.sum()
        else:
            variance = torch.where(stat.count > 0, variance, self.scale.double().square())
        self.set_moments(scale=variance.clamp(min=1.0001 * self.min_scale**2).sqrt())

    @torch.no_grad()
    def em_start(self, sequences: list[tuple[Tensor, Tensor]], generator: torch.Generator) -> bool:
        """From the principal components of the data (:func:`principal_components`), turned at random."""
        found = principal_components(sequences, min(self.z_dim, self.x_dim - 1) or 1)
        W = torch.zeros(self.x_dim, self.z_dim, dtype=torch.float64)
        W[:, : found.W.shape[1]] = found.W
        turn = torch.linalg.qr(torch.randn(self.z_dim, self.z_dim, generator=generator, dtype=torch.float64))[
            0
        ]
        scale = (
            found.scale
            if self.isotropic
            else (found.variance - W.square().sum(-1)).clamp(min=0.1 * found.variance.clamp(min=1e-6)).sqrt()
        )
        scale = scale.clamp(min=1.1 * self.min_scale)
        self.set_moments(W=W @ turn, mu=found.mu, scale=scale)
        return True

    def calibrate(self, sequences: Any) -> bool:
        """Start `fit` from the principal components of the data."""
        return self.em_start(list(sequences), torch.Generator().manual_seed(0))


class PPCA(FactorAnalysis):
    r"""Probabilistic principal component analysis: factor analysis with the same noise in every coordinate.

    .. math::
        p(z_t) = \mathcal N(0, I), \qquad p(x_t \mid z_t) = \mathcal N(W z_t + D u_t + \mu, \sigma^2 I)

    With complete data and no control the maximum has a closed form (:meth:`solve`), where EM starts: it is then there at
    once. With missing values EM finds it.

    Reads: ``p(z_t | N(0, I))  p(x_t | z_t)  q(z_t | x_t)``

    Reference: Tipping and Bishop, Probabilistic Principal Component Analysis, 1999.
    Differs from the reference: missing coordinates are left out exactly; control inputs.
    Not this model: for a noise of its own in each coordinate, see :class:`FactorAnalysis`.

    Args:
        x_dim: features of one observation.
        z_dim: components, fewer than x_dim.
        control_dim: known inputs per frame.
        min_scale: floor of the standard deviation of the noise.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, z_dim).

    Example:
        >>> x = torch.randn(1, 200, 3) @ torch.diag(torch.tensor([3.0, 1.0, 1.0]))
        >>> model = PPCA(x_dim=3, z_dim=1).solve(x)
        >>> 2.5 < float(model.W.detach().norm()) < 3.5
        True
    """

    isotropic = True

    @torch.no_grad()
    def solve(self, data: Any) -> PPCA:
        """Set the maximum of the likelihood of complete data: an array (B, T, x_dim), a list, `Sequences` or a data set.

        Raises:
            ValueError: values are missing, or there are controls: take :func:`dynavae.fit_em`.
        """
        from dynavae.training import to_data, values

        frames = list(values(to_data(data)))
        if self.D is not None or not all(bool(seen.all()) for _, seen in frames):
            raise ValueError(
                "solve needs complete data and no controls: use fit_em(model, data), which leaves out what is missing."
            )
        if self.z_dim >= self.x_dim:
            raise ValueError(f"solve needs z_dim below x_dim = {self.x_dim}; got {self.z_dim}.")
        found = principal_components(frames, self.z_dim)
        return self.set_moments(found.W, found.mu, found.scale)  # type: ignore[return-value]


class Components(NamedTuple):
    """Principal components of data as PPCA has them."""

    W: Tensor  # (x_dim, q)
    mu: Tensor  # (x_dim,)
    scale: Tensor  # (1,) standard deviation of the noise
    variance: Tensor  # (x_dim,)


def principal_components(sequences: list[tuple[Tensor, Tensor]], number: int) -> Components:
    r""":math:`W = U (\Lambda - \sigma^2 I)^{1/2}`, sigma^2 the mean of the other eigenvalues of the covariance.

    Where values are missing, covariances are those of pairs seen together: a start for EM.

    Args:
        sequences: values (T, x_dim), and whether they were observed, of each sequence.
        number: q.
    """
    x, seen = (torch.cat(parts) for parts in zip(*sequences, strict=True))
    mask = seen.double()
    count = mask.sum(0).clamp(min=1)
    mu = torch.where(seen, x, 0.0).double().sum(0) / count
    e = torch.where(seen, x.double() - mu, 0.0)
    S = (e.mT @ e) / (mask.mT @ mask).clamp(min=1)
    values, U = torch.linalg.eigh(S)
    values, U = values.flip(0), U.flip(1)
    noise = values[number:].clamp(min=0).mean() if number < len(values) else 0.1 * values[-1].clamp(min=0)
    W = U[:, :number] * (values[:number] - noise).clamp(min=0).sqrt()
    return Components(W, mu, noise.sqrt().reshape(1), S.diagonal())
