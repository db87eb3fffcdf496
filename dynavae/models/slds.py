"""SLDS: a linear-Gaussian state-space model whose matrices switch; its continuous state is integrated out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from dynavae.batch import Sequences
from dynavae.distributions import Categorical, MultivariateNormal
from dynavae.exact import kalman
from dynavae.exact._algebra import matvec
from dynavae.model import Frame, Past, Present, SequentialLVM
from dynavae.models._switched import SwitchedEmission, SwitchedNormal, pick, picked, unpack, update
from dynavae.nn.heads import inverse_softplus


class SLDS(SequentialLVM):
    r"""Switching linear dynamical system, by a Rao-Blackwellised particle filter.

    .. math::
        p(z_t \mid z_{t-1}) &= \Pi_{z_{t-1}, z_t} \quad\text{(a switch, S classes)} \\
        h_t &= A_{z_t} h_{t-1} + B u_t + b_{z_t} + \varepsilon_t, \quad \varepsilon_t \sim \mathcal N(0, Q_{z_t}), \qquad
        h_1 \sim \mathcal N(m_0, P_0) \\
        x_t &= C_{z_t} h_t + D u_t + d_{z_t} + \delta_t, \quad \delta_t \sim \mathcal N(0, R_{z_t})

    Given the switches the model is linear and Gaussian: a particle is a path of switches, with the Kalman belief
    p(h_t | z_{<=t}, x_{<t}) in `past.h`, and its likelihood is :math:`p(x_t \mid z_{\le t}, x_{<t})`. What is missing of x_t
    updates no belief. The proposal looks one step ahead, :math:`q(z_t) \propto p(z_t \mid z_{t-1})\, p(x_t \mid z_{\le t},
    x_{<t})`, the best one that reads no future; `propose=bootstrap` takes the prior.

    Reads: ``p(z_t | z_{t-1})  p(x_t | x_{<t}, z_{<=t})  q(z_t | x_{<=t}, z_{<t})``

    References: Doucet, de Freitas, Murphy and Russell, Rao-Blackwellised Particle Filtering for Dynamic Bayesian Networks,
    2000; Ghahramani and Hinton, Variational Learning for Switching State-Space Models, 2000.
    Differs from the references: trained by gradient ascent on a bound ("fivo", "iwae"), without the score of the switches.
    Not this model: without switches, see :class:`LGSSM`, without a continuous state, :class:`HMM`.

    Args:
        x_dim: features of one observation.
        states: S, switches.
        h_dim: dimension of the continuous state, which is never sampled.
        control_dim: known inputs per frame.
        sticky: added to the initial log-probability of staying in a state.
        min_scale: floor of the diagonals of the Cholesky factors of P0, Q and R.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, 1).

    Example:
        >>> from dynavae import score
        >>> model, x = SLDS(x_dim=2, states=2, h_dim=3), torch.randn(4, 10, 2)
        >>> score(model, x, bound="fivo", particles=8).bound
        'fivo'
    """

    causal = True
    autoregressive = True
    marginalises = True
    discrete_latent = True
    full_precision = True

    def __init__(
        self,
        x_dim: int,
        states: int = 3,
        h_dim: int = 4,
        control_dim: int = 0,
        sticky: float = 2.0,
        min_scale: float = 1e-3,
    ) -> None:
        super().__init__(x_dim, 1, {"emission": "gaussian", "scale": "fixed"}, control_dim)
        if states < 2 or h_dim < 1:
            raise ValueError(f"an SLDS needs states >= 2 and h_dim >= 1; got {states} and {h_dim}.")
        if min_scale <= 0:
            raise ValueError(f"min_scale should be positive; got {min_scale}.")
        S, n = states, h_dim
        self.states, self.h_dim, self.min_scale = S, n, min_scale
        self.raw_initial = nn.Parameter(torch.zeros(S))
        self.raw_transition = nn.Parameter(0.1 * torch.randn(S, S) + sticky * torch.eye(S))
        self.m0 = nn.Parameter(torch.zeros(n))
        self.A = nn.Parameter(0.9 * torch.eye(n) + 0.2 * torch.randn(S, n, n) / math.sqrt(n))
        self.b = nn.Parameter(0.1 * torch.randn(S, n))
        self.C = nn.Parameter(
            torch.randn(x_dim, n).expand(S, -1, -1) / math.sqrt(n) + 0.05 * torch.randn(S, x_dim, n)
        )
        self.d = nn.Parameter(torch.zeros(S, x_dim))
        self.raw_P0 = nn.Parameter(self._raw(torch.eye(n)))
        self.raw_Q = nn.Parameter(self._raw(0.3 * torch.eye(n).expand(S, -1, -1)))
        self.raw_R = nn.Parameter(self._raw(0.5 * torch.eye(x_dim).expand(S, -1, -1)))
        self.B = nn.Parameter(0.1 * torch.randn(n, control_dim)) if control_dim else None
        self.D = nn.Parameter(torch.zeros(x_dim, control_dim)) if control_dim else None

    def _raw(self, L: Tensor) -> Tensor:
        diagonal = L.diagonal(dim1=-2, dim2=-1)
        return L.tril(-1) + torch.diag_embed(inverse_softplus((diagonal - self.min_scale).clamp(min=1e-12)))

    def _factor(self, raw: Tensor) -> Tensor:
        return raw.tril(-1) + torch.diag_embed(softplus(raw.diagonal(dim1=-2, dim2=-1)) + self.min_scale)

    def _covariance(self, raw: Tensor) -> Tensor:
        L = self._factor(raw)
        return L @ L.mT

    @property
    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """P0 (h_dim, h_dim), Q (S, h_dim, h_dim) and R (S, x_dim, x_dim)."""
        return self._covariance(self.raw_P0), self._covariance(self.raw_Q), self._covariance(self.raw_R)

    @property
    def log_transition(self) -> Tensor:
        """log Pi, rows sum to one, (S, S)."""
        return self.raw_transition.log_softmax(-1)

    @torch.no_grad()
    def set_moments(self, **values: Any) -> SLDS:
        """Set m0, P0, A, Q, b, C, R, d, B, D, or `initial` and `transition` probabilities, by name."""
        for name, value in values.items():
            raw = name in ("P0", "Q", "R", "initial", "transition")
            target = getattr(self, f"raw_{name}" if raw else name, None)
            if not isinstance(target, Tensor):
                raise ValueError(f"SLDS has no parameter {name!r}.")
            value = torch.as_tensor(value, dtype=torch.float64)
            if name in ("P0", "Q", "R"):
                value = self._raw(torch.linalg.cholesky(value))
            elif raw:
                value = value.log()
            if value.shape != target.shape:
                raise ValueError(f"{name} should have shape {tuple(target.shape)}; got {tuple(value.shape)}.")
            target.copy_(value)
        return self

    def latent_values(self, z: Tensor) -> Tensor:
        missing = z.isnan()
        codes = one_hot(z.nan_to_num(0).squeeze(-1).long(), self.states).to(z.dtype)
        return codes.masked_fill(missing, torch.nan)

    # --- x as a function of h, for every switch: it reads x only ------------------------------------------

    @property
    def p_x(self) -> SwitchedEmission:
        return SwitchedEmission(self.C, self.d, self._factor(self.raw_R))

    def features(self, frame: Frame) -> Tensor:
        """log p(x_t | h_t, z_t = k) as a quadratic in h_t, packed: (..., S, h_dim^2 + 2 h_dim + 1)."""
        x = frame.x
        if self.D is not None:
            x = x - frame.control @ self.D.mT
        return self.p_x.message(x, frame.observed).pack()

    # --- the recursion: a Kalman filter per particle ------------------------------------------------------

    def initial(self, lead: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and covariance of h before its transition, log p(z_t | z_<t), and whether there was a step before."""
        n = self.h_dim
        P0 = self._covariance(self.raw_P0)
        log_p = self.raw_initial.log_softmax(-1)
        return (
            self.m0.expand(*lead, n),
            P0.expand(*lead, n, n),
            log_p.expand(*lead, self.states),
            self.zeros(lead, 1),
        )

    def _moved(self, past: Past, A: Tensor, Q: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor of h_t before x_t, for matrices with leading axes that broadcast with the belief's."""
        mean, P, _, started = past.h
        each = A.ndim == 3  # every switch: an axis more than the belief has
        mean, P, started = (a.unsqueeze(2) if each else a for a in (mean, P, started))
        moved = matvec(A, mean) + b
        if self.B is not None:
            known = past.control @ self.B.mT
            moved = moved + (known.unsqueeze(-2) if each else known)
        first = started > 0
        P = torch.where(first.unsqueeze(-1), A @ P @ A.mT + Q, P)
        return torch.where(first, moved, mean), torch.linalg.cholesky(P)

    def absorb(self, past: Past, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code = one_hot(z.squeeze(-1).long(), self.states).to(z.dtype)
        A, Q, b = (pick(code, a) for a in (self.A, self._covariance(self.raw_Q), self.b))
        return *self._moved(past, A, Q, b), code

    def update(self, present: Present, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, L, code = present.h
        after = update(mean, L, picked(code, u))
        log_p = self.log_transition[
            code.argmax(-1)
        ]  # a product would make 0 times -inf of what never happens
        return after.mean, after.covariance, log_p, torch.ones_like(log_p[..., :1])

    # --- the three conditionals ---------------------------------------------------------------------------

    def prior(self, past: Past) -> Categorical:
        return Categorical(past.h[2].unsqueeze(-2))

    def likelihood(self, present: Present) -> MultivariateNormal:
        mean, L, code = present.h
        known = None
        if self.D is not None:
            known = present.control @ self.D.mT
            known = known.reshape((1,) * (mean.ndim - known.ndim) + known.shape)
        return SwitchedNormal(mean, L, code, known, self.p_x)

    def posterior(self, past: Past, e: Tensor) -> Categorical:
        """The optimal proposal: every switch is tried on x_t."""
        mean, L = self._moved(past, self.A, self._covariance(self.raw_Q), self.b)
        return Categorical((past.h[2] + update(mean, L, unpack(e)).log_prob).unsqueeze(-2))

    # --- given the switches ---------------------------------------------------------------------------------

    @torch.no_grad()
    def given_switches(self, batch: Sequences, z: Tensor) -> tuple[kalman.Filtered, kalman.Smoothed]:
        """Exact beliefs about h along paths of switches (S, B, T, 1), such as `dynavae.smooth(model, data).samples`.

        Time leads in the result, and the rows are S times B: entry s B + b is path s of sequence b.
        """
        paths, B, T, _ = z.shape
        s = z.nan_to_num(0).squeeze(-1).long().permute(2, 0, 1).reshape(T, paths * B)
        P0, Q, R = self.covariances
        params = kalman.LinearGaussian(
            self.m0, P0, self.A[s], Q[s], self.C[s], R[s], self.B, self.D, self.b[s], self.d[s]
        )
        x, observed = (a.flatten(2).transpose(0, 1).repeat(1, paths, 1) for a in (batch.x, batch.observed))
        control = None if batch.control is None else batch.control.transpose(0, 1).repeat(1, paths, 1)
        filtered = kalman.kalman_filter(params, x, observed, control)
        return filtered, kalman.kalman_smoother(params, filtered)
