"""Filter and smooth: what the latents are, given the past, or given everything."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dynavae.model import SequentialLVM
from dynavae.proposals import Amortized, Proposal, filtering
from dynavae.resampling import Resampling
from dynavae.scan import scan
from dynavae.tasks.capabilities import require
from dynavae.tasks.common import (
    along,
    batch_first,
    batches,
    evaluating,
    noise,
    positive,
    scatter,
    source,
    trace,
)


class Latents(NamedTuple):
    """Beliefs about z_t. NaN after a sequence's end.

    For a model whose latent is a class, `mean` and `stddev` have one coordinate per class: probabilities.
    """

    mean: Float[Tensor, "B T z_dim"]
    stddev: Float[Tensor, "B T z_dim"]
    samples: Float[Tensor, "S B T z_noise_dim"] | None
    log_weights: Float[Tensor, "S B T"] | None  # of the samples, normalised; None: equally weighted
    lengths: Tensor
    exact: bool


class Expected(NamedTuple):
    """What is known of x_t by its mean."""

    mean: Float[Tensor, "T 1 B x_dim"]


class Completion(NamedTuple):
    """Paths that an exact model drew given what was seen, with the names of a trajectory."""

    z: Float[Tensor, "T S B z_dim"]
    x: Float[Tensor, "T S B x_dim"]
    p_x: Expected


def filter(
    model: SequentialLVM,
    data: Any,
    particles: int = 100,
    *,
    split: str | None = None,
    propose: Proposal = filtering,
    resampling: Resampling | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Latents:
    r"""Filtering beliefs :math:`p(z_t \mid x_{1:t})`: exact where possible, else a particle filter.

    Args:
        model: with a causal posterior; any model if `propose=bootstrap`.
        data: as in :func:`~dynavae.tasks.score`.
        particles: K.
        propose: where z_t comes from; weights correct for it.
        resampling: scheme and threshold.
        batch_size, seed: as in :func:`~dynavae.tasks.score`.

    Raises:
        ValueError: if the posterior reads the future.

    Example:
        >>> from dynavae.models import VRNN
        >>> filter(VRNN(x_dim=2, z_dim=3, h_dim=4), torch.zeros(1, 5, 2), particles=8).mean.shape
        torch.Size([1, 5, 3])
    """
    if isinstance(propose, Amortized):
        require(model, "filter")
        if model.exact:
            return _exact(model, data, split, batch_size, "exact_filter")
        propose = filtering
    positive(particles=particles)
    resampling = resampling or Resampling()
    src = source(data, split, batch_size, particles * max(model.z_noise_dim, model.x_dim))
    means, stddevs, samples, weights, lengths = [], [], [], [], torch.zeros(src.size, dtype=torch.long)
    with evaluating(model):
        for rows, batch in batches(model, src):
            eps = noise(model, batch, particles, seed, rows, resample=True)
            run = scan(model, batch, particles=particles, propose=propose, resample=resampling, noise=eps)
            assert run.log_weight is not None
            log_w = run.log_weight.log_softmax(1)
            mean, stddev = moments(model.latent_values(run.z), log_w.exp())
            hidden = ~batch.valid.unsqueeze(-1)
            means.append((rows, mean.masked_fill(hidden, torch.nan)))
            stddevs.append((rows, stddev.masked_fill(hidden, torch.nan)))
            samples.append((rows, batch_first(run.z).masked_fill(hidden, torch.nan)))
            weights.append((rows, log_w.permute(1, 2, 0).masked_fill(hidden[..., 0], torch.nan)))
            lengths[rows] = batch.lengths.cpu()
    n, steps = src.size, src.steps
    return Latents(
        scatter(means, n, steps, 0),
        scatter(stddevs, n, steps, 0),
        scatter(samples, n, steps, 1),
        scatter(weights, n, steps, 1),
        lengths,
        False,
    )


def smooth(
    model: SequentialLVM,
    data: Any,
    samples: int = 100,
    *,
    split: str | None = None,
    reweight: bool | None = None,
    resampling: Resampling | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Latents:
    r"""Smoothing beliefs :math:`p(z_{1:T} \mid x_{1:T})`: exact where possible, else sampled paths.

    Args:
        model: any model.
        data: as in :func:`~dynavae.tasks.score`.
        samples: S paths of each sequence.
        reweight: False takes paths from q; True weighs them by p(x, z) / q(z | x), resampling on the way
            (paths then share ancestors). Default: True for a causal q, which has not seen the future.
        resampling: scheme and threshold, if reweighted.
        batch_size, seed: as in :func:`~dynavae.tasks.score`.

    Example:
        >>> from dynavae.models import SRNN
        >>> smooth(SRNN(x_dim=2, z_dim=3, h_dim=4), torch.zeros(1, 5, 2), samples=8).samples.shape
        torch.Size([8, 1, 5, 3])
    """
    positive(samples=samples)
    if model.exact:
        return _exact(model, data, split, batch_size, "exact_smooth")
    reweight = model.causal and not model.bridges if reweight is None else reweight
    src = source(data, split, batch_size, samples * max(model.z_noise_dim, model.x_dim))
    parts, lengths = [], torch.zeros(src.size, dtype=torch.long)
    with evaluating(model):
        for rows, batch in batches(model, src):
            run, lines = paths(model, batch, samples, seed, rows, reweight, resampling)
            z = batch_first(along(run.z, lines))
            parts.append((rows, z.masked_fill(~batch.valid.unsqueeze(-1), torch.nan)))
            lengths[rows] = batch.lengths.cpu()
    z = scatter(parts, src.size, src.steps, 1)
    values = model.latent_values(z)
    return Latents(values.mean(0), values.std(0, correction=0), z, None, lengths, False)


def paths(
    model: SequentialLVM,
    batch: Any,
    samples: int,
    seed: int,
    rows: list[int],
    reweight: bool,
    resampling: Resampling | None = None,
    draw_x: bool = False,
    across: bool = False,
) -> tuple[Any, Tensor | None]:
    """Paths of z (and missing x) given x: from q, or reweighted; with the ancestral lines to follow.

    Args:
        across: the paths of a model that `bridges` are weighed as a whole, given the mean of q(z_t | .) at every frame that
            was seen: weights then say how well a path across a gap leads on, not how its codes of seen frames were drawn.
    """
    own = getattr(model, "exact_paths", None)
    if own is not None and draw_x and not reweight:  # an exact model that completes sequences by itself
        eps = noise(model, batch, samples, seed, rows, x=True)
        made = own(batch, eps.z, eps.x)
        return Completion(made.z, made.x, Expected(made.x_mean.unsqueeze(1))), None
    scheme = (resampling or Resampling()) if reweight and model.per_step_likelihood else None
    eps = noise(model, batch, samples, seed, rows, x=draw_x, resample=True)
    if across and reweight:
        seen = batch.observed.flatten(2).any(-1).transpose(0, 1)[:, None, :, None]
        eps, scheme = eps._replace(z=torch.where(seen, 0.0, eps.z)), resampling
    run = scan(model, batch, particles=samples, resample=scheme, draw_x=draw_x, noise=eps)
    if not reweight:
        return run, None
    assert eps.resample is not None
    last = torch.gather(
        eps.resample, 0, (batch.lengths - 1)[None, None].expand(1, samples, -1)
    )  # no step resamples there
    return run, trace(run, torch.special.ndtr(last[0]))


def moments(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation over particles of (T, K, B, d), batch-first."""
    w = weights.unsqueeze(-1)
    mean = (w * values).sum(1)
    variance = (w * (values - mean.unsqueeze(1)) ** 2).sum(1)
    return mean.transpose(0, 1), variance.clamp(min=0).sqrt().transpose(0, 1)


def _exact(model: SequentialLVM, data: Any, split: str | None, batch_size: int, method: str) -> Latents:
    src = source(data, split, batch_size)
    means, stddevs, lengths = [], [], torch.zeros(src.size, dtype=torch.long)
    with evaluating(model):
        for rows, batch in batches(model, src):
            mean, stddev = getattr(model, method)(batch)
            hidden = ~batch.valid.unsqueeze(-1)
            means.append((rows, mean.masked_fill(hidden, torch.nan)))
            stddevs.append((rows, stddev.masked_fill(hidden, torch.nan)))
            lengths[rows] = batch.lengths.cpu()
    n, steps = src.size, src.steps
    return Latents(scatter(means, n, steps, 0), scatter(stddevs, n, steps, 0), None, None, lengths, True)
