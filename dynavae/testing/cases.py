"""What the laws run on: small models of every kind, and sequences with all that can go wrong in data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynavae import tree
from dynavae.batch import Sequences
from dynavae.model import SequentialLVM
from dynavae.nn import Categorical, Emission, PowerSpectrum
from dynavae.noise import Noise, draw

LENGTHS = (6, 1, 4)
"""Ragged, with a sequence of one frame."""

SIZES = {"x_dim": 4, "z_dim": 3, "h_dim": 5, "w_dim": 2}
EMISSIONS: tuple[Any, ...] = (
    "bernoulli",
    "power_spectrum",
    {"emission": "gaussian", "scale": "shared"},
    "student_t",
    "laplace",
    {"emission": "nade", "hidden": 5},
    "multivariate_gaussian",
    {"emission": "gaussian_mixture", "components": 2},
)
TOLERANCE = 1e-10


class Case(NamedTuple):
    """One model that the laws run on; `build` makes the same one at each call."""

    name: str
    build: Callable[[], SequentialLVM]


def options_of(cls: type[SequentialLVM]) -> dict[str, inspect.Parameter]:
    """The constructor's options, by name."""
    return {k: p for k, p in inspect.signature(cls.__init__).parameters.items() if k != "self"}


def small(cls: type[SequentialLVM], **options: Any) -> SequentialLVM:
    """A float64 instance of a few units with fixed, generic weights.

    Sizes are tiny where the constructor accepts them, and hidden layers keep their number but not their
    width. All parameters are moved a little, so that an initial value of exactly zero hides no dependence.

    Args:
        cls: a class of model.
        options: constructor options that override the small sizes.

    Example:
        >>> from dynavae.models import VRNN
        >>> model = small(VRNN, memory="gru")
        >>> model.x_dim, model.z_dim, next(model.parameters()).dtype
        (4, 3, torch.float64)
    """
    sizes: dict[str, Any] = {}
    for name, option in options_of(cls).items():
        default = option.default
        if name in SIZES and (name != "w_dim" or default):
            sizes[name] = SIZES[name]
        elif name.endswith("layers") and isinstance(default, tuple):
            sizes[name] = (6,) * len(default)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(**{**sizes, **options}).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def cases(*classes: type[SequentialLVM]) -> Iterator[Case]:
    """The models to try: for each class the defaults, its variants, controls and several emissions.

    Args:
        classes: classes of models; by default the whole registry.
    """
    if not classes:
        from dynavae.models import MODELS

        classes = tuple(MODELS.values())
    turn = 0
    for cls in classes:
        accepted = options_of(cls)
        extra = {k: v for k, v in (("control_dim", 2), ("mask_input", True)) if k in accepted}
        yield Case(cls.__name__, partial(small, cls))
        if extra:
            yield Case(f"{cls.__name__}-control", partial(small, cls, **extra))
        # A discrete latent comes with emissions of its own choice, so only its variants are tried.
        free = "emission" in accepted and not cls.discrete_latent
        if free:
            options = {**extra, "emission": {"emission": "categorical", "classes": 3}}
            yield Case(f"{cls.__name__}-categorical", partial(small, cls, **options))
        for name, options in cls.variants.items():
            if free and "emission" not in options:
                options = {**options, "emission": EMISSIONS[turn % len(EMISSIONS)]}
                turn += 1
            yield Case(f"{cls.__name__}-{name}", partial(small, cls, **options))


def describe(model: SequentialLVM) -> str:
    """The model with whatever options differ from its defaults, sizes aside: for messages."""
    defaults = {k: p.default for k, p in options_of(type(model)).items()}
    sizes = {*SIZES, *(k for k, v in defaults.items() if isinstance(v, tuple))}
    changed = {k: v for k, v in model.config.items() if k not in sizes and v != defaults.get(k)}
    return f"{type(model).__name__}({', '.join(f'{k}={v!r}' for k, v in changed.items())})"


