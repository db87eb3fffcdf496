"""RVAE: independent latents, a recurrent decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dynavae.distributions import Normal, standard_normal
from dynavae.model import Evidence, Past, Present, SequentialLVM, Unrolled
from dynavae.nn import MLP, Bidirectional, Emission, Memory, SplitMLP, ToNormal
from dynavae.recursion import recur, stages
from dynavae.tree import cat


class RVAE(SequentialLVM):
    r"""Recurrent variational auto-encoder: x_t is decoded from all latents so far, or from all of them.

    .. math::
        p(x, z) &= \prod_t p(z_t)\, p(x_t \mid z_{1:t}) \;\text{(causal)}\quad\text{or}\quad
            \prod_t p(z_t)\, p(x_t \mid z_{1:T}) \;\text{(non-causal)}, \qquad p(z_t) = \mathcal N(0, I) \\
        q(z \mid x) &= \prod_t q(z_t \mid z_{<t}, x_{t:T}) \quad\text{or}\quad \prod_t q(z_t \mid z_{<t}, x_{1:T})

    Reads: ``p(z_t | N(0, I))  p(x_t | z_{<=t})  q(z_t | x_{t:T}, z_{<t})``

    Reference: Leglaive, Alameda-Pineda, Girin and Horaud, A Recurrent Variational Autoencoder for Speech
    Enhancement, 2020, arXiv:1910.10942.
    Differs from the paper: no layer before the posterior's heads by default, as in the DVAE review;
    ``posterior_layers=(128,)`` is the form of the paper.
    Not this model: for latents with dynamics of their own, see :class:`DKF`.

    Args:
        x_dim: features of one observation.
        z_dim: latent dimensions.
        h_dim: units of the recurrences.
        decoder: "causal" or "noncausal". The non-causal one needs all of z before it decodes: no resampling.
        posterior_layers: layers between the recurrences and q.
        decoder_layers: layers between the recurrence and the emission.
        memory, memory_layers, dropout: of the recurrences.
        emission, activation, norm, control_dim, mask_input: as in :class:`VAE`.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, z_dim).

    Example:
        >>> from dynavae import generate
        >>> generate(RVAE(x_dim=88, z_dim=16, h_dim=64), batch=4, length=10).x.shape
        torch.Size([4, 10, 88])
    """

    variants = {  # noqa: RUF012
        "noncausal": {"decoder": "noncausal"},
        "paper": {"posterior_layers": (6,), "memory": "gru", "memory_layers": 2},
    }

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 16,
        h_dim: int = 128,
        decoder: str = "causal",
        posterior_layers: Sequence[int] = (),
        decoder_layers: Sequence[int] = (),
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
        if decoder not in ("causal", "noncausal"):
            raise ValueError(f"decoder should be 'causal' or 'noncausal'; got {decoder!r}.")
        self.per_step_likelihood = decoder == "causal"
        options = dict(cell=memory, layers=memory_layers, dropout=dropout)
        net = dict(activation=activation, dropout=dropout, norm=norm)
        z_in, x_in = z_dim + control_dim, self.input_dim
        if self.per_step_likelihood:
            self.generation = Memory(z_in, h_dim, **options)
            self.back = Memory(x_in, h_dim, **options)
            size = h_dim
        else:
            self.generation = Bidirectional(z_in, h_dim, **options)
            self.both = Bidirectional(x_in, h_dim, **options)
            size = 2 * h_dim
        self.decoder = MLP(size, decoder_layers, **net)
        self.p_x = self.emit(self.decoder.out_dim)
        self.inference = Memory(z_dim, h_dim, **options)
        self.q_z = SplitMLP(size, h_dim, posterior_layers, 2 * z_dim, **net)
        self.to_normal = ToNormal()

    def evidence(self, seen: Evidence) -> Tensor:
        u, lengths = seen.u, seen.lengths
        g = self.back.backward(u, lengths) if self.per_step_likelihood else self.both(u, lengths)
        return self.q_z.split(g)

    def initial(self, lead: tuple[int, ...]) -> Any:
        state = self.generation.initial(lead) if self.per_step_likelihood else ()
        return state, self.inference.initial(lead)  # the decoder's state over z_<t, and q's

    def absorb(self, past: Past, z: Tensor) -> Any:
        decoding, inferring = past.h
        if self.per_step_likelihood:
            decoding = self.generation.step(decoding, cat(z, past.control))
        return decoding, self.inference.step(inferring, z), z

    def update(self, present: Present, u: Any) -> Any:
        return present.h[:2]

    def recursion(
        self, noise: Tensor, e: Any, u: Any, c: Any, control: Tensor | None, h: Any
    ) -> Unrolled | None:
        decoding, inferring = h
        run = recur(
            noise,
            stages(self.q_z.from_z, self.q_z.rest, before=e),
            self.to_normal,
            inferring,
            memory=self.inference,
        )
        if run is None:
            return None
        after = decoding
        if (
            self.per_step_likelihood
        ):  # the decoder's recurrence reads z, but q does not read it: all t at once
            control = None if control is None else control.unsqueeze(1)
            out, decoding = self.generation.run(cat(run.z, control), decoding)
            after = ((out,),)
        inferred = ((run.h,),)  # the prior reads its shape, the likelihood the decoder's output
        return Unrolled(
            run.z, self.to_normal(run.q), None, ((), inferred), (after, inferred, run.z), (decoding, run.last)
        )

    def prior(self, past: Past) -> Normal:
        like = self.inference.read(past.h[1])
        return standard_normal(like.shape[:-1], self.z_dim, like)

    def likelihood(self, present: Present) -> Any:
        return self.p_x(self.decoder(self.generation.read(present.h[0])))

    def decode(self, present: Present, lengths: Tensor) -> Any:
        if self.per_step_likelihood:
            return self.likelihood(present)
        z = present.h[2]
        return self.p_x(self.decoder(self.generation(cat(z, present.control), lengths)))

    def posterior(self, past: Past, e: Tensor) -> Normal:
        return self.to_normal(self.q_z(e, self.inference.read(past.h[1])))
