"""Linear dynamics that switch between modes: as parameters, or as a conjugate factor q(theta) with natural gradients."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dynavae.distributions import MultivariateNormal
from dynavae.exact._algebra import matvec
from dynavae.exact.conjugate import MNIW, Dirichlet, ExpectedNormal, step
from dynavae.exact.switching import ExpectedSums, SwitchingDynamics

FLOOR = 1e-4
"""Least standard deviation of the dynamics."""


class Discount(NamedTuple):
    """Log-factors that are left of an expected log-density once a normal density is taken out: at most 0."""

    first: Tensor  # (S,)
    later: Tensor  # (S,)
    spread: Tensor  # (S, k, k): -w' spread w / 2


class Density(NamedTuple):
    """p(z_1 | s_1), p(z_t | z_{t-1}, s_t) and p(s), for S modes."""

    m0: Tensor  # (S, n)
    L0: Tensor  # (S, n, n)
    M: Tensor  # (S, n, k): [A B b]
    L: Tensor  # (S, n, n)
    log_initial: Tensor  # (S,)
    log_transition: Tensor  # (S, S)
    discount: Discount | None = None


class Dynamics(nn.Module):
    """Dynamics whose parameters are learnt by gradient; Q and P_0 of each mode are diagonal."""

    def __init__(self, z_dim: int, control_dim: int, modes: int, sticky: float) -> None:
        super().__init__()
        n, S = z_dim, modes
        lead = () if S == 1 else (S,)
        apart = 0.05 if S == 1 else 0.2
        self.modes = S
        self.m0 = nn.Parameter(torch.zeros(*lead, n))
        self.A = nn.Parameter(0.9 * torch.eye(n) + apart * torch.randn(*lead, n, n) / n**0.5)
        self.b = nn.Parameter(torch.zeros(*lead, n))
        self.B = nn.Parameter(0.1 * torch.randn(*lead, n, control_dim)) if control_dim else None
        self.raw_P0, self.raw_Q = (
            nn.Parameter(torch.full((*lead, n), math.log(math.expm1(scale)))) for scale in (1.0, 0.3)
        )
        if S > 1:
            self.raw_initial = nn.Parameter(torch.zeros(S))
            self.raw_transition = nn.Parameter(0.1 * torch.randn(S, S) + sticky * torch.eye(S))

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """Standard deviations of P_0 and Q."""
        return softplus(self.raw_P0) + FLOOR, softplus(self.raw_Q) + FLOOR

    def _chain(self) -> tuple[Tensor, Tensor]:
        if self.modes == 1:
            return self.A.new_zeros(1), self.A.new_zeros(1, 1)
        return self.raw_initial.log_softmax(-1), self.raw_transition.log_softmax(-1)

    def density(self) -> Density:
        """What the prior is made of, in the type of the parameters."""
        parts = [self.A, self.b.unsqueeze(-1)] if self.B is None else [self.A, self.B, self.b.unsqueeze(-1)]
        P0, Q = (torch.diag_embed(scale) for scale in self.scales)
        made = self.m0, P0, torch.cat(parts, -1), Q
        if self.modes == 1:
            made = tuple(part.unsqueeze(0) for part in made)  # type: ignore[assignment]
        return Density(*made, *self._chain())

    def expected(self) -> SwitchingDynamics:
        """What messages read, in float64."""
        m0, L0, M, L, *chain = (part.double() for part in self.density()[:-1])  # type: ignore[union-attr]
        first = ExpectedNormal.known(m0.unsqueeze(-1), L0.square())
        return SwitchingDynamics(first, ExpectedNormal.known(M, L.square()), *chain)


class Transitions(NamedTuple):
    """q(z_t | z_{t-1}) = N(F z + f, L L'), and the same of a first frame, which follows nothing: all (T, B, ...)."""

    F: Tensor
    f: Tensor
    L: Tensor
    f_first: Tensor
    L_first: Tensor

    def path(self, z: Tensor, ran: Tensor, noise: Tensor) -> tuple[Tensor, MultivariateNormal]:
        """z_1:T from standard normals (T, K, B, n), and what each was drawn from; `ran`: whether z (K, B, n) goes before."""
        T, K, B, n = noise.shape
        first = torch.where(ran[:1, ..., None], self.L[0], self.L_first[0])
        L = torch.cat([first.unsqueeze(0), self.L[1:].unsqueeze(1)])
        drawn = matvec(L, noise)
        start = torch.where(ran, matvec(self.F[0], z) + self.f[0], self.f_first[0]) + drawn[0]
        path = [start.permute(1, 2, 0)]  # (B, n, K)
        given = (self.f.unsqueeze(1) + drawn).permute(0, 2, 3, 1).unbind()
        for F_t, given_t in zip(self.F.unbind()[1:], given[1:], strict=True):
            path.append(torch.baddbmm(given_t, F_t, path[-1]))
        found = torch.stack(path).permute(0, 3, 1, 2)
        return found, MultivariateNormal(found - drawn, L.expand(T, K, B, n, n))


class Factor(NamedTuple):
    """A member of the family of theta, or its natural parameters' sums."""

    first: Any
    transition: Any
    initial: Any
    chain: Any


class ConjugateDynamics(nn.Module):
    r"""Dynamics with priors, and a variational factor of the same families, learnt by natural gradients.

    .. math::
        (m_0, P_0)_k \sim \mathrm{NIW}, \quad ([A\,B\,b], Q)_k \sim \mathrm{MNIW}, \quad
        \pi, \Pi_k \sim \mathrm{Dirichlet}, \qquad q(\theta) \text{ alike}

    Its state are buffers: no optimizer sees them, :meth:`natural_step` moves them.
    """

    FIELDS = (("first", MNIW), ("transition", MNIW), ("initial", Dirichlet), ("chain", Dirichlet))

    def __init__(self, z_dim: int, control_dim: int, modes: int, sticky: float, strength: float) -> None:
        super().__init__()
        self.modes, self.sticky, self.strength = modes, sticky, strength
        self.sizes = (modes, z_dim, z_dim + control_dim + 1)
        prior = self.prior()
        apart = 0.05 if modes == 1 else 0.2
        moved = torch.zeros_like(prior.transition.mean)
        moved[..., :z_dim] = apart * torch.randn(modes, z_dim, z_dim, dtype=moved.dtype) / z_dim**0.5
        # Begins somewhat surer than the prior, each mode at dynamics of its own.
        start = prior.transition._replace(
            mean=prior.transition.mean + moved, rows=10 * prior.transition.rows, scale=10 * prior.transition.scale,
            dof=prior.transition.dof + 10 * strength,
        )  # fmt: skip
        self._set(prior._replace(transition=start))
        self.register_buffer("sequences", torch.zeros(()))

    def prior(self) -> Factor:
        """p(theta): standard normal first states, and transitions near 0.9 I with a noise of 0.3."""
        S, n, k = self.sizes
        like = dict(dtype=torch.float64, device=getattr(self, "first_mean", torch.zeros(0)).device)
        c = self.strength
        eye, dof = torch.eye(n, **like), torch.full((S,), n + 1 + c, **like)  # type: ignore[arg-type]
        lead = torch.ones(S, 1, 1, **like)  # type: ignore[arg-type]
        mean = torch.zeros(S, n, k, **like)  # type: ignore[arg-type]
        mean[..., :n] = 0.9 * eye
        rows = torch.eye(k, **like)  # type: ignore[arg-type]
        first = MNIW(0 * mean[..., :1], 0.1 * c * lead, lead * eye * dof[0], dof)
        transition = MNIW(mean, c * lead * rows, lead * 0.09 * eye * dof[0], dof)
        ones = torch.ones(S, **like)  # type: ignore[arg-type]
        chain = ones.expand(S, S) + self.sticky * torch.eye(S, **like)  # type: ignore[arg-type]
        return Factor(first, transition, Dirichlet(ones), Dirichlet(chain))

    @property
    def q(self) -> Factor:
        """q(theta), in float64."""
        found = []
        for name, family in self.FIELDS:
            found.append(family(*(getattr(self, f"{name}_{field}").double() for field in family._fields)))
        return Factor(*found)

    def _set(self, factor: Factor) -> None:
        for (name, family), member in zip(self.FIELDS, factor, strict=True):
            for field in family._fields:
                key, value = f"{name}_{field}", getattr(member, field)
                if key in self._buffers:
                    value = value.to(getattr(self, key))
                self.register_buffer(key, value)

    def expected(self) -> SwitchingDynamics:
        """What messages read: expected natural parameters, in float64."""
        return SwitchingDynamics(*(member.expected() for member in self.q))

    def density(self) -> Density:
        """At the mean of q(theta); in training, the expected log-densities, and the divergence at the first frame."""
        q = self.q
        normals: list[Tensor] = []
        for family in (q.first, q.transition):
            normals += [family.mean, torch.linalg.cholesky(family.scale / family.dof[:, None, None])]
        normals[0] = normals[0].squeeze(-1)
        if not self.training:
            return self._like(Density(*normals, q.initial.mean.log(), q.chain.mean.log()))
        n = self.sizes[1]
        left = []
        for family in (q.first, q.transition):
            at_mean = torch.logdet(family.scale / family.dof[:, None, None])
            left.append(0.5 * (family.expected().log_det + at_mean))
        first = left[0] - 0.5 * n / q.first.rows.squeeze(-1).squeeze(-1)
        if self.sequences > 0:
            first = first - self.kl() / self.sequences
        discount = Discount(first, left[1], n * torch.linalg.inv(q.transition.rows))
        return self._like(Density(*normals, q.initial.expected(), q.chain.expected(), discount))

    def _like(self, density: Density) -> Density:
        dtype = self.sequences.dtype
        *parts, discount = density
        cast = None if discount is None else Discount(*(part.to(dtype) for part in discount))
        return Density(*(part.to(dtype) for part in parts), cast)

    def kl(self) -> Tensor:
        """KL(q(theta) || p(theta)), nats."""
        terms = [a.kl(b).sum() for a, b in zip(self.q, self.prior(), strict=True)]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def natural_step(self, sums: ExpectedSums, rate: float) -> None:
        """Move q(theta) along the natural gradient, given expected sums over all sequences."""
        parts = sums.first, sums.transition, (sums.initial,), (sums.chain,)
        moved = zip(self.q, self.prior(), parts, strict=True)
        self._set(Factor(*(step(q, p, s, rate) for q, p, s in moved)))
