"""Laws of equality: however the scan is organised, the numbers are the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dynavae import objectives
from dynavae.batch import Sequences
from dynavae.model import SequentialLVM
from dynavae.noise import Noise
from dynavae.proposals import bootstrap, filtering
from dynavae.resampling import Resampling
from dynavae.scan import State, Trajectory, scan
from dynavae.testing.cases import compare, noise_for, sequences

FIELDS = [f for f in Trajectory._fields if f not in ("valid", "state")]
TERMS = ["log_prior", "log_likelihood", "log_proposal"]


def runs(model: SequentialLVM, batch: Sequences) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every way to scan these sequences, named."""
    one, many = noise_for(model, batch, 1), noise_for(model, batch, 5)
    yield "one path", dict(particles=1, noise=one)
    yield "five paths", dict(particles=5, noise=many)
    yield "drawn x", dict(particles=1, noise=one, draw_x=True)
    yield "state", dict(particles=5, noise=many, carry=True)
    yield "prior as proposal", dict(particles=5, noise=many, propose=bootstrap)
    if model.autoregressive:  # otherwise nothing reads x, and no own output either
        free = torch.rand(len(batch), batch.steps, generator=torch.Generator().manual_seed(2)) < 0.5
        yield "own samples", dict(particles=5, noise=many, free=free)
        yield "own means", dict(particles=5, noise=many, free=free, feedback="mean", carry=True)
    if model.per_step_likelihood:  # otherwise a frame cannot be weighed before the last z is known
        for threshold in (0.0, 0.5, 1.0):
            resample = Resampling(threshold=threshold)
            yield f"resampling below {threshold} K", dict(particles=5, noise=many, resample=resample)


def objective(trajectory: Trajectory) -> Tensor:
    """A number that every term of a trajectory enters."""
    if trajectory.log_evidence is not None:
        return objectives.fivo(trajectory).sum()
    total = objectives.iwae(trajectory).sum() + objectives.elbo(trajectory, kl="sample").sum()
    return total if trajectory.kl is None else total + objectives.elbo(trajectory).sum()


def law_fast_equals_slow(build: Callable[[], SequentialLVM]) -> None:
    """The hoisted, deferred scan equals the one with everything in the loop: values and gradients.

    With and without missing data, controls, several particles, resampling, own outputs fed back.
    """
    law, model = "fast equals slow", build()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for missing in (False, True):
        batch = sequences(model, missing=missing)
        for name, run in runs(model, batch):
            where = f"{name}, {'missing' if missing else 'complete'} data"
            fast, slow = scan(model, batch, **run), scan(model, batch, **run, fast=False)
            for field in (*FIELDS, "state"):
                # Parameters that are the same for all particles may be kept once.
                shared = field in ("q", "p_z", "p_x")
                values = getattr(fast, field), getattr(slow, field)
                compare(law, model, f"{field} ({where})", *values, broadcast=shared)
            if parameters:
                grads = [
                    torch.autograd.grad(objective(t), parameters, allow_unused=True, materialize_grads=True)
                    for t in (fast, slow)
                ]
                compare(law, model, f"gradient ({where})", *grads, tolerance=1e-8)


def law_chunks(build: Callable[[], SequentialLVM]) -> None:
    """Scanning in chunks, each from the state of the one before, equals scanning at once.

    For causal models without a per-sequence latent: the others need the whole sequence to infer anything.
    """
    law, model = "chunks equal the whole", build()
    if not model.causal or model.w_dim or not model.per_step_likelihood:
        return
    for lengths, cuts in (((7, 5, 6), (0, 4, 7)), ((7, 7, 6), (0, 2, 3, 7)), ((7, 1, 3), (0, 3, 7))):
        for missing in (False, True):
            batch = sequences(model, lengths, missing)
            for name, run in runs(model, batch):
                where = f"{name}, {'missing' if missing else 'complete'} data, cut at {cuts[1:-1]}"
                _compare_chunks(law, model, where, batch, cuts, run)


def _compare_chunks(
    law: str, model: SequentialLVM, where: str, batch: Sequences, cuts: tuple[int, ...], run: dict[str, Any]
) -> None:
    run = {"propose": filtering, **run}  # a chunk knows nothing of the future
    run.pop("carry", None)
    noise, free = run.pop("noise"), run.pop("free", None)
    whole = scan(model, batch, **run, noise=noise, free=free, carry=True)
    state: State | None = None
    parts: list[Trajectory] = []
    for start, end in itertools.pairwise(cuts):
        part = frames(batch, start, end)
        some = None if free is None else free[:, start:end]
        cut = Noise(*(None if a is None else a[start:end] if i != 2 else a for i, a in enumerate(noise)))
        parts.append(scan(model, part, **run, noise=cut, free=some, state=state, carry=True))
        state = parts[-1].state
    for field in TERMS if whole.kl is None else [*TERMS, "kl"]:
        joined = torch.cat([getattr(p, field) for p in parts])
        compare(law, model, f"{field} ({where})", joined, getattr(whole, field))
    valid = whole.valid[:, None, :, None]
    for field in ("z", "x"):
        value = getattr(whole, field)
        if value is not None and all(getattr(p, field) is not None for p in parts):
            joined = torch.cat([getattr(p, field) for p in parts])
            pair = (torch.where(valid, a, 0.0) for a in (joined, value))
            compare(law, model, f"{field} ({where})", *pair)
    if whole.log_evidence is not None:
        joined = torch.stack([p.log_evidence for p in parts]).sum(0)
        compare(law, model, f"log_evidence ({where})", joined, whole.log_evidence)
    assert state is not None and whole.state is not None
    for field in ("h", "c", "g", "log_w"):
        compare(law, model, f"state.{field} ({where})", getattr(state, field), getattr(whole.state, field))


def frames(batch: Sequences, start: int, end: int) -> Sequences:
    """Frames start ... end-1 of every sequence; a sequence that has ended has length 0 there."""
    lengths = (batch.lengths - start).clamp(0, end - start)
    control = None if batch.control is None else batch.control[:, start:end]
    return Sequences(batch.x[:, start:end], batch.observed[:, start:end], lengths, control, batch.names)
