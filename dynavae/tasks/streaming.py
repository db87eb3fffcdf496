"""Frames that arrive one at a time: filter, predict, score and forecast, for many sequences in parallel."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dynavae import step, tree
from dynavae.batch import Sequences
from dynavae.model import Frame, Past, Present, SequentialLVM
from dynavae.noise import Noise, draw
from dynavae.proposals import Amortized, Proposal, amortized, bootstrap
from dynavae.resampling import Resampling, choose
from dynavae.scan import State, scan
from dynavae.tasks.capabilities import needs_the_whole, require
from dynavae.tasks.common import evaluating, positive
from dynavae.tasks.predicted import Predicted
from dynavae.tasks.prediction import Forecast, center
from dynavae.tasks.stream_state import Stateful


class Step(NamedTuple):
    """What is known once x_t has been seen, and what had been expected of it."""

    mean: Float[Tensor, "B z_dim"]  # of z_t given x_<=t; probabilities, if z_t is a class
    stddev: Float[Tensor, "B z_dim"]  # over particles: 0 for a single one
    samples: Float[Tensor, "K B z_noise_dim"] | None  # None for an exact filter
    log_weights: Float[Tensor, "K B"] | None  # of the samples, normalised; before resampling
    predicted: Predicted | None  # p(x_t | x_<t); None with predict=False
    log_prob: Float[Tensor, " B"]  # log p(x_t | x_<t) of the observed values, nats; 0 where there are none
    score: Float[Tensor, " B"]  # - log_prob / number of observed values; NaN where there are none


class Stream(Stateful):
    r"""Takes frames in one at a time for B parallel sequences, with K particles for each.

    Every step gives the filtered belief :math:`p(z_t \mid x_{1:t})`, the prediction :math:`p(x_t \mid x_{<t})` made
    before x_t was seen, and how probable x_t then was. The numbers are those of a particle filter over the whole
    sequence, :func:`~dynavae.tasks.filter` (of the exact filter for a model that has one): only the noise differs,
    which is drawn here for all sequences together.

    The estimate :math:`\log p(x_t \mid x_{<t}) \approx \log \sum_k W_{t-1}^k\, p(z_t^k \mid \cdot)\,
    p(x_t \mid \cdot) / q(z_t^k \mid \cdot)` is unbiased before the logarithm; the sum over time is FIVO. The
    *anomaly score* is minus this, per observed value: nats per coordinate, so that frames with gaps compare with
    complete ones. Densities depend on the units of x: choose the threshold from scores of normal data.

    Args:
        model: causal, or exact, and without a latent of the whole sequence; any other needs `propose=bootstrap`.
        batch: B sequences in parallel.
        particles: K; for an exact model, the number of samples behind the quantiles.
        propose: where z_t comes from; `dynavae.bootstrap` ignores the inference network.
        resampling: scheme and threshold; default systematic at an effective size of K/2.
        predict: also compute `Step.predicted`, which takes a second pass through the decoder.
        gradients: record a graph; call :meth:`detach` after each backward pass.
        seed: of the noise.

    Raises:
        ValueError: for a model that has to see the whole sequence; the sentence names an alternative.

    Example:
        >>> from dynavae.models import VRNN
        >>> stream = VRNN(x_dim=2, z_dim=3, h_dim=4).stream(batch=1, particles=8)
        >>> for x_t in ([[0.1, 0.2]], None, [[0.3, float("nan")]]):
        ...     now = stream.step(x_t)
        >>> now.mean.shape, now.predicted.quantile(0.9).shape, now.score.shape
        (torch.Size([1, 3]), torch.Size([1, 2]), torch.Size([1]))
        >>> stream.forecast(horizon=5).mean.shape
        torch.Size([1, 5, 2])
    """

    def __init__(
        self,
        model: SequentialLVM,
        batch: int = 1,
        particles: int = 32,
        *,
        propose: Proposal = amortized,
        resampling: Resampling | None = None,
        predict: bool = True,
        gradients: bool = False,
        seed: int = 0,
    ) -> None:
        positive(batch=batch, particles=particles)
        if isinstance(propose, Amortized):
            require(model, "stream")
        elif (sentence := needs_the_whole(model)) is not None:
            raise ValueError(sentence)
        like = next(model.parameters())
        self.model, self.batch, self.particles = model, batch, particles
        self.propose, self.resampling = propose, resampling or Resampling()
        self.predict, self.gradients = predict, gradients
        self.exact = bool(model.exact) and isinstance(propose, Amortized)
        self.dtype, self.device = like.dtype, like.device
        self._generator = torch.Generator(like.device).manual_seed(seed)
        self._noise_dim = step.noise_dim(model, particles, predict)
        self._frames = torch.zeros(batch, dtype=torch.long, device=like.device)
        self._state = self._start()

    def step(self, x_t: Any, control: Any = None, noise: Noise | None = None) -> Step:
        """Take in one frame of every sequence.

        Args:
            x_t: (B, x_dim), NaN where a coordinate is missing; None if the whole frame is.
            control: known input of this frame (B, control_dim), for a model that has them; never missing.
            noise: of this frame, `z` (K, B, z_noise), `x` (K, B, x_noise) and `resample` (K, B); by default drawn.

        Raises:
            ValueError: for another shape, an infinite value, or a control that is missing or not expected.
        """
        frame = self._frame(x_t, control)
        with torch.set_grad_enabled(self.gradients):
            if self.model.training:
                with evaluating(self.model), torch.set_grad_enabled(self.gradients):
                    return self._step(frame, noise)
            return self._step(frame, noise)

    def _step(self, frame: Frame, noise: Noise | None) -> Step:
        self._frames = self._frames + 1
        if self.exact:
            return self._exact_step(frame)
        state = self._state
        noise = self._noise() if noise is None else noise
        new = step.advance(self.model, state, frame, noise, self.propose, self.resampling, self.predict)
        self._state = new.state
        z = self.model.latent_values(new.z)
        if self.particles == 1:
            mean, stddev, log_weights, before = z[0], torch.zeros_like(z[0]), new.log_w, state.log_w
        else:
            log_k = math.log(self.particles)
            log_weights, before = new.log_w - log_k, state.log_w - log_k
            w = log_weights.exp().unsqueeze(-1)
            mean = (w * z).sum(0)
            stddev = (w * (z - mean).square()).sum(0).sqrt()
        predicted = None
        if self.predict:
            assert noise.x is not None
            predicted = Predicted(new.p_x, before, noise.x.unsqueeze(0))
        return Step(
            mean, stddev, new.z, log_weights, predicted, new.log_prob, self._score(new.log_prob, frame)
        )

    def _exact_step(self, frame: Frame) -> Step:
        now = step.advance_exactly(self.model, self._state, frame)
        self._state = now.belief
        predicted = None
        if self.predict:
            shape = (self.particles, *now.log_weights.shape, self.model.x_noise_dim)
            predicted = Predicted(now.p_x, now.log_weights, self._normal(*shape))
        score = self._score(now.log_prob, frame)
        return Step(now.mean, now.stddev, None, None, predicted, now.log_prob, score)

    def _score(self, log_prob: Tensor, frame: Frame) -> Tensor:
        seen = self.model.x_dim if frame.observed is None else frame.observed.sum(-1)
        return -log_prob / seen  # 0 / 0 is NaN: nothing to judge

    # --- what comes next ------------------------------------------------------------------------------

    @torch.no_grad()
    def forecast(self, horizon: int, samples: int = 100, *, control: Any = None, seed: int = 0) -> Forecast:
        r"""Sampled futures :math:`x_{t+1:t+H} \sim p(\cdot \mid x_{1:t})` from where the stream is, which it leaves there.

        Args:
            horizon: H frames.
            samples: S futures of each sequence, each from a particle drawn by its weight.
            control: known inputs of these frames (B, H, control_dim), for a model that has them.
            seed: of the forecast's own noise.
        """
        positive(horizon=horizon, samples=samples)
        model, B = self.model, self.batch
        control = self._control(control, (B, horizon, model.control_dim))
        generator = torch.Generator(self.device).manual_seed(seed)
        empty = torch.zeros(B, horizon, model.x_dim, dtype=self.dtype, device=self.device)
        lengths = torch.full((B,), horizon, device=self.device)
        future = Sequences(empty, torch.zeros_like(empty, dtype=torch.bool), lengths, control)
        noise = draw(model, horizon, samples, B, x=True, generator=generator)
        with evaluating(model):
            state = self._paths(samples, generator)
            run = scan(
                model, future, particles=samples, propose=bootstrap, draw_x=True, noise=noise, state=state
            )
        assert run.x is not None
        mean = run.p_x.mean.expand(*run.z.shape[:3], -1)
        x, mean = (a.permute(1, 2, 0, 3) for a in (run.x, mean))
        return Forecast(x, center(model, mean), self._frames)

    def _paths(self, number: int, generator: torch.Generator) -> State:
        """As many equally weighted particles as asked for."""
        if not self.exact:
            state = self._complete()
            uniform = torch.rand(self.batch, generator=generator, dtype=self.dtype, device=self.device)
            index = choose(state.log_w, number, uniform)
            h, m = tree.select(state.h, index), tree.select(state.m, index)
            return state._replace(h=h, m=m, log_w=self.model.zeros((number,), self.batch))
        lead = number, self.batch
        shape = (*lead, self.model.z_noise_dim)
        noise = torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
        z = self.model.exact_draw(self._state, noise)
        first = self.model.initial(lead)
        known = self.model.absorb(Past(None, first, None, None), z)
        moved = self.model.update(Present(None, known, None, None), None)
        h = tree.where((self._frames > 0).expand(lead), moved, first)
        return State(h, (), (), (), None, self.model.zeros((number,), self.batch))

    # --- what comes in --------------------------------------------------------------------------------

    def _frame(self, x_t: Any, control: Any) -> Frame:
        shape = (self.batch, self.model.x_dim)
        control = self._control(control, (self.batch, self.model.control_dim))
        if x_t is None:
            x = torch.zeros(shape, dtype=self.dtype, device=self.device)
            return Frame(x, torch.zeros(shape, dtype=torch.bool, device=self.device), control)
        if isinstance(x_t, np.ma.MaskedArray):
            x_t = np.ma.filled(x_t.astype(float), np.nan)
        x = torch.as_tensor(x_t, dtype=self.dtype, device=self.device)
        if x.shape != shape:
            raise ValueError(
                f"x_t should have shape (batch, x_dim) = {shape}, one frame of each sequence; got {tuple(x.shape)}."
            )
        seen = x.isfinite()
        if bool(seen.all()):
            self.model.emission.check(x, "x_t")
            return Frame(x, None, control)
        if bool(x.isinf().any()):
            raise ValueError("x_t has an infinite value; pass NaN for what is missing.")
        x = torch.where(seen, x, 0.0)
        self.model.emission.check(x, "x_t", seen)
        return Frame(x, seen, control)

    def _control(self, control: Any, shape: tuple[int, ...]) -> Tensor | None:
        if not self.model.control_dim:
            if control is not None:
                raise ValueError(f"{type(self.model).__name__} was built without controls; got one.")
            return None
        if control is None:
            raise ValueError(
                f"{type(self.model).__name__} needs its control, of shape {shape}, also at a gap."
            )
        control = torch.as_tensor(control, dtype=self.dtype, device=self.device)
        if control.shape != shape or not bool(control.isfinite().all()):
            raise ValueError(f"control should be finite, of shape {shape}; got shape {tuple(control.shape)}.")
        return control

    # --- randomness -----------------------------------------------------------------------------------

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=self.dtype, device=self.device)

    def _noise(self) -> Noise:
        block = self._normal(self.particles, self.batch, self._noise_dim)
        return step.split_noise(self.model, block, self.predict)

    def __repr__(self) -> str:
        return f"Stream({type(self.model).__name__}, batch={self.batch}, particles={self.particles})"
