"""Reconstruct, generate, forecast, impute: what x is, given what was seen of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynavae.batch import Sequences
from dynavae.distributions import completed_frames
from dynavae.model import SequentialLVM
from dynavae.resampling import Resampling
from dynavae.scan import scan
from dynavae.tasks.common import along, batch_first, batches, evaluating, noise, positive, scatter, source
from dynavae.tasks.latents import paths


class Reconstruction(NamedTuple):
    """x decoded from z ~ q(z | x). NaN after a sequence's end."""

    mean: Float[Tensor, "B T x_dim"]  # mean of p(x_t | .), averaged over paths
    samples: Float[Tensor, "S B T x_dim"]  # that mean on each path
    lengths: Tensor


class Generated(NamedTuple):
    """New sequences."""

    x: Float[Tensor, "B T x_dim"]
    mean: Float[Tensor, "B T x_dim"]  # mean of p(x_t | .) along the path
    z: Float[Tensor, "B T z_dim"]


class Forecast(NamedTuple):
    """Sampled futures of each sequence, from its own last context frame on."""

    samples: Float[Tensor, "S B H x_dim"]
    mean: Float[Tensor, "B H x_dim"]
    context: Tensor  # (B,) frames that were seen
    stddev: Float[Tensor, "B H x_dim"] | None = (
        None  # of a model whose forecast is known to be Gaussian (LGSSM)
    )

    def quantile(self, q: float) -> Float[Tensor, "B H x_dim"]:
        """The q-quantile of each value: exact where `stddev` is known, else of the sampled futures.

        `quantile(0.05)` and `quantile(0.95)` are the ends of a 90 % interval.
        """
        if self.stddev is None:
            return self.samples.quantile(q, dim=0)
        if not 0 < q < 1:
            raise ValueError(f"a quantile of a Gaussian is a share between 0 and 1; got {q}.")
        return self.mean + self.stddev * torch.special.ndtri(self.mean.new_tensor(q))


class Imputation(NamedTuple):
    """Sequences with their gaps filled. NaN after a sequence's end."""

    x: Float[Tensor, "B T x_dim"]  # observed values, and the mean where missing
    samples: Float[Tensor, "S B T x_dim"]
    observed: Bool[Tensor, "B T x_dim"]
    lengths: Tensor

    def quantile(self, q: float) -> Float[Tensor, "B T x_dim"]:
        """The q-quantile of the samples (the observed value where there is one)."""
        return self.samples.quantile(q, dim=0)


