"""Deep Kalman filter / deep Markov model: a non-linear Gaussian state-space model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynavae.distributions import Normal, standard_normal
from dynavae.model import Evidence, Frame, Past, Present, SequentialLVM, Unrolled
from dynavae.nn import MLP, Emission, GaussianHead, Memory, frame_encoder
from dynavae.nn.heads import to_scale
from dynavae.recursion import recur, stages
from dynavae.tree import cat, shifted, where

INFERENCE = ("ST-R", "ST-L", "ST-LR", "MF-L", "MF-LR", "DKS")


class GatedTransition(nn.Module):
    r"""p(z_t | z_{t-1}): a gate mixes a linear map of z_{t-1} with a proposed mean.

    .. math::
        g = \sigma(W_2\,\mathrm{relu}(W_1 z)), \quad n = W_4\,\mathrm{relu}(W_3 z), \quad
        \mu = (1-g)\odot W_5 z + g\odot n, \quad \sigma^2 = \mathrm{softplus}(W_6\,\mathrm{relu}(n))
    """

    def __init__(self, z_dim: int, hidden: int, control_dim: int) -> None:
        super().__init__()
        in_dim = z_dim + control_dim
        self.gate = nn.Sequential(
            nn.Linear(in_dim, hidden), nn.ReLU(), nn.Linear(hidden, z_dim), nn.Sigmoid()
        )
        self.proposed = nn.Sequential(nn.Linear(in_dim, hidden), nn.ReLU(), nn.Linear(hidden, z_dim))
        self.linear = nn.Linear(in_dim, z_dim)
        self.scale = nn.Linear(z_dim, z_dim)
        with torch.no_grad():  # starts as the identity, so that the state persists
            self.linear.weight.copy_(torch.eye(z_dim, in_dim))
            self.linear.bias.zero_()

    def forward(self, z: Tensor) -> Normal:
        g, n = self.gate(z), self.proposed(z)
        loc = (1 - g) * self.linear(z) + g * n
        return Normal(loc, to_scale(self.scale(n.relu()), "softplus_variance"))


class DKF(SequentialLVM):
    r"""Deep Kalman filter: a Markov chain in z, seen through a network.

    .. math::
        p(x, z) &= \prod_t p(z_t \mid z_{t-1})\, p(x_t \mid z_t) \\
        q(z \mid x) &= \prod_t q(z_t \mid z_{t-1}, x_{t:T}) \quad\text{(ST-R, the structure of the true posterior)}

    Inference variants: ``ST-R`` (= ``DKS``) reads x_{t:T}, ``ST-L`` x_{1:t}, ``ST-LR`` x_{1:T}, each with
    z_{t-1} by averaging tanh(W z_{t-1}) with the recurrent states; ``MF-L`` and ``MF-LR`` do not read
    z_{t-1}; MF-LR multiplies two Gaussians. ST-L and MF-L are causal: only they can filter.

    Reads: ``p(z_t | z_{t-1})  p(x_t | z_t)  q(z_t | x_{t:T}, z_{t-1})``

    References: Krishnan, Shalit and Sontag, Deep Kalman Filters, 2015, arXiv:1511.05121; Structured Inference
    Networks for Nonlinear State Space Models, AAAI 2017, arXiv:1609.09869 (the DMM).
    Differs from the papers: a floor below the softplus variance. ``first="transition"`` applies the transition to
    z_0 = 0 (as the DVAE review does), ``"standard"`` takes p(z_1) = N(0, I) (as the DMM paper), ``"learned"``
    learns z_0. With ``aug=True`` gate, proposal and emission also read x_{t-1} (DMM-Aug).
    Not this model: for a deterministic memory of x in the generative model, see :class:`SRNN`.

    Args:
        x_dim: features of one observation.
        z_dim: latent dimensions.
        h_dim: units of the inference recurrence.
        inference: one of ST-R, DKS, ST-L, ST-LR, MF-L, MF-LR.
        transition: "gated" or "mlp" (one hidden layer).
        transition_dim: hidden units of the transition; default z_dim.
        first: "transition", "standard" or "learned".
        aug: feed x_{t-1} to transition and emission.
        x_layers: layers on x before the inference recurrence.
        z_layers: layers on z_{t-1} within the combiner, before tanh(W .).
        combiner_layers: layers after the average.
        decoder_layers: layers of the emission network.
        memory, memory_layers, dropout: of the inference recurrence (dropout also on its output).
        q_scale: how the posterior's scale is parameterised, see :class:`~dynavae.nn.ToNormal`.
        image: (height, width) of a frame, or (channels, height, width): `x_layers` and
            `decoder_layers` are then numbers of filters of
            convolutions, see :class:`~dynavae.nn.ConvEncoder`.
        emission, activation, norm, control_dim, mask_input: as in :class:`VAE`.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, z_dim).

    Example:
        >>> from dynavae import generate
        >>> generate(DKF(x_dim=88, z_dim=16, h_dim=64), batch=4, length=10).x.shape
        torch.Size([4, 10, 88])
    """

    variants = {  # noqa: RUF012
        "ST-L": {"inference": "ST-L"},
        "ST-LR": {"inference": "ST-LR", "first": "learned"},
        "MF-L": {"inference": "MF-L", "first": "standard"},
        "MF-LR": {"inference": "MF-LR", "transition": "mlp"},
        "aug": {"aug": True, "combiner_layers": ()},
    }
    causal_variant = {"inference": "ST-L"}  # noqa: RUF012

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 16,
        h_dim: int = 128,
        inference: str = "ST-R",
        transition: str = "gated",
        transition_dim: int | None = None,
        first: str = "transition",
        aug: bool = False,
        x_layers: Sequence[int] = (256,),
        z_layers: Sequence[int] = (32,),
        combiner_layers: Sequence[int] = (32,),
        decoder_layers: Sequence[int] = (32, 64, 128, 256),
        memory: str = "lstm",
        memory_layers: int = 1,
        image: Sequence[int] | None = None,
        q_scale: str = "log_variance",
        emission: Emission | str | dict[str, Any] = "gaussian",
        activation: str = "tanh",
        dropout: float = 0.0,
        norm: str | None = None,
        control_dim: int = 0,
        mask_input: bool = False,
    ) -> None:
        super().__init__(x_dim, z_dim, emission, control_dim, mask_input=mask_input)
        if inference not in INFERENCE:
            raise ValueError(f"inference should be one of {', '.join(INFERENCE)}; got {inference!r}.")
        if transition not in ("gated", "mlp"):
            raise ValueError(f"transition should be 'gated' or 'mlp'; got {transition!r}.")
        if first not in ("transition", "standard", "learned"):
            raise ValueError(f"first should be 'transition', 'standard' or 'learned'; got {first!r}.")
        kind = "ST-R" if inference == "DKS" else inference
        self.left, self.right = kind[3:] in ("L", "LR"), kind[3:] in ("R", "LR")
        self.structured, self.first, self.aug = kind.startswith("ST"), first, aug
        self.causal, self.mean_field, self.autoregressive = not self.right, not self.structured, aug
        extra_dim = control_dim + (self.input_dim if aug else 0)
        if transition == "gated":
            self.p_z: nn.Module = GatedTransition(z_dim, transition_dim or z_dim, extra_dim)
        else:
            hidden = MLP(z_dim + extra_dim, (transition_dim or z_dim,), "relu")
            self.p_z = nn.Sequential(hidden, GaussianHead(hidden.out_dim, z_dim, "softplus_variance"))
        self.z_0 = nn.Parameter(torch.zeros(z_dim)) if first == "learned" else None
        net = dict(activation=activation, dropout=dropout, norm=norm)
        self.decoder, self.p_x = self.decoder_to(z_dim + extra_dim, decoder_layers, image, **net)
        # Inference: recurrences over x, then the combiner.
        self.phi_x = frame_encoder(self.input_dim, x_dim, x_layers, image, **net)
        self.dropout = nn.Dropout(dropout)
        options = dict(cell=memory, layers=memory_layers, dropout=dropout)
        if self.left:
            self.seen_x = Memory(self.phi_x.out_dim, h_dim, **options)
        if self.right:
            self.back = Memory(self.phi_x.out_dim, h_dim, **options)
        if self.structured:
            self.z_to_h = nn.Sequential(*(f := MLP(z_dim, z_layers, activation)), nn.Linear(f.out_dim, h_dim))
            self.combiner = MLP(h_dim, combiner_layers, activation, dropout, norm)
            self.q_z = GaussianHead(self.combiner.out_dim, z_dim, q_scale)
        else:
            self.q_left = GaussianHead(h_dim, z_dim, q_scale)
            if self.right:
                self.q_right = GaussianHead(h_dim, z_dim, q_scale)

    def features(self, frame: Frame) -> Tensor:
        return self.encode(frame)

    def recognition(self, frame: Frame) -> Tensor:
        return self.phi_x(self.encode(frame))

    def evidence(self, seen: Evidence) -> Any:
        left = self.dropout(seen.g) if self.left else None
        right = (
            self.dropout(self.back.backward(self.recognition(seen.frame), seen.lengths))
            if self.right
            else None
        )
        if not self.structured:
            return left, right
        if left is not None and right is not None:
            return (left + right) / 3
        return (right if left is None else left) / 2

    def initial(self, lead: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
        z_0 = self.zeros(lead, self.z_dim) if self.z_0 is None else self.z_0.expand(*lead, -1)
        x_0 = self.zeros(lead, self.input_dim) if self.aug else None
        return z_0, self.zeros(lead, 1), x_0  # z_{t-1}, whether there was a step before, x_{t-1}

    def absorb(self, past: Past, z: Tensor) -> tuple[Tensor, Tensor | None]:
        return z, past.h[2]

    def update(self, present: Present, u: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        z, _ = present.h
        x = u.expand(*z.shape[:-1], -1) if self.aug else None
        return z, torch.ones_like(z[..., :1]), x

    def unroll(self, z: Tensor, u: Tensor, c: Any, control: Any, w: Any, h: Any) -> tuple[Any, Any, Any]:
        x = None
        if self.aug:
            x = u.unsqueeze(1).expand(*z.shape[:-1], -1)
        started = torch.ones_like(z[..., :1])
        before_x = None if x is None else shifted(h[2], x)
        past = shifted(h[0], z), shifted(h[1], started), before_x
        return past, (z, before_x), (z[-1], started[-1], None if x is None else x[-1])

    def recursion(
        self, noise: Tensor, e: Any, u: Any, c: Any, control: Tensor | None, h: Any
    ) -> Unrolled | None:
        chain, rest = stages(self.z_to_h), stages(self.combiner, self.q_z.linear)
        if chain is None or rest is None:
            return None
        share = 1 / (3 if self.left and self.right else 2)
        chain[-1] = chain[-1]._replace(act=nn.Tanh(), share=share, after=e)  # e is already divided
        run = recur(noise, chain + rest, self.q_z.to_normal, h[0])
        if run is None:
            return None
        past_h, present_h, last = self.unroll(run.z, u, c, control, None, h)
        return Unrolled(run.z, self.q_z.to_normal(run.q), None, past_h, present_h, last)

    def prior(self, past: Past) -> Normal:
        z, started, x = past.h
        p = self.p_z(cat(z, past.control, x))
        if self.first != "standard":
            return p
        return where(started[..., 0] > 0, p, standard_normal(z.shape[:-1], self.z_dim, z))

    def likelihood(self, present: Present) -> Any:
        z, x = present.h
        return self.p_x(self.decoder(cat(z, present.control, x)))

    def posterior(self, past: Past, e: Any) -> Normal:
        if self.structured:
            share = 3 if self.left and self.right else 2
            h = torch.tanh(self.z_to_h(past.h[0])) / share + e  # e is already divided
            return self.q_z(self.combiner(h))
        left, right = e
        q = self.q_left(left)
        if right is None:
            return q
        other = self.q_right(right)
        v, v_other = q.scale**2, other.scale**2
        loc = (q.loc * v_other + other.loc * v) / (v + v_other)
        return Normal(loc, torch.sqrt(v * v_other / (v + v_other)))
