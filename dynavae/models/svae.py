"""Structured VAE: recognition potentials on the states of (switching) linear dynamics, and messages between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from dynavae.batch import Sequences
from dynavae.distributions import MultivariateMixture, MultivariateNormal
from dynavae.exact import hmm, switching
from dynavae.exact._algebra import matvec
from dynavae.model import Evidence, Frame, Past, Present, SequentialLVM, Unrolled
from dynavae.models._mixed import exactly
from dynavae.models._switching import FLOOR, ConjugateDynamics, Dynamics, Transitions
from dynavae.nn import Emission, frame_encoder
from dynavae.tree import cat, shifted


class Potentials(NamedTuple):
    r"""Node potentials :math:`\psi(z) = \exp(-\tfrac12 z^\top \mathrm{diag}(J)\, z + h^\top z)`."""

    J: Tensor  # (T, B, z_dim), positive
    h: Tensor  # (T, B, z_dim)


class States(NamedTuple):
    """What is inferred of each frame; NaN after a sequence's end."""

    modes: Tensor  # (B, T, modes) q(s_t)
    mean: Tensor  # (B, T, z_dim) of q(z_t)
    covariance: Tensor  # (B, T, z_dim, z_dim)


class Inference(NamedTuple):
    """q(s) q(z), and the frames that it is about."""

    q: switching.MeanField
    u: Tensor  # (T, B, r) regressors beside z_{t-1}
    lengths: Tensor  # (B,) up to the last frame of which something was seen, at least 1
    seen: Tensor  # (B,) whether anything was


