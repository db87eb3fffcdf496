"""The law of streams: frames taken one at a time give the numbers of the whole sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dynavae.batch import Sequences
from dynavae.model import SequentialLVM
from dynavae.noise import Noise
from dynavae.proposals import Proposal, bootstrap, filtering
from dynavae.resampling import Resampling
from dynavae.scan import scan
from dynavae.tasks.capabilities import needs_the_whole, refusal
from dynavae.tasks.latents import moments
from dynavae.tasks.streaming import Step, Stream
from dynavae.testing.cases import compare, noise_for, require, sequences


@torch.no_grad()
def law_stream(build: Callable[[], SequentialLVM]) -> None:
    """A stream gives the numbers of the particle filter that sees the whole sequence, under the same noise.

    Complete and with gaps, for one particle and several, each resampling threshold, both proposals; a sequence
    that starts in a row that had another before gives what it gives alone. An exact model's stream is its
    exact filter. A model that cannot stream refuses, and names an alternative.
    """
    law, model = "a stream equals the whole", build()
    whole = needs_the_whole(model)
    sentence = refusal(model, "stream")
    if sentence is not None:
        try:
            model.stream()
        except ValueError as error:
            require(str(error) == sentence and "smooth(" in sentence, law, model, f"it refuses with: {error}")
        else:
            require(False, law, model, "a model that cannot stream should refuse.")
    if model.causal_variant and not model.causal:
        options = {**model.config, **model.causal_variant}
        require(type(model)(**options).causal, law, model, f"{model.causal_variant} should be causal.")
    for missing in (False, True):
        batch = sequences(model, missing=missing)
        if model.exact:
            _compare_exact(law, model, batch)
        for propose in (filtering, bootstrap):
            if (whole if propose is bootstrap else sentence) is not None or (
                model.exact and propose is filtering
            ):
                continue
            for particles, threshold in ((1, 0.5), (4, 0.0), (4, 0.5), (4, 1.0)):
                _compare(law, model, batch, propose, particles, Resampling(threshold=threshold))


def frame_noise(noise: Noise, t: int) -> Noise:
    """The noise of one frame."""
    assert noise.x is not None and noise.resample is not None
    return Noise(noise.z[t], noise.x[t], None, noise.resample[t])


def run(stream: Stream, batch: Sequences, noise: Noise | None = None) -> list[Step]:
    """Every frame of a batch through a stream; padding as gaps."""
    x = torch.where(batch.observed, batch.x, torch.nan).flatten(2)
    steps = []
    for t in range(batch.steps):
        control = None if batch.control is None else batch.control[:, t]
        steps.append(stream.step(x[:, t], control, None if noise is None else frame_noise(noise, t)))
    return steps


def _compare(
    law: str,
    model: SequentialLVM,
    batch: Sequences,
    propose: Proposal,
    particles: int,
    resampling: Resampling,
) -> None:
    noise = noise_for(model, batch, particles)
    where = f"K={particles}, threshold {resampling.threshold}, {type(propose).__name__}"
    all_at_once = scan(
        model, batch, particles=particles, propose=propose, resample=resampling, noise=noise, carry=True
    )
    stream = model.stream(len(batch), particles, propose=propose, resampling=resampling)
    steps = run(stream, batch, noise)
    valid = all_at_once.valid
    assert all_at_once.log_weight is not None and all_at_once.log_evidence is not None
    log_w = all_at_once.log_weight.log_softmax(1)
    mean, stddev = moments(model.latent_values(all_at_once.z), log_w.exp())
    mask = valid[:, None, :, None]
    for name, got, expected, keep in (
        ("z", torch.stack([s.samples for s in steps]), all_at_once.z, mask),
        ("log-weights", torch.stack([s.log_weights for s in steps]), log_w, mask[..., 0]),
        ("mean", torch.stack([s.mean for s in steps]), mean.transpose(0, 1), mask[:, 0]),
        ("stddev", torch.stack([s.stddev for s in steps]), stddev.transpose(0, 1), mask[:, 0]),
    ):
        # A square root of a rounding error is large: deviations are compared as variances.
        a, b = (v.square() if name == "stddev" else v for v in (got, expected))
        compare(law, model, f"{name} ({where})", torch.where(keep, a, 0.0), torch.where(keep, b, 0.0))
    log_prob = torch.where(valid, torch.stack([s.log_prob for s in steps]), 0.0).sum(0)
    compare(law, model, f"log p(x) ({where})", log_prob, all_at_once.log_evidence)
    _compare_restart(law, model, batch, stream, noise, steps, where)


def _compare_restart(
    law: str,
    model: SequentialLVM,
    batch: Sequences,
    stream: Stream,
    noise: Noise,
    steps: list[Step],
    where: str,
) -> None:
    """After a reset each row gives what it gave at first, whatever it saw since; the other rows go on."""
    if stream.exact:
        stream.reset()
    else:
        stream.reset([0])
        stream.reset(torch.arange(len(batch)) > 0)
    again = run(stream, batch, noise)
    for name in ("mean", "log_prob"):
        a, b = (torch.stack([getattr(s, name) for s in which]) for which in (again, steps))
        compare(law, model, f"{name} after a reset ({where})", a, b)


def _compare_exact(law: str, model: SequentialLVM, batch: Sequences) -> None:
    stream = model.stream(len(batch))
    steps = run(stream, batch)
    mean, stddev = model.exact_filter(batch)
    valid = batch.valid.T
    for name, expected in (("mean", mean), ("stddev", stddev)):
        got = torch.stack([getattr(s, name) for s in steps])
        pair = (torch.where(valid.unsqueeze(-1), v, 0.0) for v in (got, expected.transpose(0, 1)))
        compare(law, model, f"exact {name}", *pair)
    log_prob = torch.stack([s.log_prob for s in steps])
    compare(law, model, "exact log p(x)", log_prob.sum(0), model.exact_log_likelihood(batch))
    x = batch.x.flatten(2).transpose(0, 1)
    observed = batch.observed.flatten(2).transpose(0, 1)
    for t, step in enumerate(steps):
        assert step.predicted is not None
        predicted = step.predicted.log_prob(x[t], observed[t])
        compare(law, model, f"predictive density at t={t}", predicted, log_prob[t])
