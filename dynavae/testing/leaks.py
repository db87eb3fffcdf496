"""Laws of no leak: what was not seen, and who else is in the batch, changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dynavae import objectives
from dynavae.batch import Sequences
from dynavae.model import SequentialLVM
from dynavae.noise import Noise, draw_by_sequence
from dynavae.resampling import Resampling
from dynavae.scan import Trajectory, scan
from dynavae.testing.cases import compare, gaps, noise_for, require, sequences


def outputs(trajectory: Trajectory) -> dict[str, Tensor]:
    """Every number of a trajectory that belongs to a real frame, batch first, and the objectives."""
    valid = trajectory.valid[:, None, :]
    out = {}
    for name in ("z", "x", "log_prior", "log_likelihood", "log_proposal", "kl", "log_weight"):
        value = getattr(trajectory, name)
        if value is not None:
            mask = valid.reshape(*valid.shape, *[1] * (value.ndim - 3))
            out[name] = torch.where(mask, value, 0.0).movedim(2, 0)
    for name in ("w", "log_prior_w", "log_proposal_w", "kl_w"):
        value = getattr(trajectory, name)
        if value is not None:
            out[name] = value.movedim(1, 0)
    if trajectory.log_evidence is not None:
        out["fivo"] = objectives.fivo(trajectory)
        return out
    out["iwae"], out["sampled elbo"] = objectives.iwae(trajectory), objectives.elbo(trajectory, kl="sample")
    out["renyi"] = objectives.renyi(trajectory, 0.5)
    if trajectory.kl is not None:
        out["elbo"] = objectives.elbo(trajectory)
    return out


def runs(model: SequentialLVM) -> Iterator[dict[str, Any]]:
    """The kinds of run whose outputs are checked."""
    yield dict(particles=3, draw_x=True)
    if model.per_step_likelihood:  # without it there is nothing to resample by
        yield dict(particles=3, resample=Resampling(threshold=0.9))


def law_unseen(build: Callable[[], SequentialLVM]) -> None:
    """Missing and padded values have a gradient of exactly zero, and whatever they hold changes no number."""
    law, model = "no leak from unseen x", build()
    whole = sequences(model)
    observed = gaps(model, tuple(whole.x.shape), torch.Generator().manual_seed(5))
    unseen = ~(observed & whole.valid.unsqueeze(-1))
    noise = noise_for(model, whole, 3)

    def batch(x: Tensor) -> Sequences:
        return Sequences.from_arrays(x, whole.lengths, observed, whole.control)

    for run in runs(model):
        x = whole.x.clone().requires_grad_()
        here = outputs(scan(model, batch(x), **run, noise=noise))
        for name, value in here.items():
            leak = _gradient(value, x)[unseen].abs().max()
            require(float(leak) == 0, law, model, f"{name} has gradient {leak:.1e} in an unseen x.")
        for fill in (torch.nan, 1e6, torch.inf):
            there = outputs(scan(model, batch(torch.where(unseen, fill, whole.x)), **run, noise=noise))
            for name, value in here.items():
                compare(law, model, f"{name}, with {fill} where x is unseen", there[name], value, 0.0)


def law_forecast(build: Callable[[], SequentialLVM]) -> None:
    """Paths drawn beyond a context do not depend on what x really did there."""
    law, model, context = "a forecast sees its context only", build(), 3
    whole = sequences(model, (6, 6, 5))
    noise = noise_for(model, whole, 3)
    future = torch.zeros_like(whole.observed)
    future[:, context:] = True

    def paths(x: Tensor) -> dict[str, Tensor]:
        batch = dataclasses.replace(whole, x=x).hide(future)
        return outputs(scan(model, batch, particles=3, noise=noise, draw_x=True))

    x = whole.x.clone().requires_grad_()
    here = paths(x)
    there = paths(torch.where(future, sequences(model, (6, 6, 5), seed=8).x, whole.x))
    for name, value in here.items():
        leak = _gradient(value, x)[:, context:].abs().max()
        require(float(leak) == 0, law, model, f"{name} has gradient {leak:.1e} in the x to be forecast.")
        compare(law, model, f"{name}, with another future", there[name], value, 0.0)


def law_padding(build: Callable[[], SequentialLVM]) -> None:
    """More padding changes nothing, whatever noise falls on it; more frames to forecast change nothing before them."""
    law, model, more = "padding changes nothing", build(), 3
    for missing in (False, True):
        batch = sequences(model, missing=missing)
        longer = Sequences(
            *(_longer(a, more, 0) for a in (batch.x, batch.observed)),
            batch.lengths,
            None if batch.control is None else _longer(batch.control, more, 0),
            batch.names,
        )
        noise = noise_for(model, batch, 3)
        padded = Noise(*(a if i == 2 or a is None else _pad_time(a, more) for i, a in enumerate(noise)))
        for run in runs(model):
            first, second = scan(model, batch, **run, noise=noise), scan(model, longer, **run, noise=padded)
            here, there = outputs(first), outputs(second)
            for name, value in here.items():
                cut = there[name]
                if name in ("z", "x", "log_prior", "log_likelihood", "log_proposal", "kl", "log_weight"):
                    cut = cut[:, : batch.steps]
                compare(law, model, name, cut, value)
        asked = dataclasses.replace(longer, lengths=batch.lengths + more)
        here = outputs(scan(model, batch, particles=3, noise=noise, draw_x=True))
        there = outputs(scan(model, asked, particles=3, noise=padded, draw_x=True))
        for name in ("z", "log_prior", "log_proposal"):
            valid = batch.valid.reshape(*batch.valid.shape, *[1] * (here[name].ndim - 2))
            cut = torch.where(valid, there[name][:, : batch.steps], 0.0)
            compare(law, model, f"{name}, with {more} more frames to forecast", cut, here[name])


def law_batch(build: Callable[[], SequentialLVM]) -> None:
    """A sequence gives the same numbers alone as in a batch, under noise drawn sequence by sequence."""
    law, model, seeds = "the batch does not matter", build(), (11, 12, 13)
    for missing in (False, True):
        batch = sequences(model, missing=missing)
        noise = draw_by_sequence(model, batch.lengths, 3, seeds, x=True, resample=True)
        for run in runs(model):
            together = outputs(scan(model, batch, **run, noise=noise))
            for i in range(len(batch)):
                one = batch[i]
                own = draw_by_sequence(model, one.lengths, 3, seeds[i : i + 1], x=True, resample=True)
                compare(law, model, f"noise of sequence {i}", own, noise.sequences([i], one.steps))
                alone = outputs(scan(model, one, **run, noise=own))
                for name, value in alone.items():
                    row = together[name][i : i + 1]
                    row = row[:, : one.steps] if row.ndim > 1 and row.shape[1] == batch.steps else row
                    compare(law, model, f"{name} of sequence {i}", row, value)


def law_rows(build: Callable[[], SequentialLVM]) -> None:
    """The rows of a batch do not interact: exactly zero gradient of one in another's x."""
    law, model = "rows do not interact", build()
    for missing in (False, True):
        batch = sequences(model, missing=missing)
        noise = noise_for(model, batch, 3)
        for run in runs(model):
            x = batch.x.clone().requires_grad_()
            paths = scan(model, dataclasses.replace(batch, x=x), **run, noise=noise)
            for name, value in outputs(paths).items():
                for row in range(len(batch)):
                    grad = _gradient(value[row], x).flatten(1).abs().amax(1)
                    grad[row] = 0
                    leak = float(grad.max())
                    said = f"{name} of row {row} has gradient {leak:.1e} in another row."
                    require(leak == 0, law, model, said)


def _gradient(value: Tensor, x: Tensor) -> Tensor:
    """Of a generic combination of all numbers of `value`."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(6), dtype=value.dtype)
    total = (value * weights).sum()
    (grad,) = torch.autograd.grad(total, x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if grad is None else grad


def _longer(a: Tensor, more: int, fill: float) -> Tensor:
    """(B, T, .) with more frames."""
    return torch.cat([a, torch.full_like(a[:, :1], fill).expand(-1, more, *a.shape[2:])], 1)


def _pad_time(a: Tensor, more: int) -> Tensor:
    """(T, ...) with more random frames."""
    extra = torch.randn(more, *a.shape[1:], generator=torch.Generator().manual_seed(9), dtype=a.dtype)
    return torch.cat([a, extra])
