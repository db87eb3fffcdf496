r"""The linear recurrence :math:`h_t = F_t h_{t-1} + v_t` with few calls: blocks of time side by side.

Within a block of about :math:`\sqrt T` steps the recurrence runs from zero, for all blocks at once, together with the
products of the F_t; then the last states are carried from block to block, and added to what is in the block, times
these products. About :math:`2 \sqrt T` calls that follow one another, and as much work again as a loop.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dynavae.exact.scan import associative_scan

LOOP, WIDE, SMALL = 40, 1024, 5
"""A plain loop is as fast up to LOOP steps, or if one state of all columns has WIDE numbers; covariances of
up to SMALL states are vectors (measured on a 2-core CPU)."""


def linear_recurrence(
    F: Float[Tensor, "T *batch z z"], v: Float[Tensor, "T *batch z n"], reverse: bool = False
) -> Float[Tensor, "T *batch z n"]:
    r""":math:`h_1 = v_1,\ h_t = F_t h_{t-1} + v_t`; in reverse, :math:`h_T = v_T,\ h_t = F_t h_{t+1} + v_t`.

    Differentiable, any number of times.

    Args:
        F: matrices. The one of the first step (in reverse, of the last) is not read.
        v: what is added. Its n columns share the matrices: as many sequences, say, or one of each sequence of a batch.
        reverse: run from the end.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> linear_recurrence(torch.full((4, 1, 1), 2.0), torch.ones(4, 1, 1)).flatten()
        tensor([ 1.,  3.,  7., 15.])
    """
    if F.shape[:-1] != v.shape[:-1] or F.shape[-1] != F.shape[-2]:
        raise ValueError(
            f"F should have shape (T, ..., z, z) for v (T, ..., z, n) = {tuple(v.shape)}; got {tuple(F.shape)}."
        )
    return _Recurrence.apply(F, v, reverse)  # type: ignore[no-any-return]


def congruence_recurrence(
    F: Float[Tensor, "T *batch z z"], V: Float[Tensor, "T *batch z z"], reverse: bool = False
) -> Float[Tensor, "T *batch z z"]:
    r""":math:`P_1 = V_1,\ P_t = F_t P_{t-1} F_t^\top + V_t`, as covariances propagate; or the same from the end.

    Small states as a recurrence of vec P with :math:`F \otimes F`, larger ones by an associative scan.

    Args:
        F: matrices. The one of the first step (in reverse, of the last) is not read.
        V: what is added.
        reverse: run from the end.

    Example:
        >>> congruence_recurrence(torch.full((3, 1, 1), 2.0), torch.ones(3, 1, 1)).flatten()
        tensor([ 1.,  5., 21.])
    """
    z = F.shape[-1]
    if z > SMALL:
        first, second = (slice(0, 1), slice(1, None)) if not reverse else (slice(-1, None), slice(0, -1))
        parts = [torch.zeros_like(F[first]), F[second]]
        F = torch.cat(parts[::-1] if reverse else parts)

        def combine(i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            i, j = (j, i) if reverse else (i, j)
            return j[0] @ i[0], j[0] @ i[1] @ j[0].mT + j[1]

        return associative_scan(combine, (F, V), reverse=reverse)[1]
    both = (F[..., :, None, :, None] * F[..., None, :, None, :]).flatten(-2).flatten(-3, -2)
    return linear_recurrence(both, V.flatten(-2).unsqueeze(-1), reverse).reshape(V.shape)


class _Recurrence(torch.autograd.Function):
    """Its adjoint is the recurrence in reverse, with transposed matrices."""

    @staticmethod
    def forward(ctx: Any, F: Tensor, v: Tensor, reverse: bool) -> Tensor:
        T, *batch, z, n = v.shape
        h = solve(F.reshape(T, -1, z, z), v.reshape(T, -1, z, n).clone(), reverse).reshape(T, *batch, z, n)
        ctx.save_for_backward(F, h)
        ctx.reverse = reverse
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        F, h = ctx.saved_tensors
        if ctx.reverse:  # the matrix of the other end is not read
            adjoint = linear_recurrence(torch.cat([F[-1:], F[:-1]]).mT, grad)
            return torch.cat([adjoint[:-1] @ h[1:].mT, torch.zeros_like(F[:1])]), adjoint, None
        adjoint = linear_recurrence(torch.cat([F[1:], F[:1]]).mT, grad, reverse=True)
        return torch.cat([torch.zeros_like(F[:1]), adjoint[1:] @ h[:-1].mT]), adjoint, None


def solve(F: Tensor, v: Tensor, reverse: bool = False) -> Tensor:
    """The recurrence of F (T, batch, z, z) and v (T, batch, z, n), without a derivative; v may be overwritten."""
    if v.numel() // len(v) >= WIDE or len(v) <= LOOP:
        return _loop(F, v, reverse)
    return _blocked(F.flip(0), v.flip(0)).flip(0) if reverse else _blocked(F, v)


def _loop(F: Tensor, h: Tensor, reverse: bool) -> Tensor:
    one = F.shape[1] == 1
    states, matrices = (h[:, 0] if one else h).unbind(0), (F[:, 0] if one else F).unbind(0)
    T = len(states)
    for t in range(T - 2, -1, -1) if reverse else range(1, T):
        before = states[t + 1 if reverse else t - 1]
        if one:
            states[t].addmm_(matrices[t], before)
        else:
            states[t].baddbmm_(matrices[t], before)
    return h


def _blocked(F: Tensor, v: Tensor) -> Tensor:
    T, batch, z, n = v.shape
    size = math.isqrt(T)
    number = -(-T // size)
    missing = number * size - T
    if missing:
        F, v = (torch.cat([a, a.new_zeros(missing, *a.shape[1:])]) for a in (F, v))
    F, v = (a.unflatten(0, (number, size)).transpose(0, 1) for a in (F, v))
    h, products = [v[0].flatten(0, 1)], [F[0].flatten(0, 1)]
    for F_k, v_k in zip(F.flatten(1, 2).unbind(0)[1:], v.flatten(1, 2).unbind(0)[1:], strict=True):
        h.append(torch.baddbmm(v_k, F_k, h[-1]))
        products.append(torch.bmm(F_k, products[-1]))
    ends, steps = (a[-1].unflatten(0, (number, batch)).unbind(0) for a in (h, products))
    carried = [ends[0]]
    for end, step in zip(ends[1:-1], steps[1:-1], strict=True):
        carried.append(torch.baddbmm(end, step, carried[-1]))
    blocks = torch.stack(h, 1).unflatten(0, (number, batch))  # (number, batch, size, z, n)
    across = torch.stack(products, 1).unflatten(0, (number, batch))[1:]  # (number - 1, batch, size, z, z)
    added = torch.bmm(across.reshape(-1, size * z, z), torch.stack(carried).flatten(0, 1))
    blocks[1:] += added.view(number - 1, batch, size, z, n)
    return blocks.transpose(1, 2).reshape(number * size, batch, z, n)[:T]
