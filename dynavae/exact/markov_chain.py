"""Finite-state Markov chains in log space: samples, and what inference over the states is built from."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dynavae.exact._algebra import per_step
from dynavae.exact._entry import check_broadcast, check_float, check_shape, entry


def check_chain(log_initial: Any, log_transition: Any, T: int, B: int) -> None:
    check_float("log_initial", log_initial)
    S = log_initial.shape[-1] if log_initial.ndim else 0
    check_broadcast("log_initial", log_initial, (B, S), "(..., S)")
    check_float("log_transition", log_transition, like=log_initial)
    check_broadcast("log_transition", log_transition, (T, B, S, S), "(..., S, S)")


def check_potentials(
    log_initial: Any,
    log_transition: Any,
    log_emission: Any,
    lengths: Any = None,
) -> None:
    check_float("log_emission", log_emission)
    if log_emission.ndim != 3 or log_emission.shape[0] == 0:
        raise ValueError(
            "log_emission should have shape (T, B, S) = (time, batch, states), T >= 1; "
            f"got {tuple(log_emission.shape)}."
        )
    T, B, S = log_emission.shape
    check_chain(log_emission.new_zeros(S) if log_initial is None else log_initial, log_transition, T, B)
    if log_initial is not None and log_initial.shape[-1] != S:
        raise ValueError(
            f"log_emission has S = {S} states on its last axis, but log_initial has {log_initial.shape[-1]}."
        )
    check_float("log_transition", log_transition, like=log_emission)
    if lengths is not None:
        check_shape("lengths", lengths, (B,), "(B,)")
        if lengths.is_floating_point() or lengths.min() < 1 or lengths.max() > T:
            raise ValueError(f"lengths should be integers from 1 to T = {T}; got {lengths.tolist()}.")


def logsumexp(x: Tensor, dim: int) -> Tensor:
    """logsumexp whose gradient is 0, not NaN, where every term is minus infinity."""
    dead = (x == -torch.inf).all(dim, keepdim=True)
    return torch.logsumexp(x.masked_fill(dead, 0.0), dim).masked_fill(dead.squeeze(dim), -torch.inf)


def normalise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities over the last axis and the log of their sum; all minus infinity stays so."""
    total = logsumexp(x, -1)
    return x - total.masked_fill(total == -torch.inf, 0.0).unsqueeze(-1), total


def valid_frames(log_emission: Tensor, lengths: Tensor | None) -> Tensor:
    """True at the frames that exist (T, B)."""
    T = log_emission.shape[0]
    return torch.arange(T, device=log_emission.device).unsqueeze(-1) < ends(log_emission, lengths)


def ends(log_emission: Tensor, lengths: Tensor | None) -> Tensor:
    """Frames of each sequence (B,)."""
    T, B, _ = log_emission.shape
    if lengths is None:
        return torch.full((B,), T, device=log_emission.device)
    return lengths.to(log_emission.device, torch.int64)


def repeat_last(states: Tensor, valid: Tensor) -> Tensor:
    """Repeat each sequence's last state after its end; `states` is (T, ..., B)."""
    T, B = valid.shape
    last = (valid.sum(0) - 1).clamp(max=T - 1)
    index = torch.minimum(torch.arange(T, device=last.device).unsqueeze(-1), last)
    return states.gather(0, index.reshape(T, *(1,) * (states.ndim - 2), B).expand_as(states))


def draw(log_probability: Tensor, uniform: Tensor) -> Tensor:
    """Invert the distribution function over the last axis; a state of probability 0 is never drawn."""
    cumulative = log_probability.exp().cumsum(-1)
    return (cumulative <= uniform.unsqueeze(-1) * cumulative[..., -1:]).sum(-1)


def check_uniform(uniform: Any) -> None:
    if (uniform < 0).any() or (uniform >= 1).any():
        raise ValueError("uniform should hold draws from [0, 1), as torch.rand gives.")


def check_simulate(log_initial: Any, log_transition: Any, uniform: Any) -> None:
    if uniform.ndim != 2 or uniform.shape[0] == 0:
        raise ValueError(f"uniform should have shape (T, B) with T >= 1; got {tuple(uniform.shape)}.")
    check_chain(log_initial, log_transition, *uniform.shape)
    check_uniform(uniform)
    for name, value in (("log_initial", log_initial), ("log_transition", log_transition)):
        if (value == -torch.inf).all(-1).any():
            raise ValueError(
                f"{name} has a row in which every state is impossible (-inf); rows should sum to one."
            )


@entry(check_simulate)
def simulate(
    log_initial: Float[Tensor, "*#B S"],
    log_transition: Float[Tensor, "*#T_B S S"],
    uniform: Float[Tensor, "T B"],
) -> Int[Tensor, "T B"]:
    r"""Sample states s_1:T from the chain, as a function of uniform noise.

    Args:
        log_initial: log p(s_1).
        log_transition: log p(s_t | s_{t-1}).
        uniform: draws from [0, 1); T and B are read from it.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or noise outside [0, 1).

    Example:
        >>> log_initial = torch.tensor([1.0, 0.0]).log()
        >>> log_transition = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).log()
        >>> simulate(log_initial, log_transition, torch.rand(4, 1)).squeeze(1)
        tensor([0, 1, 0, 1])
    """
    T, B = uniform.shape
    S = log_initial.shape[-1]
    rows = torch.arange(B, device=uniform.device)
    states = [draw(log_initial.expand(B, S), uniform[0])]
    for t, transition in enumerate(per_step(log_transition, T)[1:], start=1):
        states.append(draw(transition.expand(B, S, S)[rows, states[-1]], uniform[t]))
    return torch.stack(states)
