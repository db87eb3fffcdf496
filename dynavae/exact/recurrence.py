r"""The linear recurrences :math:`h_t = F_t h_{t-1} + v_t` and :math:`P_t = F_t P_{t-1} F_t^\top + V_t` with few calls.

Blocks of time run side by side: within a block of about :math:`\sqrt T` steps the recurrence starts from zero, for all
blocks at once, together with the products of the F_t; then the last states are carried from block to block, and added to
what is in the block, times these products. About :math:`2 \sqrt T` calls that follow one another. From where F no longer
changes on, all blocks have the same matrices: they are columns of one product, and the products are powers. If few numbers
follow it, there are no blocks: each product doubles the number of steps that are summed (Hillis and Steele, 1986).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LOOP, WIDE, MANY, LARGE, NARROW = 24, 384, 8, 512, 16
"""A plain loop is as fast up to LOOP steps, or if one state of all columns has WIDE numbers, or if there are MANY matrices
per step, or one covariance of all has LARGE numbers; with one F, doublings are faster than blocks up to NARROW numbers
(measured on a 2-core CPU)."""


def linear_recurrence(
    F: Float[Tensor, "N *batch z z"], v: Float[Tensor, "T *batch z n"], reverse: bool = False
) -> Float[Tensor, "T *batch z n"]:
    r""":math:`h_1 = v_1,\ h_t = F_t h_{t-1} + v_t`; in reverse, :math:`h_T = v_T,\ h_t = F_t h_{t+1} + v_t`.

    Differentiable, any number of times.

    Args:
        F: matrices of the first N <= T steps; the last of them is that of all later ones. The one of step 1 (in reverse, of
            step T) is not read.
        v: what is added. Its n columns share the matrices: as many sequences, say, or one of each sequence of a batch.
        reverse: run from the end.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> linear_recurrence(torch.full((4, 1, 1), 2.0), torch.ones(4, 1, 1)).flatten()
        tensor([ 1.,  3.,  7., 15.])
        >>> linear_recurrence(torch.full((1, 1, 1), 2.0), torch.ones(4, 1, 1)).flatten()
        tensor([ 1.,  3.,  7., 15.])
    """
    if F.shape[1:-1] != v.shape[1:-1] or F.shape[-1] != F.shape[-2] or not 1 <= len(F) <= len(v):
        raise ValueError(
            f"F should have shape (N, ..., z, z), N <= T, for v (T, ..., z, n) = {tuple(v.shape)}; got {tuple(F.shape)}."
        )
    return _Recurrence.apply(F, v, reverse)  # type: ignore[no-any-return]


def congruence_recurrence(
    F: Float[Tensor, "T *batch z z"], V: Float[Tensor, "T *batch z z"], reverse: bool = False
) -> Float[Tensor, "T *batch z z"]:
    r""":math:`P_1 = V_1,\ P_t = F_t P_{t-1} F_t^\top + V_t`, as covariances propagate; or the same from the end.

    Differentiable, any number of times.

    Args:
        F: matrices. The one of the first step (in reverse, of the last) is not read.
        V: what is added.
        reverse: run from the end.

    Example:
        >>> congruence_recurrence(torch.full((3, 1, 1), 2.0), torch.ones(3, 1, 1)).flatten()
        tensor([ 1.,  5., 21.])
    """
    return _Congruence.apply(F, V, reverse)  # type: ignore[no-any-return]


class _Recurrence(torch.autograd.Function):
    """Its adjoint is the recurrence in the other direction, with transposed matrices."""

    @staticmethod
    def forward(ctx: Any, F: Tensor, v: Tensor, reverse: bool) -> Tensor:
        h = solve(F.reshape(len(F), -1, *F.shape[-2:]), v.reshape(len(v), -1, *v.shape[-2:]).clone(), reverse)
        h = h.reshape(v.shape)
        ctx.save_for_backward(F, h)
        ctx.reverse = reverse
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        F, h = ctx.saved_tensors
        N = len(F)
        if ctx.reverse:  # F_{t-1}' into step t
            adjoint = linear_recurrence(torch.cat([F[:1], F])[: len(h)].mT, grad)
            dF = products(adjoint[:-1], h[1:], N)
            return torch.cat([dF, torch.zeros_like(F[len(dF) :])]), adjoint, None
        adjoint = linear_recurrence((F[1:] if N > 1 else F).mT, grad, reverse=True)  # F_{t+1}'
        dF = products(adjoint[1:], h[:-1], max(N - 1, 1))
        return torch.cat([torch.zeros_like(F[: N - len(dF)]), dF]), adjoint, None


class _Congruence(torch.autograd.Function):
    """Its adjoint is the congruence in the other direction, with transposed matrices."""

    @staticmethod
    def forward(ctx: Any, F: Tensor, V: Tensor, reverse: bool) -> Tensor:
        P = _congruences(F.reshape(len(F), -1, *F.shape[-2:]), V.reshape(len(V), -1, *V.shape[-2:]), reverse)
        P = P.reshape(V.shape)
        ctx.save_for_backward(F, P)
        ctx.reverse = reverse
        return P

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        F, P = ctx.saved_tensors
        moved = torch.cat([F[:1], F[:-1]] if ctx.reverse else [F[1:], F[:1]])
        adjoint = congruence_recurrence(moved.mT, grad, not ctx.reverse)
        here, before = (slice(-1), slice(1, None)) if ctx.reverse else (slice(1, None), slice(-1))
        dF = adjoint[here] @ F[here] @ P[before].mT + adjoint[here].mT @ F[here] @ P[before]
        unread = torch.zeros_like(F[:1])
        return torch.cat([dF, unread] if ctx.reverse else [unread, dF]), adjoint, None


def products(a: Tensor, b: Tensor, N: int) -> Tensor:
    """a_t b_t' of the first N steps, the sum of all later ones added to the last: (T, ..., z, n) to (N, ..., z, z)."""
    if len(a) <= N:
        return a @ b.mT
    rest = torch.einsum("t...in,t...jn->...ij", a[N - 1 :], b[N - 1 :]).unsqueeze(0) if N else a[:0]
    return torch.cat([a[: N - 1] @ b[: N - 1].mT, rest]) if N > 1 else rest


