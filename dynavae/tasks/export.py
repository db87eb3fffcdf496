"""One step of a stream as a program of its own, that runs without this package."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynavae import step, tree
from dynavae.model import Frame, SequentialLVM
from dynavae.proposals import amortized
from dynavae.resampling import Resampling
from dynavae.scan import State
from dynavae.tasks.capabilities import require
from dynavae.tasks.predicted import Predicted
from dynavae.tree import leaves


class StepInputs(NamedTuple):
    """What the exported step takes, in this order."""

    x: Tensor  # (B, x_dim); what is missing may hold anything
    observed: Tensor  # (B, x_dim) bool
    fresh: Tensor  # (B,) bool: the sequence of this row starts here, whatever the state holds
    control: Tensor | None  # (B, control_dim)
    noise: Tensor  # (K, B, noise_dim) standard normals, new ones for each frame; noise_dim is 0 for an exact model
    state: tuple[Tensor, ...]  # the last entry of what the step before returned


class StepProgram(nn.Module):
    """The step as a function of tensors: what :func:`export_step` traces.

    Returns:
        a dict with `mean`, `stddev` (B, z_dim), `log_prob`, `score` (B,), of particles also `samples`
        (K, B, z_noise_dim) and `log_weights` (K, B), and, if asked for, `predicted_mean`, `predicted_stddev`
        (B, x_dim); then the new state.
    """

    def __init__(self, model: SequentialLVM, particles: int, resampling: Resampling, predict: bool) -> None:
        super().__init__()
        self.model, self.particles, self.resampling, self.predict = model, particles, resampling, predict

    @property
    def noise_dim(self) -> int:
        """Standard normals that one particle takes per frame; an exact filter has no use for any."""
        return 0 if self.model.exact else step.noise_dim(self.model, self.particles, self.predict)

    def initial(self, batch: int) -> Any:
        """The state before the first frame, with a memory of drawn values only where something reads it."""
        if self.model.exact:
            return self.model.exact_start(batch)
        state = step.start(self.model, self.particles, batch)
        if not (self.model.autoregressive and self.model.past_x.out_dim):
            return state._replace(m=())
        return state._replace(m=step.per_particle(state.c, self.particles), drawn=True)

    def forward(
        self,
        x: Tensor,
        observed: Tensor,
        fresh: Tensor,
        control: Tensor | None,
        noise: Tensor,
        state: tuple[Tensor, ...],
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        initial = self.initial(1)  # broadcasts over rows, so that no size is fixed
        given = iter(state)
        before = tree.tree_map(lambda _: next(given), initial)
        frame = Frame(torch.where(observed, x, 0.0), observed, control)
        if self.model.exact:
            out, after = self._exact(tree.where(fresh, initial, before), frame, noise)
        else:
            out, after = self._particles(self._renewed(before, initial, fresh), frame, noise)
        out["score"] = -out["log_prob"] / observed.sum(-1)
        return out, tuple(a.contiguous() for a in leaves(after))

    def _exact(self, before: Any, frame: Frame, noise: Tensor) -> tuple[dict[str, Tensor], Any]:
        now = step.advance_exactly(self.model, before, frame)
        out = {"mean": now.mean, "stddev": now.stddev, "log_prob": now.log_prob}
        if self.predict:
            out |= _moments(Predicted(now.p_x, now.log_weights, noise))
        return out, now.belief

    def _renewed(self, before: State, initial: State, fresh: Tensor) -> State:
        """Leaves are (K, B, .) or (B, .): a row that starts anew takes its initial values."""
        rows = fresh.expand(self.particles, -1)
        return State(
            tree.where(rows, initial.h, before.h),
            tree.where(rows, initial.m, before.m),
            tree.where(fresh, initial.c, before.c),
            tree.where(fresh, initial.g, before.g),
            None,
            torch.where(rows, 0.0, before.log_w),
            before.drawn,
        )

    def _particles(self, before: State, frame: Frame, noise: Tensor) -> tuple[dict[str, Tensor], State]:
        model, log_k = self.model, math.log(self.particles)
        eps = step.split_noise(model, noise, self.predict)
        new = step.advance(model, before, frame, eps, amortized, self.resampling, self.predict, traced=True)
        log_weights = new.log_w - log_k
        w = log_weights.exp().unsqueeze(-1)
        z = model.latent_values(new.z)
        mean = (w * z).sum(0)
        out = {
            "mean": mean,
            "stddev": (w * (z - mean).square()).sum(0).sqrt(),
            "samples": new.z,
            "log_weights": log_weights,
            "log_prob": new.log_prob,
        }
        if self.predict:
            assert eps.x is not None
            out |= _moments(Predicted(new.p_x, before.log_w - log_k, eps.x.unsqueeze(0)))
        return out, new.state


def _moments(ahead: Predicted) -> dict[str, Tensor]:
    return {"predicted_mean": ahead.mean, "predicted_stddev": ahead.stddev}


def step_inputs(
    model: SequentialLVM, batch: int = 1, particles: int = 1, *, predict: bool = True
) -> StepInputs:
    """Inputs of the right shapes for a first frame: everything missing, every row fresh, noise and state 0.

    Example:
        >>> from dynavae.models import LGSSM, VRNN
        >>> inputs = step_inputs(VRNN(x_dim=2, z_dim=3, h_dim=4), batch=5)
        >>> inputs.noise.shape, [tuple(a.shape) for a in inputs.state]
        (torch.Size([1, 5, 5]), [(1, 5, 4), (1, 5, 4), (1, 5)])
        >>> inputs = step_inputs(LGSSM(x_dim=2, z_dim=3), batch=5)  # mean, covariance, whether anything came before
        >>> inputs.noise.shape, [tuple(a.shape) for a in inputs.state]
        (torch.Size([1, 5, 0]), [(5, 3), (5, 3, 3), (5, 1)])
    """
    program = StepProgram(model, particles, Resampling(), predict)
    x = model.zeros((batch,), model.x_dim)
    with torch.no_grad():
        state = tuple(torch.zeros_like(a) for a in leaves(program.initial(batch)))
    return StepInputs(
        x,
        torch.zeros_like(x, dtype=torch.bool),
        torch.ones(batch, dtype=torch.bool, device=x.device),
        model.zeros((batch,), model.control_dim) if model.control_dim else None,
        model.zeros((particles, batch), program.noise_dim),
        tuple(a.contiguous() for a in state),
    )


def export_step(
    model: SequentialLVM,
    particles: int = 1,
    *,
    batch: int | None = None,
    resampling: Resampling | None = None,
    predict: bool = True,
) -> torch.export.ExportedProgram:
    """One step of :class:`~dynavae.tasks.streaming.Stream` as a graph of tensor operations.

    The program holds the weights and needs only torch to run: save it with `torch.export.save`, load it with
    `torch.export.load`. It is called as ``outputs, state = program.module()(*inputs)``, with the inputs of
    :class:`StepInputs` and the outputs of :class:`StepProgram`. It holds no randomness: pass standard normal noise.
    Under the same noise it gives the numbers of the eager stream. A model with an exact filter (LGSSM, HMM, GMM, PPCA,
    FactorAnalysis) is exported with it: there are no particles, the noise has width 0, and the state is the belief.

    Limits: the number of particles, the type and the device are fixed; `propose=bootstrap` is not exported; inputs are
    not checked; a path that the eager step skips (a frame without gaps, particles that need no resampling) is computed
    every time.

    Args:
        model: one that can stream.
        particles: K; for an exact model only the length of an axis of the empty noise.
        batch: B; None leaves it open.
        resampling: scheme and threshold; default systematic at an effective size of K/2.
        predict: also give mean and standard deviation of p(x_t | x_<t).

    Raises:
        ValueError: for a model that cannot stream; the sentence names an alternative.

    Example:
        >>> from dynavae.models import VRNN
        >>> model = VRNN(x_dim=2, z_dim=3, h_dim=4)
        >>> program = export_step(model).module()
        >>> inputs = step_inputs(model, batch=5)
        >>> outputs, state = program(*inputs)
        >>> outputs["mean"].shape
        torch.Size([5, 3])
    """
    require(model, "stream")
    if particles < 1:
        raise ValueError(f"particles should be at least 1; got {particles}.")
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    program = StepProgram(frozen, particles, resampling or Resampling(), predict).eval()
    inputs = step_inputs(frozen, 3 if batch is None else batch, particles, predict=predict)
    shapes = (
        None if batch is not None else _dynamic(inputs, step_inputs(frozen, 4, particles, predict=predict))
    )
    with torch.no_grad():
        return torch.export.export(program, tuple(inputs), dynamic_shapes=shapes, strict=False)


def _dynamic(inputs: StepInputs, more: StepInputs) -> tuple[Any, ...]:
    """The axis of each input that is the batch: where the inputs of a larger batch differ."""

    def axis(a: Tensor, b: Tensor) -> dict[int, Any]:
        (changed,) = [i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if m != n]
        return {changed: torch.export.Dim.DYNAMIC}

    return tuple(tree.tree_map(axis, tuple(inputs), tuple(more)))
