"""Scores that say what they are: bound, particles, averages, frames, data."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dynavae import objectives
from dynavae.model import SequentialLVM
from dynavae.proposals import Proposal, amortized
from dynavae.resampling import Resampling, log_effective_size
from dynavae.scan import scan
from dynavae.tasks.capabilities import require
from dynavae.tasks.common import batches, evaluating, noise, source

BOUNDS = ("elbo", "iwae", "fivo", "exact")
PARTICLES_PER_PASS = 32


class Score(NamedTuple):
    """A negative log-likelihood in nats, or a bound on it, with everything needed to compare it."""

    model: str
    data: str
    data_sha256: str
    split: str
    bound: str
    particles: int
    nats_per_frame: float  # minus the bound, total nats / total frames
    nats_per_frame_by_sequence: float  # minus the bound, mean over sequences of nats / frames
    average: str
    nats_total: float
    frames: int
    sequences: int
    first_frame: str
    kl: str  # "analytic", "sample", both where gaps ask for it, or "" where the bound has no KL
    density: str  # "mass" for discrete observations, else "density"
    resampling: str
    effective_size: float | None  # mean over sequences of the effective number of paths, for iwae
    seed: int
    nats: Float[Tensor, " B"]  # the bound of each sequence, in the order of the data

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-sequence values, ready for JSON."""
        return {k: v for k, v in self._asdict().items() if k != "nats"}

    def __repr__(self) -> str:
        k = f"-{self.particles}" if self.particles > 1 else ""
        return (
            f"Score({self.model}, {self.bound}{k}: {self.nats_per_frame:.4f} nats/frame over {self.frames} "
            f"frames of {self.sequences} sequences, {self.average})"
        )


