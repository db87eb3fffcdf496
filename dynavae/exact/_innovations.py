r"""The means of a filter whose covariances are known, with a backward written by hand.

.. math::
    m_{t|t-1} = F_t m_{t-1|t-2} + M_t y_{t-1} + f_t, \qquad e_t = y_t - C_t m_{t|t-1}, \qquad
    q_t = \lVert W_t e_t \rVert^2 = e_t^\top S_t^{-1} e_t

Automatic differentiation would spend its time on copies: of every slice and concatenation of what has T B numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynavae.exact.recurrence import solve


class Innovations(torch.autograd.Function):
    """(m0, F, M, C, W, y, f) -> m, e, q: columns (T, batch, ., n); q is (T, batch, n). F_1 and M_1 are not read."""

    @staticmethod
    def forward(
        ctx: Any, m0: Tensor, F: Tensor, M: Tensor, C: Tensor, W: Tensor, y: Tensor, f: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        T, batch, _, n = y.shape
        driven = y.new_empty(T, batch, F.shape[-1], n)
        driven[0] = m0
        if T > 1:
            if f is None:
                torch.bmm(_flat(M[1:]), _flat(y[:-1]), out=_flat(driven[1:]))
            else:
                torch.baddbmm(_flat(f[1:]), _flat(M[1:]), _flat(y[:-1]), out=_flat(driven[1:]))
        m = solve(F, driven)
        e = torch.baddbmm(_flat(y), _flat(C), _flat(m), alpha=-1).view_as(y)
        white = torch.bmm(_flat(W), _flat(e)).view_as(y)
        ctx.save_for_backward(F, M, C, W, y, m, e, white)
        ctx.set_materialize_grads(False)
        return m, e, white.square().sum(-2)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_m: Tensor | None, of_e: Tensor | None, of_q: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        F, M, C, W, y, m, e, white = ctx.saved_tensors
        dW = None
        if of_q is not None:
            scaled = _flat(white * (2 * of_q).unsqueeze(-2))
            dW = torch.bmm(scaled, _flat(e).mT).view_as(W)
            through = torch.bmm(_flat(W).mT, scaled).view_as(e)
            of_e = through if of_e is None else of_e + through
        dC = None
        if of_e is None:
            adjoint = torch.zeros_like(m) if of_m is None else of_m.clone()
        else:
            adjoint = torch.bmm(-_flat(C).mT, _flat(of_e)).view_as(m)
            adjoint = adjoint if of_m is None else adjoint.add_(of_m)
            dC = -torch.bmm(_flat(of_e), _flat(m).mT).view_as(C)
        adjoint = solve(torch.cat([F[1:], F[:1]]).mT, adjoint, reverse=True)
        dF, dM = torch.zeros_like(F), torch.zeros_like(M)
        dy = None
        if len(y) > 1:
            later = _flat(adjoint[1:])
            dF[1:] = torch.bmm(later, _flat(m[:-1]).mT).view_as(F[1:])
            dM[1:] = torch.bmm(later, _flat(y[:-1]).mT).view_as(M[1:])
        if ctx.needs_input_grad[5]:
            dy = torch.zeros_like(y) if of_e is None else of_e.clone()
            dy[:-1] += M[1:].mT @ adjoint[1:]
        df = None
        if ctx.needs_input_grad[6]:
            df = adjoint.clone()
            df[0] = 0.0  # nothing but m0 enters the first state
        return adjoint[0], dF, dM, dC, dW, dy, df


def _flat(a: Tensor) -> Tensor:
    return a.flatten(0, 1)
