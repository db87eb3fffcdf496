"""What a model may know exactly, beside its conditionals: log p(x), filter, smoother, and the two steps of EM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dynavae.batch import Sequences

if TYPE_CHECKING:
    from dynavae.model import Frame


class ExactStep(NamedTuple):
    """What an exact model knows once x_t was seen."""

    belief: Any  # p(z_t | x_<=t): a tree of (B, .) tensors
    mean: Tensor  # of it (B, .), as `exact_filter` gives it
    stddev: Tensor
    log_prob: Tensor  # log p(x_t | x_<t) of the observed values (B,), nats
    p_x: Any  # p(x_t | x_<t): components (C, B, .) of a mixture
    log_weights: Tensor  # of the components (C, B)


class ClosedForms:
    """Methods that a model with `exact = True`, or `closed_form_em = True`, overrides; in any other they raise TypeError."""

    # --- for exact models -----------------------------------------------------------------------------

    def exact_log_likelihood(self, batch: Sequences) -> Tensor:
        """log p(x) of the observed values (B,), nats."""
        raise TypeError(f"{type(self).__name__} has no exact likelihood.")

    def exact_filter(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of p(z_t | x_1:t), each (B, T, .)."""
        raise TypeError(f"{type(self).__name__} has no exact filter.")

    def exact_smooth(self, batch: Sequences) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of p(z_t | x_1:T), each (B, T, .)."""
        raise TypeError(f"{type(self).__name__} has no exact smoother.")

    def exact_start(self, batch: int) -> Any:
        """The belief before the first frame: a tree of (B, .) tensors."""
        raise TypeError(f"{type(self).__name__} has no exact filter.")

    def exact_step(self, belief: Any, frame: Frame) -> ExactStep:
        """One step of the exact filter: the belief after x_<t, and x_t (B, x_dim), 0 where it is missing."""
        raise TypeError(f"{type(self).__name__} has no exact filter.")

    def exact_draw(self, belief: Any, noise: Tensor) -> Tensor:
        """z_t drawn from a belief, given noise (S, B, z_noise_dim)."""
        raise TypeError(f"{type(self).__name__} has no exact filter.")

    # --- for models that EM fits ------------------------------------------------------------------------

    def expectation(self, batch: Sequences) -> Any:
        """Sums of expected statistics: a named tuple of tensors that add up over batches.

        Its `log_likelihood` is log p(x) of the batch, nats.
        """
        raise TypeError(f"{type(self).__name__} has no closed-form EM.")

    def maximisation(self, statistics: Any) -> None:
        """Move the parameters to the greatest expected log-likelihood, given the sums over all data."""
        raise TypeError(f"{type(self).__name__} has no closed-form EM.")

    def em_log_prior(self) -> float:
        """log p(parameters) up to a constant, nats: `maximisation` raises log p(x) plus this."""
        return 0.0

    def em_start(self, sequences: list[tuple[Tensor, Tensor]], generator: torch.Generator) -> bool:
        """Start from data, (T, x_dim) values and masks of each sequence; False: the parameters were left as they are."""
        return False