def reconstruct(
    model: SequentialLVM,
    data: Any,
    feedback: str = "data",
    samples: int = 1,
    *,
    split: str | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Reconstruction:
    """Encode and decode: the mean of p(x_t | .) along paths of q(z | x).

    Args:
        model: any model.
        data: as in :func:`~dynavae.tasks.score`.
        feedback: what an autoregressive model reads as its past: "data" (teacher forcing), or its own output,
            "mean" or "sample" (free running). A model that reads no past x gives the same in every case.
        samples: S paths of each sequence.
        batch_size, seed: as in :func:`~dynavae.tasks.score`.

    Example:
        >>> from dynavae.models import VRNN
        >>> reconstruct(VRNN(x_dim=2, z_dim=3, h_dim=4), torch.zeros(1, 5, 2), feedback="mean").mean.shape
        torch.Size([1, 5, 2])
    """
    if feedback not in ("data", "mean", "sample"):
        raise ValueError(f"feedback should be 'data', 'mean' or 'sample'; got {feedback!r}.")
    positive(samples=samples)
    src = source(data, split, batch_size, samples * model.x_dim)
    parts, lengths = [], torch.zeros(src.size, dtype=torch.long)
    with evaluating(model):
        for rows, batch in batches(model, src):
            running = bool(model.autoregressive) and feedback != "data"
            run = scan(
                model,
                batch,
                particles=samples,
                free=torch.ones_like(batch.valid) if running else None,
                feedback=feedback if running else "sample",
                noise=noise(model, batch, samples, seed, rows, x=running),
            )
            mean = run.p_x.mean.expand(*run.z.shape[:3], -1)
            parts.append((rows, batch_first(mean).masked_fill(~batch.valid.unsqueeze(-1), torch.nan)))
            lengths[rows] = batch.lengths.cpu()
    out = scatter(parts, src.size, src.steps, 1)
    return Reconstruction(center(model, out), out, lengths)


def generate(
    model: SequentialLVM,
    batch: int = 1,
    length: int = 100,
    *,
    control: Tensor | None = None,
    seed: int = 0,
) -> Generated:
    """Ancestral samples: z_t from the prior, x_t from its likelihood, fed back where the model reads it.

    Args:
        model: any model.
        batch: number of sequences.
        length: frames of each.
        control: known inputs (batch, length, control_dim), for a model that has them.
        seed: of the noise.

    Example:
        >>> from dynavae.models import SRNN
        >>> generate(SRNN(x_dim=2, z_dim=3, h_dim=4), batch=2, length=7).z.shape
        torch.Size([2, 7, 3])
    """
    positive(batch=batch, length=length)
    like = next(model.parameters())
    x = like.new_zeros(batch, length, model.x_dim)
    if control is not None:
        control = torch.as_tensor(control, dtype=like.dtype, device=like.device)
        if control.shape[:2] != (batch, length):
            raise ValueError(
                f"control should have shape (batch, length, control_dim) = ({batch}, {length}, "
                f"{model.control_dim}); got {tuple(control.shape)}."
            )
        _check_known(control)
    lengths = torch.full((batch,), length, device=like.device)
    empty = Sequences(
        x, torch.zeros_like(x, dtype=torch.bool), lengths, control, tuple(map(str, range(batch)))
    )
    with evaluating(model):
        run = scan(model, empty, draw_x=True, noise=noise(model, empty, 1, seed, list(range(batch)), x=True))
    assert run.x is not None
    mean = run.p_x.mean.expand(*run.z.shape[:3], -1)
    return Generated(batch_first(run.x)[0], batch_first(mean)[0], batch_first(run.z)[0])


def forecast(
    model: SequentialLVM,
    data: Any,
    horizon: int,
    context: int | None = None,
    samples: int = 100,
    *,
    split: str | None = None,
    control: Tensor | None = None,
    reweight: bool = False,
    resampling: Resampling | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Forecast:
    r"""Sampled futures: :math:`x_{C+1:C+H} \sim p(\cdot \mid x_{1:C})`.

    Args:
        model: any model.
        data: as in :func:`~dynavae.tasks.score`; frames after the context are not read.
        horizon: H frames to forecast.
        context: C frames to condition on; default all of each sequence.
        samples: S futures of each sequence.
        control: known inputs of the whole span (B, T + H, control_dim), counted from each sequence's first
            frame, for a model that has them. Default with a context: the data's own controls, if long enough.
        reweight: weigh the paths through the context by p(x, z) / q(z | x) instead of trusting q.
        resampling, batch_size, seed: as in :func:`~dynavae.tasks.smooth`.

    Example:
        >>> from dynavae.models import VRNN
        >>> f = forecast(VRNN(x_dim=2, z_dim=3, h_dim=4), torch.zeros(1, 9, 2), horizon=4, context=5, samples=8)
        >>> f.samples.shape, f.quantile(0.9).shape
        (torch.Size([8, 1, 4, 2]), torch.Size([1, 4, 2]))
    """
    positive(horizon=horizon, samples=samples)
    if context is not None and context < 1:
        raise ValueError(
            f"context should be at least 1 frame; got {context}. Without context, use generate(...)."
        )
    src = source(data, split, batch_size, samples * model.x_dim)
    xs, means, seen = [], [], torch.zeros(src.size, dtype=torch.long)
    exact = None if reweight else getattr(model, "exact_observations", None)
    spreads: list[tuple[list[int], Tensor]] = []
    with evaluating(model):
        for rows, batch in batches(model, src):
            extended, start = _extend(
                model, batch, horizon, context, None if control is None else control[rows]
            )
            run, lines = paths(model, extended, samples, seed, rows, reweight, resampling, draw_x=True)
            assert run.x is not None
            # time -> each sequence's own horizon
            t = start.to(run.x.device) + torch.arange(horizon, device=run.x.device).unsqueeze(-1)  # (H, B)
            index = t[:, None, :, None].expand(-1, samples, -1, model.x_dim)
            mean = run.p_x.mean.expand(*run.z.shape[:3], -1)
            x, mean = (torch.gather(along(v, lines), 0, index) for v in (run.x, mean))
            xs.append((rows, batch_first(x)))
            means.append((rows, batch_first(mean)))
            seen[rows] = start.cpu()
            if exact is not None:
                index = t.T.unsqueeze(-1).expand(-1, -1, model.x_dim)
                moments = [torch.gather(a, 1, index) for a in exact(extended)]
                means[-1] = (rows, moments[0].unsqueeze(0))
                spreads.append((rows, moments[1].unsqueeze(0)))
    x, mean = (scatter(parts, src.size, horizon, 1) for parts in (xs, means))
    if exact is None:
        return Forecast(x, center(model, mean), seen)
    return Forecast(x, mean[0], seen, scatter(spreads, src.size, horizon, 1)[0])


def _extend(
    model: SequentialLVM, batch: Sequences, horizon: int, context: int | None, control: Tensor | None
) -> tuple[Sequences, Tensor]:
    """The context, followed by `horizon` missing frames, for each sequence at its own end."""
    start = batch.lengths if context is None else batch.lengths.clamp(max=context)
    if context is not None and bool((batch.lengths < context).any()):
        short = int(batch.lengths.min())
        raise ValueError(
            f"context is {context} frames, but a sequence has only {short}; lower it or leave it out."
        )
    steps = int(start.max()) + horizon
    grow = max(steps - batch.steps, 0)
    x, observed = (
        torch.nn.functional.pad(a.flatten(2), (0, 0, 0, grow))[:, :steps] for a in (batch.x, batch.observed)
    )
    observed = observed & (torch.arange(steps, device=x.device) < start[:, None]).unsqueeze(-1)
    silent = (~observed.flatten(1).any(1)).nonzero().flatten().tolist()
    if silent:
        which = repr(batch.names[silent[0]]) if batch.names else silent[0]
        raise ValueError(
            f"sequence {which} has no observed value within the context; lengthen it, leave the sequence out, or use "
            "generate(...)."
        )
    if model.control_dim:
        known = control if control is not None else batch.control
        if known is None or known.shape[1] < steps:
            have = 0 if known is None else known.shape[1]
            raise ValueError(
                f"{type(model).__name__} needs controls for the future: pass control= of shape "
                f"(B, at least {steps}, {model.control_dim}); have {have} frames."
            )
        control = torch.as_tensor(known, dtype=x.dtype, device=x.device)[:, :steps]
        _check_known(control)
    elif control is not None:
        raise ValueError(
            f"{type(model).__name__} was built without controls; got control= of {control.shape[-1]}."
        )
    x = torch.where(observed, x, 0.0)
    return Sequences(x, observed, start + horizon, control if model.control_dim else None, batch.names), start


def _check_known(control: Tensor) -> None:
    """Whether inputs are known at every frame."""
    if not bool(control.isfinite().all()):
        raise ValueError("control holds NaN or inf; controls are known inputs: fill them.")


def impute(
    model: SequentialLVM,
    data: Any,
    samples: int = 100,
    *,
    split: str | None = None,
    reweight: bool | None = None,
    resampling: Resampling | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> Imputation:
    r"""Fill what is missing: :math:`x_{\mathrm{missing}} \sim p(\cdot \mid x_{\mathrm{observed}})`.

    Args:
        model: any model.
        data: as in :func:`~dynavae.tasks.score`; NaN is missing.
        samples: S completions of each sequence.
        reweight: weigh completions by how well they lead to what was seen afterwards. Default: True for a causal
            q, which has not seen the future. Of a model that `bridges` gaps, whole paths are weighed, given the mean of q
            at every frame that was seen.
        resampling, batch_size, seed: as in :func:`~dynavae.tasks.smooth`.

    Example:
        >>> from dynavae.models import DKF
        >>> x = torch.zeros(1, 5, 2)
        >>> x[0, 2] = float("nan")
        >>> impute(DKF(x_dim=2, z_dim=3, h_dim=4), x, samples=8).x.isnan().any()
        tensor(False)
    """
    positive(samples=samples)
    if reweight is None:
        reweight = model.causal and not model.exact
    src = source(data, split, batch_size, samples * model.x_dim)
    xs, means, masks, lengths = [], [], [], torch.zeros(src.size, dtype=torch.long)
    with evaluating(model):
        for rows, batch in batches(model, src):
            run, lines = paths(
                model, batch, samples, seed, rows, reweight, resampling, draw_x=True, across=model.bridges
            )
            assert run.x is not None
            hidden, seen = ~batch.valid.unsqueeze(-1), batch.observed.flatten(2)
            given, observed = (a.transpose(0, 1).unsqueeze(1) for a in (batch.x.flatten(2), seen))
            mean = completed_frames(run.p_x, given, observed).expand_as(run.x)
            x, mean = (batch_first(along(v, lines)) for v in (run.x, mean))
            xs.append((rows, x.masked_fill(hidden, torch.nan)))
            means.append((rows, mean.masked_fill(hidden, torch.nan)))
            masks.append((rows, seen.to(x.dtype)))
            lengths[rows] = batch.lengths.cpu()
    n, steps = src.size, src.steps
    x, mean = scatter(xs, n, steps, 1), scatter(means, n, steps, 1)
    observed = scatter(masks, n, steps, 0).nan_to_num(0).bool()
    return Imputation(center(model, mean), x, observed, lengths)


def center(model: SequentialLVM, means: Tensor) -> Tensor:
    """Average over paths; for classes, the most frequent one (the mean of class numbers means nothing)."""
    return means.mode(0).values if model.emission.categorical else means.mean(0)
