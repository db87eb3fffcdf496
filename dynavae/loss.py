"""The loss of a batch: minus a bound per frame, with its schedules, whole or in chunks of time."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynavae import objectives
from dynavae.batch import Sequences
from dynavae.chunks import chunk_of, noise_of, score_all, tempered
from dynavae.diagnostics import Totals, explain, reconstruction_and_kl
from dynavae.loading import Batch
from dynavae.model import SequentialLVM
from dynavae.noise import draw
from dynavae.options import check
from dynavae.parallel import Share, summed
from dynavae.plan import Compile, to_compile
from dynavae.resampling import Resampling
from dynavae.scan import Trajectory, scan
from dynavae.schedules import Real, kl_weight, ramp, seed_for
from dynavae.tasks.common import noise as noise_by_sequence
from dynavae.terms import compiled

log = logging.getLogger("dynavae")

Pool = Callable[[Tensor], Tensor] | None
"""Adds a tensor up over the processes that share a batch."""


class Part(NamedTuple):
    """The loss of one chunk of a batch, and sums in nats over its sequences (numbers, not tensors)."""

    loss: Tensor  # what is minimised, per frame of the batch
    sums: dict[str, float]  # loss, nats (minus the bound at weight 1), kl, reconstruction


def default_objective(
    model: SequentialLVM,
    particles: int | None = None,
    kl: str = "auto",
    beta: Real = 1.0,
    kl_warmup: Real = 0.0,
    free_bits: Real = 0.0,
    truncate: int | None = None,
    score_hidden: bool = False,
    **_: Any,
) -> str:
    """The likelihood of an exact model, unless an option asks for a bound; else the ELBO."""
    asked = beta != 1 or kl_warmup or free_bits or truncate is not None or score_hidden or kl != "auto"
    return "exact" if model.exact and not asked and particles is None else "elbo"


class Loss:
    """Minus a bound per frame of a batch; a pure function of (model, batch, epoch, seed).

    All epochs below are fractions: 2.5 is the middle of the third epoch.

    Args:
        model: any model.
        objective: "elbo", "iwae" and "renyi" (K whole paths), "fivo" (a particle filter), or "exact", log p(x) itself, of
            an exact model: many times faster there than "elbo", which is the same number by way of sampled paths. Its KL
            is reported as 0. Default: "exact" of an exact model, unless another option (`kl`, `beta`, `particles`,
            `truncate`, ...) asks for a bound, else "elbo". "em": each epoch is one iteration of EM over all data, without
            optimizer or learning rate; its ``train/`` figures are those before the iteration, its ``valid/`` figures
            those after it.
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
        scheduled_sampling: final probability that the model reads its own output instead of x_t, drawn per
            sequence and step; for autoregressive models. No gradient flows through that output.
        scheduled_sampling_start: epoch from which that probability grows linearly from 0.
        scheduled_sampling_end: epoch at which it has reached its final value.
        truncate: frames per chunk of truncated back-propagation. The state is carried on, gradients stop at
            the border, and one optimizer step is taken per batch, from all chunks: values of the loss are those
            of whole sequences for a causal model, while memory is that of a chunk. A smoothing posterior, and
            that of a per-sequence latent, then read their own (the first) chunk only.
        hide_rate: share of frames that are hidden from the model in training, as if missing, and not scored.
        hide: what `hide_rate` hides: whole "frames", or single "values" (each coordinate on its own).
        score_hidden: score what is hidden, though the posterior has not read it: learns to impute. Still a bound on
            log p(x), for models that read no past x when they generate ("elbo", "iwae", "renyi").
        compile: "terms" puts the scoring of all frames through `torch.compile`: needs a C++ compiler, takes some seconds at
            the start. "recursion" plays the loop over time from a CUDA graph: on a GPU, for sizes that come again (give
            `fit` a `crop`, or sequences of one length). True: both, or on a CPU the first. See the page on speed.

    Raises:
        ValueError: an option out of range, or one that this model cannot follow.

    Sources: Bowman et al. 2016, arXiv 1511.06349 (warm-up); Bengio et al. 2015, arXiv 1506.03099 (scheduled
    sampling).

    Attributes:
        kl_kind: "analytic" or "sample"; None until "auto" has been decided, at the first batch.
    """

    def __init__(
        self,
        model: SequentialLVM,
        objective: str | None = None,
        particles: int | None = None,
        kl: str = "auto",
        beta: Real = 1.0,
        kl_warmup: Real = 0.0,
        kl_start: Real = 0.0,
        free_bits: Real = 0.0,
        alpha: Real = 0.0,
        resample_threshold: Real = 0.5,
        scheduled_sampling: Real = 0.0,
        scheduled_sampling_start: Real = 0.0,
        scheduled_sampling_end: Real = 0.0,
        truncate: int | None = None,
        hide_rate: Real = 0.0,
        hide: str = "frames",
        score_hidden: bool = False,
        compile: Compile = False,
    ) -> None:
        if objective is None:
            objective = default_objective(
                model, particles, kl, beta, kl_warmup, free_bits, truncate, score_hidden
            )
        particles = (1 if objective == "elbo" else 8) if particles is None else particles
        check(
            model,
            objective,
            kl=kl,
            particles=particles,
            beta=beta,
            kl_warmup=kl_warmup,
            kl_start=kl_start,
            free_bits=free_bits,
            alpha=alpha,
            resample_threshold=resample_threshold,
            scheduled_sampling=scheduled_sampling,
            truncate=truncate,
            hide_rate=hide_rate,
            hide=hide,
            score_hidden=score_hidden,
        )
        self.model = model
        self.objective, self.particles, self.alpha = objective, particles, alpha
        self.kl_kind = None if kl == "auto" else kl
        self.beta, self.kl_warmup, self.kl_start, self.free_bits = beta, kl_warmup, kl_start, free_bits
        self.resampling = Resampling(threshold=float(resample_threshold)) if objective == "fivo" else None
        self.scheduled_sampling = scheduled_sampling
        self.sampling_ramp = (scheduled_sampling_start, scheduled_sampling_end)
        self.truncate, self.hide_rate, self.hide = truncate, hide_rate, hide
        self.score_hidden, self.compile = score_hidden, compile
        if to_compile(compile)[0]:
            compiled()  # says now if there is no compiler

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

    def parts(
        self, batch: Sequences, epoch: Real = math.inf, seed: int = 0, share: Share | None = None
    ) -> Iterator[Part]:
        """The loss of a batch, whole or in chunks of `truncate` frames: the parts add up.

        Args:
            batch: on the device, and in the dtype, of the model.
            epoch: what the schedules go by; by default their end.
            seed: of everything random.
            share: which rows of a batch that several processes share these are. The mean over processes of
                the losses, and of their gradients, is then that of the whole batch; the sums are of these rows.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        weight, sampling = self.kl_weight_at(epoch), self.sampling_at(epoch)
        device, size, rows, counts = batch.x.device, len(batch), slice(None), 1
        frames: Real = batch.frames
        pool = None
        if share is not None:
            size, rows, counts = share.sequences, share.index or [0], int(bool(share.index))
            frames = share.frames / share.processes
            pool = lambda a: summed(counts * a)  # noqa: E731
        with seeded(seed, device):
            free, scored = None, batch
            if self.hide_rate:
                batch = batch.hide(self._hidden(batch, size, rows))
            if sampling:
                free = torch.rand(size, batch.steps, device=device)[rows] < sampling
            own = bool(self.model.autoregressive) and (free is not None or not batch.complete)
            noise = draw(
                self.model, batch.steps, self.particles, size, x=own, resample=self.objective == "fivo"
            )
        if self.objective == "exact":
            value = self.model.exact_log_likelihood(batch)
            nats = -counts * float(value.detach().sum())
            if not math.isfinite(nats):
                raise FloatingPointError("log p(x) is not finite: lower the learning rate, or standardize x.")
            sums = {"loss": nats, "nats": nats, "kl": 0.0, "reconstruction": nats}
            yield Part(-counts * value.sum() / frames, sums)
            return
        if share is not None:
            noise = noise.sequences(rows, batch.steps)
        state, weighted, plain = None, None, None
        step = self.truncate or batch.steps
        first = [] if share is None else share.index[:1]  # processes should not share a dropout mask
        for i, start in enumerate(range(0, batch.steps, step)):
            whole = step >= batch.steps
            chunk = slice(start, min(start + step, batch.steps))
            with seeded(seed_for(seed, i, *first), device):  # dropout
                trajectory = scan(
                    self.model,
                    batch if whole else chunk_of(batch, chunk),
                    particles=self.particles,
                    resample=self.resampling,
                    free=None if free is None else free[:, chunk],
                    noise=noise if whole else noise_of(noise, chunk),
                    state=state,
                    carry=not whole,
                    compile=self.compile,
                )
            if self.score_hidden and self.hide_rate:
                trajectory = score_all(trajectory, scored if whole else chunk_of(scored, chunk))
            kind = self._choose_kl(trajectory)
            value, weighted = self._gain(trajectory, weight, weighted, self.free_bits, pool)
            loss = -counts * value.sum() / frames
            with torch.no_grad():
                bound, plain = self._gain(trajectory, 1.0, plain)
                reconstruction, kl = reconstruction_and_kl(trajectory, kind)
                terms = [loss.detach() * frames, -bound.sum(), kl.sum(), -reconstruction.sum()]
                sums = [counts * number for number in torch.stack(terms).tolist()]
            if not math.isfinite(sums[0]):
                raise FloatingPointError(explain(trajectory, batch.names, start))
            state = None if whole else trajectory.state.detach()  # type: ignore[union-attr]
            yield Part(loss, dict(zip(("loss", "nats", "kl", "reconstruction"), sums, strict=True)))

    def _hidden(self, batch: Sequences, size: int, rows: Any) -> Tensor:
        """What is hidden at random: whole frames, or single values; drawn for `size` sequences, of which `rows` are here."""
        shape = batch.valid.shape if self.hide == "frames" else batch.x.shape
        hidden = torch.rand(size, *shape[1:], device=batch.x.device)[rows] < self.hide_rate
        return hidden.reshape(*hidden.shape, *[1] * (batch.x.ndim - len(shape)))

    def bound(
        self, trajectory: Trajectory, weight: Real = 1.0, free_bits: Real = 0.0, pool: Pool = None
    ) -> Tensor:
        """The objective (B,) with the KL weighted; at weight 1 a bound."""
        if self.objective == "elbo":
            kl = self._choose_kl(trajectory)
            return objectives.elbo(trajectory, kl, float(weight), float(free_bits), pool)
        if self.objective == "fivo":
            return objectives.fivo(trajectory)
        trajectory = tempered(trajectory, weight)
        if self.objective == "iwae":
            return objectives.iwae(trajectory)
        return objectives.renyi(trajectory, float(self.alpha))

    def _gain(
        self,
        trajectory: Trajectory,
        weight: Real,
        before: tuple[Tensor, Tensor] | None,
        free_bits: Real = 0.0,
        pool: Pool = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What a chunk adds to the bound, given the log-weights and the bound of the paths before it."""
        if self.objective in ("elbo", "fivo"):  # sums over time: scan has carried the rest
            return self.bound(trajectory, weight, free_bits, pool), None
        trajectory = tempered(trajectory, weight)
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

    # --- validation -------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: Batch, totals: Totals, seed: int = 0) -> None:
        """Add one batch to the totals of a validation: the bound at weight 1, with noise per sequence."""
        if not batch.rows:
            return
        sequences, resample = batch.sequences, self.objective == "fivo"
        if self.objective in ("exact", "em"):
            nats = -float(self.model.exact_log_likelihood(sequences).double().sum())
            totals.add(batch.frames, nats=nats, kl=0.0, reconstruction=nats)
            return
        eps = noise_by_sequence(self.model, sequences, self.particles, seed, batch.rows, resample=resample)
        trajectory = scan(
            self.model, sequences, particles=self.particles, resample=self.resampling, noise=eps
        )
        reconstruction, kl = reconstruction_and_kl(trajectory, self._choose_kl(trajectory))
        bound = objectives.iwae(trajectory) if self.objective == "renyi" else self.bound(trajectory)
        terms = torch.stack([-bound, kl, -reconstruction]).cpu().double().sum(1).tolist()
        totals.add(batch.frames, **dict(zip(("nats", "kl", "reconstruction"), terms, strict=True)))
        totals.add_latents(trajectory)


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from this seed; the caller's own go on as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
