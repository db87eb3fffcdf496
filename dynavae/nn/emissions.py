"""Emissions: what an observation is, as recipes that build p(x_t | features)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import hardtanh, one_hot, softplus

from dynavae import distributions as D


def inverse_softplus(y: Tensor) -> Tensor:
    """What softplus makes y of, y > 0, without overflow."""
    return y + torch.log(-torch.expm1(-y))


@dataclass(frozen=True)
class Emission:
    """What x_t is, given features of the model: a recipe that builds an :class:`~dynavae.nn.EmissionHead`.

    Subclasses are the choices; their fields are the options.

    Class attributes:
        noise_per_feature: standard normals that one coordinate of a draw takes.
        discrete: x has a probability mass, not a density.
        categorical: x holds class numbers, of which no mean may be taken.
        integer: values between integers have no probability.
        marginal: coordinates may be missing one by one; else only whole frames may.
        numbers: that the last layer gives per coordinate.
    """

    noise_per_feature: ClassVar[int] = 1
    discrete: ClassVar[bool] = False
    categorical: ClassVar[bool] = False
    integer: ClassVar[bool] = False
    marginal: ClassVar[bool] = True
    numbers: ClassVar[int] = 1

    @property
    def closed_form_em(self) -> bool:
        """Whether an M-step of it is known, see :mod:`dynavae.nn.estimation`."""
        return False

    def input_dim(self, x_dim: int) -> int:
        """Features of an observation as the networks read it."""
        return x_dim

    def encode(self, x: Tensor) -> Tensor:
        """The observation as the networks read it."""
        return x

    def outputs(self, x_dim: int) -> int:
        """Numbers that the last layer must give."""
        return self.numbers * x_dim

    def extra(self, x_dim: int) -> dict[str, Tensor]:
        """Initial values of parameters that do not depend on the features."""
        return {}

    def distribution(self, raw: Tensor, extra: dict[str, Tensor]) -> Any:
        raise TypeError(f"{type(self).__name__} should say which distribution it builds.")

    def start(self, mean: Tensor, stddev: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Output bias (outputs,) and extra parameters that fit the marginal of the data."""
        bias = torch.zeros(self.outputs(len(mean)), dtype=mean.dtype)
        bias[: len(mean)] = mean
        return bias, {}

    @property
    def support(self) -> tuple[float, float, str]:
        """Least and greatest value of x, and the range in words."""
        return -math.inf, math.inf, "any finite numbers"

    def check(self, x: Tensor, what: str, observed: Tensor | None = None) -> None:
        """Raise a sentence if x (..., x_dim; 0 where missing) holds a value that has no probability.

        With `observed`, also if single coordinates are missing under an emission that cannot leave them out.
        """
        low, high, words = self.support
        if observed is not None:
            self.check_gaps(observed, what)
        if not self.integer and (low, high) == (-math.inf, math.inf):
            return
        lowest, highest = float(x.min()), float(x.max())
        fraction = self.integer and bool((x != x.round()).any())
        if lowest < low or highest > high or fraction:
            raise ValueError(
                f"{type(self).__name__} emission: values of {what} should be {words}; they go from {lowest:g} to "
                f"{highest:g}{', with fractions' if fraction else ''}. Rescale the data, or choose another emission."
            )

    def check_gaps(self, observed: Tensor, what: str) -> None:
        """Raise a sentence if a frame (..., x_dim) is observed in part, and its probability has no closed form."""
        if not self.marginal and not torch.equal(observed.any(-1), observed.all(-1)):
            raise ValueError(f"{what} has a frame that is observed in part: {D.nade.REFUSAL}")

    def to_config(self) -> dict[str, Any]:
        return {"emission": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class _LocationScale(Emission):
    """Location from the features; the scale is learned per frame, shared over time, or fixed.

    Args:
        scale: "learned" (a function of the features), "shared" (one parameter per coordinate), or "fixed".
        value: the fixed scale, or the initial shared one.
        min_scale: floor of the scale.
    """

    scale: str = "learned"
    value: float = 1.0
    min_scale: float = 1e-3

    def __post_init__(self) -> None:
        if self.scale not in ("learned", "shared", "fixed"):
            raise ValueError(f"scale should be 'learned', 'shared' or 'fixed'; got {self.scale!r}.")
        if self.value <= 0 or self.min_scale < 0:
            raise ValueError(f"scales are positive; got value={self.value}, min_scale={self.min_scale}.")

    def outputs(self, x_dim: int) -> int:
        return 2 * x_dim if self.scale == "learned" else x_dim

    def extra(self, x_dim: int) -> dict[str, Tensor]:
        if self.scale != "shared":
            return {}
        return {
            "raw_scale": torch.full((x_dim,), math.log(math.expm1(max(self.value - self.min_scale, 1e-6))))
        }

    def loc_scale(self, raw: Tensor, extra: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self.scale == "learned":
            loc, r = raw.chunk(2, -1)
            return loc, softplus(r) + self.min_scale
        if self.scale == "shared":
            return raw, (softplus(extra["raw_scale"]) + self.min_scale).expand_as(raw)
        return raw, torch.full_like(raw, self.value)

    def start(self, mean: Tensor, stddev: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        r = inverse_softplus((stddev - self.min_scale).clamp(min=1e-3))
        if self.scale == "learned":
            return torch.cat([mean, r]), {}
        return mean, {"raw_scale": r} if self.scale == "shared" else {}


@dataclass(frozen=True)
class Gaussian(_LocationScale):
    """N(x; mu, sigma^2) per coordinate."""

    @property
    def closed_form_em(self) -> bool:
        return True

    def distribution(self, raw: Tensor, extra: dict[str, Tensor]) -> D.Normal:
        return D.Normal(*self.loc_scale(raw, extra))


@dataclass(frozen=True)
class Laplace(_LocationScale):
    """Laplace(x; mu, b) per coordinate: absolute errors, robust to outliers."""

    def distribution(self, raw: Tensor, extra: dict[str, Tensor]) -> D.Laplace:
        return D.Laplace(*self.loc_scale(raw, extra))


@dataclass(frozen=True)
class StudentT(_LocationScale):
    """Student t per coordinate, with learned degrees of freedom above 2.

    Args:
        df: initial degrees of freedom.
    """

    df: float = 5.0
    noise_per_feature: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.df <= 2:
            raise ValueError(f"df should be above 2, so that the variance is finite; got {self.df}.")

    def extra(self, x_dim: int) -> dict[str, Tensor]:
        raw_df = torch.full((x_dim,), math.log(math.expm1(self.df - 2)))
        return {**super().extra(x_dim), "raw_df": raw_df}

    def distribution(self, raw: Tensor, extra: dict[str, Tensor]) -> D.StudentT:
        loc, scale = self.loc_scale(raw, extra)
        return D.StudentT(loc, scale, (2 + softplus(extra["raw_df"])).expand_as(loc))


@dataclass(frozen=True)
class Bernoulli(Emission):
    """Independent binary coordinates, from logits."""

    @property
    def closed_form_em(self) -> bool:
        return True

    discrete: ClassVar[bool] = True

    @property
    def support(self) -> tuple[float, float, str]:
        return 0.0, 1.0, "from 0 to 1"

    def distribution(self, raw: Tensor, extra: dict[str, Tensor]) -> D.Bernoulli:
        return D.Bernoulli(raw)

    def start(self, mean: Tensor, stddev: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.logit(mean.clamp(1e-4, 1 - 1e-4)), {}


@dataclass(frozen=True)
class NADE(Emission):
    """Binary coordinates, each given those before it in the same frame: see :class:`~dynavae.distributions.NADE`.

    The features give its two biases, b (x_dim) and c (hidden), by one linear layer; W and V are shared by all frames.
    A frame is observed or missing as a whole.

    Args:
        hidden: units of the hidden layer that runs along the coordinates.
        activation: of these units, "sigmoid" or "relu".
    """

    hidden: int = 100
    activation: str = "sigmoid"
    discrete: ClassVar[bool] = True
    integer: ClassVar[bool] = True
    marginal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise ValueError(f"a NADE emission needs at least 1 hidden unit; got hidden={self.hidden}.")
        if self.activation not in ("sigmoid", "relu"):
            raise ValueError(f"activation should be 'sigmoid' or 'relu'; got {self.activation!r}.")

    @property
    def support(self) -> tuple[float, float, str]:
        return 0.0, 1.0, "0 or 1"

    def outputs(self, x_dim: int) -> int:
        return x_dim + self.hidden

    def extra(self, x_dim: int) -> dict[str, Tensor]:
        """W and V, uniform within the bounds of a linear layer from `hidden` units."""
        return {
            name: (2 * torch.rand(x_dim, self.hidden) - 1) / math.sqrt(self.hidden) for name in ("W", "V")
        }

    def distribution(self, raw: Tensor, extra: dict[str, Tensor]) -> D.NADE:
        bias, hidden = raw.split([raw.shape[-1] - self.hidden, self.hidden], -1)
        return D.NADE(bias, hidden, D.NADEWeights(extra["W"], extra["V"], self.activation))

    def start(self, mean: Tensor, stddev: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Each coordinate on its own: what it reads of the others, V, starts small around that."""
        b = torch.logit(mean.clamp(1e-4, 1 - 1e-4))
        return torch.cat([b, b.new_zeros(self.hidden)]), {}


@dataclass(frozen=True)
class Categorical(Emission):
    """Each coordinate is one of `classes` classes; x holds class numbers, the networks read one-hot codes."""

    classes: int = 2
    discrete: ClassVar[bool] = True
    categorical: ClassVar[bool] = True
    integer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"a categorical emission needs at least 2 classes; got {self.classes}.")

    @property
    def closed_form_em(self) -> bool:
        return True

    def input_dim(self, x_dim: int) -> int:
        return x_dim * self.classes

    def encode(self, x: Tensor) -> Tensor:
        return one_hot(x.long().clamp(0, self.classes - 1), self.classes).flatten(-2).to(x.dtype)

    def outputs(self, x_dim: int) -> int:
        return x_dim * self.classes

    @property
    def support(self) -> tuple[float, float, str]:
        return 0.0, self.classes - 1.0, f"class numbers from 0 to {self.classes - 1}"

    def distribution(self, raw: Tensor, extra: dict[str, Tensor]) -> D.Categorical:
        return D.Categorical(raw.unflatten(-1, (-1, self.classes)))

    def start(self, mean: Tensor, stddev: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.zeros(self.outputs(len(mean)), dtype=mean.dtype), {}


@dataclass(frozen=True)
class PowerSpectrum(Emission):
    """Power of a complex Gaussian coefficient; its log-variance is clamped to [min, max].

    Args:
        min_log_variance, max_log_variance: the clamp; the lower one is the floor of the Itakura-Saito form.
        log_input: let the networks read log(x + 1e-10) instead of the raw power, whose range is large.
    """

    min_log_variance: float = -30.0
    max_log_variance: float = 30.0
    log_input: bool = False

    @property
    def closed_form_em(self) -> bool:
        return True

    def encode(self, x: Tensor) -> Tensor:
        return torch.log(x + 1e-10) if self.log_input else x

    @property
    def support(self) -> tuple[float, float, str]:
        return 0.0, math.inf, "powers, 0 or more"

    def distribution(self, raw: Tensor, extra: dict[str, Tensor]) -> D.PowerSpectrum:
        # hardtanh is the clamp whose backward is one pass over frames as wide as a spectrum
        return D.PowerSpectrum(hardtanh(raw, self.min_log_variance, self.max_log_variance))

    def start(self, mean: Tensor, stddev: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.log(mean.clamp(min=1e-10)), {}


EMISSIONS: dict[str, type[Emission]] = {
    "gaussian": Gaussian,
    "laplace": Laplace,
    "student_t": StudentT,
    "bernoulli": Bernoulli,
    "nade": NADE,
    "categorical": Categorical,
    "power_spectrum": PowerSpectrum,
}


def to_emission(emission: Emission | str | dict[str, Any]) -> Emission:
    """An emission from itself, its name, or its configuration.

    Example:
        >>> to_emission("bernoulli")
        Bernoulli()
        >>> to_emission({"emission": "gaussian", "scale": "fixed", "value": 0.1})
        Gaussian(scale='fixed', value=0.1, min_scale=0.001)
    """
    if isinstance(emission, Emission):
        return emission
    options = dict(emission) if isinstance(emission, dict) else {"emission": emission}
    name = str(options.pop("emission", ""))
    by_name = {**EMISSIONS, **{kind.__name__: kind for kind in EMISSIONS.values()}}
    if name not in by_name:
        raise ValueError(f"unknown emission {name!r}; choose one of {', '.join(EMISSIONS)}.")
    allowed = [f.name for f in dataclasses.fields(by_name[name])]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(
            f"{name} emission has no option {unknown[0]!r}; it has: {', '.join(allowed) or 'none'}."
        )
    return by_name[name](**options)
