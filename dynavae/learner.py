"""The Lightning module: any model, any objective, its schedules, and what is logged."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from dynavae import objectives
from dynavae.batch import Sequences
from dynavae.diagnostics import Totals, explain, reconstruction_and_kl
from dynavae.loading import Batch
from dynavae.model import SequentialLVM
from dynavae.noise import Noise, draw
from dynavae.resampling import Resampling
from dynavae.scan import Trajectory, scan
from dynavae.schedules import Real, Row, kl_weight, learning_rate, ramp, seed_for
from dynavae.tasks.capabilities import require
from dynavae.tasks.common import noise as noise_by_sequence

log = logging.getLogger("dynavae")

OBJECTIVES = ("elbo", "iwae", "renyi", "fivo")
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES = ("constant", "cosine", "exponential")


class Part(NamedTuple):
    """The loss of one chunk of a batch, and sums in nats over its sequences (numbers, not tensors)."""

    loss: Tensor  # what is minimised, per frame of the batch
    sums: dict[str, float]  # loss, nats (minus the bound at weight 1), kl, reconstruction


class Learner(LightningModule):
    """Trains a model by gradient ascent on a bound; the loss is minus the bound per frame of the batch.

    All epochs below are fractions: 2.5 is the middle of the third epoch. Every random number is a function of
    (seed, epoch, step), every schedule of the epoch: a resumed run repeats what an uninterrupted one does.

    Args:
        model: any model; it is trained in place.
        objective: "elbo", "iwae" and "renyi" (K whole paths), or "fivo" (a particle filter).
        particles: K; default 1 for the ELBO and 8 for the others.
        kl: "analytic", "sample", or "auto": sampled for exact models (there it is the likelihood), discrete
            latents and where no closed form exists, else analytic; decided once, at the first batch, and logged.
        beta: weight of the KL. With "iwae" and "renyi" it weighs log p(z) - log q(z); "fivo" has none.
        kl_warmup: epochs over which that weight grows linearly from `kl_start` times to 1 times `beta`.
        kl_start: where the growth starts.
        free_bits: nats per latent coordinate and frame that the KL may take for nothing ("elbo" only; with
            `truncate`, averaged over each chunk).
        alpha: of the Rényi objective: 0 is IWAE, towards 1 the ELBO.
        resample_threshold: of "fivo": resample when the effective sample size is at most this fraction of K.
        lr: highest learning rate.
        optimizer: "adam" or "adamw".
        weight_decay, eps: of the optimizer.
        lr_schedule: "constant", "cosine" or "exponential", see :func:`~dynavae.schedules.learning_rate`.
        lr_warmup: epochs over which the rate grows from 0.
        lr_decay: factor per epoch of "exponential"; default 0.99.
        lr_decay_start: epoch from which the rate falls.
        gradient_clip: largest norm of the gradient; None clips nothing.
        scheduled_sampling: final probability that the model reads its own output instead of x_t, drawn per
            sequence and step; for autoregressive models. No gradient flows through that output.
        scheduled_sampling_start, scheduled_sampling_end: epochs between which it grows linearly from 0.
        truncate: frames per chunk of truncated back-propagation. The state is carried on, gradients stop at
            the border, and one optimizer step is taken per batch, from all chunks: values of the loss are those
            of whole sequences for a causal model, while memory is that of a chunk. A smoothing posterior, and
            that of a per-sequence latent, then read their own (the first) chunk only.
        hide_rate: share of frames that are hidden from the model in training, as if missing, and not scored.
        seed: of all noise.

    Raises:
        ValueError: an option out of range, or one that this model cannot follow.

    Logged, in nats per frame, lower is better: ``train/loss`` (what is minimised), ``train/nats_per_frame``
    (minus the bound at weight 1), ``train/kl_per_frame``, ``train/reconstruction_per_frame`` (minus
    E log p(x | z)), the same under ``valid/`` (in evaluation mode, noise fixed per sequence, total nats / total
    frames: what :func:`dynavae.score` reports; "renyi" is validated by IWAE), ``valid/active_units``,
    ``kl_weight``, ``lr``, ``frames_per_second``. The attribute `kl_dim` is the KL of each latent coordinate
    on the validation set.

    Sources: Bowman et al. 2016, arXiv 1511.06349 (warm-up); Bengio et al. 2015, arXiv 1506.03099 (scheduled
    sampling).
    """

    def __init__(
        self,
        model: SequentialLVM,
        *,
        objective: str = "elbo",
        particles: int | None = None,
        kl: str = "auto",
        beta: Real = 1.0,
        kl_warmup: Real = 0.0,
        kl_start: Real = 0.0,
        free_bits: Real = 0.0,
        alpha: Real = 0.0,
        resample_threshold: Real = 0.5,
        lr: Real = 1e-3,
        optimizer: str = "adam",
        weight_decay: Real = 0.0,
        eps: Real = 1e-8,
        lr_schedule: str = "constant",
        lr_warmup: Real = 0.0,
        lr_decay: Real | None = None,
        lr_decay_start: Real = 0.0,
        gradient_clip: Real | None = 10.0,
        scheduled_sampling: Real = 0.0,
        scheduled_sampling_start: Real = 0.0,
        scheduled_sampling_end: Real = 0.0,
        truncate: int | None = None,
        hide_rate: Real = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _one_of("objective", objective, OBJECTIVES)
        _one_of("kl", kl, ("auto", "analytic", "sample"))
        _one_of("optimizer", optimizer, tuple(OPTIMIZERS))
        _one_of("lr_schedule", lr_schedule, SCHEDULES)
        particles = (1 if objective == "elbo" else 8) if particles is None else particles
        _at_least("particles", particles, 1)
        for name, value in dict(
            beta=beta, kl_warmup=kl_warmup, free_bits=free_bits, lr_warmup=lr_warmup
        ).items():
            _at_least(name, value, 0)
        for name, value in dict(kl_start=kl_start, scheduled_sampling=scheduled_sampling).items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} should be between 0 and 1; got {value}.")
        if not 0 <= hide_rate < 1:
            raise ValueError(f"hide_rate is a share of the frames, from 0 to below 1; got {hide_rate}.")
        for name, value in dict(lr=lr, gradient_clip=gradient_clip, lr_decay=lr_decay).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} should be positive; got {value}.")
        if truncate is not None:
            _at_least("truncate", truncate, 1)
        if lr_decay is not None and lr_schedule != "exponential":
            raise ValueError(f"lr_decay belongs to lr_schedule='exponential'; got {lr_schedule!r}.")
        if free_bits and (objective != "elbo" or kl == "sample"):
            raise ValueError(
                "free_bits needs objective='elbo' with an analytic KL: it is a floor on that KL."
            )
        if objective == "fivo" and (beta != 1 or kl_warmup):
            raise ValueError(
                "fivo has no KL to weigh: leave beta=1 and kl_warmup=0, or take objective='iwae'."
            )
        if scheduled_sampling and not model.autoregressive:
            raise ValueError(
                f"scheduled sampling lets a model read its own outputs, but {type(model).__name__} reads no past x "
                "when it generates (autoregressive = False): set scheduled_sampling=0."
            )
        if truncate is not None and not model.per_step_likelihood:
            raise ValueError(
                f"truncate cuts time into chunks, but this {type(model).__name__} decodes x_t from z_1:T; "
                "leave truncate=None."
            )
        require(model, "iwae" if objective == "renyi" else objective)
        self.model = model
        self.objective, self.particles, self.alpha = objective, particles, alpha
        self.kl, self.kl_kind = kl, None if kl == "auto" else kl
        self.beta, self.kl_warmup, self.kl_start, self.free_bits = beta, kl_warmup, kl_start, free_bits
        self.resampling = Resampling(threshold=float(resample_threshold)) if objective == "fivo" else None
        self.lr, self.optimizer, self.weight_decay, self.eps = lr, optimizer, weight_decay, eps
        self.rate = dict(
            lr=lr,
            schedule=lr_schedule,
            warmup=lr_warmup,
            decay=0.99 if lr_decay is None else lr_decay,
            decay_start=lr_decay_start,
        )
        self.gradient_clip, self.truncate, self.hide_rate, self.seed = (
            gradient_clip,
            truncate,
            hide_rate,
            seed,
        )
        self.scheduled_sampling = scheduled_sampling
        self.sampling_ramp = (scheduled_sampling_start, scheduled_sampling_end)
        self.automatic_optimization = truncate is None
        self.summary: Row = {}
        """What was logged in the last epoch."""
        self.kl_dim: Tensor | None = None
        self._train, self._valid = Totals(), Totals()
        self._started = self._ended = 0.0

    # --- schedules --------------------------------------------------------------------------------------

    def kl_weight_at(self, epoch: Real) -> float:
        """Weight of the KL, with `beta`."""
        return self.beta * kl_weight(epoch, self.kl_warmup, self.kl_start)

    def sampling_at(self, epoch: Real) -> float:
        """Probability that the model reads its own output."""
        return self.scheduled_sampling * ramp(epoch, *self.sampling_ramp)

    @property
    def settled(self) -> float:
        """The epoch at which every schedule of the objective has reached its end."""
        return max(self.kl_warmup, self.sampling_ramp[1] if self.scheduled_sampling else 0.0)

    # --- the loss ---------------------------------------------------------------------------------------

    def parts(self, batch: Sequences, epoch: Real = math.inf, seed: int = 0) -> Iterator[Part]:
        """The loss of a batch, whole or in chunks of `truncate` frames: the parts add up.

        Args:
            batch: on the device, and in the dtype, of the model.
            epoch: what the schedules go by; by default their end.
            seed: of everything random.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        frames, weight, sampling = batch.frames, self.kl_weight_at(epoch), self.sampling_at(epoch)
        device = batch.x.device
        with _seeded(seed, device):
            free = None
            if self.hide_rate:
                hidden = torch.rand(batch.valid.shape, device=device) < self.hide_rate
                batch = batch.hide(hidden.reshape(*hidden.shape, *[1] * (batch.x.ndim - 2)))
            if sampling:
                free = torch.rand(batch.valid.shape, device=device) < sampling
            own = bool(self.model.autoregressive) and (free is not None or not batch.complete)
            size = (batch.steps, self.particles, len(batch))
            noise = draw(self.model, *size, x=own, resample=self.objective == "fivo")
        state, weighted, plain = None, None, None
        step = self.truncate or batch.steps
        for i, start in enumerate(range(0, batch.steps, step)):
            whole = step >= batch.steps
            chunk = slice(start, min(start + step, batch.steps))
            with _seeded(seed_for(seed, i), device):  # dropout
                trajectory = scan(
                    self.model,
                    batch if whole else _frames(batch, chunk),
                    particles=self.particles,
                    resample=self.resampling,
                    free=None if free is None else free[:, chunk],
                    noise=noise if whole else _noise(noise, chunk),
                    state=state,
                    carry=not whole,
                )
            kind = self._choose_kl(trajectory)
            value, weighted = self._gain(trajectory, weight, weighted, self.free_bits)
            loss = -value.sum() / frames
            with torch.no_grad():
                bound, plain = self._gain(trajectory, 1.0, plain)
                reconstruction, kl = reconstruction_and_kl(trajectory, kind)
                sums = torch.stack(
                    [loss.detach() * frames, -bound.sum(), kl.sum(), -reconstruction.sum()]
                ).tolist()
            if not math.isfinite(sums[0]):
                raise FloatingPointError(explain(trajectory, batch.names, start))
            state = None if whole else trajectory.state.detach()  # type: ignore[union-attr]
            yield Part(loss, dict(zip(("loss", "nats", "kl", "reconstruction"), sums, strict=True)))

    def bound(self, trajectory: Trajectory, weight: Real = 1.0, free_bits: Real = 0.0) -> Tensor:
        """The objective (B,) with the KL weighted; at weight 1 a bound."""
        if self.objective == "elbo":
            return objectives.elbo(trajectory, self._choose_kl(trajectory), float(weight), float(free_bits))
        if self.objective == "fivo":
            return objectives.fivo(trajectory)
        trajectory = _tempered(trajectory, weight)
        if self.objective == "iwae":
            return objectives.iwae(trajectory)
        return objectives.renyi(trajectory, float(self.alpha))

    def _gain(
        self,
        trajectory: Trajectory,
        weight: Real,
        before: tuple[Tensor, Tensor] | None,
        free_bits: Real = 0.0,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What a chunk adds to the bound, given the log-weights and the bound of the paths before it."""
        if self.objective in ("elbo", "fivo"):  # sums over time: scan has carried the rest
            return self.bound(trajectory, weight, free_bits), None
        trajectory = _tempered(trajectory, weight)
        if before is not None:
            trajectory = trajectory._replace(
                log_prior_w=before[0], log_proposal_w=torch.zeros_like(before[0])
            )
        value = self.bound(trajectory)
        carried = objectives.log_weights(trajectory).detach(), value.detach()
        return (value if before is None else value - before[1]), carried

    def _choose_kl(self, trajectory: Trajectory) -> str:
        if self.kl_kind is None:
            closed = trajectory.kl is not None and (trajectory.w is None or trajectory.kl_w is not None)
            if self.model.exact or self.model.discrete_latent or not closed:
                if self.free_bits:
                    raise ValueError(
                        f"free_bits needs an analytic KL, but that of {type(self.model).__name__} is sampled: "
                        "set free_bits=0."
                    )
                self.kl_kind = "sample"
            else:
                self.kl_kind = "analytic"
            log.info("KL of %s: %s", type(self.model).__name__, self.kl_kind)
        return self.kl_kind

    # --- training ---------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind = OPTIMIZERS[self.optimizer]
        return kind(self.model.parameters(), lr=self.lr, weight_decay=self.weight_decay, eps=self.eps)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, next(self.model.parameters()).dtype)

    def on_train_epoch_start(self) -> None:
        self._train, self._started = Totals(), time.perf_counter()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        per_epoch = self.trainer.num_training_batches
        epoch = self.current_epoch + batch_idx / per_epoch
        optimizer = self.optimizers()
        rate = learning_rate(epoch + 1 / per_epoch, self.trainer.max_epochs or 0, **self.rate)  # type: ignore[arg-type]
        for group in optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = rate
        self.summary.update({"kl_weight": self.kl_weight_at(epoch), "lr": rate})
        parts = self.parts(batch.sequences, epoch, seed_for(self.seed, self.current_epoch, batch_idx))
        loss = None
        if not self.truncate:
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
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient, or report that it is not finite before it spoils the weights."""
        limit = math.inf if self.gradient_clip is None else self.gradient_clip
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        if not math.isfinite(norm):
            bad = [
                n
                for n, p in self.model.named_parameters()
                if p.grad is not None and not p.grad.isfinite().all()
            ]
            raise FloatingPointError(
                f"the gradient is not finite (first in {bad[0] if bad else 'its norm'!r}, epoch {self.current_epoch}) "
                "although the loss is. Lower the learning rate, raise min_scale of the emission, or set truncate."
            )

    @property
    def running_loss(self) -> float:
        """The loss per frame since the epoch began."""
        return self._train.per_frame("loss")

    def on_train_batch_end(self, *_: Any) -> None:
        self._ended = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        for name in ("loss", "nats", "kl", "reconstruction"):
            key = "loss" if name == "loss" else f"{name}_per_frame"
            self.summary[f"train/{key}"] = self._train.per_frame(name)
        self.summary["frames_per_second"] = self._train.frames / (self._ended - self._started)
        self.log_dict({k: v for k, v in self.summary.items() if not k.startswith("valid/")}, batch_size=1)

    # --- validation -------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._valid = Totals()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, self._valid)

    def on_validation_epoch_end(self) -> None:
        values = self.results(self._valid)
        self.summary.update(values)
        self.log_dict(values, batch_size=1)
        if values.get("valid/active_units") == 0 and self.current_epoch + 1 >= self.settled:
            log.warning(
                "epoch %d: no latent coordinate is active (the posterior ignores x). Try kl_warmup, free_bits, or a "
                "weaker decoder.",
                self.current_epoch,
            )

    @torch.no_grad()
    def evaluate(self, batch: Batch, totals: Totals) -> None:
        """Add one batch to the totals of a validation: noise by sequence, weight 1."""
        sequences, resample = batch.sequences, self.objective == "fivo"
        eps = noise_by_sequence(
            self.model, sequences, self.particles, self.seed, batch.rows, resample=resample
        )
        trajectory = scan(
            self.model, sequences, particles=self.particles, resample=self.resampling, noise=eps
        )
        reconstruction, kl = reconstruction_and_kl(trajectory, self._choose_kl(trajectory))
        bound = objectives.iwae(trajectory) if self.objective == "renyi" else self.bound(trajectory)
        terms = torch.stack([-bound, kl, -reconstruction]).double().sum(1).tolist()
        totals.add(batch.frames, **dict(zip(("nats", "kl", "reconstruction"), terms, strict=True)))
        totals.add_latents(trajectory)

    def results(self, totals: Totals) -> Row:
        """The validation's figures; sets `kl_dim`."""
        self.kl_dim = totals.per_frame("kl_dim") if "kl_dim" in totals.sums else None
        active = totals.active_units()
        return {
            **{f"valid/{k}_per_frame": totals.per_frame(k) for k in ("nats", "kl", "reconstruction")},
            **({} if active is None else {"valid/active_units": float(active)}),
        }


def _tempered(trajectory: Trajectory, weight: Real) -> Trajectory:
    """log p(z) - log q(z) times `weight` in every importance weight."""
    if weight == 1:
        return trajectory
    names = ("log_prior", "log_proposal", "log_prior_w", "log_proposal_w")
    terms = {name: getattr(trajectory, name) for name in names}
    return trajectory._replace(**{name: None if v is None else weight * v for name, v in terms.items()})


def _frames(batch: Sequences, chunk: slice) -> Sequences:
    """Some frames of every sequence; a sequence that has ended keeps its row, with length 0."""
    lengths = (batch.lengths - chunk.start).clamp(0, chunk.stop - chunk.start)
    control = None if batch.control is None else batch.control[:, chunk]
    return Sequences(batch.x[:, chunk], batch.observed[:, chunk], lengths, control, batch.names)


def _noise(noise: Noise, chunk: slice) -> Noise:
    x, resample = (None if n is None else n[chunk] for n in (noise.x, noise.resample))
    return noise._replace(z=noise.z[chunk], x=x, resample=resample)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from this seed; the caller's own go on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} should be one of {', '.join(choices)}; got {value!r}.")


def _at_least(name: str, value: Real, minimum: Real) -> None:
    if value < minimum:
        raise ValueError(f"{name} should be {minimum} or more; got {value}.")