def folded(a: Tensor, N: int) -> Tensor:
    """The first N of a_t, the sum of all later ones added to the last."""
    return a if len(a) <= N else torch.cat([a[: N - 1], a[N - 1 :].sum(0, keepdim=True)])


def solve(F: Tensor, v: Tensor, reverse: bool = False) -> Tensor:
    """The recurrence of F (N <= T, batch, z, z) and v (T, batch, z, n), without a derivative; v may be overwritten."""
    T, N = len(v), min(len(F), len(v))
    if T <= LOOP or v[0].numel() >= WIDE or v.shape[1] >= MANY:
        return _loop(F, v, reverse)
    with torch.inference_mode():  # what leaves it is copied
        if reverse:
            late = _constant(F[N - 1], v[N - 1 : -1], v[-1], reverse)
            early = _blocks(F[: N - 1].flip(0), v[: N - 1].flip(0), late[0] if N < T else v[-1])
            parts = [early.flip(0), late, v[-1:]]
        else:
            early = _blocks(F[1:N], v[1:N], v[0])
            parts = [v[:1], early, _constant(F[-1], v[N:], early[-1] if N > 1 else v[0])]
    return torch.cat(parts)


def _congruences(F: Tensor, V: Tensor, reverse: bool) -> Tensor:
    if reverse:
        return torch.cat([V[-1:], _congruence_blocks(F[:-1].flip(0), V[:-1].flip(0), V[-1])]).flip(0)
    return torch.cat([V[:1], _congruence_blocks(F[1:], V[1:], V[0])])


