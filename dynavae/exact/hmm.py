r"""Exact inference in hidden Markov models, in log space: filter, smoother, messages, Viterbi, samples.

.. math::
    p(s_{1:T}, x_{1:T}) = p(s_1) \prod_{t=2}^T p(s_t \mid s_{t-1}) \prod_{t=1}^T p(x_t \mid s_t), \qquad
    s_t \in \{0, \dots, S - 1\}

Pure, differentiable functions of three log-potentials, time-first:

- `log_initial` (S,) or (B, S): :math:`\log p(s_1)`;
- `log_transition` (S, S), broadcasting to (T, B, S, S): row j, column k holds
  :math:`\log p(s_t = k \mid s_{t-1} = j)` of the step *into* t, so its value at t = 1 is never read;
- `log_emission` (T, B, S): :math:`\log p(x_t \mid s_t)`, 0 where nothing is observed.

Frames from `lengths` on do not exist: their emissions, NaN included, are not read, and the result there is
stated by each function. A log-potential of minus infinity is a structural zero; gradients stay finite.

On a CPU with Numba the recursions run in machine code; of second derivatives they are the loop over tensors.

Reference: Rabiner, A Tutorial on Hidden Markov Models and Selected Applications in Speech Recognition, 1989.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dynavae.exact import hmm_compiled, hmm_loop, hmm_parallel
from dynavae.exact._algebra import into_later, per_step
from dynavae.exact._entry import entry
from dynavae.exact.markov_chain import (
    check_potentials,
    check_uniform,
    draw,
    ends,
    normalise,
    repeat_last,
    simulate,
    valid_frames,
)

__all__ = [
    "Decoded",
    "Filtered",
    "Smoothed",
    "backward_messages",
    "hmm_filter",
    "hmm_smoother",
    "sample_posterior",
    "simulate",
    "viterbi",
]


class Filtered(NamedTuple):
    r"""Result of :func:`hmm_filter`.

    Attributes:
        log_filtered: :math:`\log p(s_t \mid x_{1:t})`; after the end of a sequence, the prediction.
        log_predicted: :math:`\log p(s_t \mid x_{1:t-1})`; :math:`\log p(s_1)` at t = 1.
        log_likelihood: :math:`\log p(x_t \mid x_{1:t-1})` in nats, 0 after the end; its sum over time is
            :math:`\log p(x_{1:T})`, minus infinity for impossible data.
    """

    log_filtered: Float[Tensor, "T B S"]
    log_predicted: Float[Tensor, "T B S"]
    log_likelihood: Float[Tensor, "T B"]


class Smoothed(NamedTuple):
    r"""Result of :func:`hmm_smoother`.

    Attributes:
        log_gamma: :math:`\log p(s_t \mid x_{1:T})`; after the end, the prediction.
        log_xi: :math:`\log p(s_{t-1} = j, s_t = k \mid x_{1:T})` at index t - 2, t = 2 ... T; minus infinity
            where there is no such transition, so that summing its exponential over time counts transitions.
    """

    log_gamma: Float[Tensor, "T B S"]
    log_xi: Float[Tensor, "T-1 B S S"]


class Decoded(NamedTuple):
    """Result of :func:`viterbi`.

    Attributes:
        path: the most probable states, the last one repeated after the end of a sequence.
        log_joint: log p(path, x) in nats.
    """

    path: Int[Tensor, "T B"]
    log_joint: Float[Tensor, " B"]


def _check_chain(
    log_initial: Any, log_transition: Any, log_emission: Any, lengths: Any = None, method: str = "auto"
) -> None:
    check_potentials(log_initial, log_transition, log_emission, lengths)
    hmm_parallel.check(method, log_emission)


@entry(_check_chain)
def hmm_filter(
    log_initial: Float[Tensor, "*#B S"],
    log_transition: Float[Tensor, "*#T_B S S"],
    log_emission: Float[Tensor, "T B S"],
    lengths: Int[Tensor, " B"] | None = None,
    method: str = "auto",
) -> Filtered:
    r"""Distribution of each state given the observations so far, and the log-likelihood (forward algorithm).

    .. math::
        p(s_t = k \mid x_{1:t}) \propto p(x_t \mid s_t = k) \sum_j p(s_{t-1} = j \mid x_{1:t-1})\, A_{jk}

    The gradient of the log-likelihood with respect to `log_emission` is :math:`p(s_t \mid x_{1:T})`.

    Args:
        log_initial: log p(s_1).
        log_transition: log p(s_t | s_{t-1}), rows sum to one.
        log_emission: log p(x_t | s_t).
        lengths: frames of each sequence; default T.
        method: "sequential", one step after the other; "parallel", an associative scan over time; "compiled", the loop in
            machine code, on a CPU with Numba; or "auto", by what was measured on a CPU. The results are the same.

    Raises:
        ValueError: for shapes or dtypes that do not fit, lengths outside 1 ... T, or an unknown method.

    Example:
        >>> log_initial = torch.tensor([0.5, 0.5]).log()
        >>> log_transition = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        >>> log_emission = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log().unsqueeze(1)
        >>> hmm_filter(log_initial, log_transition, log_emission).log_likelihood.exp().squeeze(1)
        tensor([0.5000, 0.6440])
    """
    valid = valid_frames(log_emission, lengths)
    method = hmm_parallel.choose(method, log_emission)
    if method == "compiled":
        return Filtered(
            *hmm_compiled.forward(log_initial, log_transition, log_emission, ends(log_emission, lengths))
        )
    if method == "parallel":
        emission = torch.where(valid.unsqueeze(-1), log_emission, 0.0)
        log_filtered, log_predicted, evidence = hmm_parallel.forward(log_initial, log_transition, emission)
        return Filtered(log_filtered, log_predicted, torch.where(valid, evidence, 0.0))
    log_filtered, log_predicted, evidence = hmm_loop.forward(log_initial, log_transition, log_emission, valid)
    return Filtered(log_filtered, log_predicted, evidence)


def _check_backward(log_transition: Any, log_emission: Any, lengths: Any = None) -> None:
    check_potentials(None, log_transition, log_emission, lengths)


@entry(_check_backward)
def backward_messages(
    log_transition: Float[Tensor, "*#T_B S S"],
    log_emission: Float[Tensor, "T B S"],
    lengths: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "T B S"]:
    r"""Messages :math:`\log p(x_{t:T} \mid s_t = k)`, the emission at t included; 0 after the end.

    .. math::
        \beta_t(k) = p(x_t \mid s_t = k) \sum_l A_{kl}\, \beta_{t+1}(l), \qquad
        \beta_T(k) = p(x_T \mid s_T = k)

    The posterior transition is :math:`p(s_t = k \mid s_{t-1} = j, x_{t:T}) \propto A_{jk}\, \beta_t(k)`.

    Args:
        log_transition: log p(s_t | s_{t-1}).
        log_emission: log p(x_t | s_t).
        lengths: frames of each sequence; default T.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or lengths outside 1 ... T.

    Example:
        >>> log_transition = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        >>> log_emission = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log().unsqueeze(1)
        >>> backward_messages(log_transition, log_emission).exp().squeeze(1)
        tensor([[0.5920, 0.0520],
                [0.8000, 0.2000]])
    """
    valid = valid_frames(log_emission, lengths)
    if hmm_parallel.choose("auto", log_emission) == "compiled":
        messages, scales = hmm_compiled.backward(log_transition, log_emission, ends(log_emission, lengths))
    else:
        messages, scales = hmm_loop.backward(log_transition, log_emission, valid)
    log_beta = messages + scales.flip(0).cumsum(0).flip(0).unsqueeze(-1)
    return torch.where(valid.unsqueeze(-1), log_beta, 0.0)


@entry(_check_chain)
def hmm_smoother(
    log_initial: Float[Tensor, "*#B S"],
    log_transition: Float[Tensor, "*#T_B S S"],
    log_emission: Float[Tensor, "T B S"],
    lengths: Int[Tensor, " B"] | None = None,
    method: str = "auto",
) -> Smoothed:
    r"""Distribution of each state, and of each pair of successive states, given all observations.

    Args:
        log_initial: log p(s_1).
        log_transition: log p(s_t | s_{t-1}).
        log_emission: log p(x_t | s_t).
        lengths: frames of each sequence; default T.
        method: as for :func:`hmm_filter`.

    Raises:
        ValueError: for shapes or dtypes that do not fit, lengths outside 1 ... T, or an unknown method.

    Example:
        >>> log_initial = torch.tensor([0.5, 0.5]).log()
        >>> log_transition = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        >>> log_emission = torch.tensor([[1.0, 1.0], [0.8, 0.2]]).log().unsqueeze(1)  # x_1 missing
        >>> hmm_smoother(log_initial, log_transition, log_emission).log_gamma.exp().squeeze(1)
        tensor([[0.7400, 0.2600],
                [0.8000, 0.2000]])
    """
    filtered = hmm_filter(log_initial, log_transition, log_emission, lengths, method)
    valid = valid_frames(log_emission, lengths)
    method = hmm_parallel.choose(method, log_emission)
    if method == "compiled":
        messages, _ = hmm_compiled.backward(log_transition, log_emission, ends(log_emission, lengths))
    elif method == "parallel":
        emission = torch.where(valid.unsqueeze(-1), log_emission, 0.0)
        messages = hmm_parallel.backward(log_transition, emission, valid)
    else:
        messages, _ = hmm_loop.backward(log_transition, log_emission, valid)
    log_gamma, evidence = normalise(filtered.log_predicted + messages)
    evidence = evidence.masked_fill(evidence == -torch.inf, 0.0)[1:, :, None, None]
    # Summed over s_t-1 this is p(s_t | x_1:t-1) times the message: the normaliser is the same.
    before = filtered.log_filtered[:-1].unsqueeze(-1) + into_later(log_transition)
    log_xi = before + (messages[1:].unsqueeze(-2) - evidence)
    return Smoothed(log_gamma, torch.where(valid[1:, :, None, None], log_xi, -torch.inf))


@entry(check_potentials)
def viterbi(
    log_initial: Float[Tensor, "*#B S"],
    log_transition: Float[Tensor, "*#T_B S S"],
    log_emission: Float[Tensor, "T B S"],
    lengths: Int[Tensor, " B"] | None = None,
) -> Decoded:
    r"""The most probable path :math:`\arg\max_{s_{1:T}} p(s_{1:T}, x_{1:T})`.

    Args:
        log_initial: log p(s_1).
        log_transition: log p(s_t | s_{t-1}).
        log_emission: log p(x_t | s_t).
        lengths: frames of each sequence; default T.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or lengths outside 1 ... T.

    Example:
        >>> log_initial = torch.tensor([0.5, 0.5]).log()
        >>> log_transition = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        >>> log_emission = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.8, 0.2]]).log().unsqueeze(1)
        >>> viterbi(log_initial, log_transition, log_emission).path.squeeze(1)
        tensor([0, 0, 0])
    """
    T, B, S = log_emission.shape
    if hmm_parallel.choose("auto", log_emission) == "compiled":
        inputs = log_initial, log_transition, log_emission
        path = hmm_compiled.best_path(*inputs, ends(log_emission, lengths))
        return Decoded(path, _log_joint(path, *inputs, valid_frames(log_emission, lengths)))
    valid = valid_frames(log_emission, lengths)
    emissions = torch.where(valid.unsqueeze(-1), log_emission, 0.0).unbind(0)
    stay = torch.arange(S, device=log_emission.device).expand(B, S)
    best = log_initial + emissions[0]
    pointers = []
    for t, transition in enumerate(per_step(log_transition, T)[1:], start=1):
        arrival, origin = (best.unsqueeze(-1) + transition).max(-2)
        going = valid[t].unsqueeze(-1)
        best = torch.where(going, arrival + emissions[t], best)
        pointers.append(torch.where(going, origin, stay))
    log_joint, state = best.max(-1)
    path = [state]
    for pointer in reversed(pointers):
        path.append(pointer.gather(-1, path[-1].unsqueeze(-1)).squeeze(-1))
    return Decoded(torch.stack(path[::-1]), log_joint)


def _log_joint(
    path: Tensor, log_initial: Tensor, log_transition: Tensor, log_emission: Tensor, valid: Tensor
) -> Tensor:
    """log p(path, x)."""
    T, B, S = log_emission.shape
    now = path.unsqueeze(-1)
    into = into_later(log_transition).expand(T - 1, B, S, S)
    into = into.gather(-2, now[:-1].unsqueeze(-1).expand(-1, -1, 1, S)).squeeze(-2).gather(-1, now[1:])
    steps = torch.cat([log_initial.expand(1, B, S).gather(-1, now[:1]), into]) + log_emission.gather(-1, now)
    return torch.where(valid, steps.squeeze(-1), 0.0).sum(0)


def _check_sample(log_transition: Any, filtered: Any, uniform: Any, lengths: Any = None) -> None:
    if not isinstance(filtered, Filtered):
        raise TypeError(f"filtered should be the result of hmm_filter; got {type(filtered).__name__}.")
    check_potentials(None, log_transition, filtered.log_filtered, lengths)
    T, B, _ = filtered.log_filtered.shape
    if uniform.ndim != 3 or (uniform.shape[0], uniform.shape[2]) != (T, B):
        raise ValueError(
            f"uniform should have shape (T, K, B) = ({T}, samples, {B}); got {tuple(uniform.shape)}."
        )
    check_uniform(uniform)
    impossible = (filtered.log_filtered == -torch.inf).all(-1)
    if impossible.any():
        t, row = impossible.nonzero()[0].tolist()
        raise ValueError(f"sequence {row} has probability 0 from t={t} on, so no path can be sampled.")


@entry(_check_sample)
def sample_posterior(
    log_transition: Float[Tensor, "*#T_B S S"],
    filtered: Filtered,
    uniform: Float[Tensor, "T K B"],
    lengths: Int[Tensor, " B"] | None = None,
) -> Int[Tensor, "T K B"]:
    r"""Sample whole paths s_1:T from p(s_1:T | x_1:T), backward in time, as a function of uniform noise.

    .. math::
        s_T \sim p(s_T \mid x_{1:T}), \qquad
        p(s_t = j \mid s_{t+1} = k, x) \propto p(s_t = j \mid x_{1:t})\, A_{jk}

    Args:
        log_transition: log p(s_t | s_{t-1}).
        filtered: result of :func:`hmm_filter` for the same model.
        uniform: draws from [0, 1), K paths of each sequence.
        lengths: frames of each sequence, as given to the filter; the last state is repeated after the end.

    Raises:
        ValueError: for shapes or dtypes that do not fit, noise outside [0, 1), or data of probability 0.

    Example:
        >>> log_initial = torch.tensor([0.5, 0.5]).log()
        >>> log_transition = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        >>> filtered = hmm_filter(log_initial, log_transition, torch.zeros(6, 2, 2))
        >>> sample_posterior(log_transition, filtered, torch.rand(6, 100, 2)).shape
        torch.Size([6, 100, 2])
    """
    T, K, B = uniform.shape
    S = filtered.log_filtered.shape[-1]
    valid = valid_frames(filtered.log_filtered, lengths)
    rows = torch.arange(B, device=uniform.device)
    states = [draw(filtered.log_filtered[-1].expand(K, B, S), uniform[-1])]
    transitions = per_step(log_transition, T)
    for t in range(T - 2, -1, -1):
        into_next = transitions[t + 1].expand(B, S, S).mT[rows, states[-1]]  # (K, B, S): log A[:, s_{t+1}]
        into_next = torch.where(valid[t + 1].unsqueeze(-1), into_next, 0.0)
        log_probability, _ = normalise(filtered.log_filtered[t] + into_next)
        states.append(draw(log_probability, uniform[t]))
    return repeat_last(torch.stack(states[::-1]), valid)
