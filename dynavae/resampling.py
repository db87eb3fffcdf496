r"""Resampling: from log-weights (K, B) and uniforms to ancestors (K, B).

Every scheme is unbiased: the expected number of offspring of particle i is :math:`K \bar w_i`.
`Resampling` says which scheme, and when: if the effective sample size :math:`1/\sum_i \bar w_i^2` is at
most `threshold` times K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def multinomial(log_w: Tensor, uniform: Tensor) -> Tensor:
    """K independent draws; uniform (K, B) in (0, 1)."""
    return _invert(log_w, uniform)


def stratified(log_w: Tensor, uniform: Tensor) -> Tensor:
    """One draw in each of K equal strata: (i + U_i) / K."""
    steps = torch.arange(len(log_w), dtype=log_w.dtype, device=log_w.device).unsqueeze(-1)
    return _invert(log_w, (steps + uniform) / len(log_w))


def systematic(log_w: Tensor, uniform: Tensor) -> Tensor:
    """One uniform shifts a regular grid: (i + U) / K. The least variance of the three, and the default."""
    return stratified(log_w, uniform[:1].expand_as(log_w))


def _invert(log_w: Tensor, points: Tensor) -> Tensor:
    cumulative = torch.softmax(log_w, 0).cumsum(0).T.contiguous()  # (B, K)
    index = torch.searchsorted(cumulative, points.T.contiguous(), right=True)
    # A sum may end just below 1 and a point may round to 1: then the last particle that has any weight.
    last = (cumulative < cumulative[:, -1:]).sum(-1, keepdim=True)
    return index.minimum(last).T


SCHEMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
}


@dataclass(frozen=True)
class Resampling:
    """Which scheme, and how often.

    Args:
        scheme: "multinomial", "stratified" or "systematic".
        threshold: resample where the effective sample size is at most this fraction of K; 1 means at
            every step, 0 never.

    Example:
        >>> Resampling("systematic", threshold=0.5).due(torch.tensor([[0.0], [-9.0], [-9.0], [-9.0]]))
        tensor([True])
    """

    scheme: str = "systematic"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(
                f"unknown resampling scheme {self.scheme!r}; choose one of {', '.join(SCHEMES)}."
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(
                f"threshold should be in [0, 1], a fraction of the particles; got {self.threshold}."
            )

    def due(self, log_w: Tensor) -> Tensor:
        """(B,): whether to resample now."""
        if self.threshold >= 1:
            return torch.ones(log_w.shape[1], dtype=torch.bool, device=log_w.device)
        return log_effective_size(log_w).exp() <= self.threshold * len(log_w)

    def ancestors(self, log_w: Tensor, uniform: Tensor) -> Tensor:
        """(K, B) indices of the particles that survive."""
        return SCHEMES[self.scheme](log_w.detach(), uniform)


def log_effective_size(log_w: Tensor) -> Tensor:
    """log of (sum w)^2 / sum w^2 over the particle axis, (B,)."""
    return 2 * torch.logsumexp(log_w, 0) - torch.logsumexp(2 * log_w, 0)


def choose(log_w: Tensor, number: int, uniform: Tensor) -> Tensor:
    """`number` systematic draws of K particles by their weights, (number, B); uniform (B,).

    Example:
        >>> choose(torch.tensor([[0.0], [-torch.inf]]), 3, torch.tensor([0.5])).flatten()
        tensor([0, 0, 0])
    """
    steps = torch.arange(number, dtype=log_w.dtype, device=log_w.device).unsqueeze(-1)
    return _invert(log_w, (steps + uniform) / number)
