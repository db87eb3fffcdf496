"""Which task is right for which model, and what to do instead where it is not."""

from __future__ import annotations

from dynavae.model import SequentialLVM

TASKS = (
    "elbo",
    "iwae",
    "fivo",
    "exact",
    "filter",
    "smooth",
    "reconstruct",
    "generate",
    "forecast",
    "impute",
    "stream",
)
"""Columns of the model × task table: four bounds, then the tasks."""


def refusal(model: SequentialLVM, task: str) -> str | None:
    """None if the task is right for this model, else a sentence that says why not and names the alternative."""
    name = type(model).__name__
    if task == "fivo" and not model.per_step_likelihood:
        return (
            f"fivo weighs p(x_t | z_<=t) step by step, but this {name} decodes x_t from z_1:T; "
            "use bound='iwae', or its causal decoder."
        )
    if task == "exact" and not model.exact:
        return f"{name} has no exact likelihood; use bound='elbo', 'iwae' or 'fivo'."
    if task == "em" and not model.closed_form_em:
        if model.exact and "emission" in model.config:
            return (
                f"em needs an M-step in closed form, which a {type(model.emission).__name__} emission of {name} has not; "
                "use objective='exact', or another emission, such as gaussian or bernoulli."
            )
        return f"em needs an M-step in closed form, which {name} has not; use objective='elbo'."
    if task == "filter" and not (model.causal or model.exact):
        if not model.per_step_likelihood:
            return f"filter needs p(x_t | z_<=t), but this {name} decodes x_t from z_1:T; use smooth(...)."
        return (
            f"filter needs a causal posterior q(z_t | z_<t, x_<=t), but this {name} reads the future of x "
            f"(causal = False). Use smooth(...), or pass propose=bootstrap."
        )
    if task == "stream" and not model.exact:
        whole = needs_the_whole(model)
        if whole is not None or model.causal:
            return whole
        options = ", ".join(f"{k}={v!r}" for k, v in model.causal_variant.items())
        variant = (
            f"take the causal variant, {name}({options}),"
            if options
            else "take a causal model, such as VRNN,"
        )
        return (
            f"stream needs a causal posterior q(z_t | z_<t, x_<=t), but this {name} reads the future of x "
            f"(causal = False). Use smooth(...) on a window of frames, {variant} or pass propose=bootstrap."
        )
    return None


def needs_the_whole(model: SequentialLVM) -> str | None:
    """Why this model cannot go frame by frame, whatever proposes z_t; None if it can."""
    name = type(model).__name__
    if model.w_dim:
        return (
            f"stream takes one frame at a time, but this {name} infers a latent of the whole sequence from all "
            "of x. Use smooth(...) on a window of frames, or a model without one, such as DKF(inference='ST-L')."
        )
    if not model.per_step_likelihood:
        return (
            f"stream needs p(x_t | z_<=t), but this {name} decodes x_t from z_1:T. Use smooth(...) on a window of "
            "frames, or its causal decoder with propose=bootstrap."
        )
    return None


def capabilities(model: SequentialLVM) -> dict[str, bool]:
    """Task -> whether it is right for this model.

    Example:
        >>> from dynavae.models import VRNN
        >>> capabilities(VRNN(x_dim=3, z_dim=2, h_dim=4))["filter"]
        True
    """
    return {task: refusal(model, task) is None for task in TASKS}


def require(model: SequentialLVM, task: str) -> None:
    """Raise the refusal, if there is one."""
    sentence = refusal(model, task)
    if sentence is not None:
        raise ValueError(sentence)
