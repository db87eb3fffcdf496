r"""Forward and backward recursions of a hidden Markov model in O(log T) batched calls, by associative scans over time.

A step is the matrix :math:`\log A_{jk} + \log p(x_t \mid s_t = k)` of what it does to a distribution of states, and steps in
a row are products in the log-semiring. Costs S times the work of the loop: worth it for long sequences, few states, small
batches, and on accelerators.

Reference: Hassan, Särkkä and García-Fernández, Temporal Parallelization of Inference in Hidden Markov Models, 2021,
arXiv:2102.05743.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynavae.exact import _native
from dynavae.exact.markov_chain import logsumexp, normalise
from dynavae.exact.scan import associative_scan

METHODS = ("auto", "sequential", "parallel", "compiled")
SCAN_STEPS, SCAN_WORK = 64, 1500
"""Without Numba `auto` scans sequences of at least SCAN_STEPS steps, where the batch times S^3 is at most SCAN_WORK."""


def check(method: str, log_emission: Tensor) -> None:
    """Raise an error unless there is this method, and it applies."""
    if method not in METHODS:
        raise ValueError(f"method should be one of {', '.join(METHODS)}; got {method!r}.")
    if method == "compiled" and not _native.applies(log_emission):
        raise ValueError(
            "method='compiled' needs tensors on a CPU, and Numba (pip install 'dynavae[compiled]'); use method='auto'."
        )


def choose(method: str, log_emission: Tensor) -> str:
    """The form of the recursions, if `method` is "auto"."""
    if method != "auto":
        return method
    if _native.applies(log_emission):
        return "compiled"
    T, B, S = log_emission.shape
    return "parallel" if T >= SCAN_STEPS and B * S**3 <= SCAN_WORK else "sequential"


def _product(earlier: Tensor, later: Tensor) -> Tensor:
    """In the log-semiring, up to a constant, which keeps the largest entry at 0."""
    out = logsumexp(earlier.unsqueeze(-1) + later.unsqueeze(-3), -2)
    top = out.detach().amax((-2, -1), keepdim=True)
    return out - torch.where(top == -torch.inf, 0.0, top)


def forward(log_initial: Tensor, log_transition: Tensor, emission: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(s_t | x_1:t), log p(s_t | x_1:t-1), log p(x_t | x_1:t-1); emission (T, B, S) is 0 where there is nothing."""
    T, B, S = emission.shape
    transition = log_transition.expand(T, B, S, S)
    first = log_initial.expand(B, S).unsqueeze(-2).expand(1, B, S, S)
    steps = torch.cat([first, transition[1:]]) + emission.unsqueeze(-2)
    filtered, _ = normalise(associative_scan(_product, steps)[..., 0, :])
    moved = logsumexp(filtered[:-1].unsqueeze(-1) + transition[1:], -2)
    predicted = torch.cat([log_initial.expand(1, B, S), moved])
    return filtered, predicted, logsumexp(predicted + emission, -1)


def backward(log_transition: Tensor, emission: Tensor, valid: Tensor) -> Tensor:
    """Messages p(x_t:T | s_t), normalised over s_t; those after the end of a sequence say nothing."""
    T, B, S = emission.shape
    goes_on = torch.cat([valid[1:], torch.zeros_like(valid[:1])])[..., None, None]
    into_next = log_transition.expand(T, B, S, S).roll(-1, 0)
    steps = torch.where(goes_on, into_next, 0.0) + emission.unsqueeze(-1)
    return normalise(logsumexp(associative_scan(_product, steps, reverse=True), -1))[0]
