"""Laws of probability: bounds in their order, divergences that are expectations, samples that fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dynavae import objectives
from dynavae.batch import Sequences
from dynavae.distributions import (
    NADE,
    Bernoulli,
    Categorical,
    GaussianMixture,
    MultivariateNormal,
    Product,
    completed,
    completed_frames,
)
from dynavae.model import SequentialLVM
from dynavae.resampling import Resampling
from dynavae.scan import Trajectory, scan
from dynavae.testing.cases import compare, noise_for, require, sequences, within

REPLICAS = 256


def copies(model: SequentialLVM, steps: int, missing: bool, number: int = REPLICAS) -> Sequences:
    """One sequence many times: independent runs side by side in a batch."""
    return sequences(model, (steps, steps, steps), missing)[[2] * number]


@torch.no_grad()
def law_bounds(build: Callable[[], SequentialLVM]) -> None:
    r"""Identities hold exactly, and expectations are in order.

    Rényi at alpha = 0 is IWAE, at 1 the mean of log w, which is the ELBO with the sampled KL; it falls in
    alpha; one particle makes them equal; a filter that never resamples is IWAE. E[ELBO] <= E[IWAE_8].
    """
    law, model = "bounds", build()
    for missing in (False, True):
        batch = copies(model, 4, missing)
        noise = noise_for(model, batch, 8)
        paths = scan(model, batch, particles=8, noise=noise)
        iwae, sampled = objectives.iwae(paths), objectives.elbo(paths, kl="sample")
        log_w = objectives.log_weights(paths)
        for name, a, b in (
            ("renyi(alpha=0) and iwae", objectives.renyi(paths, 0.0), iwae),
            ("renyi(alpha=1) and the mean of log w", objectives.renyi(paths, 1.0), log_w.mean(0)),
            ("renyi(alpha=1) and the sampled elbo", objectives.renyi(paths, 1.0), sampled),
            ("renyi near alpha=1 and its limit", objectives.renyi(paths, 1 - 1e-9), sampled),
            ("renyi(alpha=-inf) and the best path", objectives.renyi(paths, -torch.inf), log_w.amax(0)),
        ):
            compare(law, model, name, a, b, 1e-5 if "near" in name else 1e-10)
        ordered = torch.stack([objectives.renyi(paths, a) for a in (-torch.inf, -2.0, 0.0, 0.3, 0.9, 1.0)])
        require(bool((ordered.diff(dim=0) <= 1e-9).all()), law, model, "renyi should not rise in alpha.")
        if model.per_step_likelihood:  # a filter weighs frame by frame
            never = scan(model, batch, particles=8, noise=noise, resample=Resampling(threshold=0.0))
            compare(law, model, "fivo without resampling and iwae", objectives.fivo(never), iwae)
        one = scan(model, batch, noise=noise_for(model, batch, 1, seed=2))
        compare(
            law,
            model,
            "iwae of one path and the sampled elbo",
            objectives.iwae(one),
            objectives.elbo(one, kl="sample"),
        )
        elbo = objectives.elbo(one, kl="sample" if one.kl is None else "analytic")
        gap, error = float((elbo - iwae).mean()), float(((elbo.var() + iwae.var()) / len(batch)).sqrt())
        require(
            gap <= 6 * error + 1e-12,
            law,
            model,
            f"E[elbo] - E[iwae_8] = {gap:.4f} +- {error:.4f} should not be positive.",
        )


@torch.no_grad()
def law_divergence(build: Callable[[], SequentialLVM]) -> None:
    """The analytic KL is not negative and is the expectation of log q - log p at the sample."""
    law, model = "analytic KL", build()
    for missing in (False, True):
        batch = copies(model, 4, missing, 1024)
        paths = scan(model, batch, noise=noise_for(model, batch, 1))
        if paths.kl is None:  # these two kinds of distribution have no closed form
            continue
        for name, kl, sampled in (
            ("z", paths.kl.sum(-1), paths.log_proposal - paths.log_prior),
            ("w", paths.kl_w, paths.log_proposal_w),
        ):
            if kl is None or sampled is None:  # no per-sequence latent
                continue
            if name == "w":
                kl, sampled = kl.sum(-1), sampled - paths.log_prior_w
            require(bool((kl >= -1e-12).all()), law, model, f"KL of {name} has {float(kl.min()):.2e} < 0.")
            difference = (sampled - kl).reshape(-1, len(batch)).sum(0)
            within(law, model, f"sampled minus analytic KL of {name}", difference)


@torch.no_grad()
def law_exact(build: Callable[[], SequentialLVM]) -> None:
    """A model that knows log p(x) gives every path that weight: its posterior is the true one.

    For models with the attribute `exact`. Its smoother is then the mean of its own paths.
    """
    law, model = "exact models are exact", build()
    if not model.exact:
        return
    for missing in (False, True):
        batch = sequences(model, missing=missing)
        paths = scan(model, batch, particles=5, noise=noise_for(model, batch, 5))
        exact = model.exact_log_likelihood(batch)
        log_w = objectives.log_weights(paths)
        compare(law, model, "log-weight of each path", log_w, exact.expand_as(log_w), 1e-8)
        batch = copies(model, 4, missing, 2048)
        z = model.latent_values(scan(model, batch, noise=noise_for(model, batch, 1)).z)[:, 0]
        mean, stddev = model.exact_smooth(batch[[0]])
        for t in range(batch.steps):
            for value, m, s in zip(z[t].T, mean[0, t].tolist(), stddev[0, t].tolist(), strict=True):
                if (
                    model.discrete_latent
                ):  # a rare class comes once or not at all: counts are no normal numbers
                    s = max(s, len(batch) ** -0.5)
                within(law, model, f"smoothed mean at t={t}", value, m, s)


@torch.no_grad()
def law_marginal(build: Callable[[], SequentialLVM]) -> None:
    """The log-likelihood with a coordinate missing is the exact marginal of the others.

    For emissions that factorise: the sum over observed coordinates. For a full multivariate normal, and
    for a mixture: the density of the rest, computed by another library. An emission without closed marginals (`marginal` =
    False) sums to one over all of x, and refuses a frame that is observed in part. What completes a frame draws from the
    conditional that belongs to that marginal.
    """
    law, model = "a missing coordinate is integrated out", build()
    batch = sequences(model)
    p_x = scan(model, batch, noise=noise_for(model, batch, 1)).p_x
    if not model.emission.marginal:
        _sums_to_one(law, model, p_x)
        _refuses_parts(law, model, p_x, batch)
        return
    x = batch.x.flatten(2).transpose(0, 1).unsqueeze(1)
    for j in range(model.x_dim):
        rest = torch.ones_like(x, dtype=torch.bool)
        rest[..., j] = False
        marginal = p_x.log_prob(x, rest)
        other = torch.where(rest, x, 1 - x.abs())
        compare(
            law,
            model,
            f"marginal without coordinate {j}, for another value there",
            marginal,
            p_x.log_prob(other, rest),
            0.0,
        )
        if isinstance(p_x, GaussianMixture):
            keep = [i for i in range(model.x_dim) if i != j]
            parts = torch.distributions.Normal(p_x.loc[..., keep], p_x.scale[..., keep]).log_prob(
                x.unsqueeze(-2)[..., keep]
            )
            exact = torch.logsumexp(p_x.logits.log_softmax(-1) + parts.sum(-1), -1)
            compare(law, model, f"marginal without coordinate {j}", marginal, exact, 1e-9)
        elif isinstance(p_x, MultivariateNormal):
            keep = [i for i in range(model.x_dim) if i != j]
            block = (p_x.scale_tril @ p_x.scale_tril.mT)[..., keep, :][..., keep]
            if keep:
                exact = torch.distributions.MultivariateNormal(p_x.loc[..., keep], block)
                exact = exact.log_prob(x[..., keep])
                compare(law, model, f"marginal without coordinate {j}", marginal, exact, 1e-9)
        else:
            compare(
                law,
                model,
                f"log-density split at coordinate {j}",
                marginal + p_x.log_prob(x, ~rest),
                p_x.log_prob(x),
            )
    _completes(law, model)
    hidden = torch.rand(batch.x.shape, generator=torch.Generator().manual_seed(3)) < 0.4
    hidden[:, 0, 0] = False
    paths = scan(model, batch.hide(hidden), noise=noise_for(model, batch, 1))
    seen = batch.hide(hidden)
    observed = seen.observed.flatten(2).transpose(0, 1).unsqueeze(1)
    expected = paths.p_x.log_prob(seen.x.flatten(2).transpose(0, 1).unsqueeze(1), observed)
    expected = torch.where(paths.valid.unsqueeze(1), expected, 0.0)
    compare(law, model, "log_likelihood and the marginal of p(x_t | .)", paths.log_likelihood, expected)


def _completes(law: str, model: SequentialLVM) -> None:
    """A coordinate drawn anew given the others of its frame keeps its mean, and that of its product with each of them.

    Half of the frames are observed whole: they keep their values.
    """
    p_x, generator = generated(model, 512, 2, 2).p_x, torch.Generator().manual_seed(4)
    if isinstance(p_x, GaussianMixture):  # far enough apart for a coordinate to say which component it was
        apart = 3 * torch.arange(p_x.loc.shape[-2], dtype=p_x.loc.dtype).unsqueeze(-1)
        p_x = p_x._replace(loc=p_x.loc + apart * p_x.scale.mean())
    shape = (2, 2, 512, model.x_noise_dim)

    def noise_of_x() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=p_x.mean.dtype)

    x = p_x.sample(noise_of_x())
    for j in range(model.x_dim):
        rest = torch.ones_like(x, dtype=torch.bool)
        rest[:, :, ::2, j] = False
        noise = noise_of_x()
        for complete in (completed, completed_frames):
            drawn = complete(p_x, x, rest, noise)
            compare(law, model, "what was observed, completed", drawn[rest], x[rest], 0.0)
            for i in range(model.x_dim):
                other = x[..., i] if i != j else 1.0
                difference = (other * (drawn[..., j] - x[..., j]))[:, :, ::2]
                within(
                    law, model, f"product of coordinates {i} and {j}, {j} drawn anew", difference.flatten()
                )


def _sums_to_one(law: str, model: SequentialLVM, p_x: Any) -> None:
    """Over every binary x."""
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * model.x_dim)
    every = every.reshape(-1, 1, 1, 1, model.x_dim)
    mass = p_x.log_prob(every).exp().sum(0)
    compare(law, model, "the sum of p(x_t | .) over all x_t", mass, torch.ones_like(mass))


def _refuses_parts(law: str, model: SequentialLVM, p_x: Any, batch: Sequences) -> None:
    """Of a frame all is observed, or nothing, which counts as 0."""
    x = batch.x.flatten(2).transpose(0, 1).unsqueeze(1)
    missing = p_x.log_prob(x, torch.zeros_like(x, dtype=torch.bool))
    compare(law, model, "the log-probability of missing frames", missing, torch.zeros_like(missing), 0.0)
    part = torch.ones_like(x, dtype=torch.bool)
    part[0, ..., 0] = False
    for name, ask in (
        ("log_prob", lambda: p_x.log_prob(x, part)),
        ("emission.check", lambda: model.emission.check(x, "x", part)),
    ):
        try:
            ask()
        except ValueError as error:
            require("missing as a whole" in str(error), law, model, f"{name} refuses with: {error}")
        else:
            require(False, law, model, f"{name} should refuse a frame that is observed in part.")


@torch.no_grad()
def law_generation(build: Callable[[], SequentialLVM]) -> None:
    """Generated z and x have the moments of the conditionals they were drawn from.

    Within 6 standard errors: those of a standardised residual are known for its mean.
    """
    law, model = "samples fit their conditionals", build()
    paths = generated(model, 128, 6, 4)
    assert paths.x is not None
    require(
        paths.q is None or bool((paths.log_prior == paths.log_proposal).all()),
        law,
        model,
        "without observations z should come from the prior.",
    )
    for name, d, value in (("z", paths.p_z, paths.z), ("x", paths.p_x, paths.x)):
        for r in residuals(d, value):
            within(law, model, f"mean of the standardised residual of {name}", r, 0.0, 1.0)
            if not isinstance(d, Categorical | Bernoulli | NADE):  # whose mean says everything
                within(law, model, f"variance of the standardised residual of {name}", r.square(), 1.0)


def generated(model: SequentialLVM, number: int, steps: int, particles: int) -> Trajectory:
    """Paths of a model that has seen nothing."""
    like = sequences(model, (steps,))[[0] * number]
    empty = dataclasses.replace(like, x=torch.zeros_like(like.x), observed=torch.zeros_like(like.observed))
    return scan(model, empty, particles=particles, noise=noise_for(model, empty, particles), draw_x=True)


def residuals(d: Any, value: Tensor) -> list[Tensor]:
    """(value - mean) / stddev of each coordinate, flattened; a class number by its indicators."""
    if isinstance(d, Product):
        blocks = value.split(d.sizes, -1)
        return [r for part, block in zip(d.parts, blocks, strict=True) for r in residuals(part, block)]
    if isinstance(d, Categorical):
        mean, value = d.probs.flatten(-2), d.one_hot(value).flatten(-2)
        stddev = (mean * (1 - mean)).sqrt()
    elif isinstance(d, NADE):  # given the coordinates before it, each is binary
        mean = d.logits(value).sigmoid()
        stddev = (mean * (1 - mean)).sqrt()
    else:
        mean, stddev = d.mean, d.stddev
    return list(((value - mean) / stddev).flatten(0, -2).T)
