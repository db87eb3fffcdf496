"""Deep variational Bayes filter: the noise of the transition is inferred, not the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynavae.distributions import Normal, standard_normal
from dynavae.model import Evidence, Frame, Past, Present, SequentialLVM
from dynavae.nn import MLP, Bidirectional, Emission, GaussianHead, frame_encoder
from dynavae.tree import cat, where


class DVBF(SequentialLVM):
    r"""Deep variational Bayes filter with locally linear transitions: all error goes through the transition.

    .. math::
        s_t &= A_t s_{t-1} + B_t u_t + C_t w_t, \qquad (A, B, C)_t = \textstyle\sum_i \alpha_t^i (A, B, C)^i, \qquad
        \alpha_t = \mathrm{softmax}(\mathrm{MLP}(s_{t-1}, u_t)) \\
        s_1 &= \mathrm{MLP}(w_1), \qquad w_t \sim \mathcal N(0, I), \qquad x_t \sim p(x_t \mid s_t) \\
        q(w \mid x) &= q(w_1 \mid x_{1:T}) \prod_{t>1} q(w_t \mid s_{t-1}, x_t, u_t)

    **The latent z_t of the engine is the noise w_t**; the state s_t is a function of w_1:t, carried by the recursion. Only
    the noise is inferred, so what a reconstruction gets wrong flows back through the transitions, and the state is made
    to carry what the dynamics need.

    Reads: ``p(z_t | N(0, I))  p(x_t | z_{<=t})  q(z_t | x_t (t=1: x_{1:T}), z_{<t})``

    Reference: Karl, Soelch, Bayer and van der Smagt, Deep Variational Bayes Filters: Unsupervised Learning of State Space
    Models from Raw Data, 2017, arXiv:1605.06432.
    Differs from the paper: the matrices are parameters, without a distribution of their own; annealing is `kl_warmup`
    of `fit`.
    Not this model: with a Gaussian transition and its own posterior see :class:`DKF`; with exact inference :class:`KVAE`.

    Args:
        x_dim: features of one observation.
        z_dim: dimensions of the noise w_t.
        state_dim: dimensions of s_t.
        mixtures: M matrices of each kind.
        h_dim: units of the recurrent networks that read all of x for w_1.
        layers: hidden widths of the features of x_t; with `image`, filters of convolutions.
        decoder_layers: of the decoder; by default `layers`, mirrored.
        transition_layers: hidden widths behind alpha and behind s_1.
        posterior_layers: hidden widths behind q(w_t | .).
        image: (height, width) of a frame, or (channels, height, width).
        emission, activation, dropout, norm, control_dim, mask_input: as in :class:`VAE`.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, z_dim).

    Example:
        >>> from dynavae import generate
        >>> generate(DVBF(x_dim=88, z_dim=3, state_dim=4), batch=4, length=10).x.shape
        torch.Size([4, 10, 88])
    """

    variants = {"conv": {"image": (2, 2), "layers": (8,), "emission": "bernoulli"}}  # noqa: RUF012

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 3,
        state_dim: int = 3,
        mixtures: int = 16,
        h_dim: int = 64,
        layers: Sequence[int] = (128,),
        decoder_layers: Sequence[int] | None = None,
        transition_layers: Sequence[int] = (32,),
        posterior_layers: Sequence[int] = (64,),
        image: Sequence[int] | None = None,
        emission: Emission | str | dict[str, Any] = "gaussian",
        activation: str = "relu",
        dropout: float = 0.0,
        norm: str | None = None,
        control_dim: int = 0,
        mask_input: bool = False,
    ) -> None:
        super().__init__(x_dim, z_dim, emission, control_dim, mask_input=mask_input)
        for name, value in dict(state_dim=state_dim, mixtures=mixtures).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} of DVBF should be a positive integer; got {value!r}.")
        self.state_dim, self.mixtures = state_dim, mixtures
        net = dict(activation=activation, dropout=dropout, norm=norm)
        self.phi_x = frame_encoder(self.input_dim, x_dim, layers, image, **net)
        self.whole = Bidirectional(self.phi_x.out_dim, h_dim, "lstm")
        self.q_1 = GaussianHead(self.whole.out_dim, z_dim)
        hidden = MLP(self.phi_x.out_dim + state_dim + control_dim, posterior_layers, **net)
        self.q_w = nn.Sequential(hidden, GaussianHead(hidden.out_dim, z_dim))
        hidden = MLP(z_dim, transition_layers, "tanh")
        self.to_first = nn.Sequential(hidden, nn.Linear(hidden.out_dim, state_dim))
        hidden = MLP(state_dim + control_dim, transition_layers, "tanh")
        self.to_weights = nn.Sequential(hidden, nn.Linear(hidden.out_dim, mixtures))
        n = state_dim
        self.A = nn.Parameter(torch.eye(n) + 0.05 * torch.randn(mixtures, n, n))
        self.B = nn.Parameter(0.1 * torch.randn(mixtures, n, control_dim)) if control_dim else None
        self.C = nn.Parameter(0.3 * torch.randn(mixtures, n, z_dim))
        mirrored = tuple(layers)[::-1] if decoder_layers is None else decoder_layers
        self.decoder, self.p_x = self.decoder_to(state_dim, mirrored, image, **net)

    def features(self, frame: Frame) -> Tensor:
        return self.phi_x(self.encode(frame))

    def evidence(self, seen: Evidence) -> tuple[Tensor, Tensor]:
        first = self.whole.ends(seen.u, seen.lengths)
        return seen.u, first.expand(len(seen.u), *first.shape)

    def initial(self, lead: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        return self.zeros(lead, self.state_dim), self.zeros(
            lead, 1
        )  # s_{t-1}; whether there was a step before

    def absorb(self, past: Past, z: Tensor) -> Tensor:
        """The transition: s_t from s_{t-1}, u_t and w_t = z."""
        state, started = past.h
        inputs = cat(state, past.control)
        weights = self.to_weights(inputs).softmax(-1)
        A, C = (torch.einsum("...k,kij->...ij", weights, M) for M in (self.A, self.C))
        moved = A @ state.unsqueeze(-1) + C @ z.unsqueeze(-1)
        if self.B is not None:
            B = torch.einsum("...k,kij->...ij", weights, self.B)
            moved = moved + B @ past.control.unsqueeze(-1)
        return torch.where(started > 0, moved.squeeze(-1), self.to_first(z))

    def update(self, present: Present, u: Any) -> tuple[Tensor, Tensor]:
        return present.h, torch.ones_like(present.h[..., :1])

    def prior(self, past: Past) -> Normal:
        state, _ = past.h
        return standard_normal(state.shape[:-1], self.z_dim, state)

    def likelihood(self, present: Present) -> Any:
        return self.p_x(self.decoder(present.h))

    def posterior(self, past: Past, e: tuple[Tensor, Tensor]) -> Normal:
        state, started = past.h
        u, first = e
        q = self.q_w(cat(u, state, past.control))
        return where(started[..., 0] > 0, q, self.q_1(first))