class SVAE(SequentialLVM):
    r"""Structured variational auto-encoder: linear dynamics, which may switch, behind a network; messages as posterior.

    .. math::
        p(s_{1:T}) &= \pi_{s_1} \textstyle\prod_{t>1} \Pi_{s_{t-1}, s_t}, \qquad
        p(z_1 \mid s_1) = \mathcal N(m_0^{s_1}, P_0^{s_1}) \\
        p(z_t \mid z_{t-1}, s_t) &= \mathcal N(A_{s_t} z_{t-1} + B_{s_t} u_t + b_{s_t}, Q_{s_t}), \qquad p(x_t \mid z_t) \\
        q(z \mid x) &\propto \exp\big\{\mathbb E_{q(s)}[\log p(z \mid s)]\big\} \textstyle\prod_t \psi(z_t; x_t), \qquad
        \psi(z; x) = \exp\big(-\tfrac12 z^\top \mathrm{diag}(J(x))\, z + h(x)^\top z\big)

    A recognition network gives each frame a Gaussian potential; a missing one has none. With one mode, inference is then
    exact, by messages backward in time: :math:`q(z_t \mid z_{t-1}, x_{t:T})` fuses the transition with what the future says.
    With more, q(s) q(z) is found by `sweeps` of structured mean field, :func:`dynavae.exact.switching.mean_field`, through
    which gradients flow.

    **The modes are summed out of the bound.** They are discrete, so the prior of the engine is
    :math:`p(z_t \mid z_{<t}) = \sum_k p(s_t = k \mid z_{<t})\, p(z_t \mid z_{t-1}, s_t = k)`, a mixture whose weights are an
    exact HMM filter along z, kept in `past.h`. The bound E[log p(x | z) + log p(z) - log q(z)] is thus at least the paper's,
    which loses KL(q(s) || p(s | z)), and q(s) only serves to find q(z). :meth:`states` gives both.

    `conjugate=True` puts priors on the dynamics' parameters (matrix normal inverse Wishart, and Dirichlet on the chain) and
    learns q(theta) of the same families by natural gradients (`fit(..., global_lr=0.1)`), not by the optimizer. Messages
    read expected natural parameters. In training mode log p(z) is its expectation under q(theta), less the share of one
    training sequence in KL(q(theta) || p(theta)): summed over all, the bound is on log p(x) with theta integrated out. In
    evaluation mode theta is the mean of q(theta), so that scores compare with those of other models.

    Modes part most readily once the networks are there: train one mode, hand on `encoder`, `to_potentials`, `decoder` and
    `p_x` (`load_state_dict(..., strict=False)`), and train on with more modes, conjugate.

    Reads: ``p(z_t | z_{t-1})  p(x_t | z_t)  q(z_t | x_{t:T}, z_{t-1})``

    Reference: Johnson, Duvenaud, Wiltschko, Datta and Adams, Composing Graphical Models with Neural Networks for
    Structured Representations and Fast Inference, 2016, arXiv:1603.06277.
    Differs from the paper: modes are summed out, as above; by default the dynamics are parameters, learnt by gradient, with
    diagonal Q and P_0 (with one mode and a free decoder no restriction); the natural gradient is the one at a fixed local
    factor, without the term that passes through it; sweeps are a fixed number.
    Not this model: :class:`KVAE` has dynamics that are mixed anew in each step, and a posterior from each frame on its own;
    :class:`SLDS` sees the state through linear maps, and samples the modes; :class:`LGSSM` is exact.

    Args:
        x_dim: features of one observation.
        z_dim: state dimensions.
        modes: S; 1 does not switch.
        sweeps: updates of q(s) for each batch.
        sticky: added to the initial log-probability of staying in a mode; with `conjugate`, to the prior counts of it.
        conjugate: priors and natural gradients for the dynamics.
        strength: with `conjugate`, how many observations the prior of each mode is worth.
        layers: hidden widths of the recognition network; with `image`, filters of its convolutions.
        decoder_layers: of the decoder; by default `layers`, mirrored.
        image: (height, width) of a frame, or (channels, height, width).
        emission, activation, dropout, norm, control_dim, mask_input: as in :class:`VAE`; controls move the state only.

    Shapes: x (B, T, x_dim) in the public API; inside `scan`, x (T, B, x_dim) and z (T, K, B, z_dim).

    Example:
        >>> from dynavae import Sequences, generate
        >>> generate(SVAE(x_dim=88, z_dim=8), batch=4, length=10).x.shape
        torch.Size([4, 10, 88])
        >>> SVAE(x_dim=2, modes=3).states(Sequences.from_arrays(torch.randn(4, 10, 2))).modes.shape
        torch.Size([4, 10, 3])
    """

    variants = {  # noqa: RUF012
        "conv": {"image": (2, 2), "layers": (8,), "emission": "bernoulli"},
        "switching": {"modes": 3, "sweeps": 2},
        "conjugate": {"conjugate": True},
        "conjugate_switching": {"modes": 2, "sweeps": 2, "conjugate": True, "control_dim": 2},
    }

    def __init__(
        self,
        x_dim: int,
        z_dim: int = 8,
        modes: int = 1,
        sweeps: int = 4,
        sticky: float = 2.0,
        conjugate: bool = False,
        strength: float = 1.0,
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
        for name, value in dict(modes=modes, sweeps=sweeps).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} of SVAE should be a positive integer; got {value!r}.")
        if sticky < 0 or not strength > 0:
            raise ValueError(f"SVAE needs sticky >= 0 and strength > 0; got {sticky} and {strength}.")
        self.modes, self.sweeps, self.conjugate = modes, sweeps, conjugate
        net = dict(activation=activation, dropout=dropout, norm=norm)
        self.encoder = frame_encoder(self.input_dim - control_dim, x_dim, layers, image, **net)
        self.to_potentials = nn.Linear(self.encoder.out_dim, 2 * z_dim)
        mirrored = tuple(layers)[::-1] if decoder_layers is None else decoder_layers
        self.decoder, self.p_x = self.decoder_to(z_dim, mirrored, image, **net)
        sizes = z_dim, control_dim, modes, sticky
        self.dynamics = ConjugateDynamics(*sizes, strength) if conjugate else Dynamics(*sizes)

    @property
    def z_noise_dim(self) -> int:
        """A mixture takes one number more, which chooses a mode."""
        return self.z_dim + (self.modes > 1 or self.conjugate)

    # --- x only: potentials, and messages between them ----------------------------------------------------

    def features(self, frame: Frame) -> Tensor:
        return self.encode(frame._replace(control=None))

    def potentials(self, u: Tensor) -> Potentials:
        """What each frame says of its state."""
        raw, h = self.to_potentials(self.encoder(u)).chunk(2, -1)
        return Potentials(softplus(raw) + FLOOR, h)

    def infer(self, frame: Frame, features: Tensor, lengths: Tensor) -> Inference:
        """q(s) q(z) of sequences, time first, in float64."""
        J, h = (part.double() for part in self.potentials(features))
        t = torch.arange(len(J), device=J.device).unsqueeze(-1)
        seen = t < lengths
        if frame.observed is not None:
            seen = seen & frame.observed.any(-1)
        J, h = (torch.where(seen.unsqueeze(-1), part, 0.0) for part in (J, h))
        ends = torch.where(seen, t + 1, 1).amax(0)  # afterwards z follows the prior
        ones = torch.ones_like(J[..., :1])
        u = ones if frame.control is None else torch.cat([frame.control.double(), ones], -1)
        q = switching.mean_field(J, h, u, self.dynamics.expected(), ends, self.sweeps)
        return Inference(q, u, ends, seen.any(0))

    def evidence(self, seen: Evidence) -> Transitions:
        """The factors of q(z)."""
        dynamics = self.dynamics.expected()
        q, u, *_ = self.infer(seen.frame, seen.u, seen.lengths)
        parts = q.gamma, q.precision, q.linear
        later = switching.conditionals(dynamics, *parts, u, start=False)
        first = switching.conditionals(dynamics, *(part[:1] for part in parts), u[:1])
        dtype, T = self.to_potentials.weight.dtype, len(u)
        starts = (part.expand(T, *part.shape[1:]) for part in first[1:])
        return Transitions(*(part.to(dtype) for part in (*later, *starts)))

    # --- the recursion: z_{t-1}, whether there was one, and log p(s_t | z_<t) -----------------------------

    def initial(self, lead: tuple[int, ...]) -> tuple[Tensor, ...]:
        start = self.zeros(lead, self.z_dim), self.zeros(lead, 1)
        if self.modes == 1:
            return start
        return *start, self.dynamics.density().log_initial.expand(*lead, -1)

    def absorb(self, past: Past, z: Tensor) -> tuple[Tensor, ...]:
        if self.modes == 1:
            return (z,)
        return z, self._mixture(past).component_log_prob(z).log_softmax(-1)

    def update(self, present: Present, u: Any) -> tuple[Tensor, ...]:
        z, *rest = present.h
        moved = [torch.logsumexp(p.unsqueeze(-1) + self.dynamics.density().log_transition, -2) for p in rest]
        return z, torch.ones_like(z[..., :1]), *moved

    def _mixture(self, past: Past) -> MultivariateMixture:
        """p(z_t, s_t | z_<t); in training of a conjugate factor, the exponential of its expected logarithm."""
        z, started, *rest = past.h
        d, ran = self.dynamics.density(), started > 0
        w = cat(z, past.control, torch.ones_like(started))
        with exactly(z):
            moved = torch.einsum("...k,snk->...sn", w, d.M)
        loc = torch.where(ran.unsqueeze(-1), moved, d.m0)
        scale_tril = torch.where(ran[..., :1, :, :, None, None], d.L, d.L0)
        log_weights = rest[0] if rest else torch.zeros_like(started)
        if d.discount is not None:
            with exactly(z):
                spread = torch.einsum("...k,skl,...l->...s", w, d.discount.spread, w)
            log_weights = log_weights + torch.where(ran, d.discount.later - 0.5 * spread, d.discount.first)
        return MultivariateMixture(log_weights, loc, scale_tril)

    def recursion(
        self, noise: Tensor, e: Transitions, u: Any, c: Any, control: Tensor | None, h: tuple[Tensor, ...]
    ) -> Unrolled:
        """The same for all frames: a linear recurrence, and an HMM filter along what it gave."""
        T, K, B, _ = noise.shape
        z, started, *rest = h
        ran = torch.cat([started.unsqueeze(0), torch.ones_like(started).expand(T - 1, K, B, 1)])
        with exactly(z):
            found, q = e.path(z, started > 0, noise[..., : self.z_dim])
        before = shifted(z, found)
        last = found[-1], torch.ones_like(started)
        if self.modes == 1:
            return Unrolled(found, q, None, (before, ran), (found,), last)
        flat = torch.zeros_like(rest[0]).expand(T, K, B, -1)
        p = self._mixture(
            Past(None, (before, ran, flat), None if control is None else control.unsqueeze(1), None)
        )
        log_transition = self.dynamics.density().log_transition
        filtered = hmm.hmm_filter(
            rest[0].reshape(K * B, -1), log_transition, p.component_log_prob(found).reshape(T, K * B, -1)
        )
        here, ahead = (part.reshape(T, K, B, -1) for part in filtered[:2])
        p = p._replace(log_weights=p.log_weights + ahead)
        following = torch.logsumexp(here[-1].unsqueeze(-1) + log_transition, -2)
        return Unrolled(found, q, p, (before, ran, ahead), (found, here), (*last, following))

    # --- the three conditionals -------------------------------------------------------------------------

    def prior(self, past: Past) -> MultivariateMixture | MultivariateNormal:
        p = self._mixture(past)
        if self.modes == 1 and not (self.conjugate and self.training):
            return MultivariateNormal(p.loc.squeeze(-2), p.scale_tril.squeeze(-3))
        return p

    def likelihood(self, present: Present) -> Any:
        return self.p_x(self.decoder(present.h[0]))

    def posterior(self, past: Past, e: Transitions) -> MultivariateNormal:
        z, ran = past.h[0], past.h[1] > 0
        with exactly(z):
            loc = torch.where(ran, matvec(e.F, z) + e.f, e.f_first)
        return MultivariateNormal(loc, torch.where(ran[..., :1, :, :, None], e.L, e.L_first))

    # --- the states, and the global factor ----------------------------------------------------------------

    def _of(self, batch: Sequences) -> Inference:
        x, observed = (v.flatten(2).transpose(0, 1) for v in (batch.x, batch.observed))
        control = None if batch.control is None else batch.control.transpose(0, 1)
        frame = Frame(x, observed, control)
        return self.infer(frame, self.features(frame), batch.lengths)

    @torch.no_grad()
    def states(self, batch: Sequences) -> States:
        """q(s_t) and the moments of q(z_t), from all of x; after the last frame that was seen, a prediction.

        Example:
            >>> SVAE(x_dim=4, z_dim=2).states(Sequences.from_arrays(torch.zeros(1, 6, 4))).mean.shape
            torch.Size([1, 6, 2])
        """
        q, u, *_ = self._of(batch)
        chain = switching.conditionals(self.dynamics.expected(), q.gamma, q.precision, q.linear, u)
        z = switching.moments(chain)
        hidden = ~batch.valid
        return States(
            *(
                v.transpose(0, 1)
                .to(batch.x.dtype)
                .masked_fill(hidden.reshape(*hidden.shape, *[1] * (v.ndim - 2)), torch.nan)
                for v in (q.gamma, z.mean, z.covariance)
            )
        )

    def begin_global(self, sequences: int) -> None:
        self._factor.sequences.fill_(sequences)

    @torch.no_grad()
    def global_statistics(self, batch: Sequences) -> switching.ExpectedSums:
        """Expected sums of a batch, which a natural gradient of q(theta) reads."""
        q, u, ends, seen = self._of(batch)
        chain = switching.conditionals(self.dynamics.expected(), q.gamma, q.precision, q.linear, u)
        return switching.expected_sums(q.gamma, q.xi, switching.moments(chain), u, ends, seen)

    def natural_step(self, sums: switching.ExpectedSums, rate: float) -> None:
        self._factor.natural_step(sums, rate)

    @property
    def _factor(self) -> ConjugateDynamics:
        if not isinstance(self.dynamics, ConjugateDynamics):
            raise TypeError(
                "this SVAE learns its dynamics by gradient: for a conjugate factor take SVAE(conjugate=True)."
            )
        return self.dynamics
