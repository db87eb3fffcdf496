"""STORN: a recurrent network with an independent latent at its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynavae.distributions import Normal, standard_normal
from dynavae.model import Evidence, Frame, Past, Present, SequentialLVM
from dynavae.nn import MLP, Bidirectional, Emission, GaussianHead, Memory
from dynavae.nn.memory import State
from dynavae.tree import cat


class Delayed(Memory):
    """A memory whose output at t is the one before it reads u_t: g_t = g(x_{<t})."""

    def run(
        self, u: Tensor, m: State | None = None, valid: Tensor | None = None, fused: bool = True
    ) -> tuple[Tensor, State]:
        if m is None:
            m = self.initial(u.shape[1:-1])
        out, last = super().run(u, m, valid, fused)
        return torch.cat([self.read(m).expand(1, *out.shape[1:]), out[:-1]]), last


class STORN(SequentialLVM):
    r"""Stochastic recurrent network: latents independent in time drive a recurrence.

    .. math::
        p(x, z) &= \prod_t p(z_t)\, p(x_t \mid h_t), \qquad p(z_t) = \mathcal N(0, I), \qquad
            h_t = \mathrm{RNN}(h_{t-1}, [\varphi_z(z_t), \varphi_x(x_{t-1})]) \\
        q(z \mid x) &= \prod_t q(z_t \mid x_{1:t})

    Reads: ``p(z_t | N(0, I))  p(x_t | x_{<t}, z_{<=t})  q(z_t | x_{<=t})``

    Reference: Bayer and Osendorfer, Learning Stochastic Recurrent Networks, 2014, arXiv:1411.7610.
    Differs from the paper: the recognition network reads x_t (``reads="current"``, as every published
    comparison does); ``"past"`` (x_{<t}, the paper's text) and ``"full"`` (both directions) are options.
    Not this model: for latents with dynamics of their own, see :class:`VRNN` or :class:`SRNN`.

    Args:
        x_dim: features of one observation.
        z_dim: latent dimensions.
        h_dim: units of both recurrences.
        reads: what the recognition network sees: "past", "current" or "full".
        x_layers: layers on x_{t-1} (generation) and, separately, on x_t (recognition).
        z_layers: layers on z_t.
        decoder_layers: layers between h_t and the emission.
        posterior_layers: layers between the recognition state and q.
        memory, memory_layers, dropout: of the recurrences.
        emission, activation, norm, control_dim, mask_input: as in :class:`VAE`.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, z_dim).

    Example:
        >>> from dynavae import generate
        >>> generate(STORN(x_dim=88, z_dim=16, h_dim=64), batch=4, length=10).x.shape
        torch.Size([4, 10, 88])
    """

    autoregressive = True
    mean_field = True
    variants = {"past": {"reads": "past"}, "full": {"reads": "full", "memory": "gru"}}  # noqa: RUF012
    causal_variant = {"reads": "current"}  # noqa: RUF012

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 16,
        h_dim: int = 128,
        reads: str = "current",
        x_layers: Sequence[int] = (256,),
        z_layers: Sequence[int] = (32, 64),
        decoder_layers: Sequence[int] = (256,),
        posterior_layers: Sequence[int] = (64, 32),
        memory: str = "lstm",
        memory_layers: int = 1,
        emission: Emission | str | dict[str, Any] = "gaussian",
        activation: str = "tanh",
        dropout: float = 0.0,
        norm: str | None = None,
        control_dim: int = 0,
        mask_input: bool = False,
    ) -> None:
        super().__init__(x_dim, z_dim, emission, control_dim, mask_input=mask_input)
        if reads not in ("past", "current", "full"):
            raise ValueError(f"reads should be 'past', 'current' or 'full'; got {reads!r}.")
        self.reads, self.causal = reads, reads != "full"
        options = dict(cell=memory, layers=memory_layers, dropout=dropout)
        self.phi_x = MLP(self.input_dim, x_layers, activation, dropout, norm)
        self.phi_z = MLP(z_dim + control_dim, z_layers, activation, dropout, norm)
        self.rnn = Memory(self.phi_x.out_dim + self.phi_z.out_dim, h_dim, **options)
        self.decoder = MLP(h_dim, decoder_layers, activation, dropout, norm)
        self.p_x = self.emit(self.decoder.out_dim)
        self.psi_x = MLP(self.input_dim, x_layers, activation, dropout, norm)
        if reads == "full":
            self.both = Bidirectional(self.psi_x.out_dim, h_dim, **options)
        else:
            self.seen_x = (Delayed if reads == "past" else Memory)(self.psi_x.out_dim, h_dim, **options)
        g_dim = 2 * h_dim if reads == "full" else h_dim
        self.encoder = MLP(g_dim, posterior_layers, activation, dropout, norm)
        self.q_z = GaussianHead(self.encoder.out_dim, z_dim)

    def features(self, frame: Frame) -> Tensor:
        return self.phi_x(self.encode(frame))

    def recognition(self, frame: Frame) -> Tensor:
        return self.psi_x(self.encode(frame))

    def evidence(self, seen: Evidence) -> Tensor:
        if self.reads == "full":
            g = self.both(self.recognition(seen.frame), seen.lengths)
        else:
            g = seen.g
        return self.encoder(g)

    def initial(self, lead: tuple[int, ...]) -> Any:
        return self.rnn.initial(lead), self.zeros(lead, self.phi_x.out_dim)  # h_{t-1}, phi(x_{t-1})

    def absorb(self, past: Past, z: Tensor) -> Any:
        state, u = past.h
        return self.rnn.step(state, cat(self.phi_z(cat(z, past.control)), u))

    def update(self, present: Present, u: Tensor) -> Any:
        lead = self.rnn.read(present.h).shape[:-1]
        return present.h, u.expand(*lead, u.shape[-1])

    def unroll(self, z: Tensor, u: Tensor, c: Any, control: Any, w: Any, h: Any) -> tuple[Any, Any, Any]:
        state, u_0 = h
        control = None if control is None else control.unsqueeze(1)
        u = u.unsqueeze(1).expand(*z.shape[:-1], -1)
        before = torch.cat([u_0.unsqueeze(0), u[:-1]])
        out, last = self.rnn.run(cat(self.phi_z(cat(z, control)), before), state)
        # the prior reads only the shape of past.h, the likelihood only the output of the recurrence
        return (((out,),), before), ((out,),), (last, u[-1])

    def prior(self, past: Past) -> Normal:
        like = past.h[1]
        return standard_normal(like.shape[:-1], self.z_dim, like)

    def likelihood(self, present: Present) -> Any:
        return self.p_x(self.decoder(self.rnn.read(present.h)))

    def posterior(self, past: Past, e: Tensor) -> Normal:
        return self.q_z(e)
