"""The Gaussian with a full covariance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynavae import tree
from dynavae.distributions.factorised import LOG_2PI

FEW = 8
"""A pattern of gaps that fewer frames have is not worth a factorisation of its own: those go side by side."""


def in_full(method: Callable[..., Any]) -> Callable[..., Any]:
    """Without autocast: covariances do not stand numbers of 8 bits, for which there is no factorisation either."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **named: Any) -> Any:
        device = self[0].device.type
        if not torch.is_autocast_enabled(device):
            return method(self, *args, **named)
        with torch.autocast(device, enabled=False):
            values = self, *args, *named.values()
            parts = tree.tree_map(lambda a: a.float() if a.dtype == torch.bfloat16 else a, values)
            n = len(args) + 1
            return method(*parts[:n], **dict(zip(named, parts[n:], strict=True)))

    return run


class MultivariateNormal(NamedTuple):
    r"""Gaussian with a full covariance :math:`L L^\top`, L lower triangular."""

    loc: Tensor
    scale_tril: Tensor

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def stddev(self) -> Tensor:
        return self.scale_tril.square().sum(-1).sqrt().expand_as(self.loc)

    @in_full
    def sample(self, noise: Tensor) -> Tensor:
        """Of more noise than coordinates (a mixture takes one number more) the first is read."""
        noise = noise[..., : self.loc.shape[-1]]
        return self.loc + (self.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)

    @in_full
    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """Of the observed coordinates: the sub-block of the covariance, exactly."""
        e = x - self.loc
        traced = torch.compiler.is_compiling()  # no branch may depend on values then
        if observed is None or (not traced and bool(observed.all())):
            return log_density(e, self.scale_tril)
        frames = e.ndim + 1 - self.scale_tril.ndim  # leading axes without a factor of their own
        same = (1,) * (e.ndim - observed.ndim) + observed.shape  # what is missing, in as many axes
        if not traced and frames > 0 and all(size == 1 for size in same[frames:-1]):
            seen = observed.reshape(same[:frames] + same[-1:]).expand(*e.shape[:frames], -1)
            return by_pattern(e.flatten(0, frames - 1), self.scale_tril, seen.flatten(0, -2)).unflatten(
                0, e.shape[:frames]
            )
        return _observed_log_density(e, self.scale_tril, observed)

    @in_full
    def complete(self, x: Tensor, observed: Tensor, noise: Tensor | None = None) -> Tensor:
        """A sample given the observed coordinates, which keep their values; without noise, the mean given these.

        It is a draw of all coordinates, corrected by what it and x differ in.
        """
        loc, L = self.loc, self.scale_tril  # of some kinds both are computed when asked for
        drawn = loc if noise is None else MultivariateNormal(loc, L).sample(noise)
        L = L.double()  # the difference of two covariances that may be close
        covariance, eye = L @ L.mT, torch.eye(x.shape[-1], dtype=L.dtype, device=x.device)
        block = torch.where(observed.unsqueeze(-1) & observed.unsqueeze(-2), covariance, eye)
        difference = torch.where(observed, x - drawn, 0.0).unsqueeze(-1).to(L.dtype)
        across = torch.where(observed.unsqueeze(-2), covariance, 0.0)
        moved = (across @ torch.linalg.solve(block, difference)).squeeze(-1)
        return torch.where(observed, x, drawn + moved.to(drawn.dtype))

    @in_full
    def kl(self, other: Any) -> Tensor | None:
        """The whole divergence, as one coordinate."""
        if not isinstance(other, MultivariateNormal):
            return None
        solve = torch.linalg.solve_triangular
        ratio = solve(other.scale_tril, self.scale_tril.expand(*self.loc.shape, -1), upper=False)
        distance = solve(other.scale_tril, (self.loc - other.loc).unsqueeze(-1), upper=False)
        log_ratio = ratio.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        squares = ratio.square().sum((-2, -1)) + distance.square().sum((-2, -1))
        return (0.5 * (squares - self.loc.shape[-1]) - log_ratio).unsqueeze(-1)


def log_density(e: Tensor, factor: Tensor) -> Tensor:
    """log N(e; 0, L L'), with e (..., n); leading axes that L (*own, n, n) lacks are columns of one solve."""
    frames = e.ndim + 1 - factor.ndim
    if frames > 0:
        columns = e.flatten(0, frames - 1).movedim(0, -1)  # (*own, n, frames)
        squares = torch.linalg.solve_triangular(factor, columns, upper=False).square().sum(-2)
        squares = squares.movedim(-1, 0).unflatten(0, e.shape[:frames])
    else:
        squares = (
            torch.linalg.solve_triangular(factor, e.unsqueeze(-1), upper=False).squeeze(-1).square().sum(-1)
        )
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (squares + LOG_2PI * e.shape[-1]) - log_det


def _observed_log_density(e: Tensor, factor: Tensor, observed: Tensor) -> Tensor:
    """Each with the block of its own observed coordinates, and the identity elsewhere."""
    eye = torch.eye(e.shape[-1], dtype=e.dtype, device=e.device)
    block = observed.unsqueeze(-1) & observed.unsqueeze(-2)
    L = torch.linalg.cholesky(torch.where(block, factor @ factor.mT, eye))
    missing = LOG_2PI * (~observed).to(e.dtype).sum(-1)
    return log_density(torch.where(observed, e, 0.0), L) + 0.5 * missing


def by_pattern(e: Tensor, factor: Tensor, observed: Tensor) -> Tensor:
    """log N of the observed coordinates of e (N, *own, n), frames that miss the same (N, n) at once: (N, *own).

    One factorisation of the observed block of L L' (*own, n, n) serves all frames of a pattern.
    """
    unique, of, number = torch.unique(observed, dim=0, return_inverse=True, return_counts=True)
    covariance = factor @ factor.mT
    order, parts = of.argsort(stable=True), []
    rare = (number < FEW)[of[order]]
    rows = order[rare]
    if len(rows):
        seen = observed[rows].reshape(len(rows), *[1] * (e.ndim - 2), -1)
        parts.append(_observed_log_density(e[rows], factor, seen))
    common = number >= FEW
    for seen, frames in zip(unique[common], order[~rare].split(number[common].tolist()), strict=True):
        index = seen.nonzero().squeeze(-1)
        block = covariance[..., index.unsqueeze(-1), index]
        parts.append(log_density(e[frames][..., index], torch.linalg.cholesky(block)))
    back = torch.empty_like(order)
    back[torch.cat([rows, order[~rare]])] = torch.arange(len(order), device=order.device)
    return torch.cat(parts)[back]