def observations(emission: Emission, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random values that this emission can emit."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if isinstance(emission, PowerSpectrum):
        return x.square()
    if isinstance(emission, Categorical):
        return (torch.special.ndtr(x) * emission.classes).floor().clamp(max=emission.classes - 1)
    return (x > 0).to(x.dtype) if emission.discrete else x


def sequences(
    model: SequentialLVM, lengths: Sequence[int] = LENGTHS, missing: bool = False, seed: int = 0
) -> Sequences:
    """Random sequences for a model.

    Args:
        lengths: frames of each sequence.
        missing: leave out coordinates at random, and whole frames: one inside, the first and the last ones.
        seed: of the values and the gaps.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths), model.x_dim)
    x = observations(model.emission, shape, generator)
    control = None
    if model.control_dim:
        control = torch.randn(*shape[:2], model.control_dim, generator=generator, dtype=x.dtype)
    return Sequences.from_arrays(x, lengths, gaps(model, shape, generator) if missing else None, control)


def gaps(model: SequentialLVM, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """An observed mask (B, T, x_dim): some whole frames are missing, and coordinates if the emission allows it."""
    observed = torch.rand(shape, generator=generator) > 0.3
    observed[:, 0, -1] = True  # every sequence keeps a value
    if shape[1] > 4:
        observed[0, 2] = False
        observed[0, 4:] = False
        observed[0, 3, 0] = True
    if len(observed) > 2 and shape[1] > 2:
        observed[2, 0] = False
        observed[2, 1, 0] = True
    return observed if model.emission.marginal else observed[..., -1:].expand(shape).clone()


def noise_for(
    model: SequentialLVM, batch: Sequences, particles: int, seed: int = 1, resample: bool = True
) -> Noise:
    """Noise for any kind of run on these sequences."""
    generator = torch.Generator().manual_seed(seed)
    return draw(model, batch.steps, particles, len(batch), x=True, resample=resample, generator=generator)


def compare(
    law: str,
    model: SequentialLVM,
    what: str,
    a: Any,
    b: Any,
    tolerance: float = TOLERANCE,
    broadcast: bool = False,
) -> None:
    """Assert that two trees of tensors hold the same numbers; `broadcast` expands their axes first."""
    if not tree.same_structure(a, b):
        kinds = f"{type(a).__name__}, {type(b).__name__}"
        raise AssertionError(f"{describe(model)} breaks '{law}': {what} differs in kind: {kinds}.")
    for i, (first, second) in enumerate(zip(tree.leaves(a), tree.leaves(b), strict=True)):
        if broadcast:
            first, second = torch.broadcast_tensors(first, second)
        if first.shape != second.shape:
            shapes = f"{tuple(first.shape)}, {tuple(second.shape)}"
            raise AssertionError(f"{describe(model)} breaks '{law}': {what} has shapes {shapes}.")
        first, second = first.double(), second.double()
        gap = torch.where(first == second, 0.0, (first - second).abs() / (1 + second.abs()))
        if not bool((gap <= tolerance).all()):  # NaN fails too
            worst = int(torch.nan_to_num(gap, nan=torch.inf).argmax())
            raise AssertionError(
                f"{describe(model)} breaks '{law}': {what} (tensor {i}) differs: "
                f"{first.flatten()[worst].item():.12g}, {second.flatten()[worst].item():.12g}, "
                f"relative gap {gap.flatten()[worst].item():.1e} above {tolerance:.0e}."
            )


def within(
    law: str,
    model: SequentialLVM,
    what: str,
    values: Tensor,
    expected: float = 0.0,
    stddev: float | None = None,
) -> None:
    """Assert that the mean of independent `values` is `expected`, within 6 standard errors.

    `stddev` is that of one value, where it is known; otherwise it is estimated.
    """
    spread = float(values.std()) if stddev is None else stddev
    mean, error = float(values.mean()), spread / len(values) ** 0.5
    if not abs(mean - expected) <= 6 * error + 1e-12:
        raise AssertionError(
            f"{describe(model)} breaks '{law}': {what} is {mean:.5f} +- {error:.5f}, not {expected:.5f}."
        )


def require(condition: bool, law: str, model: SequentialLVM, sentence: str) -> None:
    """Assert, with a sentence that names the model and the law."""
    if not condition:
        raise AssertionError(f"{describe(model)} breaks '{law}': {sentence}")
