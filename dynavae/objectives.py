r"""Objectives: pure functions of a trajectory, in nats per sequence (B,), to be maximised.

.. math::
    \mathrm{ELBO} &= \mathbb E_q\Big[\sum_t \log p(x_t \mid \cdot) - \mathrm{KL}(q_t \,\|\, p_t)\Big] \\
    \mathrm{IWAE}_K &= \log \frac1K \sum_k \frac{p(x, z^k)}{q(z^k \mid x)}, \qquad
    \mathrm{VR}_{\alpha,K} = \frac{1}{1-\alpha} \log \frac1K \sum_k w_k^{1-\alpha} \\
    \mathrm{FIVO}_K &= \log \hat p(x) \text{ of a particle filter}
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from dynavae.scan import Trajectory


def elbo(
    trajectory: Trajectory,
    kl: str = "analytic",
    beta: float = 1.0,
    free_bits: float = 0.0,
    pool: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, " B"]:
    """Evidence lower bound, averaged over the K paths.

    Args:
        trajectory: independent paths (no resampling).
        kl: "analytic" (closed form given the sampled past) or "sample" (log q - log p at the sample).
        beta: weight of the KL; anything but 1 is a training objective, not a bound to report.
        free_bits: nats per latent coordinate, per frame, below which the KL (averaged over frames, paths and
            sequences) is not penalised; needs the analytic KL.
        pool: adds a tensor up over the processes that share a batch, for free bits, whose floor is on the KL of all.

    Raises:
        ValueError: if an analytic KL is asked for and there is none, or the paths were resampled.

    Source: Kingma and Welling 2014, arXiv 1312.6114; free bits: Kingma et al. 2016, arXiv 1606.04934.
    """
    reconstruction, divergence = factors(trajectory, kl)
    if free_bits > 0:
        divergence = _free_bits(trajectory, free_bits, pool)
    return reconstruction - beta * divergence


def factors(trajectory: Trajectory, kl: str = "analytic") -> tuple[Tensor, Tensor]:
    """The two parts of the ELBO, each (B,): expected log-likelihood, and KL (with the per-sequence latent's)."""
    _independent(trajectory, "elbo")
    reconstruction = trajectory.log_likelihood.sum(0).mean(0)
    if kl == "sample":
        divergence = (trajectory.log_proposal - trajectory.log_prior).sum(0).mean(0)
        if trajectory.log_prior_w is not None:
            divergence = divergence - trajectory.log_w_static.mean(0)  # type: ignore[union-attr]
        return reconstruction, divergence
    if kl != "analytic":
        raise ValueError(f"kl should be 'analytic' or 'sample'; got {kl!r}.")
    if trajectory.kl is None or not closed_form(trajectory):
        raise ValueError("no closed-form KL between these distributions; use elbo(trajectory, kl='sample').")
    divergence = trajectory.kl.sum((0, -1)).mean(0)
    if trajectory.kl_w is not None:
        divergence = divergence + trajectory.kl_w.sum(-1).mean(0)
    return reconstruction, divergence


def closed_form(trajectory: Trajectory) -> bool:
    """Whether all divergences of q from p are known without sampling."""
    return trajectory.kl is not None and (trajectory.log_prior_w is None or trajectory.kl_w is not None)


def _free_bits(
    trajectory: Trajectory, minimum: float, pool: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """KL with a floor per latent coordinate; spread evenly over sequences, so that its mean is the total."""
    if trajectory.kl is None:
        raise ValueError("free bits need a closed-form KL; these distributions have none. Use free_bits=0.")
    nats = trajectory.kl.sum(0).mean(0).sum(0)  # (z_dim,)
    everything = torch.cat([nats.detach(), trajectory.valid.sum().to(nats).view(1), nats.new_ones(1)])
    if pool is not None:
        everything = pool(everything)
    all_nats, (frames, processes) = everything[:-2], everything[-2:]
    free = minimum * frames
    paid = torch.where(all_nats < free, free / processes, nats).sum()
    B = trajectory.valid.shape[1]
    out = (paid / B).expand(B)
    return out if trajectory.kl_w is None else out + trajectory.kl_w.sum(-1).mean(0)


def log_weights(trajectory: Trajectory) -> Float[Tensor, "K B"]:
    """log p(x, z^k) - log q(z^k | x) of whole independent paths."""
    _independent(trajectory, "iwae and renyi")
    return trajectory.log_w.sum(0) + trajectory.log_w_static


def iwae(trajectory: Trajectory) -> Float[Tensor, " B"]:
    """Importance-weighted bound with K whole paths.

    Source: Burda, Grosse and Salakhutdinov 2016, arXiv 1509.00519.
    """
    log_w = log_weights(trajectory)
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def renyi(trajectory: Trajectory, alpha: float) -> Float[Tensor, " B"]:
    """Variational Rényi objective. alpha = 0 is IWAE, alpha -> 1 the ELBO, alpha = -inf takes the best path.

    A lower bound on log p(x) for 0 <= alpha <= 1; below 0 it may lie on either side.

    Source: Li and Turner 2016, arXiv 1602.02311.
    """
    log_w = log_weights(trajectory)
    if alpha == 1:
        return log_w.mean(0)
    if alpha == -math.inf:
        return log_w.amax(0)
    return (torch.logsumexp((1 - alpha) * log_w, 0) - math.log(len(log_w))) / (1 - alpha)


def fivo(trajectory: Trajectory) -> Float[Tensor, " B"]:
    """Filtering variational objective: the log of a particle filter's unbiased estimate of p(x).

    Gradients are pathwise; the score term of the ancestor indices is dropped (biased, far less variance).

    Source: Maddison et al. 2017, arXiv 1705.09279.
    """
    if trajectory.log_evidence is None:
        raise ValueError("fivo needs a resampled trajectory; pass scan(..., resample=Resampling()).")
    return trajectory.log_evidence


def _independent(trajectory: Trajectory, what: str) -> None:
    if trajectory.ancestors is not None:
        raise ValueError(f"{what} needs independent paths, but this trajectory was resampled; use fivo.")