def _loop(F: Tensor, h: Tensor, reverse: bool) -> Tensor:
    one, N = F.shape[1] == 1, len(F)
    states, matrices = (h[:, 0] if one else h).unbind(0), (F[:, 0] if one else F).unbind(0)
    T = len(states)
    for t in range(T - 2, -1, -1) if reverse else range(1, T):
        before, matrix = states[t + 1 if reverse else t - 1], matrices[min(t, N - 1)]
        if one:
            states[t].addmm_(matrix, before)
        else:
            states[t].baddbmm_(matrix, before)
    return h


def _congruent(V: Tensor, F: Tensor, P: Tensor) -> Tensor:
    return torch.baddbmm(V, torch.bmm(F, P), F.mT)


def _blocks(F: Tensor, v: Tensor, start: Tensor) -> Tensor:
    """h_1, ..., h_T of h_0 = start and h_t = F_t h_{t-1} + v_t.

    Within a block the states that start from zero and the products of the F_t are n + z columns of one recurrence.
    """
    T, batch, z, n = v.shape
    if T <= LOOP:
        h = [start]
        for F_t, v_t in zip(F.unbind(0), v.unbind(0), strict=True):
            h.append(torch.baddbmm(v_t, F_t, h[-1]))
        return torch.stack(h[1:]) if T else v
    size, number = _blocks_of(T)
    columns = v.new_zeros(number * size, batch, z, n + 2 * z)
    columns[:T, ..., :n] = v
    columns[:T, ..., n + z :] = F
    both, F = columns.unflatten(0, (number, size)).transpose(1, 2).flatten(0, 1).split((n + z, z), -1)
    steps, matrices = both.unbind(1), F.unbind(1)
    steps[0][..., n:] = matrices[0]
    for F_k, before, here in zip(matrices[1:], steps[:-1], steps[1:], strict=True):
        here.baddbmm_(F_k, before)
    carried, ends = [start], (a.unflatten(0, (number, batch)).unbind(0) for a in steps[-1].split((n, z), -1))
    for end, across in itertools.islice(zip(*ends, strict=True), number - 1):
        carried.append(torch.baddbmm(end, across, carried[-1]))
    within, products = both.flatten(1, 2).split((n, z), -1)
    h = torch.baddbmm(within, products, torch.cat(carried))
    return _one_after_another(h.unflatten(1, (-1, z)), batch)[:T]


def _congruence_blocks(F: Tensor, V: Tensor, start: Tensor) -> Tensor:
    """P_1, ..., P_T of P_0 = start and P_t = F_t P_{t-1} F_t' + V_t."""
    T, batch = V.shape[:2]
    if T <= LOOP or start.numel() >= LARGE:
        P = [start]
        for F_t, V_t in zip(F.unbind(0), V.unbind(0), strict=True):
            P.append(_congruent(V_t, F_t, P[-1]))
        return torch.stack(P[1:]) if T else V
    F, V = _side_by_side(F), _side_by_side(V)
    number, P, products = len(F) // batch, [V[:, 0]], [F[:, 0]]
    for F_k, V_k in zip(F.unbind(1)[1:], V.unbind(1)[1:], strict=True):
        P.append(_congruent(V_k, F_k, P[-1]))
        products.append(torch.bmm(F_k, products[-1]))
    carried, ends = [start], (a[-1].unflatten(0, (number, batch)).unbind(0) for a in (P, products))
    for end, across in itertools.islice(zip(*ends, strict=True), number - 1):
        carried.append(_congruent(end, across, carried[-1]))
    across = torch.stack(products, 1)
    blocks = torch.stack(P, 1) + across @ torch.cat(carried).unsqueeze(1) @ across.mT
    return _one_after_another(blocks, batch)[:T]


