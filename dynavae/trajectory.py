"""What a scan returns: the paths, the log-density of every factor along them, and where they ended."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from dynavae import tree


class State(NamedTuple):
    """What the next chunk of the same sequences needs: pass it to `scan(state=...)`."""

    h: Any  # the recursion, (K, B, .)
    m: Any  # memory of x_<t as the generative part saw it (with drawn values)
    c: Any  # memory of x_<t as the inference part saw it
    g: Any  # inference memory of x_<=t
    w: Tensor | None  # per-sequence latent
    log_w: Tensor  # (K, B) running log-weights
    drawn: bool = False  # whether m has seen drawn values, so that it differs from c

    def detach(self) -> State:
        """The same values, cut from the graph: truncated back-propagation."""
        return tree.detach(self)


class Trajectory(NamedTuple):
    """Sampled paths and the log-density of every factor along them. Zero at padding; nats."""

    z: Tensor  # (T, K, B, z_dim)
    x: Tensor | None  # (T, K, B, x_dim): observed values, the rest drawn; None if nothing was drawn
    q: Any  # q(z_t | .), stacked over time
    p_z: Any  # p(z_t | .)
    p_x: Any  # p(x_t | .)
    log_prior: Tensor  # (T, K, B), as the two below
    log_likelihood: Tensor  # of the observed coordinates
    log_proposal: Tensor
    kl: Tensor | None  # KL(q_t || p_t) per coordinate (T, K, B, z_dim); None without a closed form
    w: Tensor | None  # (K, B, w_dim)
    log_prior_w: Tensor | None  # (K, B), as the one below
    log_proposal_w: Tensor | None
    kl_w: Tensor | None  # (K, B, w_dim)
    log_weight: Tensor | None  # (T, K, B) running weight before resampling, if resampling
    ancestors: Tensor | None  # (T, K, B) whom each particle of step t+1 continues, if resampling
    log_evidence: Tensor | None  # (B,) particle estimate of log p(x), if resampling
    valid: Tensor  # (T, B)
    state: State | None  # after the last frame of each sequence, if asked for

    @property
    def log_w(self) -> Tensor:
        """Log-weight of each step, (T, K, B)."""
        return self.log_prior + self.log_likelihood - self.log_proposal

    @property
    def log_w_static(self) -> Tensor | float:
        """Log-weight of the per-sequence latent, (K, B)."""
        if self.log_prior_w is None or self.log_proposal_w is None:
            return 0.0
        return self.log_prior_w - self.log_proposal_w
