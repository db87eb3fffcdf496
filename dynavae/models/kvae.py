"""KVAE: a linear-Gaussian state-space model below a frame-wise auto-encoder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from dynavae.batch import Sequences
from dynavae.distributions import MultivariateNormal
from dynavae.exact import kalman
from dynavae.exact._algebra import matvec
from dynavae.model import Evidence, Frame, Past, Present, SequentialLVM
from dynavae.models._mixed import Belief, MixedDynamics, exactly
from dynavae.models._slow_start import start_slowly
from dynavae.nn import Emission, Memory, frame_encoder
from dynavae.options import one_of


class Encoded(NamedTuple):
    """What the posterior reads of x: q(a_t | x_t), and across gaps the message of the future about s_t."""

    loc: Tensor  # (T, B, z_dim)
    scale: Tensor
    seen: Tensor | None = None  # (T, B, 1); None: all frames were
    J: Tensor | None = None  # (T, B, n, n) and
    h: Tensor | None = None  # (T, B, n), in information form


class States(NamedTuple):
    """Beliefs about the states behind a video, given the means of q(a_t | x_t). NaN after a sequence's end."""

    a: Tensor  # (B, T, z_dim) encoded frames; where x_t is missing, the filter's prediction
    weights: Tensor  # (B, T, mixtures) alpha_t of the dynamics
    filtered_mean: Tensor  # (B, T, n) of s_t given x_1:t
    filtered_covariance: Tensor
    smoothed_mean: Tensor  # of s_t given x_1:T
    smoothed_covariance: Tensor
    filtered_a: Tensor  # (B, T, z_dim): C_t times these means
    smoothed_a: Tensor


