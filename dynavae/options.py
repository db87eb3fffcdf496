"""Whether the options of an objective fit together, and fit the model."""

from __future__ import annotations

from dynavae.model import SequentialLVM
from dynavae.schedules import Real
from dynavae.tasks.capabilities import require

OBJECTIVES = ("elbo", "iwae", "renyi", "fivo", "exact", "em")
HIDE = ("frames", "values")


def check(
    model: SequentialLVM,
    objective: str,
    *,
    kl: str,
    particles: int,
    beta: Real,
    kl_warmup: Real,
    kl_start: Real,
    free_bits: Real,
    alpha: Real,
    resample_threshold: Real,
    scheduled_sampling: Real,
    truncate: int | None,
    hide_rate: Real,
    hide: str,
    score_hidden: bool,
) -> None:
    """Raise ValueError, with a sentence, where options of :class:`~dynavae.loss.Loss` do not fit together or the model."""
    one_of("objective", objective, OBJECTIVES)
    one_of("hide", hide, HIDE)
    one_of("kl", kl, ("auto", "analytic", "sample"))
    at_least("particles", particles, 1)
    for name, value in dict(beta=beta, kl_warmup=kl_warmup, free_bits=free_bits).items():
        at_least(name, value, 0)
    for name, value in dict(kl_start=kl_start, scheduled_sampling=scheduled_sampling).items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} should be between 0 and 1; got {value}.")
    if not 0 <= hide_rate < 1:
        raise ValueError(
            f"hide_rate is a share of the frames (or values), from 0 to below 1; got {hide_rate}."
        )
    if hide_rate and hide == "values" and not model.emission.marginal:
        raise ValueError(
            f"{type(model.emission).__name__} emission: values of a frame are missing all together or not at all; "
            "hide='values' hides single ones. Take hide='frames'."
        )
    if objective in ("exact", "em") and (
        beta != 1 or kl_warmup or free_bits or truncate is not None or score_hidden
    ):
        raise ValueError(
            f"objective={objective!r} is log p(x) of whole sequences: it has no KL to weigh, no chunks, and scores "
            "what the model reads. Leave beta=1, kl_warmup=0, free_bits=0, truncate=None, score_hidden=False."
        )
    if score_hidden and (model.autoregressive or objective == "fivo"):
        raise ValueError(
            "score_hidden scores x that the posterior has not read: a bound only where x is read by nothing else. "
            f"It takes a model that is not autoregressive, and not fivo; got {type(model).__name__}, {objective}."
        )
    if truncate is not None:
        at_least("truncate", truncate, 1)
    for name, value, default, by, used in (
        ("alpha", alpha, 0, "objective='renyi'", objective == "renyi"),
        ("resample_threshold", resample_threshold, 0.5, "objective='fivo'", objective == "fivo"),
        ("hide", hide, "frames", "a hide_rate above 0", hide_rate > 0),
        ("score_hidden", score_hidden, False, "a hide_rate above 0", hide_rate > 0),
    ):
        if value != default and not used:
            raise ValueError(f"{name}={value!r} does nothing without {by}: set it, or leave {name} out.")
    if free_bits and (objective != "elbo" or kl == "sample"):
        raise ValueError("free_bits needs objective='elbo' with an analytic KL: it is a floor on that KL.")
    if objective == "fivo" and (beta != 1 or kl_warmup):
        raise ValueError("fivo has no KL to weigh: leave beta=1 and kl_warmup=0, or take objective='iwae'.")
    if scheduled_sampling and not model.autoregressive:
        raise ValueError(
            f"scheduled sampling lets a model read its own outputs, but {type(model).__name__} reads no past x "
            "when it generates (autoregressive = False): set scheduled_sampling=0."
        )
    if truncate is not None and not model.per_step_likelihood:
        raise ValueError(
            f"truncate cuts time into chunks, but this {type(model).__name__} decodes x_t from z_1:T; "
            "leave truncate=None."
        )
    require(model, "iwae" if objective == "renyi" else objective)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} should be one of {', '.join(choices)}; got {value!r}.")


def at_least(name: str, value: Real, minimum: Real) -> None:
    if value < minimum:
        raise ValueError(f"{name} should be {minimum} or more; got {value}.")
