"""`fit`: train any model on any data, with validation, best weights, files and exact resume."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Trainer
from torch import Tensor

from dynavae import recording
from dynavae.allocator import keep_freed_memory
from dynavae.batch import Sequences
from dynavae.callbacks import Progress, Recorder
from dynavae.data.dataset import SequenceDataset
from dynavae.diagnostics import first_nonfinite
from dynavae.em import choose_start
from dynavae.learner import Learner
from dynavae.loading import loader, to_data
from dynavae.loss import Loss
from dynavae.model import SequentialLVM
from dynavae.nn.heads import EmissionHead
from dynavae.parallel import layout, main_process
from dynavae.plan import check_fits
from dynavae.resume import prepare
from dynavae.runs import check_accelerator
from dynavae.schedules import Row, kl_weight, learning_rate

__all__ = [
    "FitResult",
    "Learner",
    "calibrate",
    "first_nonfinite",
    "fit",
    "kl_weight",
    "learning_rate",
    "loader",
    "values",
]

log = logging.getLogger("dynavae")

PRECISIONS = ("32-true", "bf16-mixed")


class FitResult(NamedTuple):
    """What training left behind."""

    model: SequentialLVM  # the model given to fit, in evaluation mode, with the best (or the last) weights
    history: list[Row]  # one row per epoch, as in metrics.csv
    best: Row  # the row of the best epoch; the last row without a validation set
    out_dir: Path | None
    seconds: float  # of all epochs, also those before a resume
    parameters: int
    notes: tuple[str, ...] = ()  # what was said on the way: resumed, collapse, divergence, ...

    def __repr__(self) -> str:
        name, shown = type(self.model).__name__, "valid/nats_per_frame"
        shown = shown if shown in self.best else "train/nats_per_frame"
        figure = f"{shown}={self.best[shown]:.4f} at epoch {self.best['epoch']}" if self.best else "no epoch"
        return f"FitResult({name}, {self.parameters} parameters, {figure} of {len(self.history)}, {self.seconds:.1f} s)"


def fit(
    model: SequentialLVM,
    train: Any,
    valid: Any = None,
    *,
    epochs: int = 100,
    batch_size: int = 32,
    crop: int | None = None,
    out_dir: str | Path | None = None,
    patience: int | None = None,
    seed: int = 0,
    calibrate: bool = True,
    progress: bool = True,
    accelerator: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
    precision: str = "32-true",
    num_workers: int = 0,
    tensorboard: bool = True,
    loggers: Any = None,
    resume: bool | None = None,
    checkpoint_minutes: float | None = 10.0,
    **options: Any,
) -> FitResult:
    """Train a model, in place: by gradient, or by EM (`objective="em"`: an epoch is one iteration over all data).

    Batches hold sequences of like length and change every epoch. After each epoch the validation bound is
    computed, in nats per frame, with noise that is the same each time; the returned model has the weights
    of its best epoch (of those after scheduled sampling has reached its end), or the last without `valid`.

    Args:
        model: any model; where it starts is up to you (`torch.manual_seed` before you build it).
        train: a `SequenceDataset`, `Sequences`, an array (B, T, x_dim) or a list of (T_i, x_dim).
        valid: the same, to validate on, or None.
        epochs: passes over `train`, in all (those before a resume count).
        batch_size: sequences per update, of all processes together.
        crop: train on pieces of at most so many frames, cut at new places every epoch; each starts from the model's
            initial state. Validation reads whole sequences.
        out_dir: receives `metrics.csv` (one row per epoch), `kl_dim.csv`, `training.json`, `best/` (for
            :func:`dynavae.load`), `checkpoints/` (`last.ckpt`, `previous.ckpt`) and `tensorboard/`; None writes
            nothing.
        patience: stop after so many epochs without a better validation bound, counted after the KL warm-up and
            scheduled sampling have reached their end.
        seed: of batches and noise.
        calibrate: first set the output bias to the marginal of the training data, see :func:`calibrate`; with
            objective="em", start from clusters or moments of it, see :func:`dynavae.fit_em`.
        progress: show a progress bar.
        accelerator: "auto", "cpu" or "gpu".
        devices: processes, each with its GPU or its share of the cores, that train together (the script is started
            once more for each, up to this call). They give the numbers of one process, dropout apart. What torchrun
            has started counts.
        strategy: "auto", or "ddp" to say the same in Lightning's words.
        precision: "32-true" (the model's own dtype) or "bf16-mixed".
        num_workers: processes that prepare batches.
        tensorboard: write events, if there is an `out_dir`.
        loggers: further loggers of Lightning.
        resume: True continues the run in `out_dir` exactly where it was last saved; False replaces it; None
            refuses to touch it.
        checkpoint_minutes: how often to save within an epoch; None saves after epochs only.
        **options: of :class:`~dynavae.loss.Loss`: objective, particles, kl_warmup, ...; and of
            :class:`~dynavae.learner.Learner`: lr, optimizer, lr_schedule, ...

    Raises:
        ValueError, TypeError: options, data and model that do not fit together.
        FileExistsError, FileNotFoundError: a run in `out_dir` where there should be none, or none to resume.
        OSError: `out_dir` cannot be written, or the disk is full.
        KeyboardInterrupt: ctrl-C (or SIGTERM), after the current update has been finished and saved.
        FloatingPointError: the loss or its gradient is not finite; says where that began.

    Example:
        >>> from dynavae import VRNN
        >>> x = torch.bernoulli(torch.full((8, 6, 3), 0.2))
        >>> model = VRNN(x_dim=3, z_dim=2, h_dim=4, emission="bernoulli")
        >>> result = fit(model, x[:6], x[6:], epochs=2, progress=False, accelerator="cpu")
        >>> len(result.history), result.best["epoch"] in (1, 2), result.model is model
        (2, True, True)
    """
    known = [name for kind in (Loss, Learner) for name in _options(kind)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TypeError(f"unknown option {name!r} for fit{hint} Options: {', '.join(known)}.")
    if epochs < 1:
        raise ValueError(f"epochs should be at least 1; got {epochs}.")
    if patience is not None and (patience < 1 or valid is None):
        raise ValueError(
            "patience counts epochs without a better validation bound: it should be at least 1, with valid."
        )
    check_accelerator(accelerator)
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision should be one of {', '.join(PRECISIONS)} (log-likelihoods overflow in float16; for float64 "
            f"use model.double()); got {precision!r}."
        )
    learner = Learner(model, seed=seed, **options)
    train, valid = to_data(train), None if valid is None else to_data(valid, "valid")
    for what, data in (("train", train), ("valid", valid)):
        if data is not None:
            _check_data(what, data, model)
    if checkpoint_minutes is not None and checkpoint_minutes < 0:
        raise ValueError(f"checkpoint_minutes should be 0 or more, or None; got {checkpoint_minutes}.")
    processes = layout(devices, strategy)
    keep_freed_memory()
    out = None if out_dir is None else Path(out_dir)
    settings = dict(
        epochs=epochs,
        batch_size=batch_size,
        crop=crop,
        patience=patience,
        seed=seed,
        precision=precision,
        **options | {"objective": learner.loss.objective},
    )
    description = {**_description(model, train, valid), "options": settings}
    checkpoint, notes = prepare(out, resume, description, main_process())
    if calibrate and checkpoint is None:
        if learner.by_em:
            choose_start(model, train, learner.starts, seed)
        else:
            _calibrate(model, train)
    batches = loader(train, batch_size, shuffle=True, seed=seed, num_workers=num_workers, crop=crop)
    about = getattr(train, "about", {})
    recorder = Recorder(
        out, patience, description, tensorboard, batches.sampler, checkpoint_minutes, notes, about
    )
    device = next(model.parameters()).device
    signals = recorder.signals
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            max_epochs=epochs,
            accelerator=accelerator,
            **processes,
            precision=precision,  # type: ignore[arg-type]
            logger=loggers or False,
            callbacks=[recorder, *([Progress(recorder)] if progress else [])],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            log_every_n_steps=1,
            default_root_dir=str(out or scratch),
        )
        signals.install()  # and again when training starts: Lightning adds its own
        learner.train()  # a model that was fitted or loaded before is in evaluation mode, and Lightning leaves it there
        try:
            trainer.fit(
                learner,
                batches,
                None if valid is None else loader(valid, batch_size, num_workers=num_workers),
                ckpt_path=checkpoint,
                weights_only=True,
            )
        except SystemExit:  # Lightning's answer to ctrl-C
            if recorder.interrupted is not None:
                raise recorder.interrupted from None
            raise
        finally:
            signals.restore()
            model.to(device)
            recording.recordings.clear()  # their memory
    weights = recorder.weights
    model.load_state_dict(learner.weights() if weights is None else weights)
    model.eval()
    history = recorder.history
    best = recorder.best or (history[-1] if history else {})
    seconds = sum(row["seconds"] for row in history)
    parameters = sum(p.numel() for p in model.parameters())
    return FitResult(model, history, best, out, seconds, parameters, tuple(learner.watch.notes))


def _options(kind: type) -> list[str]:
    """Names of the options of :class:`Loss` or :class:`Learner`."""
    parameters = inspect.signature(kind).parameters.values()
    return [p.name for p in parameters if p.name not in ("model", "seed") and p.kind is not p.VAR_KEYWORD]


@torch.no_grad()
def calibrate(model: SequentialLVM, data: Any) -> bool:
    """Set the output bias (and a shared scale) to the mean and standard deviation of each coordinate.

    The model then starts from the marginal of the data, which saves the first epochs. Only observed values
    count. It is done for models whose `p_x` is an :class:`~dynavae.nn.EmissionHead`; a model with a method `calibrate`
    of its own, such as LGSSM or KVAE, then starts as that says.

    Returns:
        Whether anything was set.

    Example:
        >>> from dynavae import VAE
        >>> model = VAE(x_dim=1, z_dim=2)
        >>> calibrate(model, [[[2.0], [4.0]]]), model.p_x.linear.bias[0].item()
        (True, 3.0)
    """
    data = to_data(data)
    head, own = getattr(model, "p_x", None), getattr(model, "calibrate", None)
    started = isinstance(head, EmissionHead)
    if isinstance(head, EmissionHead):
        _start_head(head, data)
    if own is not None:
        started = bool(own(values(data))) or started
    return started


def _start_head(head: EmissionHead, data: SequenceDataset | Sequences) -> None:
    count, total = torch.zeros(head.x_dim), torch.zeros(head.x_dim, dtype=torch.float64)
    for x, seen in values(data):
        count, total = count + seen.sum(0), total + x.sum(0)
    mean = total / count.clamp(min=1)
    square = torch.zeros_like(total)
    for x, seen in values(data):
        square = square + torch.where(seen, x - mean, 0.0).square().sum(0)
    stddev = (square / count.clamp(min=1)).sqrt()
    stddev = torch.where(count > 0, stddev, 1.0)
    least = getattr(head.emission, "min_scale", 0.0)
    still = (stddev <= least).nonzero().flatten().tolist() if least else []
    if still:
        log.warning(
            "of x the coordinates %s hardly vary (standard deviation at most %g, the least scale of the emission): their "
            "density is all that training will see. Standardize x, or leave them out.",
            ", ".join(map(str, still[:8])) + (", ..." if len(still) > 8 else ""),
            least,
        )
    like = next(head.parameters())
    head.start(mean.to(like), stddev.to(like))


_calibrate = calibrate  # `fit` has an argument of that name


def values(data: SequenceDataset | Sequences) -> Iterator[tuple[Tensor, Tensor]]:
    """Values (frames, x_dim), 0 where missing, and whether they were observed."""
    for i in range(len(data)):
        batch = data[[i]] if isinstance(data, Sequences) else data.batch([i])
        yield batch.x.flatten(2)[0].double().cpu(), batch.observed.flatten(2)[0].cpu()


def _check_data(what: str, data: SequenceDataset | Sequences, model: SequentialLVM) -> None:
    """Whether data have the model's sizes, and values that its emission can produce."""
    like = next(model.parameters())
    first = data[[0]] if isinstance(data, Sequences) else data.batch([0])
    check_fits(model, first.to(device=like.device, dtype=like.dtype))
    for i, (x, observed) in enumerate(values(data)):
        model.emission.check(x, f"{what}, sequence {data.names[i]!r},", observed)


def _description(model: SequentialLVM, train: Any, valid: Any) -> dict[str, Any]:
    def of(data: Any) -> dict[str, Any] | None:
        return (
            None if data is None else {"sha256": data.sha256(), "sequences": len(data), "frames": data.frames}
        )

    parameters = sum(p.numel() for p in model.parameters())
    return {
        "model": type(model).__name__,
        "config": model.config,
        "parameters": parameters,
        "train": of(train),
        "valid": of(valid),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning without its advice about the machine, the loggers and the data loaders."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        for message in (
            ".*does not have many workers",
            ".*GPU available but not used",
            ".*LeafSpec",
            ".*configure_optimizers.* returned `None`",  # EM has no optimizer
        ):
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