class KVAE(MixedDynamics, SequentialLVM):
    r"""Kalman variational auto-encoder: frames become points a_t, and linear dynamics with mixed matrices move them.

    .. math::
        s_1 &\sim \mathcal N(0, P_0), \qquad s_t = A_t s_{t-1} + B_t u_t + b_t + \mathcal N(0, Q), \qquad
        a_t = C_t s_t + \mathcal N(0, R) \\
        (A, B, C, b)_t &= \textstyle\sum_k \alpha_t^k\, (A, B, C, b)^k, \qquad
        \alpha_t = \mathrm{softmax}(W\,\mathrm{LSTM}(a_0, a_1, \dots, a_{t-1})) \\
        x_t &\sim p(x_t \mid a_t), \qquad q(a \mid x) = \prod_t q(a_t \mid x_t)

    **The latent z_t of the engine is the pseudo-observation a_t**; the state s_t is integrated out: `past.h` holds the
    Kalman belief about it, so the prior :math:`p(a_t \mid a_{<t})` is the exact predictive Gaussian, and the ELBO has
    log p(a) where the paper has a sampled state (the same in expectation, without that variance). Where x_t is missing, a_t
    is drawn from its Gaussian given all that was seen before and after, by messages of the future (it `bridges` gaps).
    It is a proposal, and the bound stays a bound: the messages have the encoder's mean and spread where the path has draws,
    and the weights alpha in a gap come from predictions there. With one mixture and an encoder without spread it is the
    exact conditional, and a missing frame is integrated out.
    :meth:`states` gives filtered and smoothed states.

    Reads: ``p(z_t | z_{<t})  p(x_t | z_t)  q(z_t | x_t)``

    Reference: Fraccaro, Kamronn, Paquet and Winther, A Disentangled Recognition and Nonlinear Dynamics Model for
    Unsupervised Learning, 2017, arXiv:1710.05741.
    Differs from the paper: the state is integrated out instead of sampled, and what is missing is drawn, not
    replaced by its prediction; the codes start at slow features; offsets and learned noise are new; Kalman algebra is
    in float64. Its reconstruction weight of 0.3 is `beta` = 1 / 0.3.
    Not this model: recognition potentials on the state itself are :class:`SVAE`; an exact model of x is :class:`LGSSM`.

    Args:
        x_dim: features of one observation.
        z_dim: dimensions of a_t.
        state_dim: dimensions of s_t.
        mixtures: K matrices of each kind; with 1 the dynamics do not vary.
        h_dim: units of the LSTM behind alpha.
        layers: hidden widths of the encoder; with `image`, filters of its convolutions.
        decoder_layers: of the decoder; by default those of the encoder, mirrored.
        image: (height, width) of a frame, or (channels, height, width): encoder and decoder then convolve.
        state_noise, a_noise: variances: Q = state_noise I, R = a_noise I. They are fixed, and give a_t its scale; a_noise
            is also the largest variance of q(a_t | x_t).
        start_variance: P_0 = start_variance I.
        learn_noise: learn the variances of each coordinate of Q and R; they start at state_noise and a_noise.
        offsets: mix offsets b of the state, too; without them A_t alone turns a velocity around at a wall.
        start: "slow": training begins at the :func:`slow features <dynavae.exact.slow_features.slow_features>` of the
            frames and constant velocity, which unfolds the plane of codes (600 updates on single frames, before the
            first epoch). "random": as in the paper; whether the plane unfolds then depends on the initial weights.
        emission, activation, dropout, norm, control_dim, mask_input: as in :class:`VAE`; controls move the state only.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, z_dim).

    Example:
        >>> from dynavae import generate
        >>> model = KVAE(x_dim=64, image=(8, 8), layers=(8, 8), emission="bernoulli")
        >>> generate(model, batch=4, length=10).x.shape
        torch.Size([4, 10, 64])
    """

    causal = True
    mean_field = True
    bridges = True
    variants = {  # noqa: RUF012
        "linear": {"mixtures": 1},
        "offsets": {"offsets": True, "learn_noise": True, "start": "random"},
        "conv": {"image": (2, 2), "layers": (8,), "emission": "bernoulli"},
    }

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 2,
        state_dim: int = 4,
        mixtures: int = 3,
        h_dim: int = 50,
        layers: Sequence[int] = (128,),
        decoder_layers: Sequence[int] | None = None,
        image: Sequence[int] | None = None,
        state_noise: float = 0.08,
        a_noise: float = 0.03,
        start_variance: float = 20.0,
        learn_noise: bool = False,
        offsets: bool = False,
        start: str = "slow",
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
                raise ValueError(f"{name} of KVAE should be a positive integer; got {value!r}.")
        variances = dict(state_noise=state_noise, a_noise=a_noise, start_variance=start_variance)
        for name, variance in variances.items():
            if not variance > 0:
                raise ValueError(f"{name} of KVAE is a variance and should be positive; got {variance}.")
        one_of("start", start, ("slow", "random"))
        self.state_dim, self.mixtures, self.start = state_dim, mixtures, start
        self.state_noise, self.a_noise, self.start_variance = state_noise, a_noise, start_variance
        net = dict(activation=activation, dropout=dropout, norm=norm)
        in_dim = self.input_dim - control_dim
        self.encoder = frame_encoder(in_dim, x_dim, layers, image, **net)
        self.q_a = nn.Linear(self.encoder.out_dim, 2 * z_dim)
        mirrored = tuple(layers)[::-1] if decoder_layers is None else decoder_layers
        self.decoder, self.p_x = self.decoder_to(z_dim, mirrored, image, **net)
        n = state_dim
        self.A = nn.Parameter(torch.eye(n).repeat(mixtures, 1, 1))
        self.B = nn.Parameter(0.05 * torch.randn(mixtures, n, control_dim)) if control_dim else None
        self.C = nn.Parameter(0.05 * torch.randn(mixtures, z_dim, n))
        self.b = nn.Parameter(torch.zeros(mixtures, n)) if offsets else None
        self.log_Q = nn.Parameter(torch.full((n,), math.log(state_noise))) if learn_noise else None
        self.log_R = nn.Parameter(torch.full((z_dim,), math.log(a_noise))) if learn_noise else None
        if mixtures > 1:
            self.a_0 = nn.Parameter(torch.zeros(z_dim))
            self.rnn = Memory(z_dim, h_dim, "lstm")
            self.to_weights = nn.Linear(h_dim, mixtures)

    def calibrate(self, sequences: Iterable[tuple[Tensor, Tensor]]) -> bool:
        """Start from training data: (T, x_dim) values, 0 where missing, and masks of each sequence."""
        return self.start == "slow" and start_slowly(self, sequences)

    # --- x only: the encoder, and the messages of the future across gaps ----------------------------------

    def features(self, frame: Frame) -> Tensor:
        return self.encode(frame._replace(control=None))

    def encoded(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(a_t | x_t); its variance is at most `a_noise`."""
        loc, raw = (
            self.q_a(self.encoder(u)).to(self.A.dtype).chunk(2, -1)
        )  # what follows is algebra, in full precision
        return loc, self.a_noise**0.5 * torch.exp(0.5 * logsigmoid(raw))

    def evidence(self, seen: Evidence) -> Encoded:
        loc, scale = self.encoded(seen.u)
        if seen.frame.observed is None or len(loc) == 1:  # nothing is missing, or has a future
            return Encoded(loc, scale)
        frames = seen.frame.observed.any(-1, keepdim=True)
        t = torch.arange(len(loc), device=loc.device).unsqueeze(-1)
        if bool((frames.squeeze(-1) | (t >= seen.lengths)).all()):
            return Encoded(loc, scale)
        with exactly(loc):
            walk = self._walk(loc, frames, seen.frame.control)
            spread = self.R + torch.diag_embed(scale.double().square())
            message = kalman.backward_information(
                walk.dynamics._replace(R=spread), loc.double(), frames.expand_as(loc), walk.control
            )
        return Encoded(loc, scale, frames, message.J, message.h)

    # --- the recursion: the Kalman belief about the state ---------------------------------------------------

    def absorb(self, past: Past, z: Tensor) -> tuple[Tensor, Tensor, Belief]:
        return z, self._mean(past), past.h

    def update(self, present: Present, u: Any) -> Belief:
        a, mean, belief = present.h
        return self._after(a, mean, belief)

    def unroll(
        self, z: Tensor, u: Any, c: Any, control: Tensor | None, w: Any, h: Belief
    ) -> tuple[Belief, tuple[Tensor, Tensor, Belief], Belief]:
        past, mean, last = self._path(z, control, h)
        return past, (z, mean, past), last

    # --- the three conditionals -------------------------------------------------------------------------

    def prior(self, past: Past) -> MultivariateNormal:
        with exactly(past.h.mean):
            return self._predictive(self._mean(past), past.h.covariance, past.h.C)

    def likelihood(self, present: Present) -> Any:
        return self.p_x(self.decoder(present.h[0]))

    def posterior(self, past: Past, e: Encoded) -> MultivariateNormal:
        encoded = MultivariateNormal(e.loc, torch.diag_embed(e.scale))
        if e.seen is None or e.J is None or e.h is None:
            return encoded
        with exactly(e.loc):
            flat = kalman.Information(e.J, e.h, e.h.new_zeros(()))
            fused = kalman.condition(self._mean(past), past.h.covariance, flat)
            across = self._predictive(fused.mean, fused.covariance, past.h.C)
        return MultivariateNormal(
            torch.where(e.seen, encoded.loc, across.loc),
            torch.where(e.seen.unsqueeze(-1), encoded.scale_tril, across.scale_tril),
        )

    # --- the states -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def states(self, batch: Sequences) -> States:
        """Filtered and smoothed states, by the exact filter and smoother given the means of q(a_t | x_t).

        Frames without any observed value are missing: the filter predicts them, the smoother fills them.

        Example:
            >>> from dynavae import Sequences
            >>> x = torch.zeros(1, 6, 4)
            >>> x[:, 2:4] = float("nan")
            >>> KVAE(x_dim=4).states(Sequences.from_arrays(x)).smoothed_a.shape
            torch.Size([1, 6, 2])
        """
        x, observed = (v.flatten(2).transpose(0, 1) for v in (batch.x, batch.observed))
        control = None if batch.control is None else batch.control.transpose(0, 1)
        u = self.features(Frame(x, observed, control))
        loc, _ = self.encoded(u)
        frames = observed.any(-1, keepdim=True)
        walk = self._walk(loc, frames, control)
        filtered = kalman.kalman_filter(walk.dynamics, walk.a.double(), frames.expand_as(loc), walk.control)
        smoothed = kalman.kalman_smoother(walk.dynamics, filtered)
        C = walk.dynamics.C
        made = [walk.a, walk.weights]
        for part in (filtered, smoothed):
            made += [part.mean, part.covariance]
        made += [matvec(C, part.mean) for part in (filtered, smoothed)]
        hidden = ~batch.valid
        out = [v.transpose(0, 1).to(x.dtype) for v in made]
        return States(
            *(v.masked_fill(hidden.reshape(*hidden.shape, *[1] * (v.ndim - 2)), torch.nan) for v in out)
        )

    @torch.no_grad()
    def decoded(self, a: Tensor) -> Tensor:
        """Mean of p(x_t | a_t), (..., x_dim)."""
        return self.p_x(self.decoder(a)).mean
