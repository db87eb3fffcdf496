"""The Lightning module: the loss, the optimizer and its schedule, and what is logged."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from dynavae import tree
from dynavae.averaging import WeightAverage
from dynavae.diagnostics import Totals
from dynavae.em import Iteration, everywhere
from dynavae.loading import Batch
from dynavae.loss import Loss
from dynavae.model import SequentialLVM
from dynavae.options import at_least, one_of
from dynavae.parallel import Averaged, average_gradients, main_process, rank, together
from dynavae.schedules import Real, Row, learning_rate, seed_for
from dynavae.watch import Watch

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES = ("constant", "cosine", "exponential")


class Learner(LightningModule):
    """Trains a model by gradient ascent on a bound; the loss is minus the bound per frame of the batch.

    Every random number is a function of (seed, epoch, step), every schedule of the epoch, which is a fraction: a resumed
    run repeats what an uninterrupted one does.

    Args:
        model: any model; it is trained in place.
        lr: highest learning rate.
        optimizer: "adam" or "adamw".
        weight_decay: of the optimizer.
        eps: of the optimizer, added to the root of the second moment.
        lr_schedule: "constant", "cosine" or "exponential", see :func:`~dynavae.schedules.learning_rate`.
        lr_warmup: epochs over which the rate grows from 0.
        lr_decay: factor per epoch of "exponential"; default 0.99.
        lr_decay_start: epoch from which the rate falls.
        gradient_clip: largest norm of the gradient; None clips nothing.
        freeze: beginnings of the names of parameters (as `model.named_parameters` has them) that stay as they are at first,
            such as ("rnn",): parts that should learn only once others have settled.
        freeze_until: epoch up to which they do.
        ema: decay per update of a moving average of the weights, such as 0.998; validation, the best weights and the
            model that `fit` returns are then those of the average, see :class:`~dynavae.averaging.WeightAverage`.
        global_lr: step of the natural gradient for a model with a conjugate factor of global parameters, such as
            SVAE(conjugate=True), in (0, 1]; default 0.1. At each update of the other parameters its natural
            parameters move by global_lr times (the prior's + expected sums of all training sequences - themselves).
        tolerance: of "em": stop when an iteration gains less, in nats per frame of the training data; None never does.
        starts: of "em": try so many starts from the data, and go on from the best, see :func:`dynavae.fit_em`.
        seed: of all noise.
        **objective: of :class:`~dynavae.loss.Loss`: objective, particles, kl_warmup, free_bits, truncate, ...

    Raises:
        ValueError: an option out of range, or one that this model cannot follow.

    Logged, in nats per frame, lower is better: ``train/loss`` (what is minimised), ``train/nats_per_frame``
    (minus the bound at weight 1), ``train/kl_per_frame``, ``train/reconstruction_per_frame`` (minus
    E log p(x | z)), the same under ``valid/`` (in evaluation mode, noise fixed per sequence, total nats / total
    frames: what :func:`dynavae.score` reports, with `kl="sample"` for discrete latents; "renyi" is validated by IWAE),
    ``valid/active_units``,
    ``kl_weight``, ``lr``, ``grad_norm`` (before clipping, mean over updates), ``frames_per_second``. The attribute
    `kl_dim` is the KL of each latent coordinate on the validation set; `watch` says when training goes wrong.

    With several processes (:class:`~dynavae.loading.Turns`) gradients, figures and weights are those of one process
    with the same batches, dropout apart.
    """

    def __init__(
        self,
        model: SequentialLVM,
        *,
        lr: Real = 1e-3,
        optimizer: str = "adam",
        weight_decay: Real = 0.0,
        eps: Real = 1e-8,
        lr_schedule: str = "constant",
        lr_warmup: Real = 0.0,
        lr_decay: Real | None = None,
        lr_decay_start: Real = 0.0,
        gradient_clip: Real | None = 10.0,
        freeze: Sequence[str] = (),
        freeze_until: Real = 0.0,
        ema: Real | None = None,
        global_lr: Real | None = None,
        tolerance: Real | None = None,
        starts: int = 1,
        seed: int = 0,
        **objective: Any,
    ) -> None:
        super().__init__()
        self.loss = Loss(model, **objective)
        self.by_em = self.loss.objective == "em"
        at_least("starts", starts, 1)
        if not self.by_em and (tolerance is not None or starts != 1):
            raise ValueError(
                f"tolerance and starts belong to objective='em'; got objective={self.loss.objective!r}."
            )
        if self.by_em and (ema is not None or self.loss.hide_rate):
            raise ValueError(
                "objective='em' has no updates to average and hides nothing: leave ema and hide_rate."
            )
        if global_lr is not None and not model.conjugate:
            raise ValueError(
                f"global_lr is a step of the natural gradient of a conjugate factor, which this {type(model).__name__} has "
                "not: leave it out, or take SVAE(conjugate=True)."
            )
        if global_lr is not None and not 0 < global_lr <= 1:
            raise ValueError(f"global_lr should be in (0, 1]; got {global_lr}.")
        self.global_lr: Real = 0.1 if global_lr is None else global_lr
        one_of("optimizer", optimizer, tuple(OPTIMIZERS))
        one_of("lr_schedule", lr_schedule, SCHEDULES)
        at_least("lr_warmup", lr_warmup, 0)
        for name, value in dict(lr=lr, gradient_clip=gradient_clip, lr_decay=lr_decay).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} should be positive; got {value}.")
        if lr_decay is not None and lr_schedule != "exponential":
            raise ValueError(f"lr_decay belongs to lr_schedule='exponential'; got {lr_schedule!r}.")
        at_least("freeze_until", freeze_until, 0)
        self.freeze, self.freeze_until = _prefixes(model, freeze), freeze_until
        self.model = model
        self.optimizer_name, self.weight_decay, self.eps = optimizer, weight_decay, eps
        self.rate = dict(
            lr=lr,
            schedule=lr_schedule,
            warmup=lr_warmup,
            decay=0.99 if lr_decay is None else lr_decay,
            decay_start=lr_decay_start,
        )
        self.gradient_clip, self.seed = gradient_clip, seed
        self.average = None if ema is None else WeightAverage(model, ema)
        self.automatic_optimization = self.loss.truncate is None and not self.by_em
        self.tolerance, self.starts = tolerance, starts
        self._toward: Any = None  # where the natural gradient of a conjugate factor leads
        self.iteration = Iteration()
        self._nats_before = math.inf  # per frame, of the iteration before, with the prior of the parameters
        self._log_prior = 0.0
        self.summary: Row = {}
        """What was logged in the last epoch."""
        self.kl_dim: Tensor | None = None
        self._train, self._valid = Totals(), Totals()
        self._started = 0.0
        self._elapsed = 0.0
        self._step = 0
        self.watch = Watch(speak=main_process())

    # --- training ---------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        if self.by_em:
            return None
        kind, lr = OPTIMIZERS[self.optimizer_name], self.rate["lr"]
        optimizer = kind(
            self.model.parameters(), lr=lr, weight_decay=self.weight_decay, eps=self.eps, fused=True
        )
        if self.model.conjugate:
            optimizer.register_step_post_hook(
                lambda *_: self.model.natural_step(self._toward, float(self.global_lr))
            )
        if self.average is not None:
            average = self.average
            optimizer.register_step_post_hook(lambda *_: average.update())
        return optimizer

    def weights(self) -> dict[str, Tensor]:
        """What is validated and kept: the average of the weights with `ema`, else the weights."""
        return self.model.state_dict() if self.average is None else self.average.weights()

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, next(self.model.parameters()).dtype)

    def on_train_start(self) -> None:
        if self.model.conjugate:
            self.model.begin_global(self._sequences)
        if self.average is not None:
            self.average.start()

    def on_train_epoch_start(self) -> None:
        self._train, self._started, self._elapsed = Totals(), 0.0, 0.0
        self._log_prior = (
            self.model.em_log_prior() if self.by_em else 0.0
        )  # at the parameters of the expectation

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if not self._started:
            self._started = time.perf_counter() - self._elapsed

    @torch.no_grad()
    def _em_step(self, batch: Batch, last: bool) -> None:
        """The expectation over a batch; after the last one, the maximisation."""
        nats = -self.iteration.add(self.model, batch)
        if not math.isfinite(nats):
            raise FloatingPointError("log p(x) is not finite: standardize x, or raise min_scale.")
        self._train.add(batch.frames, loss=nats, nats=nats, kl=0.0, reconstruction=nats)
        if last:
            self.iteration.finish(self.model)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if self.by_em:
            self._em_step(batch, batch_idx + 1 == self.trainer.num_training_batches)
            return None
        per_epoch, self._step = self.trainer.num_training_batches, batch_idx
        epoch = self.current_epoch + batch_idx / per_epoch
        optimizer = self.optimizers()
        rate = learning_rate(epoch + 1 / per_epoch, self.trainer.max_epochs or 0, **self.rate)  # type: ignore[arg-type]
        for group in optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = rate
        self.summary.update({"kl_weight": self.loss.kl_weight_at(epoch), "lr": rate})
        seed = seed_for(self.seed, self.current_epoch, batch_idx)
        if self.model.conjugate:
            self._toward = self._expect(batch)
        parts = together(self.loss.parts(batch.sequences, epoch, seed, batch.share), batch.share, self.device)
        loss = None
        with self._full_precision(self.model.full_precision):
            if not self.loss.truncate:
                for part in parts:
                    loss = part.loss
                    self._train.add(**part.sums)
            else:
                optimizer.zero_grad()  # type: ignore[union-attr]
                for part in parts:
                    self.manual_backward(part.loss)
                    self._train.add(**part.sums)
                optimizer.step()  # type: ignore[union-attr]
        self._train.add(batch.frames)
        if batch.frames:
            self.watch.begin(nats=self._train.per_frame("nats"))
        return loss

    def _full_precision(self, on: bool = True) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, enabled=False) if on else contextlib.nullcontext()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient, or report that it is not finite before it spoils the weights."""
        if isinstance(self.trainer.strategy, Averaged):
            average_gradients(self.model.parameters())
        epoch = self.current_epoch + self._step / self.trainer.num_training_batches
        if self.freeze and epoch < self.freeze_until:
            for name, parameter in self.model.named_parameters():
                if name.startswith(self.freeze):
                    parameter.grad = None  # the optimizer passes over it
        limit = math.inf if self.gradient_clip is None else self.gradient_clip
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        self.watch.begin(norm=norm)
        if rank() == 0:  # the same in every process: count it once
            self._train.add(norm=norm, updates=1)
        if not math.isfinite(norm):
            bad = [
                n
                for n, p in self.model.named_parameters()
                if p.grad is not None and not p.grad.isfinite().all()
            ]
            raise FloatingPointError(
                f"the gradient is not finite (first in {bad[0] if bad else 'its norm'!r}, epoch {self.current_epoch + 1}) "
                "although the loss is. Lower the learning rate, raise min_scale of the emission, or set truncate."
            )

    @property
    def running_loss(self) -> float:
        """The loss per frame since the epoch began."""
        return self._train.per_frame("loss") if self._train.frames else math.nan

    @property
    def _sequences(self) -> int:
        """How many sequences, or pieces of them, an epoch has."""
        loader: Any = self.trainer.train_dataloader
        batches = getattr(loader.sampler, "batches", None)
        return int(getattr(batches, "size", len(loader.dataset)))

    @torch.no_grad()
    def _expect(self, batch: Batch) -> Any:
        """Expected sums over all training sequences, as this batch has them: where a natural gradient leads."""
        training = self.model.training
        self.model.eval()  # without dropout
        sums, rows = self.model.global_statistics(batch.sequences), len(batch.sequences)
        self.model.train(training)
        if batch.share is not None:
            rows = batch.share.sequences
            if not batch.share.index:  # a process without a row of this batch
                sums = tree.tree_map(torch.zeros_like, sums)
        scale = self._sequences / rows
        return tree.tree_map(lambda a: scale * a, everywhere(sums))

    def on_train_batch_end(self, *_: Any) -> None:
        self._elapsed = time.perf_counter() - self._started

    def on_train_epoch_end(self) -> None:
        totals = self._train.merged()
        for name in ("loss", "nats", "kl", "reconstruction"):
            key = "loss" if name == "loss" else f"{name}_per_frame"
            self.summary[f"train/{key}"] = totals.per_frame(name)
        if self.by_em:
            nats = totals.per_frame("nats") - self._log_prior / totals.frames
            if self.tolerance is not None and self._nats_before - nats < self.tolerance:
                self.trainer.should_stop = True
            self._nats_before = nats
        else:
            self.summary["grad_norm"] = totals.sums["norm"] / totals.sums["updates"]
        self.summary["frames_per_second"] = totals.frames / self._elapsed
        self.log_dict({k: v for k, v in self.summary.items() if not k.startswith("valid/")}, batch_size=1)
        self.watch.look({"epoch": self.current_epoch + 1, **self.summary}, self.loss.settled)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What a run that stops within an epoch has to remember of it."""
        totals = self._train.merged()
        checkpoint["epoch_so_far"] = {
            "frames": totals.frames,
            "sums": totals.sums,
            "elapsed": self._elapsed,
            "watch": self.watch.state_dict(),
            "nats_before": self._nats_before,
            "log_prior": self._log_prior,
            "statistics": self.iteration.state(),
        }
        if self.average is not None:
            checkpoint["average"] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["epoch_so_far"]
        self._train, self._elapsed = Totals(), state["elapsed"]
        if rank() == 0:  # the sums of all processes
            self._train.add(state["frames"], **state["sums"])
        self.watch.load_state_dict(state["watch"])
        self._nats_before, self._log_prior = state["nats_before"], state.get("log_prior", 0.0)
        self.iteration.restore(state["statistics"] if rank() == 0 else None)  # the sums of all processes
        if self.average is not None:
            self.average.load_state_dict(checkpoint["average"])

    # --- validation -------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._valid = Totals()
        if self.average is not None:
            self.average.swap()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with self._full_precision():  # a bound to report
            self.loss.evaluate(batch, self._valid, self.seed)

    def on_validation_epoch_end(self) -> None:
        if self.average is not None:
            self.average.swap()
        totals = self._valid.merged()
        values = {f"valid/{k}_per_frame": totals.per_frame(k) for k in ("nats", "kl", "reconstruction")}
        self.kl_dim = totals.per_frame("kl_dim") if "kl_dim" in totals.sums else None
        active = totals.active_units()
        if active is not None:
            values["valid/active_units"] = float(active)
        self.summary.update(values)
        self.log_dict(values, batch_size=1)


def _prefixes(model: SequentialLVM, freeze: Sequence[str]) -> tuple[str, ...]:
    """What `freeze` says, if each of it begins the name of a parameter."""
    prefixes = (freeze,) if isinstance(freeze, str) else tuple(freeze)
    names = [name for name, _ in model.named_parameters()]
    for prefix in prefixes:
        if not prefix or not any(name.startswith(prefix) for name in names):
            parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise ValueError(
                f"freeze names {prefix!r}, but {type(model).__name__} has only the parts {parts}."
            )
    return prefixes
