r"""Expected least squares: the M-step of everything that is linear and Gaussian.

For :math:`y = \Theta w + e`, :math:`e \sim \mathcal N(0, S)`, with y and w uncertain, the expected log-likelihood is a
function of a few sums. They are kept for the error at the current :math:`\Theta`, which loses no digits to the size of
y and w.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Regression(NamedTuple):
    r"""Sums over cases, of G groups of rows of :math:`\Theta`; groups have cases of their own.

    Attributes:
        count: how many cases.
        ww: :math:`\sum \mathbb{E}[w w^\top]`.
        ew: :math:`\sum \mathbb{E}[e w^\top]` at the current :math:`\Theta`.
        ee: :math:`\sum \mathbb{E}[e e^\top]`.
    """

    count: Float[Tensor, " G"]
    ww: Float[Tensor, "G k k"]
    ew: Float[Tensor, "G r k"]
    ee: Float[Tensor, "G r r"]


def solve(
    stat: Regression, free: Bool[Tensor, "n k"] | None, S: Float[Tensor, "n n"] | None
) -> Float[Tensor, "n k"]:
    r"""The change of :math:`\Theta` that maximises the expected log-likelihood, where it is free to change.

    Args:
        stat: G groups of r rows, n = G r.
        free: False where an entry is held; None: all are free.
        S: covariance of the errors, which couples the rows if some entries of them are held; None: rows do not matter
            to each other.

    What the cases do not determine (collinear regressors) stays as it is.
    """
    G, r, k = stat.ew.shape
    if free is None or bool(free.all()):
        return (_pinv(stat.ww) @ stat.ew.mT).mT.reshape(G * r, k)
    mask = free.to(stat.ww)
    if r == 1 or S is None or bool((S == torch.diag(S.diagonal())).all()):
        ww = stat.ww.repeat_interleave(r, 0) * mask.unsqueeze(-1) * mask.unsqueeze(-2)
        return mask * (_pinv(ww) @ (stat.ew.reshape(-1, k) * mask).unsqueeze(-1)).squeeze(-1)
    W = torch.linalg.pinv(S, hermitian=True)
    flat = mask.flatten()
    system = torch.kron(W, stat.ww[0]) * torch.outer(flat, flat)
    return (flat * (_pinv(system) @ ((W @ stat.ew[0]).flatten() * flat))).reshape(r, k)


def spread(stat: Regression, change: Float[Tensor, "n k"]) -> Float[Tensor, "G r r"]:
    r"""The mean of :math:`\mathbb{E}[e e^\top]` after a change of :math:`\Theta`: the covariance of each group."""
    change = change.reshape(stat.ew.shape)
    cross = change @ stat.ew.mT
    total = stat.ee - cross - cross.mT + change @ stat.ww @ change.mT
    return 0.5 * (total + total.mT) / stat.count.clamp(min=1e-300)[:, None, None]


def _pinv(M: Tensor) -> Tensor:
    """Of symmetric matrices, after their diagonals have been scaled to one."""
    scale = M.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    outer = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    return torch.linalg.pinv(M / outer, rtol=1e-11, hermitian=True) / outer
