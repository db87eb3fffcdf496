"""Pieces of time of a batch and of its noise, and trajectories scored in another way: what the loss is made of."""

from __future__ import annotations

from dynavae.batch import Sequences
from dynavae.noise import Noise
from dynavae.scan import Trajectory
from dynavae.schedules import Real


def tempered(trajectory: Trajectory, weight: Real) -> Trajectory:
    """log p(z) - log q(z) times `weight` in every importance weight."""
    if weight == 1:
        return trajectory
    names = ("log_prior", "log_proposal", "log_prior_w", "log_proposal_w")
    terms = {name: getattr(trajectory, name) for name in names}
    return trajectory._replace(**{name: None if v is None else weight * v for name, v in terms.items()})


def score_all(trajectory: Trajectory, batch: Sequences) -> Trajectory:
    """The same paths, with the likelihood of all that is observed in `batch`, read or not."""
    x, observed = (a.flatten(2).transpose(0, 1).unsqueeze(1) for a in (batch.x, batch.observed))
    log_likelihood = trajectory.p_x.log_prob(x, observed)  # padding is unobserved
    return trajectory._replace(log_likelihood=log_likelihood.expand_as(trajectory.log_likelihood))


def chunk_of(batch: Sequences, chunk: slice) -> Sequences:
    """Some frames of every sequence; a sequence that has ended keeps its row, with length 0."""
    lengths = (batch.lengths - chunk.start).clamp(0, chunk.stop - chunk.start)
    control = None if batch.control is None else batch.control[:, chunk]
    return Sequences(batch.x[:, chunk], batch.observed[:, chunk], lengths, control, batch.names)


def noise_of(noise: Noise, chunk: slice) -> Noise:
    x, resample = (None if n is None else n[chunk] for n in (noise.x, noise.resample))
    return noise._replace(z=noise.z[chunk], x=x, resample=resample)
