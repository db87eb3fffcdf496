"""Laws of good behaviour: gradients, sizes, saving, types, copies, seeds."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable

import torch
from torch import Tensor

from dynavae import objectives
from dynavae.batch import Sequences
from dynavae.model import SequentialLVM
from dynavae.noise import Noise
from dynavae.resampling import Resampling
from dynavae.scan import scan
from dynavae.testing.cases import compare, noise_for, require, sequences
from dynavae.testing.equality import FIELDS, objective


def law_gradients(build: Callable[[], SequentialLVM]) -> None:
    """Every parameter gets a finite gradient from the objectives, also where data are missing."""
    law, model = "every parameter is trained", build()
    if not any(p.requires_grad for p in model.parameters()):
        return  # there is nothing to train
    for missing in (False, True):
        batch = sequences(model, missing=missing)
        for resample in (None, Resampling(threshold=0.9)):
            if resample is not None and not model.per_step_likelihood:
                continue  # cannot be resampled
            model.zero_grad()
            noise = noise_for(model, batch, 2)
            objective(scan(model, batch, particles=2, noise=noise, resample=resample)).backward()
            for name, parameter in model.named_parameters():
                if not parameter.requires_grad:
                    continue  # fixed on purpose
                grad = parameter.grad
                require(grad is not None, law, model, f"{name} gets no gradient.")
                require(bool(torch.isfinite(grad).all()), law, model, f"{name} gets NaN or inf.")
                # Unseen input may leave a unit idle; with complete data something must move.
                require(missing or bool((grad != 0).any()), law, model, f"{name} gets a gradient of zero.")


def law_sizes(build: Callable[[], SequentialLVM]) -> None:
    """One frame, one sequence, one particle: shapes are as always, numbers are finite."""
    law, model = "small sizes", build()
    for lengths in ((1,), (1, 1), (3,)):
        for particles in (1, 2):
            batch = sequences(model, lengths)
            noise = noise_for(model, batch, particles)
            for resample in (None, Resampling(threshold=1.0)):
                if resample is not None and not model.per_step_likelihood:
                    continue  # cannot be resampled
                paths = scan(model, batch, particles=particles, noise=noise, resample=resample, draw_x=True)
                lead = (max(lengths), particles, len(lengths))
                assert paths.x is not None
                shapes = {
                    "z": (*lead, model.z_dim),
                    "x": (*lead, model.x_dim),
                    "log_prior": lead,
                    "log_likelihood": lead,
                    "log_proposal": lead,
                }
                for name, shape in shapes.items():
                    value: Tensor = getattr(paths, name)
                    got = tuple(value.shape)
                    require(got == shape, law, model, f"{name} has shape {got}, not {shape}.")
                    require(bool(torch.isfinite(value).all()), law, model, f"{name} is not finite.")
                require(bool(torch.isfinite(objective(paths))), law, model, "the objective is not finite.")


def law_checkpoint(build: Callable[[], SequentialLVM]) -> None:
    """`type(model)(**model.config)` with the saved parameters gives the same numbers; config is JSON."""
    law, model = "save and load", build()
    config = json.loads(json.dumps(model.config))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)  # other initial values than those of `build`
        again = type(model)(**config).to(next(model.parameters()).dtype)
    again.load_state_dict(torch.load(file, weights_only=True), strict=True)
    again.train(model.training)
    require(again.config == model.config, law, model, f"config changed: {model.config}, {again.config}.")
    _same_numbers(law, model, again)


def law_copy(build: Callable[[], SequentialLVM]) -> None:
    """A deep copy gives the same numbers and shares no parameter; building twice gives the same model."""
    law, model = "copies", build()
    other = copy.deepcopy(model)
    _same_numbers(law, model, other)
    _same_numbers(law, model, build())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    _same_numbers(law, model, build())


def law_types(build: Callable[[], SequentialLVM]) -> None:
    """float32 gives float32 throughout and the same numbers to its precision; float64 comes back."""
    law, model = "floating types", build()
    batch = sequences(model, missing=True)
    noise = noise_for(model, batch, 2)
    exact = objective(scan(model, batch, particles=2, noise=noise))
    single = build().to(torch.float32)
    noise32 = Noise(*(None if a is None else a.float() for a in noise))
    paths = scan(single, batch.to(torch.float32), particles=2, noise=noise32)
    for field in FIELDS:
        value = getattr(paths, field)
        if isinstance(value, Tensor) and value.is_floating_point():
            same = value.dtype == torch.float32
            require(same, law, model, f"{field} has {value.dtype} in a float32 model.")
    if not model.discrete_latent:  # rounding may choose another class, which is another path
        compare(law, model, "the objective in float32", objective(paths), exact, 1e-3)
    back = single.to(torch.float64)
    dtype = scan(back, batch, particles=2, noise=noise).log_prior.dtype
    require(dtype == torch.float64, law, model, f"log_prior has {dtype} after a move to float64.")


def law_seeds(build: Callable[[], SequentialLVM]) -> None:
    """The same seed gives the same numbers, another one gives others; the global generator is left alone."""
    law, model = "seeds", build()
    batch = sequences(model)

    def z(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return scan(model, batch, particles=8, generator=generator).z

    before = torch.random.get_rng_state()
    compare(law, model, "z under the same seed", z(3), z(3), 0.0)
    require(bool((z(3) != z(4)).any()), law, model, "z is the same under two seeds.")
    unchanged = torch.equal(before, torch.random.get_rng_state())
    require(unchanged, law, model, "scan(generator=...) used the global random state.")


def law_representation(build: Callable[[], SequentialLVM]) -> None:
    """repr names the class and its options."""
    law, model = "repr", build()
    text = repr(model)
    require(type(model).__name__ in text, law, model, f"repr should name the class; it starts {text[:40]!r}.")
    require(f"x_dim={model.x_dim}" in text, law, model, "repr should show x_dim.")


def law_device(build: Callable[[], SequentialLVM], device: str = "cuda") -> None:
    """Another device gives the numbers of the CPU, under the same noise."""
    law, model = f"{device} equals cpu", build()
    there = build().to(device)
    for missing in (False, True):
        batch = sequences(model, missing=missing)
        noise = noise_for(model, batch, 3)
        moved = Noise(*(None if a is None else a.to(device) for a in noise))
        for resample in (None, Resampling(threshold=0.9)):
            if resample is not None and not model.per_step_likelihood:
                continue  # cannot be resampled
            here = scan(model, batch, particles=3, noise=noise, resample=resample)
            other = scan(there, batch.to(device), particles=3, noise=moved, resample=resample)
            for name in ("z", "log_prior", "log_likelihood", "log_proposal"):
                compare(law, model, name, getattr(other, name).cpu(), getattr(here, name), 1e-8)
            compare(law, model, "the objective", objective(other).cpu(), objective(here), 1e-8)


@torch.no_grad()
def _same_numbers(law: str, model: SequentialLVM, other: SequentialLVM) -> None:
    batch: Sequences = sequences(model, missing=True)
    noise = noise_for(model, batch, 2)
    first, second = (scan(m, batch, particles=2, noise=noise) for m in (model, other))
    for field in FIELDS:
        compare(law, model, field, getattr(first, field), getattr(second, field), 0.0)
    compare(law, model, "iwae", objectives.iwae(first), objectives.iwae(second), 0.0)
