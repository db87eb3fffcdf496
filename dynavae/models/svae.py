"""Structured VAE: recognition potentials on the states of a linear dynamical system, and exact messages between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dynavae.distributions import MultivariateNormal
from dynavae.exact import kalman
from dynavae.model import Evidence, Frame, Past, Present, SequentialLVM
from dynavae.nn import Emission, frame_encoder

FLOOR = 1e-4
"""Least standard deviation of the dynamics, and least precision of a potential."""


class Potentials(NamedTuple):
    r"""Node potentials :math:`\psi(z) = \exp(-\tfrac12 z^\top \mathrm{diag}(J)\, z + h^\top z)`."""

    J: Tensor  # (T, B, z_dim), positive
    h: Tensor  # (T, B, z_dim)


class SVAE(SequentialLVM):
    r"""Structured variational auto-encoder: a linear dynamical system behind a network, with messages as posterior.

    .. math::
        p(x, z) &= \mathcal N(z_1; m_0, P_0) \prod_{t>1} \mathcal N(z_t; A z_{t-1} + B u_t + b, Q) \prod_t p(x_t \mid z_t) \\
        q(z \mid x) &\propto p(z) \prod_t \psi(z_t; x_t), \qquad
        \psi(z; x) = \exp\big(-\tfrac12 z^\top \mathrm{diag}(J(x))\, z + h(x)^\top z\big)

    A recognition network gives each frame a Gaussian potential; then inference is exact, by messages backward in time:
    :math:`q(z_t \mid z_{t-1}, x_{t:T})` fuses the transition with what the future says. A missing frame has no potential.

    Reads: ``p(z_t | z_{t-1})  p(x_t | z_t)  q(z_t | x_{t:T}, z_{t-1})``

    Reference: Johnson, Duvenaud, Wiltschko, Datta and Adams, Composing Graphical Models with Neural Networks for
    Structured Representations and Fast Inference, 2016, arXiv:1603.06277 (its linear dynamical system).
    Differs from the paper: the dynamics are parameters, learnt by gradient, without a prior and variational factor of
    their own, so there are no natural gradients; Q and P_0 are diagonal, which a free decoder makes no restriction; the
    switching variant is not included.
    Not this model: :class:`KVAE` has dynamics that switch, and a posterior from each frame on its own; :class:`LGSSM` is
    exact where the emission is linear.

    Args:
        x_dim: features of one observation.
        z_dim: state dimensions.
        layers: hidden widths of the recognition network; with `image`, filters of its convolutions.
        decoder_layers: of the decoder; by default `layers`, mirrored.
        image: (height, width) of a frame, or (channels, height, width).
        emission, activation, dropout, norm, control_dim, mask_input: as in :class:`VAE`; controls move the state only.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, z_dim).

    Example:
        >>> from dynavae import generate
        >>> generate(SVAE(x_dim=88, z_dim=8), batch=4, length=10).x.shape
        torch.Size([4, 10, 88])
    """

    variants = {"conv": {"image": (2, 2), "layers": (8,), "emission": "bernoulli"}}  # noqa: RUF012

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 8,
        layers: Sequence[int] = (128,),
        decoder_layers: Sequence[int] | None = None,
        image: Sequence[int] | None = None,
        emission: Emission | str | dict[str, Any] = "gaussian",
        activation: str = "relu",
        dropout: float = 0.0,
        norm: str | None = None,
        control_dim: int = 0,
        mask_input: bool = False,
    ) -> None:
        super().__init__(x_dim, z_dim, emission, control_dim, mask_input=mask_input)
        net = dict(activation=activation, dropout=dropout, norm=norm)
        self.encoder = frame_encoder(self.input_dim - control_dim, x_dim, layers, image, **net)
        self.to_potentials = nn.Linear(self.encoder.out_dim, 2 * z_dim)
        mirrored = tuple(layers)[::-1] if decoder_layers is None else decoder_layers
        self.decoder, self.p_x = self.decoder_to(z_dim, mirrored, image, **net)
        self.m0 = nn.Parameter(torch.zeros(z_dim))
        self.A = nn.Parameter(0.9 * torch.eye(z_dim) + 0.05 * torch.randn(z_dim, z_dim) / z_dim**0.5)
        self.b = nn.Parameter(torch.zeros(z_dim))
        self.B = nn.Parameter(0.1 * torch.randn(z_dim, control_dim)) if control_dim else None
        self.raw_P0, self.raw_Q = (
            nn.Parameter(torch.full((z_dim,), math.log(math.expm1(scale)))) for scale in (1.0, 0.3)
        )

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """Standard deviations of P_0 and Q."""
        return softplus(self.raw_P0) + FLOOR, softplus(self.raw_Q) + FLOOR

    def features(self, frame: Frame) -> Tensor:
        return self.encode(frame._replace(control=None))

    def potentials(self, u: Tensor) -> Potentials:
        """What each frame says of its state."""
        raw, h = self.to_potentials(self.encoder(u)).chunk(2, -1)
        return Potentials(softplus(raw) + FLOOR, h)

    def evidence(self, seen: Evidence) -> kalman.Information:
        """Messages of the frames t, ..., T about z_t, in float64: a potential is a noisy sight of z_t at h / J."""
        J, h = (part.double() for part in self.potentials(seen.u))
        t = torch.arange(len(J), device=J.device).unsqueeze(-1)
        frames = (t < seen.lengths).unsqueeze(-1)
        if seen.frame.observed is not None:
            frames = frames & seen.frame.observed.any(-1, keepdim=True)
        control = None if self.B is None else seen.frame.control.double()  # type: ignore[union-attr]
        with torch.autocast(J.device.type, enabled=False):
            return kalman.backward_information(
                self._dynamics(torch.diag_embed(1 / J)), h / J, frames.expand_as(J), control
            )

    def _dynamics(self, R: Tensor) -> kalman.LinearGaussian:
        m0, A, b, P0, Q = (p.double() for p in (self.m0, self.A, self.b, *self.scales))
        eye = torch.eye(self.z_dim, dtype=A.dtype, device=A.device)
        B = None if self.B is None else self.B.double()
        return kalman.LinearGaussian(m0, torch.diag(P0**2), A, torch.diag(Q**2), eye, R, B, None, b)

    def initial(self, lead: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self.m0.expand(*lead, -1), self.zeros(lead, 1)  # mean of z_t before control; whether t > 1

    def absorb(self, past: Past, z: Tensor) -> Tensor:
        return z

    def update(self, present: Present, u: Any) -> tuple[Tensor, Tensor]:
        z = present.h
        return z @ self.A.mT + self.b, torch.ones_like(z[..., :1])

    def prior(self, past: Past) -> MultivariateNormal:
        loc, scale = self._transition(past)
        return MultivariateNormal(loc, torch.diag_embed(scale.expand_as(loc)))

    def _transition(self, past: Past) -> tuple[Tensor, Tensor]:
        loc, started = past.h
        if self.B is not None:
            loc = loc + started * (past.control @ self.B.mT)
        P0, Q = self.scales
        return loc, torch.where(started[..., :1, :, :] > 0, Q, P0)

    def likelihood(self, present: Present) -> Any:
        return self.p_x(self.decoder(present.h))

    def posterior(self, past: Past, e: kalman.Information) -> MultivariateNormal:
        loc, scale = (part.double() for part in self._transition(past))
        with torch.autocast(loc.device.type, enabled=False):
            fused = kalman.condition(loc, torch.diag_embed(scale.square()), e)
            factor = torch.linalg.cholesky(fused.covariance)
        dtype = self.A.dtype
        return MultivariateNormal(fused.mean.to(dtype), factor.to(dtype))
