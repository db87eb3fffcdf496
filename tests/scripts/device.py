"""Every model gives the numbers of the CPU on another device, in every task. Run by test_device.py.

python tests/scripts/device.py conditionals|tasks|training|from_the_command_line|mutants [NAME ...]
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from emulated import Apart, Device, register

import dynavae
from dynavae import MODELS, VRNN, Sequences, SequentialLVM, commands
from dynavae.checkpoint import save_pretrained
from dynavae.cli import main as main_of_cli
from dynavae.em import Iteration, choose_start
from dynavae.loading import Batch
from dynavae.loss import Loss
from dynavae.tasks import capabilities
from dynavae.testing import cases, law_device, small
from dynavae.testing.cases import EMISSIONS, observations
from dynavae.training import calibrate

NAN = float("nan")
MIXTURE = {"emission": "gaussian_mixture", "components": 2}


def conditionals(name: str) -> None:
    """The law of the same name, for a model and its variants."""
    for case in cases(MODELS[name]):
        try:
            law_device(case.build, "apart")
        except Exception as error:
            raise type(error)(f"{case.name}: {error}") from None


def series() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, 3, generator=generator) for n in (9, 4, 1, 6)]
    xs[0][3:5] = NAN
    xs[1][1, 0] = NAN
    return xs


def both(name: str, **options: Any) -> Iterator[SequentialLVM]:
    """The model here, and there."""
    for device in ("cpu", "apart"):
        torch.manual_seed(0)
        yield small(MODELS[name], x_dim=3, **options).to(device)


def tasks(name: str) -> None:
    here, there = both(name)
    can, data = capabilities(here), series()
    runs: dict[str, Callable[[SequentialLVM], Any]] = {
        "smooth": lambda m: dynavae.smooth(m, data, samples=6),
        "generate": lambda m: dynavae.generate(m, 2, 5),
        "forecast": lambda m: dynavae.forecast(m, data[:1], horizon=3, samples=5),
        "impute": lambda m: dynavae.impute(m, data, samples=5),
        "save": saved,
    }
    for feedback in ("data", "mean", "sample"):
        runs[f"reconstruct {feedback}"] = lambda m, f=feedback: dynavae.reconstruct(m, data, f)
    for bound in ("elbo", "iwae", "fivo", "exact"):
        if can[bound]:
            runs[bound] = lambda m, b=bound: dynavae.score(m, data, b, particles=4).nats
    if can["filter"]:
        runs["filter"] = lambda m: dynavae.filter(m, data, particles=6)
    if can["stream"]:
        runs["stream"] = streamed
    if callable(getattr(here, "states", None)):
        batch = Sequences.from_arrays(data).to(dtype=torch.float64)
        runs["states"] = lambda m: m.states(batch.to(next(m.parameters()).device))
    for task, run in runs.items():
        equal(f"{name}, {task}", run(there), run(here))


def streamed(model: SequentialLVM) -> list[Any]:
    stream = model.stream(batch=2, particles=3, seed=0) if not model.exact else model.stream(batch=2)
    generator = torch.Generator().manual_seed(1)
    out = []
    for t in range(4):
        x = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        if t == 2:
            x[0] = NAN
        step = stream.step(x)
        out += [step.mean, step.stddev, step.score, step.predicted.mean, step.predicted.quantile(0.9)]
    return out


def saved(model: SequentialLVM) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder) / "model")
        again = dynavae.load(Path(folder) / "model")
    return dynavae.generate(again, 1, 3).x


def started(name: str) -> None:
    """Starts from data, which stay on the CPU; the VAE with every emission, the HMM by clusters of a mixture too."""
    emissions: dict[str, tuple[Any, ...]] = {"VAE": EMISSIONS, "HMM": (None, MIXTURE)}
    for emission in emissions.get(name, (None,)):
        options = {} if emission is None else {"emission": emission}
        here, there = both(name, **options)
        x = observations(here.emission, (6, 12, 3), torch.Generator().manual_seed(2))
        data = Sequences.from_arrays(x, [12, 9, 12, 1, 12, 12])
        for model in (here, there):
            calibrate(model, data)
        equal(f"{name} {options}, start", list(there.parameters()), list(here.parameters()), 1e-6)
        if here.closed_form_em:
            for model in (here, there):
                choose_start(model, data, seed=1)
            equal(f"{name} {options}, start of EM", list(there.parameters()), list(here.parameters()), 1e-6)


def training(name: str) -> None:
    """Loss and gradient of the objectives that the model has, and EM."""
    started(name)
    here, there = both(name)
    can = capabilities(here)
    batch = Sequences.from_arrays([x.nan_to_num() if not here.emission.marginal else x for x in series()])
    for objective in ("elbo", "iwae", "fivo", "exact"):
        if not can[objective]:
            continue
        options: dict[str, Any]
        for options in ({}, {"truncate": 4}, {"hide_rate": 0.3}) if objective == "elbo" else ({},):
            if here.exact and "truncate" in options:
                continue
            results = []
            for model in (here, there):
                device = next(model.parameters()).device
                loss = Loss(model, objective, particles=1 if objective in ("elbo", "exact") else 3, **options)
                model.zero_grad()
                moved = batch.to(device, torch.float64)
                total = 0.0
                for part in loss.parts(moved, seed=3):
                    part.loss.backward()
                    total += part.sums["loss"]
                results.append([total, *(p.grad for p in model.parameters())])
            equal(f"{name}, training by {objective} {options}", results[1], results[0])
    if here.closed_form_em:
        for model in (here, there):
            where = next(model.parameters())
            rows = Batch(batch, list(range(len(batch)))).to(where.device, where.dtype)
            for _ in range(3):
                iteration = Iteration()
                iteration.add(model, rows)
                iteration.finish(model)
        equal(f"{name}, EM", list(there.parameters()), list(here.parameters()))


def from_the_command_line(_: str) -> None:
    """evaluate, generate, forecast and impute of a run, with --device."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "gaps.csv"
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(60, 2, generator=generator).cumsum(0)
        rows = [f"{t},{a},{b if t % 7 else ''}" for t, (a, b) in enumerate(values.tolist())]
        table.write_text("\n".join(["time,a,b", *rows]))
        run = f"{folder}/run"
        fit = [
            "fit",
            "--model",
            "VRNN",
            "--data",
            str(table),
            "--out",
            run,
            "--epochs",
            "1",
            "--progress",
            "false",
        ]
        assert main_of_cli([*fit, "--time", "time", "--window", "20", "--accelerator", "cpu"]) == 0
        found = []
        for device in ("apart", "cpu"):
            commands.evaluate(run, ["elbo", "iwae-4", "fivo-4"], device=device)
            commands.generate(run, 2, 5, device=device)
            commands.forecast(run, 3, samples=7, device=device)
            commands.impute(run, samples=7, device=device)
            names = ("scores.json", "forecast.csv", "imputed.csv")
            texts = [(Path(run) / name).read_text() for name in names]
            samples = np.load(Path(run) / "samples" / "samples.npz")
            found.append([[float(n) for n in re.findall(r"-?\d+\.\d+", text)] for text in texts])
            found[-1].append(torch.as_tensor(samples["x"]))
        equal("commands", *found, tolerance=1e-4)  # float32, printed with six digits


