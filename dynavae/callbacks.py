"""What happens after every epoch of `fit`: history, best weights, early stop, files, progress."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor
from tqdm.auto import tqdm

from dynavae.checkpoint import save_pretrained
from dynavae.files import explained, write_csv, write_json
from dynavae.interruption import Interrupted, Signals
from dynavae.learner import Learner
from dynavae.parallel import agreed
from dynavae.resume import Checkpoints
from dynavae.schedules import Real, Row

METRIC = "valid/nats_per_frame"


class Recorder(Checkpoint):
    """Keeps the history and the best weights, stops early, writes the run's files, answers ctrl-C.

    Lightning runs checkpoint callbacks last, so the epoch's figures are complete here. All of its memory
    (history, best weights, patience, where in the epoch) is in its `state_dict`, hence in `checkpoints/last.ckpt`.
    With several processes all of them come here, and one writes.

    Args:
        out_dir: where files go; None writes none.
        patience: epochs without a better validation bound before training stops, counted from `Loss.settled`
            on; None never stops.
        description: of the run, for `training.json`; its options are stored beside the weights too.
        tensorboard: write TensorBoard events.
        sampler: of the training batches. Lightning starts the first pass of a resumed run before it has said
            which epoch it is.
        minutes: save within an epoch, too, when so long has passed since the last time; None: only after epochs.
        notes: what is to be said as soon as training starts.
        about: of the data, what is to stay with the weights: their kind, and the schema of a table.
    """

    def __init__(
        self,
        out_dir: Path | None = None,
        patience: int | None = None,
        description: dict[str, Any] | None = None,
        tensorboard: bool = True,
        sampler: Any = None,
        minutes: Real | None = None,
        notes: list[str] | None = None,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.out_dir, self.patience, self.description = out_dir, patience, description or {}
        self.tensorboard = tensorboard and out_dir is not None
        self.sampler, self.minutes, self.notes, self.about = sampler, minutes, notes or [], about or {}
        self.signals = Signals()
        self.history: list[Row] = []
        self.kl_dim: list[list[float] | None] = []
        self.best: Row = {}
        self.best_settled = False
        self.waited = 0
        self.weights: dict[str, Tensor] | None = None
        self.interrupted: KeyboardInterrupt | None = None
        self.batches, self.elapsed = 0, 0.0  # done of the current epoch
        self._writer: Any = None
        self._start = self._saved = 0.0

    def state_dict(self) -> dict[str, Any]:
        names = ("history", "kl_dim", "best", "best_settled", "waited", "weights", "batches", "elapsed")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)
        if self.sampler is not None:
            self.sampler.resume(len(self.history), self.batches)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self.interrupted = exception
        self._close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Learner)
        if self._patience_is_over():
            trainer.should_stop = True
        self._start, self._saved = time.perf_counter() - self.elapsed, time.monotonic()
        self.signals.speak = pl_module.watch.speak = trainer.is_global_zero
        for sentence in self.notes:
            pl_module.watch.note(sentence)
        if trainer.is_global_zero and self.out_dir is not None:
            self._describe(self.out_dir, pl_module)
            if self.best:  # a kill may have come between best/ and last.ckpt
                self._write_best(self.out_dir, pl_module)
            if self.tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                folder, step = str(self.out_dir / "tensorboard"), len(self.history) + 1
                self._writer = SummaryWriter(folder, purge_step=step)
        self.signals.install()  # after Lightning's own

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 >= trainer.num_training_batches:
            return  # the epoch ends, and is saved, next
        due = self.minutes is not None and time.monotonic() - self._saved >= 60 * self.minutes
        asked = agreed(self.signals.asked or int(due and self.out_dir is not None) - 1, pl_module.device)
        if asked < 0:
            return
        self.batches, self.elapsed = batch_idx + 1, time.perf_counter() - self._start
        self._save(trainer)
        if asked > 0:
            self._stop(trainer, asked, f"in epoch {trainer.current_epoch + 1}")

    def _save(self, trainer: Trainer) -> None:
        if self.out_dir is not None:
            Checkpoints(self.out_dir).save(trainer)
        self._saved = time.monotonic()

    def _stop(self, trainer: Trainer, signal: int, where: str) -> None:
        saved = "nothing was saved" if self.out_dir is None else "saved"
        raise Interrupted(f"{saved} {where}, after update {trainer.global_step}", signal)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Learner) -> None:
        epoch = trainer.current_epoch + 1
        row: Row = {"epoch": epoch, "updates": trainer.global_step}
        row |= {
            k: v
            for part in ("", "train/", "valid/")
            for k, v in pl_module.summary.items()
            if _part(k) == part
        }
        row["seconds"] = time.perf_counter() - self._start
        self.history.append(row)
        self.kl_dim.append(None if pl_module.kl_dim is None else pl_module.kl_dim.tolist())
        improved = self._judge(row, pl_module) if METRIC in row else self._latest(row)
        self.batches, self.elapsed = 0, 0.0
        if self.out_dir is not None and trainer.is_global_zero:
            self._write(self.out_dir, row, pl_module, improved)
        self._save(trainer)
        if self._patience_is_over():
            trainer.should_stop = True
        asked = agreed(self.signals.asked, pl_module.device)
        if asked and not trainer.should_stop and epoch < (trainer.max_epochs or 0):
            self._stop(trainer, asked, f"at the end of epoch {epoch}")

    def _judge(self, row: Row, learner: Learner) -> bool:
        """Whether this epoch is the best so far; if so, keep a copy of the weights.

        Validation feeds data back, so figures from before the end of scheduled sampling would always win:
        the first epoch after it replaces them.
        """
        settled = not learner.loss.scheduled_sampling or row["epoch"] >= learner.loss.sampling_ramp[1]
        if math.isfinite(row[METRIC]):
            before = self.best.get(METRIC, math.inf)
            better = row[METRIC] < before or not math.isfinite(before) or (settled and not self.best_settled)
        else:
            better, settled = not self.best, False
        if better:
            self.best, self.best_settled, self.waited = dict(row), settled, 0
            self.weights = {name: value.detach().cpu().clone() for name, value in learner.weights().items()}
        elif row["epoch"] > learner.loss.settled:
            self.waited += 1
        return better

    def _latest(self, row: Row) -> bool:
        """Without a validation set the last weights are the best ones."""
        self.best = dict(row)
        return True

    def _patience_is_over(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    # --- files ------------------------------------------------------------------------------------------

    def _write(self, out: Path, row: Row, learner: Learner, improved: bool) -> None:
        write_csv(out / "metrics.csv", self.history)
        if any(self.kl_dim):
            vectors = [
                {"epoch": r["epoch"], **{f"kl_{i}": v for i, v in enumerate(kl)}}
                for r, kl in zip(self.history, self.kl_dim, strict=True)
                if kl is not None
            ]
            write_csv(out / "kl_dim.csv", vectors)
        if self._writer is not None:
            try:
                for name, value in row.items():
                    if name not in ("epoch", "updates"):
                        self._writer.add_scalar(name, value, row["epoch"])
                if learner.kl_dim is not None:
                    self._writer.add_histogram("valid/kl_dim", learner.kl_dim, row["epoch"])
                self._writer.flush()
            except OSError as error:
                raise explained(error, out / "tensorboard") from error
        if improved:
            self._write_best(out, learner)
        self._describe(out, learner)

    def _write_best(self, out: Path, learner: Learner) -> None:
        extra = {
            "epoch": self.best["epoch"],
            "metrics": self.best,
            "training": self.description.get("options", {}),
            **self.about,
        }
        weights = learner.weights() if self.weights is None else self.weights
        save_pretrained(learner.model, out / "best", extra=extra, weights=weights)

    def _describe(self, out: Path, learner: Learner) -> None:
        write_json(out / "training.json", {**self.description, "notes": learner.watch.notes})


def _part(name: str) -> str:
    return name[: name.find("/") + 1]


class Progress(Callback):
    """One line: updates done, epoch, loss, and the last validation bound."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._bar: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = (trainer.max_epochs or 0) * trainer.num_training_batches
        name = type(pl_module.model).__name__
        every = 0.2 if sys.stderr.isatty() else 20.0  # a log file need not see every update
        self._bar = tqdm(
            total=total,
            initial=trainer.global_step,
            desc=name,
            dynamic_ncols=True,
            leave=True,
            mininterval=every,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Learner, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        figures = {"epoch": trainer.current_epoch + 1, "loss": f"{pl_module.running_loss:.4f}"}
        if self.recorder.history and METRIC in self.recorder.history[-1]:
            figures["valid"] = f"{self.recorder.history[-1][METRIC]:.4f}"
            figures["best"] = f"{self.recorder.best[METRIC]:.4f}"
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
