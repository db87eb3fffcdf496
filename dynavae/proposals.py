"""Where z_t comes from: functions (model, past, e, informed) -> q_t.

`informed` (B,) is True for the sequences whose evidence at t holds an observation that the posterior may
read; elsewhere (after the last observation, or at a gap for a causal posterior) z_t comes from the prior.
A proposal never changes what is estimated, only how well: its density enters every weight.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dynavae.distributions import Chain, either, expand
from dynavae.model import Past, SequentialLVM


@runtime_checkable
class Proposal(Protocol):
    """What the loop asks of a proposal.

    needs_prior: it reads `past.prior`, which the engine then computes first.
    evidence: if there is such a method, (model, Evidence) -> what it reads of x, a tree of (T, B, .) tensors.
    """

    needs_prior: bool

    def __call__(self, model: SequentialLVM, past: Past, e: Any, informed: Tensor | None) -> Any: ...


class Amortized:
    """The inference network q(z_t | z_<t, x), and the prior where it has nothing to read."""

    needs_prior = False
    bridge = True  # let a model that `bridges` read the future of x across a gap

    def __call__(self, model: SequentialLVM, past: Past, e: Any, informed: Tensor | None) -> Any:
        if informed is None:
            return model.posterior(past, e)
        prior = past.prior if past.prior is not None else model.prior(past)
        q = model.posterior(past, e)
        if isinstance(q, Chain) or isinstance(prior, Chain):
            return _either_chain(informed, q, prior)
        return _either(informed, q, prior)


class Filtering(Amortized):
    """The same without any future of x: the prior at a gap, also for a model that `bridges`."""

    bridge = False


class Bootstrap:
    """The prior, whatever x says: the proposal of a bootstrap particle filter."""

    needs_prior = True

    def __call__(self, model: SequentialLVM, past: Past, e: Any, informed: Tensor | None) -> Any:
        return past.prior


amortized = Amortized()
filtering = Filtering()
bootstrap = Bootstrap()


def _either(informed: Tensor, q: Any, prior: Any) -> Any:
    """q where it has something to read, else the prior; each may lack the particle axis."""
    lead = torch.broadcast_shapes(q.mean.shape, prior.mean.shape)[:-1]
    return either(informed.expand(lead), expand(q, lead), expand(prior, lead))


def _either_chain(informed: Tensor, q: Any, prior: Any) -> Chain:
    """Choose latent by latent, so that each level of the chain is chosen with its own conditions."""

    def step(i: int) -> Any:
        def conditional(*blocks: Tensor) -> Any:
            first, second = q.steps[i](*blocks), prior.steps[i](*blocks)
            return _either(informed, first, second)

        return conditional

    if not (isinstance(q, Chain) and isinstance(prior, Chain) and q.sizes == prior.sizes):
        raise TypeError("prior and posterior should both be chains of the same sizes, or neither.")
    return Chain([step(i) for i in range(len(q.sizes))], list(q.sizes))
