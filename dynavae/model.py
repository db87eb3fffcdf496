r"""The model: three conditionals, and the recursion that carries what they condition on.

.. math::
    p(x_{1:T}, z_{1:T}) &= \prod_t p(z_t \mid x_{<t}, z_{<t})\; p(x_t \mid x_{<t}, z_{\le t}) \\
    q(z_{1:T} \mid x_{1:T}) &= \prod_t q(z_t \mid z_{<t}, x_{1:T})

A model is a :class:`SequentialLVM` with these factors as methods. **The argument list of a method is its
information set**, so the one time loop (`scan.py`) knows what runs before it (whatever reads x only) and
after it (scoring). Time leads inside the engine: x is (T, B, x_dim), a latent is (T, K, B, z_dim) for K
particles, and what depends on x alone has no K axis and broadcasts against what does (use `cat`).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dynavae.closed_forms import ClosedForms
from dynavae.configuration import recording
from dynavae.distributions import standard_normal
from dynavae.nn.conv import ConvEmissionHead
from dynavae.nn.heads import Emission, EmissionHead, to_emission
from dynavae.nn.memory import Empty, Memory
from dynavae.nn.mlp import MLP
from dynavae.tree import cat

if TYPE_CHECKING:
    from dynavae.batch import Sequences
    from dynavae.tasks.streaming import Stream


class Frame(NamedTuple):
    """What the networks may read of one frame, or of all frames at once."""

    x: Tensor  # (..., x_dim); 0 where it was not observed
    observed: Tensor | None  # (..., x_dim) bool; None: everything was observed, or has been drawn
    control: Tensor | None  # (..., control_dim)


class Past(NamedTuple):
    """Everything known just before z_t."""

    x: Any  # c_t = c(x_<t), the output of `past_x`; (B, .) without particles
    h: Any  # h_t = h(x_<t, z_<t): any tree of (K, B, .) tensors
    control: Tensor | None  # known input of this step (B, control_dim)
    w: Tensor | None  # per-sequence latent (K, B, w_dim)
    prior: Any = None  # p(z_t | .), given to a posterior that declares `reads_prior`


class Present(NamedTuple):
    """The same once z_t is known: what the likelihood of x_t and the update may read."""

    x: Any
    h: Any
    control: Tensor | None
    w: Tensor | None


class Evidence(NamedTuple):
    """What an inference network may read: all of x, nothing of z. Time leads."""

    frame: Frame  # x (T, B, x_dim) with what is missing set to 0
    u: Any  # features(frame)  (T, B, .)
    c: Any  # past_x over u: c_t = c(x_<t)
    g: Any  # seen_x over recognition(frame): g_t = g(x_<=t)
    lengths: Tensor  # (B,) frames up to the last one in which something was seen, at least 1
    w: Tensor | None  # per-sequence latent (K, B, w_dim), already drawn


class Unrolled(NamedTuple):
    """A recursion over all frames: leading axes (T, K, B)."""

    z: Tensor
    q: Any  # q(z_t | .)
    p_z: Any  # p(z_t | .), or None: it is computed from past_h afterwards
    past_h: Any
    present_h: Any
    h: Any  # after the last frame (K, B, .)


class SequentialLVM(ClosedForms, nn.Module, abc.ABC):
    """Base of every model. A subclass writes the factors; every task and objective then works.

    Required: `initial`, `absorb`, `prior`, `likelihood`, `posterior`, and a call of `super().__init__`.
    `features`, `evidence`, `update`, the two memories of x and the per-sequence latent are optional.

    Class attributes, each of which a law checks against what autograd sees:
        causal: q(z_t | .) reads x_<=t only, so the model can filter and stream.
        autoregressive: the generative part reads x_<t.
        marginalises: `update` leaves out what is missing of x_t (its features say what), so nothing is drawn in its place.
        reads_prior: `posterior` reads `past.prior`; the engine then computes it in the loop.
        mean_field: q(z_t | .) does not read z_<t, so z_1:T is drawn at once and `unroll` replaces the loop.
        bridges: where x_t is missing, q(z_t | .) reads z_<t and the future of x; filters and streams take the prior there.
        per_step_likelihood: p(x_t | .) reads z_<=t; False if it reads z_1:T (`decode` all at once).
        discrete_latent: z has no pathwise gradient (the KL is then sampled in training).
        exact: log p(x), filter and smoother are known; see :class:`~dynavae.closed_forms.ClosedForms`.
        full_precision: nothing but algebra of covariances and counts; `fit` leaves autocast out.
        conjugate: global parameters have a conjugate factor, moved by natural gradients; see `natural_step`.
        closed_form_em: `expectation` and `maximisation` fit it by EM; it may depend on options, then `__init__` sets it.

    Attributes set by ``__init__``: `x_dim, z_dim, w_dim, control_dim, emission, config`.
    """

    causal: bool = False
    autoregressive: bool = False
    marginalises: bool = False
    reads_prior: bool = False
    mean_field: bool = False
    bridges: bool = False
    per_step_likelihood: bool = True
    discrete_latent: bool = False
    exact: bool = False
    full_precision: bool = False
    conjugate: bool = False
    closed_form_em: bool = False
    variants: ClassVar[dict[str, dict[str, Any]]] = {}
    """Named constructor options that the laws also run on, beside the defaults."""
    causal_variant: ClassVar[dict[str, Any]] = {}
    """Constructor options that make the posterior causal, if the defaults do not: refusals name them."""

    x_dim: int
    z_dim: int
    config: dict[str, Any]
    past_x: Memory | Empty
    seen_x: Memory | Empty

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        emission: Emission | str | dict[str, Any] = "gaussian",
        control_dim: int = 0,
        w_dim: int = 0,
        mask_input: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("x_dim", x_dim), ("z_dim", z_dim)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{name} of {type(self).__name__} should be a positive integer; got {value!r}."
                )
        if control_dim < 0 or w_dim < 0:
            raise ValueError(f"control_dim and w_dim should be 0 or more; got {control_dim} and {w_dim}.")
        self.x_dim, self.z_dim, self.control_dim, self.w_dim = x_dim, z_dim, control_dim, w_dim
        self.mask_input = mask_input
        self.emission = to_emission(emission)
        # Set here: as class attributes they would shadow the submodules of the subclass.
        self.past_x, self.seen_x = Empty(), Empty()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Record the constructor's arguments: they are the configuration that a checkpoint stores."""
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = recording(cls.__init__)  # type: ignore[method-assign]

    # --- sizes and shared pieces for subclasses ---------------------------------------------------

    @property
    def input_dim(self) -> int:
        """Features of `encode`: the observation as networks read it, its mask if wanted, the control."""
        return self.emission.input_dim(self.x_dim) + self.x_dim * self.mask_input + self.control_dim

    def encode(self, frame: Frame) -> Tensor:
        """[x, its mask if `mask_input`, control], with missing coordinates at zero."""
        x = self.emission.encode(frame.x)
        seen = frame.observed
        if seen is not None and x is not frame.x:
            repeated = seen.repeat_interleave(x.shape[-1] // seen.shape[-1], -1)
            x = torch.where(repeated, x, 0.0)
        mask = None
        if self.mask_input:
            mask = torch.ones_like(frame.x) if seen is None else seen.to(frame.x.dtype)
        return cat(x, mask, frame.control)

    def emit(self, in_dim: int) -> EmissionHead:
        """The emission head p(x_t | features of size in_dim)."""
        return EmissionHead(self.emission, in_dim, self.x_dim)

    def decoder_to(
        self, in_dim: int, layers: Sequence[int], image: Sequence[int] | None, **net: Any
    ) -> tuple[MLP, EmissionHead]:
        """A decoder and its emission head: an MLP of these widths, or with `image` convolutions of so many filters."""
        if image is None:
            decoder = MLP(in_dim, layers, **net)
            return decoder, self.emit(decoder.out_dim)
        head = ConvEmissionHead(
            self.emission, in_dim, self.x_dim, layers, image, net.get("activation", "relu")
        )
        return MLP(in_dim, ()), head

    def zeros(self, lead: tuple[int, ...], dim: int) -> Tensor:
        """Zeros with the device and type of the parameters."""
        return next(self.parameters()).new_zeros(*lead, dim)

    # --- x only: no method here can read z ---------------------------------------------------------

    def features(self, frame: Frame) -> Any:
        """u_t = phi(x_t): what the recursion and the memories of x read."""
        return self.encode(frame)

    def recognition(self, frame: Frame) -> Any:
        """v_t = psi(x_t): input of the inference memory `seen_x`."""
        return self.features(frame)

    def evidence(self, seen: Evidence) -> Any:
        """e_t = e(x_1:T): what the posterior reads of x; by default u_t."""
        return seen.u

    # --- the recursion ------------------------------------------------------------------------------

    @abc.abstractmethod
    def initial(self, lead: tuple[int, ...]) -> Any:
        """h_1: a tree of tensors with leading axes `lead` = (K, B)."""

    @abc.abstractmethod
    def absorb(self, past: Past, z: Tensor) -> Any:
        """Past and z_t give present.h."""

    def update(self, present: Present, u: Any) -> Any:
        """Present and x_t (as features u_t) give the next past.h; by default x_t is not read."""
        return present.h

    def unroll(
        self, z: Tensor, u: Any, c: Any, control: Tensor | None, w: Any, h: Any
    ) -> tuple[Any, Any, Any]:
        """(past.h, present.h) stacked over time, and the last h: only for a mean-field q, all z at once."""
        raise TypeError(f"{type(self).__name__} declares mean_field but has no unroll.")

    def recursion(
        self, noise: Tensor, e: Any, u: Any, c: Any, control: Tensor | None, h: Any
    ) -> Unrolled | None:
        """z_1:T drawn from the posterior, by a faster form of the loop (see `recursion.py`); None: there is none."""
        return None

    # --- the three conditionals ---------------------------------------------------------------------

    @abc.abstractmethod
    def prior(self, past: Past) -> Any:
        """p(z_t | x_<t, z_<t)."""

    @abc.abstractmethod
    def likelihood(self, present: Present) -> Any:
        """p(x_t | x_<t, z_<=t)."""

    @abc.abstractmethod
    def posterior(self, past: Past, e: Any) -> Any:
        """q(z_t | z_<t, x_1:T)."""

    def decode(self, present: Present, lengths: Tensor) -> Any:
        """p(x_t | .) for all t at once; override only if it reads z_1:T."""
        return self.likelihood(present)

    # --- the per-sequence latent --------------------------------------------------------------------

    def static_prior(self, batch: int) -> Any:
        """p(w), by default N(0, I)."""
        return standard_normal((batch,), self.w_dim, next(self.parameters()))

    def static_posterior(self, seen: Evidence) -> Any:
        """q(w | x_1:T): (B, w_dim)."""
        raise TypeError(f"{type(self).__name__} has w_dim={self.w_dim} but no static_posterior.")

    def latent_values(self, z: Tensor) -> Tensor:
        """z as numbers that may be averaged: one-hot codes where z is a class."""
        return z

    # --- for models with a conjugate factor of global parameters ------------------------------------------

    def begin_global(self, sequences: int) -> None:
        """How many training sequences share KL(q(theta) || p(theta))."""
        raise TypeError(f"{type(self).__name__} has no conjugate factor.")

    def global_statistics(self, batch: Sequences) -> Any:
        """Expected sums of a batch under q(z): a tree of tensors that add up over batches."""
        raise TypeError(f"{type(self).__name__} has no conjugate factor.")

    def natural_step(self, sums: Any, rate: float) -> None:
        """Move q(theta) by `rate` along its natural gradient, given the sums of all training sequences."""
        raise TypeError(f"{type(self).__name__} has no conjugate factor.")

    # --- frame by frame -------------------------------------------------------------------------------

    def stream(self, batch: int = 1, particles: int = 32, **options: Any) -> Stream:
        """Filter, predict and score frames as they arrive: see :class:`~dynavae.tasks.streaming.Stream`."""
        from dynavae.tasks.streaming import Stream

        return Stream(self, batch, particles, **options)

    # --- saving -------------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | Path, extra: dict[str, Any] | None = None) -> Path:
        """Write `config.json` and `model.safetensors`; :func:`dynavae.load` reads them back."""
        from dynavae.checkpoint import save_pretrained

        return save_pretrained(self, directory, extra)

    # --- noise --------------------------------------------------------------------------------------

    @property
    def z_noise_dim(self) -> int:
        """Standard normals that one draw of z_t takes."""
        return self.z_dim

    @property
    def x_noise_dim(self) -> int:
        """Standard normals that one draw of x_t takes."""
        return self.x_dim * self.emission.noise_per_feature

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.config.items())
