"""What happens after every epoch of `fit`: history, best weights, early stop, files, progress."""

from __future__ import annotations

import csv
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from torch import Tensor
from tqdm.auto import tqdm

from dynavae.checkpoint import read_weights, save_pretrained
from dynavae.learner import Learner
from dynavae.schedules import Row

log = logging.getLogger("dynavae")
METRIC = "valid/nats_per_frame"


class Recorder(Checkpoint):
    """Keeps the history and the best weights, stops early, and writes the run's files.

    Lightning runs checkpoint callbacks last, so the epoch's figures are complete here. All of its memory
    (history, best figure, patience) is in its `state_dict`, hence in `checkpoints/last.ckpt`.

    Args:
        out_dir: where files go; None writes none.
        patience: epochs without a better validation bound before training stops, counted from `Loss.settled`
            on; None never stops.
        options: of the run, stored beside the weights.
        tensorboard: write TensorBoard events.
        sampler: of the training batches. Lightning starts the first pass of a resumed run before it has said
            which epoch it is.
    """

    def __init__(
        self,
        out_dir: Path | None = None,
        patience: int | None = None,
        options: dict[str, Any] | None = None,
        tensorboard: bool = True,
        sampler: Any = None,
    ) -> None:
        self.out_dir, self.patience, self.options = out_dir, patience, options or {}
        self.tensorboard = tensorboard and out_dir is not None
        self.sampler = sampler
        self.history: list[Row] = []
        self.kl_dim: list[list[float] | None] = []
        self.best: Row = {}
        self.best_settled = False
        self.waited = 0
        self.weights: dict[str, Tensor] | None = None
        self.interrupted = False
        self._writer: Any = None
        self._start = 0.0

    def state_dict(self) -> dict[str, Any]:
        names = ("history", "kl_dim", "best", "best_settled", "waited")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            setattr(self, name, value)
        if self.sampler is not None:
            self.sampler.set_epoch(len(self.history))
        if self.best and self.out_dir is not None:
            self.weights = read_weights(self.out_dir / "best")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.interrupted = isinstance(exception, KeyboardInterrupt)
        self._close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._patience_is_over():
            trainer.should_stop = True
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            assert self.out_dir is not None
            self._writer = SummaryWriter(str(self.out_dir / "tensorboard"), purge_step=len(self.history) + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()

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
        improved = METRIC in row and self._judge(row, pl_module)
        if self.out_dir is not None:
            self._write(self.out_dir, row, trainer, pl_module, improved)
        if self._patience_is_over():
            trainer.should_stop = True

    def _judge(self, row: Row, learner: Learner) -> bool:
        """Whether this epoch is the best so far; if so, keep a copy of the weights.

        Validation feeds data back, so figures from before the end of scheduled sampling would always win:
        the first epoch after it replaces them.
        """
        settled = not learner.loss.scheduled_sampling or row["epoch"] >= learner.loss.sampling_ramp[1]
        better = not self.best or row[METRIC] < self.best[METRIC] or (settled and not self.best_settled)
        if better:
            self.best, self.best_settled, self.waited = dict(row), settled, 0
            state = learner.model.state_dict()
            self.weights = {name: value.detach().cpu().clone() for name, value in state.items()}
        elif row["epoch"] > learner.loss.settled:
            self.waited += 1
        return better

    def _patience_is_over(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    # --- files ------------------------------------------------------------------------------------------

    def _write(self, out: Path, row: Row, trainer: Trainer, learner: Learner, improved: bool) -> None:
        write_csv(out / "metrics.csv", self.history)
        if any(self.kl_dim):
            vectors = [
                {"epoch": r["epoch"], **{f"kl_{i}": v for i, v in enumerate(kl)}}
                for r, kl in zip(self.history, self.kl_dim, strict=True)
                if kl is not None
            ]
            write_csv(out / "kl_dim.csv", vectors)
        if self._writer is not None:
            for name, value in row.items():
                if name not in ("epoch", "updates"):
                    self._writer.add_scalar(name, value, row["epoch"])
            if learner.kl_dim is not None:
                self._writer.add_histogram("valid/kl_dim", learner.kl_dim, row["epoch"])
            self._writer.flush()
        if improved:
            extra = {"epoch": row["epoch"], "metrics": row, "training": self.options}
            save_pretrained(learner.model, out / "best", extra=extra)
        last = out / "checkpoints" / "last.ckpt"
        last.parent.mkdir(parents=True, exist_ok=True)
        beside = last.with_name(".last.ckpt")
        trainer.save_checkpoint(beside, weights_only=False)
        os.replace(beside, last)


def _part(name: str) -> str:
    return name[: name.find("/") + 1]


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line per row; columns in the order in which they first occur."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    beside = path.with_name(f".{path.name}")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")


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
