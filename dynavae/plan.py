"""What one call of `scan` has to do, from model and data: which frames are seen, what must happen in the loop."""

from __future__ import annotations

import torch
from torch import Tensor

from dynavae.batch import Sequences
from dynavae.model import SequentialLVM
from dynavae.proposals import Amortized, Proposal
from dynavae.resampling import Resampling
from dynavae.trajectory import State

Compile = bool | str
"""What to compile: the scoring of all frames ("terms"), on a GPU the loop over time ("recursion"), or both (True)."""


def to_compile(compile: Compile) -> tuple[bool, bool]:
    """Whether the terms, and whether the recursion."""
    if compile not in (True, False, "terms", "recursion"):
        raise ValueError(f"compile should be True, False, 'terms' or 'recursion'; got {compile!r}.")
    return compile in (True, "terms"), compile in (True, "recursion")


class Plan:
    """The arguments of `scan`, checked, and what follows from them.

    Time leads from here on. `given` (T, B, x_dim): what the recursion reads of x; elsewhere the model's own output
    replaces it. `informed` (T, B): where the posterior has something to read, so that z_t does not come from the prior.
    `standard`: nothing but q(z_t | z_<t, x_1:T) and its recursion has to happen within the loop.
    """

    def __init__(
        self,
        model: SequentialLVM,
        batch: Sequences,
        particles: int,
        propose: Proposal,
        resample: Resampling | None,
        free: Tensor | None,
        feedback: str,
        draw_x: bool,
        state: State | None,
        carry: bool,
        fast: bool,
        compile: Compile,
    ) -> None:
        check_fits(model, batch)
        if feedback not in ("sample", "mean"):
            raise ValueError(f"feedback should be 'sample' or 'mean'; got {feedback!r}.")
        if particles < 1:
            raise ValueError(f"particles should be at least 1; got {particles}.")
        if resample is not None and not model.per_step_likelihood:
            raise ValueError(
                f"resampling weighs p(x_t | z_<=t) step by step, but {type(model).__name__} decodes x_t from "
                "z_1:T; use independent paths (iwae) instead."
            )
        self.model, self.propose, self.resample, self.feedback = model, propose, resample, feedback
        self.draw_x, self.state, self.carry, self.fast = draw_x, state, carry, fast
        compile_terms, record = to_compile(compile)
        self.compile, self.record = compile_terms and fast, record and fast
        if compile == "recursion" and batch.x.device.type != "cuda":
            raise ValueError(
                "compile='recursion' makes a CUDA graph of the loop over time, which needs a GPU; the sequences are on "
                f"{batch.x.device}: move model and sequences there, or leave compile=False."
            )
        self.K, self.B, self.T = particles, len(batch), batch.steps
        self.lengths = batch.lengths
        self.x = batch.x.flatten(2).transpose(0, 1)
        self.control = None if batch.control is None else batch.control.transpose(0, 1)
        self.valid = batch.valid.T
        self.ragged = batch.ragged
        observed = batch.observed.flatten(2).transpose(0, 1)
        complete = batch.complete
        self.observed = None if complete else observed
        # What the recursion is given (T, B, x_dim): seen, and not to be replaced by the model's own output.
        if complete and free is None:
            self.given, self.given_all = torch.ones_like(observed[..., :1]), [True] * self.T
            self.given_partly = [False] * self.T
        else:
            self.given = observed | ~self.valid.unsqueeze(-1)
            if free is not None:
                self.given = self.given & ~(free.T & self.valid).unsqueeze(-1)
            every = self.given.all(-1)
            self.given_all = every.all(1).tolist()
            self.given_partly = (self.given.any(-1) & ~every).any(1).tolist()  # of some frame a part
        self.free = free is not None
        diverged = state is not None and state.drawn and model.past_x.out_dim > 0
        gaps = not all(self.given_all) and (self.free or draw_x or not model.marginalises)
        self.draws = bool(model.autoregressive) and (diverged or gaps)
        # Where the posterior has something to read (T, B).
        seen = self.valid if complete else observed.any(-1)
        informed = seen
        bridging = model.bridges and isinstance(propose, Amortized) and propose.bridge
        if not model.causal or bridging:
            informed = informed.flip(0).cummax(0).values.flip(0)
        self.any_seen = seen.any(0)  # (B,)
        # The inference networks read each sequence to its last frame with something to see, not the emptiness after it (B,).
        t = torch.arange(1, self.T + 1, device=seen.device).unsqueeze(-1)
        self.seen_until = self.lengths.clamp(min=1) if complete else torch.where(seen, t, 1).amax(0)
        self.informed = informed | ~self.valid
        if complete:
            self.informed_any = [t < batch.longest for t in range(self.T)]
            self.informed_all = [True] * self.T
        else:
            self.informed_any = (informed & self.valid).any(1).tolist()
            self.informed_all = self.informed.all(1).tolist()
        if not isinstance(propose, Amortized):
            self.informed_any, self.informed_all = [True] * self.T, [True] * self.T
        # Nothing but q(z_t | z_<t, x_1:T) and its recursion has to happen within the loop.
        self.standard = (
            fast
            and isinstance(propose, Amortized)
            and resample is None
            and not self.draws
            and all(self.informed_all)
            and not (carry and self.ragged)
        )
        across = bridging and not complete and not bool((seen | ~self.valid).all())  # then q reads z_<t
        self.all_at_once = self.standard and bool(model.mean_field) and not across
        self.prior_in_loop = (
            not fast
            or bool(model.reads_prior)
            or propose.needs_prior
            or resample is not None
            or not all(self.informed_all)
            or not all(self.informed_any)
        )
        self.likelihood_in_loop = bool(model.per_step_likelihood) and (
            not fast or resample is not None or self.draws
        )


def check_fits(model: SequentialLVM, batch: Sequences) -> None:
    """Whether these sequences are what this model was built for."""
    name = type(model).__name__
    if batch.x_dim != model.x_dim:
        raise ValueError(
            f"{name} was built for x_dim={model.x_dim}; the sequences have {batch.x_dim} features."
        )
    got = 0 if batch.control is None else batch.control.shape[-1]
    if got != model.control_dim:
        raise ValueError(
            f"{name} was built for control_dim={model.control_dim}; the sequences carry "
            f"{got or 'no'} control{'s' if got != 1 else ''}."
        )
    parameter = next(model.parameters())
    if batch.x.dtype != parameter.dtype or batch.x.device != parameter.device:
        raise TypeError(
            f"{name} has {parameter.dtype} on {parameter.device}, the sequences {batch.x.dtype} on "
            f"{batch.x.device}; use batch.to(...) or model.to(...)."
        )
