"""VRNN: every factor sees all the past of x and z through one recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dynavae.distributions import Normal, standard_normal
from dynavae.model import Evidence, Frame, Past, Present, SequentialLVM, Unrolled
from dynavae.nn import MLP, Emission, GaussianHead, Memory, SplitMLP, ToNormal, frame_encoder
from dynavae.recursion import recur, stages
from dynavae.tree import cat


class VRNN(SequentialLVM):
    r"""Variational recurrent neural network: every factor sees all the past of x and z.

    .. math::
        p(x, z) &= \prod_t p(x_t \mid x_{<t}, z_{\le t})\; p(z_t \mid x_{<t}, z_{<t}) \\
        q(z \mid x) &= \prod_t q(z_t \mid x_{\le t}, z_{<t}), \qquad
        h_{t+1} = \mathrm{RNN}(h_t, [\varphi_x(x_t), \varphi_z(z_t)])

    Reads: ``p(z_t | x_{<t}, z_{<t})  p(x_t | x_{<t}, z_{<=t})  q(z_t | x_{<=t}, z_{<t})``

    Reference: Chung et al., A Recurrent Latent Variable Model for Sequential Data, 2015, arXiv:1506.02216.
    Differs from the paper: sizes are free and log-variances are clamped; ``residual=True`` adds the prior mean to
    the posterior mean, as the FIVO experiments do; ``prior="standard"`` is VRNN-I.
    Not this model: for a posterior that reads the future of x, see :class:`SRNN`.

    Args:
        x_dim: features of one observation.
        z_dim: latent dimensions.
        h_dim: units of the recurrence.
        x_layers, z_layers: features phi_x and phi_z.
        prior_layers, posterior_layers, decoder_layers: layers before each head.
        prior: "learned" or "standard".
        residual: posterior mean = prior mean + network.
        scale: how scales of latents are parameterised, see :class:`~dynavae.nn.ToNormal`.
        memory, memory_layers, dropout: of the recurrence.
        image: (height, width) of a frame, or (channels, height, width): `x_layers` and
            `decoder_layers` are then numbers of filters of
            convolutions, see :class:`~dynavae.nn.ConvEncoder`.
        emission, activation, norm, control_dim, mask_input: as in :class:`VAE`.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, z_dim).

    Example:
        >>> from dynavae import generate
        >>> generate(VRNN(x_dim=88, z_dim=16, h_dim=64), batch=4, length=10).x.shape
        torch.Size([4, 10, 88])
    """

    causal = True
    autoregressive = True
    variants = {  # noqa: RUF012
        "residual": {"residual": True, "posterior_layers": (6,), "memory": "gru"},
        "standard": {"prior": "standard", "memory_layers": 2},
    }

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 16,
        h_dim: int = 128,
        x_layers: Sequence[int] = (256,),
        z_layers: Sequence[int] = (32, 64),
        prior_layers: Sequence[int] = (),
        posterior_layers: Sequence[int] = (),
        decoder_layers: Sequence[int] = (),
        prior: str = "learned",
        residual: bool = False,
        scale: str = "log_variance",
        memory: str = "lstm",
        memory_layers: int = 1,
        image: Sequence[int] | None = None,
        emission: Emission | str | dict[str, Any] = "gaussian",
        activation: str = "tanh",
        dropout: float = 0.0,
        norm: str | None = None,
        control_dim: int = 0,
        mask_input: bool = False,
    ) -> None:
        super().__init__(x_dim, z_dim, emission, control_dim, mask_input=mask_input)
        if prior not in ("learned", "standard"):
            raise ValueError(f"prior should be 'learned' or 'standard'; got {prior!r}.")
        self.reads_prior, self.learned = residual, prior == "learned"
        net = dict(activation=activation, dropout=dropout, norm=norm)
        self.phi_x = frame_encoder(self.input_dim, x_dim, x_layers, image, **net)
        self.phi_z = MLP(z_dim, z_layers, **net)
        fx, fz = self.phi_x.out_dim, self.phi_z.out_dim
        self.rnn = Memory(fx + fz, h_dim, memory, memory_layers, dropout)
        if self.learned:
            self.prior_net = MLP(h_dim + control_dim, prior_layers, **net)
            self.p_z = GaussianHead(self.prior_net.out_dim, z_dim, scale)
        self.decoder, self.p_x = self.decoder_to(fz + h_dim + control_dim, decoder_layers, image, **net)
        self.q_z = SplitMLP(fx, h_dim, posterior_layers, 2 * z_dim, **net)
        self.to_normal = ToNormal(scale)

    def features(self, frame: Frame) -> Tensor:
        return self.phi_x(self.encode(frame))

    def evidence(self, seen: Evidence) -> Tensor:
        return self.q_z.split(seen.u)

    def initial(self, lead: tuple[int, ...]) -> Any:
        return self.rnn.initial(lead)

    def absorb(self, past: Past, z: Tensor) -> Any:
        return past.h, self.phi_z(z)

    def update(self, present: Present, u: Tensor) -> Any:
        state, f_z = present.h
        return self.rnn.step(state, cat(u, f_z))

    def recursion(
        self, noise: Tensor, e: Any, u: Any, c: Any, control: Tensor | None, h: Any
    ) -> Unrolled | None:
        relative = self.reads_prior and self.learned  # N(0, I) has mean 0
        run = recur(
            noise,
            stages(self.q_z.from_z, self.q_z.rest, before=e),
            self.to_normal,
            h,
            prior=stages(self.prior_net, self.p_z.linear, reads=(..., control)) if relative else [],
            features=stages(self.phi_z),
            memory=self.rnn,
            reads=u,
        )
        if run is None:
            return None
        q, p_z = self.to_normal(run.q), None if run.p is None else self.p_z.to_normal(run.p)
        q = q if p_z is None else q._replace(loc=q.loc + p_z.loc)
        state = ((run.h,),)  # the factors read the output of the memory only
        return Unrolled(run.z, q, p_z, state, (state, run.z if run.f is None else run.f), run.last)

    def prior(self, past: Past) -> Normal:
        h = self.rnn.read(past.h)
        if not self.learned:
            return standard_normal(h.shape[:-1], self.z_dim, h)
        return self.p_z(self.prior_net(cat(h, past.control)))

    def likelihood(self, present: Present) -> Any:
        state, f_z = present.h
        return self.p_x(self.decoder(cat(f_z, self.rnn.read(state), present.control)))

    def posterior(self, past: Past, e: Tensor) -> Normal:
        q = self.to_normal(self.q_z(e, self.rnn.read(past.h)))
        return q._replace(loc=q.loc + past.prior.loc) if self.reads_prior else q
