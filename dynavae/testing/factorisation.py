"""Who reads whom: the dependency table of a model, derived by autograd, and the law about it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynavae import tree
from dynavae.distributions import MultivariateNormal, Normal, Product, at, expand
from dynavae.model import Past, SequentialLVM
from dynavae.noise import Noise
from dynavae.proposals import Amortized
from dynavae.scan import State, Trajectory, scan
from dynavae.testing.cases import require, sequences, small

STEPS, ROWS = 6, 3


class DependencyTable(NamedTuple):
    """What the parameters of each factor at step t read, weights and controls aside."""

    prior: str  # p(z_t | .), or "N(0, I)"
    likelihood: str  # p(x_t | .)
    posterior: str  # q(z_t | .)
    static: str | None  # q(w | .) of the per-sequence latent; None without one

    def __str__(self) -> str:
        text = f"p(z_t | {self.prior})  p(x_t | {self.likelihood})  q(z_t | {self.posterior})"
        return text if self.static is None else f"{text}  q(w | {self.static})"


class Given(NamedTuple):
    """A distribution whose sample is given: it makes every factor a function of x and z."""

    q: Any
    z: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.z

    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        return self.q.log_prob(x, observed)

    def kl(self, other: Any) -> Tensor | None:
        return self.q.kl(other)


class At(Amortized):
    """The inference network, evaluated along a given path of z."""

    def __init__(self, z: Tensor) -> None:
        self.steps = iter(z.unbind())

    def __call__(self, model: SequentialLVM, past: Past, e: Any, informed: Tensor | None) -> Any:
        z = next(self.steps)
        q = at(super().__call__(model, past, e, informed), z)
        return Given(expand(q, z.shape[:-1]), z)


class ReadsPrior(Amortized):
    """The inference network with a stand-in for `past.prior`, to see whether it is read."""

    def __init__(self) -> None:
        self.reads = False

    def __call__(self, model: SequentialLVM, past: Past, e: Any, informed: Tensor | None) -> Any:
        prior = tree.tree_map(lambda a: a.detach().clone().requires_grad_(a.is_floating_point()), past.prior)
        q = model.posterior(past._replace(prior=prior), e)
        value = sum(a.sum() for a in tree.leaves(q) if a.requires_grad)
        into = [a for a in tree.leaves(prior) if a.requires_grad]
        if isinstance(value, Tensor) and into:
            grads = torch.autograd.grad(value, into, retain_graph=True, allow_unused=True)
            self.reads |= any(g is not None for g in grads)
        return q


class Dependencies(NamedTuple):
    """{(factor, variable): (T, T) bool}: whether the factor at t (row) reads the variable at s (column)."""

    reads: dict[tuple[str, str], Tensor]
    w: dict[str, bool]  # whether a factor reads the per-sequence latent
    static: Tensor  # (T,): which x_s the posterior of w reads
    standard: bool  # whether the prior is N(0, I) throughout


def dependencies(model: SequentialLVM) -> Dependencies:
    """Derive what each factor reads from its derivatives with respect to given x, z and w.

    A class number has no derivative: with a discrete latent or a categorical emission it is changed
    instead, one step at a time, and what changes with it reads it.
    """
    batch = sequences(model, (STEPS,) * ROWS)
    generator = torch.Generator().manual_seed(3)
    like = batch.x
    lead = (STEPS, 1, ROWS, model.z_dim)
    z = torch.randn(lead, generator=generator, dtype=like.dtype)
    if model.discrete_latent:
        z = (z > 0).to(like.dtype)
    w = torch.randn(1, ROWS, model.w_dim, generator=generator, dtype=like.dtype) if model.w_dim else None
    x_steps = batch.x.flatten(2).transpose(0, 1)
    discrete = {"x": model.emission.input_dim(model.x_dim) != model.x_dim, "z": model.discrete_latent}

    def run(x: Tensor, z: Tensor, w: Tensor | None) -> Trajectory:
        state = None
        if w is not None:
            h, zero = model.initial((1, ROWS)), like.new_zeros(1, ROWS)
            state = State(h, model.past_x.initial((1, ROWS)), None, None, w, zero)
        noise = Noise(like.new_zeros(STEPS, 1, ROWS, model.z_noise_dim), None, None, None)
        given = dataclasses.replace(batch, x=x.transpose(0, 1))
        return scan(model, given, propose=At(z), noise=noise, state=state, fast=False)

    inputs = {"x": x_steps.clone().requires_grad_(), "z": z.clone().requires_grad_()}
    w = None if w is None else w.requires_grad_()
    trajectory = run(inputs["x"], inputs["z"], w)
    here = numbers(trajectory)
    weights = {k: torch.randn(len(v[0]), generator=generator, dtype=like.dtype) for k, v in here.items()}
    reads, reads_w = {}, {}
    for name, value in inputs.items():
        if discrete[name]:
            columns = []
            for s in range(STEPS):
                other = value.detach().clone()
                other[s] = torch.where(other[s] == 0, 1.0, 0.0)
                changed = numbers(run(**{"x": x_steps, "z": z, "w": w, name: other}))
                columns.append({k: ((changed[k] - here[k]).abs() > 0).any(1) for k in here})
            for factor in here:
                reads[factor, name] = torch.stack([c[factor] for c in columns], 1)
        else:
            for factor, matrix in here.items():
                rows = [_gradient(matrix[t] @ weights[factor], value) for t in range(STEPS)]
                reads[factor, name] = torch.stack([row.flatten(1).abs().sum(1) > 0 for row in rows])
    for factor, matrix in here.items():
        reads_w[factor] = w is not None and bool((_gradient(matrix.sum(), w) != 0).any())
    static = torch.zeros(STEPS, dtype=torch.bool)
    if model.w_dim:
        static = _static(model, batch.x, discrete["x"])
    p = trajectory.p_z
    standard = (
        isinstance(p, Normal | MultivariateNormal)
        and bool((p.loc == 0).all())
        and bool((p.stddev == 1).all())
    )
    if isinstance(p, MultivariateNormal):
        standard = standard and bool((p.scale_tril.tril(-1) == 0).all())
    return Dependencies(reads, reads_w, static, standard)


def numbers(trajectory: Trajectory) -> dict[str, Tensor]:
    """The parameters of each factor, (T, numbers per step)."""
    factors = {"prior": trajectory.p_z, "likelihood": trajectory.p_x, "posterior": trajectory.q.q}
    out = {}
    for name, factor in factors.items():
        found = [a.reshape(STEPS, -1) for a in tree.leaves(factor) if a.is_floating_point()]
        out[name] = torch.cat(found, 1)
    return out


def _gradient(value: Tensor, variable: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(variable)
    (grad,) = torch.autograd.grad(value, variable, retain_graph=True, allow_unused=True)
    return torch.zeros_like(variable) if grad is None else grad


def _static(model: SequentialLVM, x: Tensor, discrete: bool) -> Tensor:
    """Which frames the posterior of the per-sequence latent reads, (T,)."""
    batch = sequences(model, (STEPS,) * ROWS)
    noise = Noise(
        x.new_zeros(STEPS, 1, ROWS, model.z_noise_dim), None, x.new_ones(1, ROWS, model.w_dim), None
    )

    def w_of(x: Tensor) -> Tensor:
        w = scan(model, dataclasses.replace(batch, x=x), noise=noise).w
        assert w is not None
        return w

    if not discrete:
        x = x.clone().requires_grad_()
        return (_gradient(w_of(x).sum(), x) != 0).flatten(2).any(2).any(0)
    here, columns = w_of(x), []
    for s in range(STEPS):
        other = x.clone()
        other[:, s] = torch.where(other[:, s] == 0, 1.0, 0.0)
        columns.append((w_of(other) != here).any())
    return torch.stack(columns)


def dependency_table(model: SequentialLVM) -> DependencyTable:
    """What each factor of a model reads, derived from its derivatives.

    Example:
        >>> from dynavae.models import SRNN
        >>> from dynavae.testing import small
        >>> print(dependency_table(small(SRNN)))
        p(z_t | x_{<t}, z_{t-1})  p(x_t | x_{<t}, z_t)  q(z_t | x_{1:T}, z_{t-1})
    """
    found = dependencies(model)

    def row(factor: str) -> str:
        parts = [name_set(v, found.reads[factor, v]) for v in ("x", "z")]
        parts.append("w" if found.w[factor] else "")
        return ", ".join(p for p in parts if p)

    static = None
    if model.w_dim:
        frames = found.static.nonzero().flatten().tolist()
        static = "x_{1:T}" if len(frames) == STEPS else f"x at {frames}"
    prior = row("prior") or ("N(0, I)" if found.standard else "")
    return DependencyTable(prior, row("likelihood"), row("posterior"), static)


def law_docstring(cls: type[SequentialLVM]) -> None:
    """The docstring's line "Reads:" says what the factors of the default model really read.

    Raises:
        AssertionError: if the line is missing or says something else.
    """
    found = str(dependency_table(small(cls)))
    said = re.search(r"Reads: ``(.*?)``", inspect.getdoc(cls) or "")
    assert said, f"the docstring of {cls.__name__} should have a line\n    Reads: ``{found}``"
    assert said[1] == found, (
        f"the docstring of {cls.__name__} says it reads\n    {said[1]}\nbut it reads\n    {found}"
    )


def name_set(variable: str, reads: Tensor) -> str:
    """The name of a set of (t, s) pairs, such as z_{<t}; empty if there are none."""
    t = torch.arange(len(reads)).unsqueeze(1)
    s = t.T
    known = {
        "": torch.zeros_like(reads),
        "_t": s == t,
        "_{t-1}": s == t - 1,
        "_{t-1:t}": (s == t - 1) | (s == t),
        "_{<t}": s < t,
        "_{<=t}": s <= t,
        "_{t:T}": s >= t,
        "_{1:T}": torch.ones_like(reads),
    }
    for name, pairs in known.items():
        if torch.equal(reads, pairs):
            return variable + name if name else ""
    if torch.equal(reads, (s == t) | ((t == 0) & (s >= 0))):
        return f"{variable}_t (t=1: {variable}_{{1:T}})"
    lags = sorted({int(a - b) for a, b in reads.nonzero().tolist()})
    return f"{variable} at lags {lags}"


def law_factorisation(build: Callable[[], SequentialLVM]) -> None:
    """No factor reads what its place in the factorisation forbids, and the class attributes are exact.

    causal, autoregressive, mean_field, per_step_likelihood and reads_prior are each checked both ways: a
    model that declares less than it reads is wrong, one that declares more is slower than it needs to be.
    """
    law, model = "factorisation", build()
    found = dependencies(model)
    reads = found.reads
    t = torch.arange(STEPS).unsqueeze(1)
    past, present, future = t.T < t, t.T == t, t.T > t

    def seen(factor: str, variable: str, pairs: Tensor) -> bool:
        return bool((reads[factor, variable] & pairs).any())

    def forbid(factor: str, variable: str, pairs: Tensor, said: str) -> None:
        bad = (reads[factor, variable] & pairs).nonzero().tolist()
        require(not bad, law, model, f"the {factor} at t reads {variable}_s, {said}; (t, s) = {bad[:4]}.")

    chained = isinstance(_trajectory_prior(model), Product)  # then z_t^2 may read z_t^1
    forbid("prior", "x", present | future, "s >= t")
    forbid("prior", "z", future if chained else present | future, "s >= t")
    forbid("likelihood", "x", present | future, "s >= t")
    forbid("posterior", "z", future if chained else present | future, "s >= t")
    if model.w_dim:
        used = bool(found.w["prior"] or found.w["likelihood"])
        require(
            used,
            law,
            model,
            "neither prior nor likelihood reads the per-sequence latent w: drop w_dim, or use it.",
        )
    if model.per_step_likelihood:
        forbid("likelihood", "z", future, "s > t, but per_step_likelihood is declared")
    else:
        require(
            seen("likelihood", "z", future),
            law,
            model,
            "p(x_t | .) reads no z_s with s > t: declare "
            "per_step_likelihood = True, and it can be resampled.",
        )
    if model.causal:
        forbid("posterior", "x", future, "s > t, but causal is declared")
    else:
        require(
            seen("posterior", "x", future),
            law,
            model,
            "q(z_t | .) reads no x_s with s > t: declare causal = True, and it can filter.",
        )
    if model.autoregressive:
        require(
            seen("prior", "x", past) or seen("likelihood", "x", past),
            law,
            model,
            "it declares autoregressive, but neither prior nor likelihood reads x_<t.",
        )
    else:
        forbid("prior", "x", past, "s < t, but autoregressive is not declared")
        forbid("likelihood", "x", past, "s < t, but autoregressive is not declared")
    if model.mean_field:
        forbid("posterior", "z", past, "s < t, but mean_field is declared")
    else:
        require(
            seen("posterior", "z", past),
            law,
            model,
            "q(z_t | .) reads no z_s with s < t: declare "
            "mean_field = True and write `unroll`, and the time loop goes.",
        )
    if not chained:  # the stand-in needs a prior made of tensors
        probe = ReadsPrior()
        scan(model, sequences(model, (STEPS,) * ROWS), propose=probe, fast=False)
        declared = bool(model.reads_prior)
        require(
            probe.reads == declared,
            law,
            model,
            f"reads_prior is {declared}, but its posterior "
            f"{'reads' if probe.reads else 'does not read'} past.prior.",
        )


def _trajectory_prior(model: SequentialLVM) -> Any:
    return scan(model, sequences(model, (2,)), fast=False).p_z
