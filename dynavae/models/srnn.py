"""SRNN: a deterministic recurrence over x below a Markov chain in z."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dynavae.distributions import Normal
from dynavae.model import Evidence, Frame, Past, Present, SequentialLVM, Unrolled
from dynavae.nn import MLP, Emission, GaussianHead, Memory, SplitMLP, ToNormal
from dynavae.recursion import recur, stages
from dynavae.tree import cat, shifted


class SRNN(SequentialLVM):
    r"""Stochastic recurrent neural network: a state-space layer on a recurrent layer.

    .. math::
        p(x, z) &= \prod_t p(z_t \mid z_{t-1}, d_t)\; p(x_t \mid z_t, d_t), \qquad
            d_{t+1} = \mathrm{RNN}(d_t, \varphi(x_t)) \\
        q(z \mid x) &= \prod_t q(z_t \mid z_{t-1}, a_t), \qquad
            a_t = \mathrm{RNN}(a_{t+1}, [d_t, x_t]) \;\text{(smooth)}\; \text{or}\; \mathrm{MLP}([d_t, x_t])
            \;\text{(filter)}

    d sees no z, so it is computed for all t at once; the smoothing q has the structure of the true posterior.

    Reads: ``p(z_t | x_{<t}, z_{t-1})  p(x_t | x_{<t}, z_t)  q(z_t | x_{1:T}, z_{t-1})``

    Reference: Fraccaro, Sønderby, Paquet and Winther, Sequential Neural Models with Stochastic Layers, 2016,
    arXiv:1605.07571. ``residual=True`` is its Res_q: posterior mean = prior mean + network.
    Differs from the paper: one trunk gives mean and log-variance; ``shared_features=True`` (the paper's
    choice) lets q read phi(x_t) instead of x_t. The DVAE review has ``residual=False, shared_features=False``.
    Not this model: for latents that feed the recurrence, see :class:`VRNN`.

    Args:
        x_dim: features of one observation.
        z_dim: latent dimensions.
        h_dim: units of both recurrences.
        inference: "smooth" or "filter" (causal).
        residual: Res_q.
        shared_features: q reads phi(x_t) instead of x_t.
        x_layers: phi, on x_{t-1}.
        encoder_layers: on [d_t, x_t], before the backward recurrence.
        prior_layers, posterior_layers, decoder_layers: layers before each head.
        scale: how scales of latents are parameterised, see :class:`~dynavae.nn.ToNormal`.
        memory, memory_layers, dropout: of the recurrences.
        emission, activation, norm, control_dim, mask_input: as in :class:`VAE`.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, z_dim).

    Example:
        >>> from dynavae import generate
        >>> generate(SRNN(x_dim=88, z_dim=16, h_dim=64), batch=4, length=10).x.shape
        torch.Size([4, 10, 88])
    """

    autoregressive = True
    variants = {  # noqa: RUF012
        "filter": {"inference": "filter", "memory": "gru"},
        "plain": {"residual": False, "shared_features": False, "memory_layers": 2},
    }
    causal_variant = {"inference": "filter"}  # noqa: RUF012

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 16,
        h_dim: int = 128,
        inference: str = "smooth",
        residual: bool = True,
        shared_features: bool = True,
        x_layers: Sequence[int] = (256,),
        encoder_layers: Sequence[int] = (256,),
        prior_layers: Sequence[int] = (64, 32),
        posterior_layers: Sequence[int] = (64, 32),
        decoder_layers: Sequence[int] = (256,),
        scale: str = "log_variance",
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
        if inference not in ("smooth", "filter"):
            raise ValueError(f"inference should be 'smooth' or 'filter'; got {inference!r}.")
        self.smooths, self.shared_features = inference == "smooth", shared_features
        self.causal, self.reads_prior = not self.smooths, residual
        net = dict(activation=activation, dropout=dropout, norm=norm)
        self.phi_x = MLP(self.input_dim, x_layers, **net)
        self.past_x = Memory(self.phi_x.out_dim, h_dim, memory, memory_layers, dropout)
        d = h_dim + control_dim
        self.prior_net = MLP(d + z_dim, prior_layers, **net)
        self.p_z = GaussianHead(self.prior_net.out_dim, z_dim, scale)
        self.decoder = MLP(d + z_dim, decoder_layers, **net)
        self.p_x = self.emit(self.decoder.out_dim)
        frame_dim = self.phi_x.out_dim if shared_features else self.input_dim
        self.encoder = MLP(h_dim + frame_dim, encoder_layers, **net)
        if self.smooths:
            self.back = Memory(self.encoder.out_dim, h_dim, memory, memory_layers, dropout)
        self.q_z = SplitMLP(
            h_dim if self.smooths else self.encoder.out_dim, z_dim, posterior_layers, 2 * z_dim, **net
        )
        self.to_normal = ToNormal(scale)

    def features(self, frame: Frame) -> Tensor:
        return self.phi_x(self.encode(frame))

    def evidence(self, seen: Evidence) -> Tensor:
        frame = seen.u if self.shared_features else self.encode(seen.frame)
        a = self.encoder(cat(seen.c, frame))
        if self.smooths:
            a = self.back.backward(a, seen.lengths)
        return self.q_z.split(a)

    def initial(self, lead: tuple[int, ...]) -> Tensor:
        return self.zeros(lead, self.z_dim)

    def absorb(self, past: Past, z: Tensor) -> Tensor:
        return z

    def recursion(
        self, noise: Tensor, e: Any, u: Any, c: Any, control: Tensor | None, h: Any
    ) -> Unrolled | None:
        q_z = stages(self.q_z.from_z, self.q_z.rest, before=e)
        prior = stages(self.prior_net, self.p_z.linear, reads=(c, ..., control)) if self.reads_prior else []
        run = recur(noise, q_z, self.to_normal, h, prior=prior)
        if run is None:
            return None
        q, p_z = self.to_normal(run.q), None if run.p is None else self.p_z.to_normal(run.p)
        q = q if p_z is None else q._replace(loc=q.loc + p_z.loc)
        return Unrolled(run.z, q, p_z, shifted(h, run.z), run.z, run.z[-1])

    def prior(self, past: Past) -> Normal:
        return self.p_z(self.prior_net(cat(past.x, past.h, past.control)))

    def likelihood(self, present: Present) -> Any:
        return self.p_x(self.decoder(cat(present.x, present.h, present.control)))

    def posterior(self, past: Past, e: Tensor) -> Normal:
        q = self.to_normal(self.q_z(e, past.h))
        return q._replace(loc=q.loc + past.prior.loc) if self.reads_prior else q