def equal(what: str, ours: Any, theirs: Any, tolerance: float = 1e-8) -> None:
    """Of the same kind, part by part; tensors and numbers up to the tolerance, anything else exactly."""
    if type(theirs) in (torch.Tensor, torch.nn.Parameter):
        if not isinstance(ours, Tensor):
            raise AssertionError(f"{what}: {ours} is not a tensor")
        try:
            torch.testing.assert_close(
                ours.detach().cpu(), theirs.detach(), rtol=tolerance, atol=tolerance, equal_nan=True
            )
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from None
    elif isinstance(theirs, float):
        if not math.isclose(ours, theirs, rel_tol=tolerance, abs_tol=tolerance):
            raise AssertionError(f"{what}: {ours} is not {theirs}")
    elif isinstance(theirs, tuple | list):
        names = getattr(theirs, "_fields", range(len(theirs)))
        for name, a, b in zip(names, ours, theirs, strict=True):
            equal(f"{what} {name}", a, b, tolerance)
    elif type(ours) is not type(theirs) or ours != theirs:
        raise AssertionError(f"{what}: {ours!r} is not {theirs!r}")


class Misplaced(VRNN):
    """Forgets where it is."""

    def likelihood(self, present: Any) -> Any:
        p = super().likelihood(present)
        return p._replace(loc=p.loc + torch.zeros(self.x_dim))


class Elsewhere(VRNN):
    """Draws from the CPU's generator."""

    def likelihood(self, present: Any) -> Any:
        p = super().likelihood(present)
        noise = torch.randn(p.loc.shape, generator=torch.Generator(), device=p.loc.device)
        return p._replace(loc=p.loc + 0 * noise)


def mutants(_: str) -> None:
    """What would fail on a GPU fails here."""
    for wrong, said in (
        (Misplaced, "on the same device"),
        (Elsewhere, "the generator is not on the device"),
    ):
        try:
            law_device(lambda wrong=wrong: small(wrong), "apart")
        except RuntimeError as error:
            if said not in str(error):
                raise
        else:
            raise AssertionError(f"{wrong.__name__} was not caught")
    if type(torch.zeros(2, device="apart")) is not Apart:
        raise AssertionError("the device is not there")


def main() -> None:
    register()
    check = {f.__name__: f for f in (conditionals, tasks, training, from_the_command_line, mutants)}[
        sys.argv[1]
    ]
    names = [check.__name__] if check in (from_the_command_line, mutants) else sys.argv[2:] or list(MODELS)
    for name in names:
        try:
            with Device():
                check(name)
        except Exception as error:
            first = str(error).strip().splitlines()
            print(f"{name}: {type(error).__name__}: {' '.join(first[:8])}")
            if "-v" in sys.argv:
                raise
        else:
            print(f"{name}: equal", flush=True)


if __name__ == "__main__":
    main()
