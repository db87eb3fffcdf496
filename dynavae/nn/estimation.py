r"""Closed-form M-steps of emissions: weighted maximum likelihood, with missing coordinates, from additive sums.

For states (or components) k = 1 ... S with responsibilities :math:`w_{nk}` of the frames x_n, `statistics` gives sums from
which `estimate` finds the parameters of greatest :math:`\sum_{nk} w_{nk}\, \mathbb{E} \log p(x_n \mid k)`. Where coordinates
depend on each other, missing ones are replaced by what is expected of them, with their covariance; otherwise they are left
out. Sums are taken about the current means, in float64: no digits are lost to the size of x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dynavae import distributions as D
from dynavae.exact._completion import completion, floored, patterns
from dynavae.nn.clusters import clusters_of
from dynavae.nn.emissions import Bernoulli, Categorical, Emission, Gaussian, PowerSpectrum, inverse_softplus
from dynavae.nn.heads import EmissionHead
from dynavae.nn.joint_emissions import GaussianMixture, MultivariateGaussian

LEAST = 1e-8
"""Least probability of a value of a discrete x, and least expected number of frames of a state whose emission moves."""


class Sums(NamedTuple):
    """Of the weights, of the errors about the current mean, and of their squares (or products)."""

    count: Tensor
    first: Tensor
    second: Tensor


def emission_of_states(head: EmissionHead, states: int) -> Any:
    """The distribution of x in each state, (S, ...), of a head that reads one-hot codes; in float64."""
    like = head.linear.weight
    codes = torch.eye(states, dtype=torch.float64, device=like.device)
    raw = codes @ head.linear.weight.double().mT + head.linear.bias.double()
    return head.emission.distribution(raw, {k: v.double() for k, v in head.extra.items()})


@torch.no_grad()
def statistics(emission: Emission, p: Any, x: Tensor, observed: Tensor, weights: Tensor) -> tuple[Any, ...]:
    """Sums over frames x (N, x_dim), observed (N, x_dim), with weights (N, S), under p (S, ...)."""
    x, w = torch.where(observed, x, 0.0).double(), weights.double()
    seen = observed.double()
    if isinstance(emission, MultivariateGaussian):
        return (_joint_sums(p, x, observed, w),)
    if isinstance(emission, GaussianMixture):
        log_r = p.component_log_prob(x.unsqueeze(-2), observed.unsqueeze(-2))  # (N, S, M)
        r = log_r.softmax(-1) * (w * observed.any(-1, keepdim=True)).unsqueeze(-1)
        S, M = r.shape[1:]
        sums = _sums(p.loc.flatten(0, 1), x, seen, r.flatten(1))
        return (r.sum(0), Sums(*(a.unflatten(0, (S, M)) for a in sums)))
    if isinstance(emission, Categorical):
        codes = one_hot(x.long().clamp(0, emission.classes - 1), emission.classes).double()
        return (torch.einsum("ns,ndc->sdc", w, codes * seen.unsqueeze(-1)),)
    if isinstance(emission, Bernoulli | PowerSpectrum):
        return (w.mT @ seen, w.mT @ x)
    if isinstance(emission, Gaussian):
        return (_sums(p.loc, x, seen, w),)
    raise TypeError(f"{type(emission).__name__} has no closed-form M-step.")


def _sums(loc: Tensor, x: Tensor, seen: Tensor, w: Tensor) -> Sums:
    """Of each coordinate on its own: (S, x_dim)."""
    count = w.mT @ seen
    center = (x.sum(0) / seen.sum(0).clamp(min=1)).expand_as(x)
    e = (x - center) * seen
    shift = loc - center[0]
    first = w.mT @ e - shift * count
    second = w.mT @ e.square() - 2 * shift * (w.mT @ e) + shift.square() * count
    return Sums(count, first, second)


def _joint_sums(p: D.MultivariateNormal, x: Tensor, observed: Tensor, w: Tensor) -> Sums:
    """Of all coordinates together, missing ones completed: (S,), (S, x_dim), (S, x_dim, x_dim)."""
    some = observed.any(-1)
    x, observed, w = x[some], observed[some], w[some]
    masks, of = patterns(observed)
    first, second = [], []
    for loc, L, weight in zip(p.loc, p.scale_tril, w.mT, strict=True):
        filled = completion(L @ L.mT, masks, of)
        e = filled.mean(torch.where(observed, x - loc, 0.0))
        first.append(weight @ e)
        second.append((e * weight.unsqueeze(-1)).mT @ e + filled.covariance(weight))
    return Sums(w.sum(0), torch.stack(first), torch.stack(second))


@torch.no_grad()
def estimate(head: EmissionHead, p: Any, sums: tuple[Any, ...]) -> None:
    """Set a head that reads one-hot codes to the greatest expected log-likelihood. A state without frames stays."""
    emission, extra = head.emission, {}
    if isinstance(emission, MultivariateGaussian):
        raw, extra = emission.raw(*_joint_estimate(emission, p, sums[0]))
    elif isinstance(emission, GaussianMixture):
        weights, moments = sums
        used = moments.count > LEAST
        loc, variance = _moments(moments, p.loc)
        scale = torch.where(used, variance.clamp(min=emission.min_scale**2).sqrt(), p.scale)
        share = (weights / weights.sum(-1, keepdim=True).clamp(min=LEAST)).clamp(min=LEAST)
        logits = torch.where(weights.sum(-1, keepdim=True) > LEAST, share.log(), p.logits)
        raw = emission.raw(logits, loc, scale)
    elif isinstance(emission, Categorical):
        total = sums[0].sum(-1, keepdim=True)
        share = (sums[0] / total.clamp(min=LEAST)).clamp(min=LEAST)
        raw = torch.where(total > LEAST, share.log(), p.logits).flatten(-2)
    elif isinstance(emission, Bernoulli):
        count, total = sums
        share = torch.logit((total / count.clamp(min=LEAST)).clamp(LEAST, 1 - LEAST))
        raw = torch.where(count > LEAST, share, p.logits)
    elif isinstance(emission, PowerSpectrum):
        count, total = sums
        mean = (
            (total / count.clamp(min=LEAST)).log().clamp(emission.min_log_variance, emission.max_log_variance)
        )
        raw = torch.where(count > LEAST, mean, p.log_variance)
    else:
        raw, extra = _gaussian_raw(emission, p, sums[0], head)
    head.linear.weight.copy_(raw.mT)
    head.linear.bias.zero_()
    for name, value in extra.items():
        head.extra[name].copy_(value)


def _moments(sums: Sums, loc: Tensor) -> tuple[Tensor, Tensor]:
    """New means and variances of coordinates; a mean without frames stays."""
    count = sums.count.clamp(min=LEAST)
    change = torch.where(sums.count > LEAST, sums.first / count, 0.0)
    return loc + change, (sums.second / count - change.square()).clamp(min=0)


def _gaussian_raw(
    emission: Emission, p: D.Normal, sums: Sums, head: EmissionHead
) -> tuple[Tensor, dict[str, Tensor]]:
    """Means and standard deviations: of each state, shared by all, or fixed."""
    assert isinstance(emission, Gaussian)
    loc, variance = _moments(sums, p.loc)
    if emission.scale == "fixed":
        return loc, {}
    used = sums.count > LEAST
    if emission.scale == "shared":
        count = sums.count.sum(0)
        variance = (variance * sums.count).sum(0) / count.clamp(min=LEAST)
        used, before = count > LEAST, p.scale[0]
    else:
        before = p.scale
    scale = torch.where(used, variance.sqrt().clamp(min=emission.min_scale), before)
    r = inverse_softplus((scale - emission.min_scale).clamp(min=1e-12))
    return (torch.cat([loc, r], -1), {}) if emission.scale == "learned" else (loc, {"raw_scale": r})


def _joint_estimate(
    emission: MultivariateGaussian, p: D.MultivariateNormal, sums: Sums
) -> tuple[Tensor, Tensor]:
    """Means and covariances, of the kind that the emission says."""
    before = p.scale_tril @ p.scale_tril.mT
    count = sums.count.clamp(min=LEAST)[:, None, None]
    used = (sums.count > LEAST)[:, None, None]
    change = torch.where(used[..., 0], sums.first / count[..., 0], 0.0)
    S = sums.second / count - change.unsqueeze(-1) * change.unsqueeze(-2)
    floor = 1.0001 * emission.min_scale**2
    if emission.covariance == "tied":
        S = (S * sums.count[:, None, None]).sum(0) / sums.count.sum().clamp(min=LEAST)
        return p.loc + change, floored(S, floor).expand_as(before)
    variance = S.diagonal(dim1=-2, dim2=-1)
    if emission.covariance == "full":
        S = torch.stack([floored(one, floor) for one in torch.where(used, S, before)])
    elif emission.covariance == "diagonal":
        S = torch.diag_embed(variance.clamp(min=floor))
    else:
        S = torch.diag_embed(variance.mean(-1, keepdim=True).clamp(min=floor).expand_as(variance))
    return p.loc + change, torch.where(used, S, before)


def log_share(counts: Tensor, before: Tensor) -> Tensor:
    """Log-probabilities over the last axis in proportion to expected counts; as before where there are none."""
    total = counts.sum(-1, keepdim=True)
    share = (counts / total.clamp(min=1e-300)).clamp(min=1e-16).log()
    return torch.where(total > LEAST, share, before.log_softmax(-1).to(share))


@torch.no_grad()
def start_from_clusters(
    head: EmissionHead, sequences: list[tuple[Tensor, Tensor]], states: int, generator: torch.Generator
) -> None:
    """Set a head that reads one-hot codes to the clusters of all frames."""
    x, observed, weights = clusters_of(head.emission, sequences, states, generator)
    device = head.linear.weight.device
    x, observed, weights = x.to(device).double(), observed.to(device), weights.to(device)
    count = observed.sum(0).clamp(min=1)
    mean = torch.where(observed, x, 0.0).sum(0) / count
    stddev = (torch.where(observed, x - mean, 0.0).square().sum(0) / count).sqrt()
    head.linear.weight.zero_()
    head.start(mean, torch.where(stddev > 0, stddev, 1.0))  # what missing values are completed by
    p = emission_of_states(head, states)
    estimate(head, p, statistics(head.emission, p, x, observed, weights))