def _blocks_of(T: int) -> tuple[int, int]:
    """Steps of a block, and the number of blocks."""
    size = math.isqrt(T)
    return size, -(-T // size)


def _side_by_side(a: Tensor) -> Tensor:
    """(T, batch, ., .) as blocks of time (number * batch, size, ., .); zeros fill the last one."""
    T, (size, number) = len(a), _blocks_of(len(a))
    a = a if number * size == T else torch.cat([a, a.new_zeros(number * size - T, *a.shape[1:])])
    return a.unflatten(0, (number, size)).transpose(1, 2).flatten(0, 1)


def _one_after_another(blocks: Tensor, batch: int) -> Tensor:
    """Blocks of time (number * batch, size, ., .) as (number * size, batch, ., .)."""
    return blocks.unflatten(0, (-1, batch)).transpose(1, 2).flatten(0, 1)


def _constant(F: Tensor, v: Tensor, start: Tensor, reverse: bool = False) -> Tensor:
    """h_1, ..., h_T of h_0 = start (batch, z, n) and h_t = F h_{t-1} + v_t, with one F (batch, z, z); or from the end."""
    if len(v) > LOOP and start.numel() <= NARROW:
        return _constant_doubled(F, v, start, reverse)
    if len(v) > LOOP:
        return _constant_blocks(F, v, start, reverse)
    if not len(v):
        return v
    h = [start]
    for v_t in reversed(v.unbind(0)) if reverse else v.unbind(0):
        h.append(torch.baddbmm(v_t, F, h[-1]))
    return torch.stack(h[:0:-1] if reverse else h[1:])


def _constant_doubled(F: Tensor, v: Tensor, start: Tensor, reverse: bool) -> Tensor:
    """:func:`_constant` in log T calls: what the last m steps put into h_t, plus F^m times the same of h_{t-m}, is 2 m."""
    T, batch, z, n = v.shape
    # Columns are steps, h_0 and then the others (in reverse the other way round), and before h_0 zeros to look back at.
    zeros, steps = n << (T.bit_length() - 1), (T + 1) * n
    at = 0 if reverse else zeros
    h, other = v.new_zeros(2, batch, z, zeros + steps).unbind(0)
    here, there = h.narrow(-1, at, steps), other.narrow(-1, at, steps)
    columns = here.unflatten(-1, (T + 1, n))
    columns.select(-2, T if reverse else 0).copy_(start)
    columns.narrow(-2, 0 if reverse else 1, T).copy_(v.permute(1, 2, 0, 3))
    power, m = F, n
    while m < steps:
        torch.baddbmm(here, power, h.narrow(-1, at + m if reverse else at - m, steps), out=there)
        h, other, here, there, m = other, h, there, here, 2 * m
        power = torch.bmm(power, power) if m < steps else power
    if not math.isfinite(power.sum().item()):  # times the zeros before h_0
        return _constant_blocks(F, v, start, reverse)
    return here.unflatten(-1, (T + 1, n)).narrow(-2, 0 if reverse else 1, T).permute(2, 0, 1, 3)


def _constant_blocks(F: Tensor, v: Tensor, start: Tensor, reverse: bool) -> Tensor:
    """:func:`_constant` in blocks."""
    if reverse:
        return _constant_blocks(F, v.flip(0), start, False).flip(0)
    T, batch, z, n = v.shape
    size = math.isqrt(T)
    number = -(-T // size)
    if number * size > T:
        v = torch.cat([v, v.new_zeros(number * size - T, batch, z, n)])
    # Time within a block first, and all blocks as columns.
    blocks = v.view(number, size, batch, z, n).permute(1, 2, 3, 0, 4).reshape(size, batch, z, number * n)
    steps = blocks.unbind(0)
    for before, here in itertools.pairwise(steps):
        here.baddbmm_(F, before)
    powers = F  # F, F^2, ..., F^size, one below the other
    while powers.shape[1] < size * z:
        powers = torch.cat([powers, torch.bmm(powers, powers[:, -z:])], 1)
    powers = powers[:, : size * z]
    carried, across = [start], powers[:, -z:]
    for end in steps[-1].view(batch, z, number, n).permute(2, 0, 1, 3).contiguous().unbind(0)[:-1]:
        carried.append(torch.baddbmm(end, across, carried[-1]))
    before = torch.stack(carried, 2).view(batch, z, number * n)
    blocks += torch.bmm(powers, before).view(batch, size, z, number * n).transpose(0, 1)
    return blocks.view(size, batch, z, number, n).permute(3, 0, 1, 2, 4).reshape(-1, batch, z, n)[:T]
