"""The one time loop. Every task and objective is a choice of what is observed, proposal and resampler.

Before the loop runs whatever reads x only, after it whatever merely scores; what is left inside is the
recursion over z. The fast path and the plain one (`fast=False`, everything in the loop) give the same
numbers: that is law L1.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from dynavae import tree
from dynavae.batch import Sequences
from dynavae.distributions import REPARAMETERIZED, at, completed, completed_frames, expand, sample_at
from dynavae.model import Evidence, Frame, Past, Present, SequentialLVM
from dynavae.noise import Noise, draw
from dynavae.plan import Compile, Plan
from dynavae.proposals import Amortized, Proposal, amortized
from dynavae.recording import recorded
from dynavae.resampling import Resampling
from dynavae.terms import Terms, compiled, terms
from dynavae.trajectory import State, Trajectory

__all__ = ["State", "Trajectory", "scan"]


def scan(
    model: SequentialLVM,
    batch: Sequences,
    *,
    particles: int = 1,
    propose: Proposal = amortized,
    resample: Resampling | None = None,
    free: Tensor | None = None,
    feedback: str = "sample",
    draw_x: bool = False,
    noise: Noise | None = None,
    generator: torch.Generator | None = None,
    state: State | None = None,
    carry: bool = False,
    fast: bool = True,
    compile: Compile = False,
) -> Trajectory:
    """Run a model over time.

    An unobserved x_t that the recursion reads is drawn from p(x_t | .), given what was observed of the same frame, so every
    bound stays a bound on the likelihood of the observed values; z_t comes from the prior where its posterior has nothing to
    read. Where such a draw has no pathwise gradient (discrete emissions, mixtures) it is taken as given: values are those
    of the bound, gradients leave out how the draw depends on the parameters.

    Args:
        batch: the sequences; unobserved values are hidden before anything else is computed.
        particles: K paths per sequence.
        propose: where z_t comes from.
        resample: scheme and threshold, or None for independent paths.
        free: (B, T) bool; where True the recursion reads the model's own output instead of the data
            (scheduled sampling, free running). No gradient flows through that output.
        feedback: "sample" or "mean", what an own output is.
        draw_x: also draw unobserved x that nothing reads.
        noise: all randomness; by default drawn with `generator`.
        state: where the previous chunk of these sequences ended.
        carry: return the state after each sequence's last frame.
        fast: hoist and defer; False runs everything in the loop.
        compile: put what comes after the loop through `torch.compile` ("terms"), play the loop itself from a CUDA graph
            where the model has a :mod:`~dynavae.recursion` and a GPU ("recursion"), or both (True).
    """
    run = _Run(
        model, batch, particles, propose, resample, free, feedback, draw_x, state, carry, fast, compile
    )
    if noise is None:
        noise = draw(
            model,
            run.T,
            run.K,
            run.B,
            x=run.draws or draw_x,
            resample=resample is not None,
            generator=generator,
        )
    run.noise = noise
    run.before_loop()
    if run.all_at_once:
        run.mean_field()
    elif not run.recursion():
        run.loop()
    return run.after_loop()


class _Run(Plan):
    """One call of :func:`scan`, in three stages: before, in and after the loop."""

    noise: Noise
    c: Any
    c_last: Any
    g_last: Any
    log_prior_w: Tensor | None
    log_proposal_w: Tensor | None
    log_weights: list[Tensor]
    ancestors: list[Tensor]
    increments: list[Tensor]
    stepwise: bool = False
    p_z: Any = None

    # --- before the loop: whatever reads x only -----------------------------------------------------

    def before_loop(self) -> None:
        model, T, K, B = self.model, self.T, self.K, self.B
        state = self.state
        frame = Frame(self.x, self.observed, self.control)
        keep = self.valid if self.carry and self.ragged else None
        if self.fast:
            self.u = model.features(frame)
            v = (
                model.recognition(frame) if model.seen_x.out_dim else self.u
            )  # without a memory nothing reads it
        else:
            frames = [Frame(*f) for f in zip(*(_steps(a, T) for a in frame), strict=True)]
            self.u = tree.stack([model.features(f) for f in frames])
            v = tree.stack([model.recognition(f) for f in frames])
        self.c, self.c_last = model.past_x.before(self.u, None if state is None else state.c, keep, self.fast)
        g, self.g_last = model.seen_x.run(v, None if state is None else state.g, keep, self.fast)
        evidence = Evidence(frame, self.u, self.c, g, self.seen_until, None)
        self._draw_static(evidence)
        needs_evidence = isinstance(self.propose, Amortized) and any(self.informed_any)
        self.e = model.evidence(evidence._replace(w=self.w)) if needs_evidence else None
        own = getattr(self.propose, "evidence", None)  # a proposal may read x by itself
        if own is not None:
            self.e = own(model, evidence._replace(w=self.w))
        if state is None:
            self.h = model.initial((K, B))
            self.m = model.past_x.initial((K, B)) if self.draws else ()
            self.log_w = self.x.new_zeros(K, B)
            if self.log_prior_w is not None and self.log_proposal_w is not None:
                self.log_w = self.log_w + self.log_prior_w - self.log_proposal_w
        else:
            self.h, self.m, self.log_w = state.h, state.m, state.log_w
        self.log_w_start = self.log_w

    def _draw_static(self, evidence: Evidence) -> None:
        self.w = self.log_prior_w = self.log_proposal_w = self.kl_w = None
        if not self.model.w_dim:
            return
        if self.state is not None:
            self.w = self.state.w
            return
        p_w = self.model.static_prior(self.B)
        q_w = self.model.static_posterior(evidence) if bool(self.any_seen.any()) else p_w
        if not bool(self.any_seen.all()):
            q_w = tree.where(self.any_seen, q_w, p_w)
        if self.noise.w is None:
            raise ValueError(
                f"{type(self.model).__name__} has a per-sequence latent: noise.w should be given."
            )
        self.w = q_w.sample(self.noise.w)
        self.log_prior_w, self.log_proposal_w = p_w.log_prob(self.w), q_w.log_prob(self.w)
        kl_w = q_w.kl(p_w)
        self.kl_w = None if kl_w is None else kl_w.expand(self.K, *kl_w.shape)

    # --- the loop: sample, remember, move on ---------------------------------------------------------

    def loop(self) -> None:
        model, T, K, lead = self.model, self.T, self.K, (self.K, self.B)
        past_x: Any = model.past_x
        # Unbind once: the backward of a[t] inside a loop allocates a full-size zero tensor per step.
        x_steps, u_steps = _steps(self.x, T), _steps(self.u, T)
        c_steps = _steps(self.c, T)
        e_steps = _steps(self._with_particles(self.e) if model.mean_field else self.e, T)
        control_steps, z_noise = _steps(self.control, T), _steps(self.noise.z, T)
        x_noise = _steps(self.noise.x, T)
        given, valid = _steps(self.given, T), _steps(self.valid, T)
        h, m, w, log_w = self.h, self.m, self.w, self.log_w
        lineage = None  # who the current particles descend from, for evidence that has a particle axis
        self.stepwise = True
        self.zs, self.qs, self.p_zs, self.p_xs, self.xs = [], [], [], [], []
        self.cs, self.past_hs, self.present_hs = [], [], []
        self.log_weights, self.ancestors, self.increments = [], [], []
        for t in range(T):
            c_t = past_x.read(m) if self.draws and past_x.out_dim else c_steps[t]
            past = Past(c_t, h, control_steps[t], w)
            if self.prior_in_loop:
                past = past._replace(prior=expand(model.prior(past), lead))
            if not self.informed_any[t]:
                q = past.prior
            else:
                e_t = e_steps[t] if lineage is None else _follow(e_steps[t], lineage)
                q = self.propose(model, past, e_t, None if self.informed_all[t] else self.informed[t])
            z, q = sample_at(q, z_noise[t])
            q = expand(q, lead)
            present = Present(c_t, model.absorb(past, z), control_steps[t], w)
            self.zs.append(z)
            self.qs.append(q)
            self.cs.append(c_t)
            self.past_hs.append(h)
            self.present_hs.append(present.h)
            if self.prior_in_loop:
                self.p_zs.append(expand(at(past.prior, z), lead))
            if self.likelihood_in_loop:
                self.p_xs.append(expand(model.likelihood(present), lead))
            x_t, u_t = x_steps[t], u_steps[t]
            if self.draws:
                if not self.given_all[t]:
                    own = None if x_noise is None else x_noise[t]
                    x_t = self._fill(x_t, given[t], self.given_partly[t], self.p_xs[-1], own)
                    u_t = model.features(Frame(x_t, None, control_steps[t]))
                self.xs.append(x_t.expand(K, *x_t.shape[-2:]))
                m = self._held(valid[t], past_x.step(m, u_t), m)
            h = self._held(valid[t], model.update(present, u_t), h)
            if self.resample is not None:
                log_w, ancestors = self._weigh(t, log_w, z, valid[t])
                if ancestors is not None:
                    h, m = tree.select(h, ancestors), tree.select(m, ancestors)
                    if w is not None:
                        w = tree.select(w, ancestors)
                        lineage = ancestors if lineage is None else torch.gather(lineage, 0, ancestors)
        self.h, self.m, self.log_w, self.w_last = h, m, log_w, w

    def _fill(self, x: Tensor, given: Tensor, partly: bool, p_x: Any, noise: Tensor | None) -> Tensor:
        noise = None if self.feedback == "mean" else noise
        if partly:
            drawn = completed(p_x, x, given, noise)
        else:
            drawn = p_x.mean if noise is None else p_x.sample(noise)
        if self.free or not isinstance(p_x, REPARAMETERIZED):
            drawn = drawn.detach()
        return torch.where(given, x, drawn)

    def _held(self, valid: Tensor, new: Any, old: Any) -> Any:
        """After a sequence's end its state stays, if someone will ask for it."""
        if not (self.carry and self.ragged):
            return new
        return tree.where(valid.expand(self.K, -1), new, old)

    def _weigh(self, t: int, log_w: Tensor, z: Tensor, valid: Tensor) -> tuple[Tensor, Tensor | None]:
        resample = self.resample
        assert resample is not None and self.noise.resample is not None
        observed = None if self.observed is None else self.observed[t]
        log_lik = self.p_xs[-1].log_prob(self.x[t], observed)
        increment = self.p_zs[-1].log_prob(z) + log_lik - self.qs[-1].log_prob(z)
        log_w = log_w + torch.where(valid, increment, 0.0)
        self.log_weights.append(log_w)
        more = valid if self.carry else t + 1 < self.lengths
        due = resample.due(log_w) & more
        stay = torch.arange(self.K, device=log_w.device).unsqueeze(-1).expand(-1, self.B)
        if due.is_cpu and not bool(due.any()):  # a GPU would have to finish its work to answer
            self.ancestors.append(stay)
            return log_w, None
        uniform = torch.special.ndtr(self.noise.resample[t])
        ancestors = torch.where(due, resample.ancestors(log_w, uniform), stay)
        self.ancestors.append(ancestors)
        self.increments.append(torch.where(due, _log_mean_exp(log_w), 0.0))
        return torch.where(due, 0.0, log_w), ancestors

    def _with_particles(self, e: Any) -> Any:
        """Evidence of a mean-field posterior, which no (K, B, .) state would broadcast."""
        return tree.tree_map(
            lambda a: a.unsqueeze(1).expand(-1, self.K, *a.shape[1:]) if a.ndim == 3 else a, e
        )

    # --- q ignores z_<t: all z at once ----------------------------------------------------------------

    def mean_field(self) -> None:
        e = tree.tree_map(lambda a: a.unsqueeze(1) if a.ndim == 3 else a, self.e)
        past = Past(None, None, _lift(self.control), self.w)
        self.z, self.q = sample_at(self.model.posterior(past, e), self.noise.z)
        self.past_h, self.present_h, self.h = self.model.unroll(
            self.z, self.u, self.c, self.control, self.w, self.h
        )
        self.w_last = self.w

    def recursion(self) -> bool:
        """The model's faster form of the loop, if it has one and it applies."""
        if not self.standard or self.w is not None:
            return False
        with recorded() if self.record else contextlib.nullcontext():
            run = self.model.recursion(self.noise.z, self.e, self.u, self.c, self.control, self.h)
        if run is None:
            return False
        self.z, self.q, self.p_z, self.past_h, self.present_h, self.h = run
        self.w_last = self.w
        return True

    # --- after the loop: the conditionals do not care about batch shape, so score all t at once --------

    def after_loop(self) -> Trajectory:
        model = self.model
        if self.stepwise:
            self.z = torch.stack(self.zs)
            self.q = None if self._mixed(self.qs) else tree.stack(self.qs)
            self.past_h, self.present_h = tree.stack(self.past_hs), tree.stack(self.present_hs)
            if self.prior_in_loop:
                self.p_z = None if self._mixed(self.p_zs) else tree.stack(self.p_zs)
        p_x = tree.stack(self.p_xs) if self.stepwise and self.likelihood_in_loop else None
        c = tree.stack(self.cs) if self.draws and model.past_x.out_dim else _lift(self.c)
        control = _lift(self.control)
        past, present = Past(c, self.past_h, control, self.w), Present(c, self.present_h, control, self.w)
        observed = None if self.observed is None else self.observed.unsqueeze(1)
        frames = (past, present, self.lengths, self.x.unsqueeze(1), observed, self.z)
        if self.q is None or (self.p_z is None and self.stepwise and self.prior_in_loop):
            p_z, p_x, log_prior, log_likelihood, log_proposal, kl = self._apart(past, present, p_x, observed)
        else:
            score = compiled() if self.compile else terms
            p_z, p_x, log_prior, log_likelihood, log_proposal, kl = score(
                model, *frames, self.q, self.p_z, p_x
            )

        lead = (self.T, self.K, self.B)
        log_evidence = log_weight = ancestors = None
        if self.resample is not None:
            log_evidence = _log_mean_exp(self.log_w) - (
                0.0 if self.state is None else _log_mean_exp(self.log_w_start)
            )
            log_evidence = log_evidence + sum(self.increments)
            log_weight, ancestors = torch.stack(self.log_weights), torch.stack(self.ancestors)
        trajectory = Trajectory(
            self.z,
            self._drawn(p_x),
            self.q,
            p_z,
            p_x,
            self._masked(log_prior.expand(lead)),
            self._masked(log_likelihood.expand(lead)),
            self._masked(log_proposal.expand(lead)),
            None if kl is None else self._masked(kl.expand(*lead, kl.shape[-1])),
            self.w,
            self.log_prior_w,
            self.log_proposal_w,
            self.kl_w,
            log_weight,
            ancestors,
            log_evidence,
            self.valid,
            None,
        )
        return trajectory._replace(state=self._state(trajectory)) if self.carry else trajectory

    def _apart(self, past: Past, present: Present, p_x: Any, observed: Tensor | None) -> Terms:
        """The terms where the steps have distributions of different kinds, which cannot be stacked."""
        if p_x is None:
            p_x = self.model.decode(present, self.lengths)
        if not self.prior_in_loop:
            self.p_z = at(self.model.prior(past), self.z)
        log_prior = self.p_z.log_prob(self.z) if self.p_z is not None else self._each(self.p_zs)
        log_proposal = self.q.log_prob(self.z) if self.q is not None else self._each(self.qs)
        log_likelihood = p_x.log_prob(self.x.unsqueeze(1), observed)
        return Terms(self.p_z, p_x, log_prior, log_likelihood, log_proposal, None)

    def _drawn(self, p_x: Any) -> Tensor | None:
        if self.stepwise and self.draws:
            return torch.stack(self.xs)
        if not self.draw_x:
            return None
        noise = None if self.feedback == "mean" else self.noise.x
        drawn = completed_frames(p_x, self.x.unsqueeze(1), self.given.unsqueeze(1), noise)
        return drawn.expand(self.T, self.K, *drawn.shape[2:])

    def _state(self, trajectory: Trajectory) -> State:
        log_w = self.log_w
        if self.resample is None:
            log_w = log_w + trajectory.log_w.sum(0)
        m = self.m
        if not self.draws:  # nothing was drawn: both parts of the model saw the same x
            m = tree.tree_map(lambda a: a.expand(self.K, *a.shape[-2:]), self.c_last)
        return State(self.h, m, self.c_last, self.g_last, self.w_last, log_w, self.draws)

    def _mixed(self, ds: list[Any]) -> bool:
        """Whether the steps have distributions of different kinds or shapes, which cannot be stacked."""
        return not all(tree.same_structure(ds[0], d) for d in ds[1:])

    def _each(self, ds: list[Any]) -> Tensor:
        return torch.stack([d.log_prob(z).expand(self.K, self.B) for d, z in zip(ds, self.zs, strict=True)])

    def _masked(self, terms: Tensor) -> Tensor:
        if not self.ragged:
            return terms
        mask = self.valid.unsqueeze(1)
        return torch.where(mask if terms.ndim == 3 else mask.unsqueeze(-1), terms, 0.0)


def _steps(value: Any, length: int) -> Any:
    """A list of `length` values, one per step."""
    return [None] * length if value is None else tree.unbind(value, length)


def _lift(value: Any) -> Any:
    """(T, B, .) to (T, 1, B, .): a particle axis that broadcasts."""
    return tree.tree_map(lambda a: a.unsqueeze(1), value)


def _follow(e: Any, lineage: Tensor) -> Any:
    return tree.tree_map(lambda a: tree.select(a, lineage) if a.ndim == 3 else a, e)


def _log_mean_exp(log_w: Tensor) -> Tensor:
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))
