"""The recursions of the hidden Markov model as loops over tensors, one step after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from dynavae.exact._algebra import per_step
from dynavae.exact.markov_chain import logsumexp, normalise


def forward(
    log_initial: Tensor, log_transition: Tensor, log_emission: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(s_t | x_1:t), log p(s_t | x_1:t-1), log p(x_t | x_1:t-1); `valid` (T, B) are the frames that exist."""
    T, B, _ = log_emission.shape
    predicted = log_initial.expand(B, -1)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    emissions = torch.where(valid.unsqueeze(-1), log_emission, 0.0).unbind(0)
    for t, (transition, emission) in enumerate(zip(per_step(log_transition, T), emissions, strict=True)):
        if t > 0:
            predicted = logsumexp(rows[-1][0].unsqueeze(-1) + transition, -2)
        filtered, evidence = normalise(predicted + emission)
        rows.append((filtered, predicted, evidence))
    log_filtered, log_predicted, evidence = (torch.stack(part) for part in zip(*rows, strict=True))
    return log_filtered, log_predicted, torch.where(valid, evidence, 0.0)


def backward(log_transition: Tensor, log_emission: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Messages p(x_t:T | s_t) normalised over s_t, and the log of each step's normaliser."""
    transitions = per_step(log_transition, log_emission.shape[0])
    emissions = torch.where(valid.unsqueeze(-1), log_emission, 0.0).unbind(0)
    rows = [normalise(emissions[-1])]
    for t in range(len(emissions) - 2, -1, -1):
        future = logsumexp(transitions[t + 1] + rows[-1][0].unsqueeze(-2), -1)
        future = torch.where(valid[t + 1].unsqueeze(-1), future, 0.0)
        rows.append(normalise(emissions[t] + future))
    messages, scales = zip(*rows[::-1], strict=True)
    return torch.stack(messages), torch.where(valid, torch.stack(scales), 0.0)