def score(
    model: SequentialLVM,
    data: Any,
    bound: str = "elbo",
    particles: int = 1,
    *,
    split: str | None = None,
    kl: str = "auto",
    propose: Proposal = amortized,
    resampling: Resampling | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Score:
    """Minus the log-likelihood of data under a model, or a bound on it.

    Every frame is scored, the first from the model's own initial state. Noise is drawn sequence by
    sequence, so the result does not depend on `batch_size`; particles are processed in passes of bounded
    memory.

    Args:
        model: any model.
        data: `Sequences`, a data set, an array (B, T, x_dim), a list of (T_i, x_dim), or `DataSplits` with
            `split`.
        bound: "elbo"; "iwae" (whole paths); "fivo" (a particle filter); "exact" where there is one.
        particles: K. For "elbo" the number of paths that are averaged.
        kl: "analytic" or "sample", for "elbo"; "auto" is the first where the model's divergences have a closed form, but the
            second for an exact model, whose every path then has the weight p(x).
        propose: where z comes from.
        resampling: scheme and threshold for "fivo"; default systematic at an effective size of K/2.
        batch_size: sequences at a time, at most.
        seed: of the noise.

    Raises:
        ValueError: an unknown bound, or one that is not right for this model (the sentence names another).

    Example:
        >>> from dynavae.models import VAE
        >>> _ = torch.manual_seed(0)
        >>> result = score(VAE(x_dim=2, z_dim=2), torch.zeros(3, 5, 2), bound="iwae", particles=8)
        >>> result.bound, result.particles, result.frames, result.first_frame
        ('iwae', 8, 15, 'scored')
    """
    if bound not in BOUNDS:
        raise ValueError(f"bound should be one of {', '.join(BOUNDS)}; got {bound!r}.")
    if particles < 1:
        raise ValueError(f"particles should be at least 1; got {particles}.")
    require(model, bound)
    resampling = resampling or Resampling()
    per_pass = particles if bound == "fivo" else min(particles, PARTICLES_PER_PASS)
    widest = max(model.emission.outputs(model.x_dim), model.z_noise_dim)
    src = source(data, split, batch_size, per_pass * widest)
    nats = torch.zeros(src.size, dtype=torch.float64)
    frames = torch.zeros(src.size, dtype=torch.float64)
    sizes: list[Tensor] = []
    kinds: set[str] = set()
    with evaluating(model):
        for rows, batch in batches(model, src):
            frames[rows] = batch.lengths.double().cpu()
            if bound == "exact":
                values = model.exact_log_likelihood(batch)
            elif bound == "fivo":
                eps = noise(model, batch, particles, seed, rows, resample=True)
                run = scan(model, batch, particles=particles, propose=propose, resample=resampling, noise=eps)
                values = objectives.fivo(run)
            else:
                values, size, kind = _passes(
                    model, batch, rows, bound, particles, per_pass, kl, propose, seed
                )
                sizes.append(size)
                kinds.add(kind)
            nats[rows] = values.double().cpu()
    total = float(nats.sum())
    return Score(
        model=type(model).__name__,
        data=src.name or "array",
        data_sha256=src.sha256,
        split=src.split,
        bound=bound,
        particles=1 if bound == "exact" else particles,
        nats_per_frame=-total / src.frames,
        nats_per_frame_by_sequence=-float((nats / frames).mean()),
        average="total nats / total frames",
        nats_total=-total,
        frames=src.frames,
        sequences=src.size,
        first_frame="scored",
        kl=" and ".join(sorted(kinds)) if bound == "elbo" else "",
        density="mass" if model.emission.discrete else "density",
        resampling=f"{resampling.scheme}, threshold {resampling.threshold}" if bound == "fivo" else "",
        effective_size=float(torch.cat(sizes).mean()) if bound == "iwae" else None,
        seed=seed,
        nats=nats,
    )


def _passes(
    model: SequentialLVM,
    batch: Any,
    rows: list[int],
    bound: str,
    particles: int,
    per_pass: int,
    kl: str,
    propose: Proposal,
    seed: int,
) -> tuple[Tensor, Tensor, str]:
    """ELBO or IWAE over particles in passes of at most `per_pass`; the bound, the effective sizes, and which KL it was."""
    sums: list[Tensor] = []
    log_ws: list[Tensor] = []
    for block, start in enumerate(range(0, particles, per_pass)):
        count = min(per_pass, particles - start)
        eps = noise(model, batch, count, seed, rows, block)
        run = scan(model, batch, particles=count, propose=propose, noise=eps)
        if kl == "auto":
            kl = "analytic" if objectives.closed_form(run) and not model.exact else "sample"
        if bound == "elbo":
            sums.append(objectives.elbo(run, kl=kl) * count)
        else:
            log_ws.append(objectives.log_weights(run))
    if bound == "elbo":
        return torch.stack(sums).sum(0) / particles, torch.ones(len(rows)), kl
    log_w = torch.cat(log_ws)
    return torch.logsumexp(log_w, 0) - math.log(particles), log_effective_size(log_w).exp().cpu(), kl


def crps(samples: Any, truth: Any) -> Float[Tensor, "*shape"]:
    r"""Continuous ranked probability score of samples at what came true, in the units of x; lower is better.

    .. math:: \mathrm{CRPS} = E|X - x| - \tfrac12 E|X - X'|,

    over all pairs of samples: the absolute error of a point forecast, made fit for a distribution. Of one sample it is
    the absolute error. Reference: Gneiting and Raftery, Strictly Proper Scoring Rules, Prediction, and Estimation, 2007.

    Args:
        samples: (S, \*shape), such as `Forecast.samples` or `Imputation.samples`.
        truth: x, (\*shape); where it is NaN the score is NaN.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> crps([[0.0, 1.0], [2.0, 1.0]], [1.0, 4.0])
        tensor([0.5000, 3.0000])
    """
    x, truth = torch.as_tensor(samples), torch.as_tensor(truth)
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    if x.shape[1:] != truth.shape or not len(x):
        raise ValueError(
            f"samples should have shape (S, *shape of truth) = (S, {', '.join(map(str, truth.shape))}); got "
            f"{tuple(x.shape)}."
        )
    S = len(x)
    rank = 2 * torch.arange(1, S + 1, dtype=x.dtype, device=x.device) - S - 1
    half_spread = (
        torch.tensordot(rank, x.sort(0).values, 1) / S**2
    )  # E|X - X'| / 2, from the order statistics
    return (x - truth).abs().mean(0) - half_spread
