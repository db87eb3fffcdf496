"""DSAE: one latent for the sequence, one per frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dynavae.distributions import Normal
from dynavae.model import Evidence, Past, Present, SequentialLVM
from dynavae.nn import MLP, Bidirectional, Emission, GaussianHead, Memory
from dynavae.tree import cat


class DSAE(SequentialLVM):
    r"""Disentangled sequential auto-encoder: content w of the whole sequence apart from dynamics z_t.

    .. math::
        p(x, z, w) &= p(w) \prod_t p(z_t \mid z_{<t})\, p(x_t \mid z_t, w), \qquad p(w) = \mathcal N(0, I) \\
        q(z, w \mid x) &= q(w \mid x_{1:T}) \prod_t q(z_t \mid x_{1:T}, w)

    Reads: ``p(z_t | z_{<t})  p(x_t | z_t, w)  q(z_t | x_{1:T}, w)  q(w | x_{1:T})``

    Reference: Li and Mandt, Disentangled Sequential Autoencoder, 2018, arXiv:1803.02991 (the "full" model).
    Differs from the paper: sizes of the DVAE review; w is called f in the paper and v in the review.
    Not this model: for a posterior that follows its own samples z_{t-1}, see :class:`DKF`.

    Args:
        x_dim: features of one observation.
        z_dim: dimensions of the latent of a frame.
        h_dim: units of the recurrences.
        w_dim: dimensions of the latent of a sequence.
        decoder_layers: layers on [w, z_t].
        memory, memory_layers, dropout: of the recurrences.
        emission, activation, norm, control_dim, mask_input: as in :class:`VAE`.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim), z (T, K, B, z_dim), w (K, B, w_dim).

    Example:
        >>> from dynavae import generate
        >>> generate(DSAE(x_dim=88, z_dim=16, h_dim=64), batch=4, length=10).x.shape
        torch.Size([4, 10, 88])
    """

    mean_field = True
    variants = {"gru": {"memory": "gru", "memory_layers": 2, "w_dim": 2}}  # noqa: RUF012

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 16,
        h_dim: int = 128,
        w_dim: int = 16,
        decoder_layers: Sequence[int] = (32, 64, 128, 256),
        memory: str = "lstm",
        memory_layers: int = 1,
        emission: Emission | str | dict[str, Any] = "gaussian",
        activation: str = "tanh",
        dropout: float = 0.0,
        norm: str | None = None,
        control_dim: int = 0,
        mask_input: bool = False,
    ) -> None:
        super().__init__(x_dim, z_dim, emission, control_dim, w_dim, mask_input)
        if w_dim < 1:
            raise ValueError(f"w_dim of DSAE should be 1 or more, or take DKF; got {w_dim}.")
        options = dict(cell=memory, layers=memory_layers, dropout=dropout)
        self.dynamics = Memory(z_dim, h_dim, **options)
        self.p_z = GaussianHead(h_dim + control_dim, z_dim)
        self.decoder = MLP(w_dim + z_dim + control_dim, decoder_layers, activation, dropout, norm)
        self.p_x = self.emit(self.decoder.out_dim)
        self.sequence_encoder = Bidirectional(self.input_dim, h_dim, **options)
        self.q_w = GaussianHead(2 * h_dim, w_dim)
        self.frame_encoder = Bidirectional(self.input_dim + w_dim, h_dim, **options)
        self.frame_rnn = Memory(2 * h_dim, h_dim, "rnn")
        self.q_z = GaussianHead(h_dim, z_dim)

    def static_posterior(self, seen: Evidence) -> Normal:
        return self.q_w(self.sequence_encoder.ends(seen.u, seen.lengths))

    def evidence(self, seen: Evidence) -> Tensor:
        both = self.frame_encoder(
            cat(seen.u.unsqueeze(1), seen.w), seen.lengths
        )  # (T, K, B, .): w has particles
        return self.frame_rnn.run(both)[0]

    def initial(self, lead: tuple[int, ...]) -> Any:
        return self.dynamics.initial(lead)

    def absorb(self, past: Past, z: Tensor) -> Any:
        return self.dynamics.step(past.h, z), z

    def update(self, present: Present, u: Any) -> Any:
        return present.h[0]

    def unroll(self, z: Tensor, u: Any, c: Any, control: Any, w: Any, h: Any) -> tuple[Any, Any, Any]:
        before, last = self.dynamics.before(z, h)
        return ((before,),), (None, z), last  # the prior reads only the output of the recurrence

    def prior(self, past: Past) -> Normal:
        return self.p_z(cat(self.dynamics.read(past.h), past.control))

    def likelihood(self, present: Present) -> Any:
        return self.p_x(self.decoder(cat(present.w, present.h[1], present.control)))

    def posterior(self, past: Past, e: Tensor) -> Normal:
        return self.q_z(e)
