"""Frame-wise variational auto-encoder: the baseline without dynamics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dynavae.distributions import Normal, standard_normal
from dynavae.model import Evidence, Frame, Past, Present, SequentialLVM
from dynavae.nn import Emission, GaussianHead, frame_encoder
from dynavae.tree import cat


class VAE(SequentialLVM):
    r"""Variational auto-encoder applied to every frame on its own.

    .. math::
        p(x, z) = \prod_t p(z_t)\, p(x_t \mid z_t), \qquad q(z \mid x) = \prod_t q(z_t \mid x_t),
        \qquad p(z_t) = \mathcal N(0, I)

    Reads: ``p(z_t | N(0, I))  p(x_t | z_t)  q(z_t | x_t)``

    Reference: Kingma and Welling, Auto-Encoding Variational Bayes, 2014, arXiv:1312.6114.
    Differs from the paper: nothing; a frame that is missing has its prior as posterior.
    Not this model: anything that must use the order of the frames; see :class:`DKF` for the smallest step up.

    Args:
        x_dim: features of one observation.
        z_dim: latent dimensions.
        h_dim: units of the hidden layer, if `layers` is not given.
        layers: hidden widths of the encoder; the decoder mirrors them.
        image: (height, width) of a frame, or (channels, height, width): `layers` are then numbers of filters of
            convolutions, see :class:`~dynavae.nn.ConvEncoder`.
        emission: p(x_t | .), a name, an :class:`~dynavae.nn.Emission`, or its configuration.
        activation, dropout, norm: of the hidden layers.
        control_dim: known inputs per frame, read by encoder and decoder.
        mask_input: let the encoder read which coordinates are missing.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, z_dim).

    Example:
        >>> from dynavae import generate
        >>> generate(VAE(x_dim=88, z_dim=16, h_dim=64), batch=4, length=10).x.shape
        torch.Size([4, 10, 88])
    """

    causal = True
    mean_field = True
    variants = {"conv": {"image": (2, 2), "layers": (8,), "emission": "bernoulli"}}  # noqa: RUF012

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 16,
        h_dim: int = 128,
        layers: Sequence[int] | None = None,
        image: Sequence[int] | None = None,
        emission: Emission | str | dict[str, Any] = "gaussian",
        activation: str = "tanh",
        dropout: float = 0.0,
        norm: str | None = None,
        control_dim: int = 0,
        mask_input: bool = False,
    ) -> None:
        super().__init__(x_dim, z_dim, emission, control_dim, mask_input=mask_input)
        widths = (h_dim,) if layers is None else tuple(layers)
        net = dict(activation=activation, dropout=dropout, norm=norm)
        self.encoder = frame_encoder(self.input_dim, x_dim, widths, image, **net)
        self.q_z = GaussianHead(self.encoder.out_dim, z_dim)
        self.decoder, self.p_x = self.decoder_to(z_dim + control_dim, widths[::-1], image, **net)

    def features(self, frame: Frame) -> Tensor:
        return self.encode(frame)

    def evidence(self, seen: Evidence) -> Tensor:
        return self.encoder(seen.u)

    def initial(self, lead: tuple[int, ...]) -> Tensor:
        return self.zeros(lead, self.z_dim)

    def absorb(self, past: Past, z: Tensor) -> Tensor:
        return z

    def unroll(
        self, z: Tensor, u: Any, c: Any, control: Any, w: Any, h: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return z, z, z[-1]  # the prior reads only the shape of past.h

    def prior(self, past: Past) -> Normal:
        return standard_normal(past.h.shape[:-1], self.z_dim, past.h)

    def likelihood(self, present: Present) -> Any:
        return self.p_x(self.decoder(cat(present.h, present.control)))

    def posterior(self, past: Past, e: Tensor) -> Normal:
        return self.q_z(e)
