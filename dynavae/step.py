"""One frame of the time loop, for frames that arrive one at a time.

`advance` is a pure function of tensors: a state, a frame and its noise give the next state. Called frame by
frame it gives the numbers of :func:`~dynavae.scan.scan` on the whole sequence; that is a law. It serves the
stream (`tasks/streaming.py`) and, with `traced=True`, the exported step (`tasks/export.py`); `advance_exactly` serves both
where the filter is exact.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynavae import tree
from dynavae.closed_forms import ExactStep
from dynavae.distributions import at, completed, expand, sample_at
from dynavae.model import Evidence, Frame, Past, Present, SequentialLVM
from dynavae.noise import Noise
from dynavae.proposals import Amortized, Proposal
from dynavae.resampling import Resampling
from dynavae.scan import State


class Advanced(NamedTuple):
    """What one frame gave."""

    state: State  # log-weights of mean weight 1; m has no particle axis until something has been drawn
    z: Tensor  # (K, B, z_dim)
    log_w: Tensor  # (K, B) with this frame, before resampling; mean weight 1
    log_prob: Tensor  # (B,) particle estimate of log p(x_t | x_<t), nats; 0 where nothing was observed
    p_x: Any  # p(x_t | x_<t, z_<t, z_t) with z_t from the prior: a mixture over (K, B); None if not asked for


def start(model: SequentialLVM, particles: int, batch: int) -> State:
    """The state before the first frame."""
    h = model.initial((particles, batch))
    c, g = model.past_x.initial((batch,)), model.seen_x.initial((batch,))
    return State(h, c, c, g, None, model.zeros((particles,), batch))


def noise_dim(model: SequentialLVM, particles: int, predict: bool = True) -> int:
    """Standard normals that one particle takes per frame, as one block (K, B, noise_dim)."""
    return model.z_noise_dim + _x_noise(model, predict) + (particles > 1)


def split_noise(model: SequentialLVM, block: Tensor, predict: bool = True) -> Noise:
    """A block (K, B, noise_dim) as the noise of z, of x where something reads it, and of resampling."""
    x_dim, more = _x_noise(model, predict), int(len(block) > 1)
    z, x, rest = block.split([model.z_noise_dim, x_dim, more], -1)
    return Noise(z, x if x_dim else None, None, rest[..., 0] if more else None)


def _x_noise(model: SequentialLVM, predict: bool) -> int:
    return model.x_noise_dim if predict or model.autoregressive else 0


def advance(
    model: SequentialLVM,
    state: State,
    frame: Frame,
    noise: Noise,
    propose: Proposal,
    resample: Resampling,
    predict: bool = True,
    traced: bool = False,
) -> Advanced:
    """Take one frame in.

    Args:
        model: without a latent of the whole sequence, and with a causal posterior if `propose` reads it.
        state: as `start` or the step before gave it.
        frame: x (B, x_dim), 0 where it is missing; `observed` (B, x_dim), or None for a complete frame.
        noise: of this frame, as :class:`~dynavae.noise.Noise` without the time axis.
        propose, resample: as in :func:`~dynavae.scan.scan`.
        predict: also give the mixture that x_t was predicted with. It uses the same noise as z_t.
        traced: take no branch that depends on values: `observed` has to be given.
    """
    lead = K, _ = state.log_w.shape
    observed, control, past_x = frame.observed, frame.control, model.past_x
    reads, own_evidence = isinstance(propose, Amortized), getattr(propose, "evidence", None)
    seen = None if observed is None else observed.any(-1)
    informed, anything = seen if reads else None, True
    if informed is not None and not traced:
        anything = bool(informed.any())
        informed = None if bool(informed.all()) else informed

    # What x_<t left behind: as the inference part saw it (c), and with drawn values for what it missed (m).
    drawing = observed is not None and bool(model.autoregressive) and not model.marginalises
    drawn = state.drawn or drawing
    m = state.m if state.drawn or not drawn else per_particle(state.c, K)
    c = past_x.read(m if drawn else state.c)
    u = model.features(frame)
    g, g_next = None, state.g
    if reads or own_evidence is not None:
        g, g_next = model.seen_x.run(_lift(model.recognition(frame)), state.g, fused=False)

    past = Past(c, state.h, control, None)
    prior = expand(model.prior(past), lead)
    past = past._replace(prior=prior)
    lengths = torch.ones(lead[1], dtype=torch.long, device=frame.x.device)
    evidence = Evidence(_lift(frame), _lift(u), _lift(past_x.read(state.c)), g, lengths, None)
    if reads:
        q = propose(model, past, _drop(model.evidence(evidence)), informed) if anything else prior
    else:
        e = None if own_evidence is None else _drop(own_evidence(model, evidence))
        q = propose(model, past, e, None)
    own = q is not prior  # otherwise the weight is the likelihood alone
    z, q = sample_at(q, noise.z)
    present = Present(c, model.absorb(past, z), control, None)
    likelihood = model.likelihood(present)
    increment = likelihood.log_prob(frame.x, observed)
    if own:
        increment = increment + at(prior, z).log_prob(z) - q.log_prob(z)
    p_x = likelihood if predict else None
    if predict and own:
        ahead = model.absorb(past, sample_at(prior, noise.z)[0])
        p_x = model.likelihood(Present(c, ahead, control, None))
    p_x = expand(p_x, lead)

    # The recursion reads x_t, drawn where it is missing.
    u_t = u
    if drawing:
        x_t = completed(likelihood, frame.x, observed, noise.x)  # type: ignore[arg-type]
        u_t = model.features(Frame(x_t, None, control))
    h = model.update(present, u_t)
    c_next = past_x.step(state.c, u)
    m = past_x.step(m, u_t) if drawn else c_next

    log_w = state.log_w + increment
    log_prob = log_w[0] if K == 1 else torch.logsumexp(log_w, 0) - math.log(K)
    log_w = log_w - log_prob
    if seen is not None:  # rounding of the weights' sum
        log_prob = torch.where(seen, log_prob, 0.0)
    kept = log_w
    if K > 1:
        due = resample.due(log_w)
        if traced or bool(due.any()):
            assert noise.resample is not None
            stay = torch.arange(K, device=log_w.device).unsqueeze(-1).expand(lead)
            uniform = torch.special.ndtr(noise.resample)
            ancestors = torch.where(due, resample.ancestors(log_w, uniform), stay)
            h = tree.select(h, ancestors)
            m = tree.select(m, ancestors) if drawn else m
            kept = torch.where(due, 0.0, log_w)
    return Advanced(State(h, m, c_next, g_next, None, kept, drawn), z, log_w, log_prob, p_x)


def advance_exactly(model: SequentialLVM, belief: Any, frame: Frame) -> ExactStep:
    """Take one frame in by the exact filter: the model's own step, with the mixture of p(x_t | x_<t) over (C, B)."""
    now = model.exact_step(belief, frame)
    log_prob = now.log_prob
    if frame.observed is not None:  # rounding, where nothing was
        log_prob = torch.where(frame.observed.any(-1), log_prob, 0.0)
    return now._replace(log_prob=log_prob, p_x=expand(now.p_x, tuple(now.log_weights.shape)))


def per_particle(c: Any, particles: int) -> Any:
    """A memory of x alone, (B, .), as each particle has it, (K, B, .)."""
    return tree.tree_map(lambda a: a.expand(particles, *a.shape[-2:]), c)


def _lift(value: Any) -> Any:
    """(B, .) to (1, B, .): one step of time."""
    return tree.tree_map(lambda a: a.unsqueeze(0), value)


def _drop(value: Any) -> Any:
    return tree.tree_map(lambda a: a[0], value)
