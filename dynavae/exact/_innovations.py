r"""The means of a filter whose covariances are known, with a backward written by hand.

One matrix per step takes the predicted mean and the observation to the whitened error and the next prediction,

.. math::
    \begin{pmatrix} w_t \\ m_{t+1|t} \end{pmatrix} = \Omega_t \begin{pmatrix} m_{t|t-1} \\ y_t \end{pmatrix}, \qquad
    \Omega_t = \begin{pmatrix} -L_t^{-1} C & L_t^{-1} \\ A (I - K_t C) & A K_t \end{pmatrix}, \qquad L_t L_t^\top = S_t,

and its transpose takes their adjoints back, so that the derivative of :math:`\Omega_t` is one outer product. Automatic
differentiation would spend its time on copies: of every slice and concatenation of what has T B numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dynavae.exact._algebra import once
from dynavae.exact.recurrence import WIDE, products, solve


class Innovations(torch.autograd.Function):
    """(m0, Omega, y, f) -> predicted means m, whitened errors w: columns (T, batch, ., n).

    Omega (N, batch, x + z, z + x) is of the first N steps, the last of them of all later ones. f_t is added to m_t.
    """

    @staticmethod
    def forward(ctx: Any, m0: Tensor, Omega: Tensor, y: Tensor, f: Tensor | None) -> tuple[Tensor, Tensor]:
        s, white = means(m0, Omega, y, f)
        ctx.save_for_backward(Omega, s, white)
        ctx.set_materialize_grads(False)
        return s[..., : Omega.shape[-1] - y.shape[-2], :], white

    @staticmethod
    @once
    def backward(ctx: Any, of_m: Tensor | None, of_white: Tensor | None) -> tuple[Tensor | None, ...]:
        Omega, s, white = ctx.saved_tensors
        out, first = adjoints(Omega, s, torch.zeros_like(white) if of_white is None else of_white, of_m)
        dy = times(Omega[..., first.shape[-2] :].mT, out) if ctx.needs_input_grad[2] else None
        # Nothing but m0 enters the first state.
        later = out[:-1, ..., white.shape[-2] :, :]
        df = torch.cat([torch.zeros_like(first)[None], later]) if ctx.needs_input_grad[3] else None
        return first, products(out, s, len(Omega)), dy, df


def means(m0: Tensor, Omega: Tensor, y: Tensor, f: Tensor | None) -> tuple[Tensor, Tensor]:
    """All (m_t, y_t), one below the other, and w_t; without a derivative."""
    x, z = y.shape[-2], Omega.shape[-1] - y.shape[-2]
    if _by_steps(y, z):
        return _step_by_step(m0, Omega, y, f)
    with torch.inference_mode():  # what leaves it is copied
        driven = torch.empty(*y.shape[:2], z, y.shape[-1], dtype=y.dtype, device=y.device)
        driven[0] = m0
        driven[1:] = times(Omega[..., x:, z:], y[:-1])
        if f is not None:
            driven[1:] += f[1:]
        # The step into t has the matrix of t - 1.
        F = torch.cat([Omega[:1], Omega])[: len(y), ..., x:, :z]
        m = solve(F, driven)
    s = torch.cat([m, y], -2)
    return s, times(Omega[..., :x, :], s)


def adjoints(Omega: Tensor, s: Tensor, of_white: Tensor, of_m: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Adjoints of what each Omega_t gives, w_t and m_{t+1}, one below the other, and that of the first m."""
    T, x = s.shape[0], of_white.shape[-2]
    z = s.shape[-2] - x
    out = torch.empty(T, s.shape[1], x + z, s.shape[-1], dtype=s.dtype, device=s.device)
    out[..., :x, :] = of_white
    out[-1, ..., x:, :] = 0.0
    back = Omega[..., :z].mT
    if _by_steps(of_white, z):
        matrices, steps = back[:, 0].unbind(0), out[:, 0].unbind(0)
        for t in range(T - 1, 0, -1):
            torch.mm(matrices[min(t, len(Omega) - 1)], steps[t], out=steps[t - 1][x:])
            if of_m is not None:
                steps[t - 1][x:] += of_m[t, 0]
        first = back[0] @ out[0]
        return out, first if of_m is None else first + of_m[0]
    driven = times(back[..., :x], of_white)
    adjoint = solve(back[..., x:], driven if of_m is None else driven.add_(of_m), reverse=True)
    out[:-1, ..., x:, :] = adjoint[1:]
    return out, adjoint[0]


def times(matrices: Tensor, v: Tensor) -> Tensor:
    """Products of v (T, batch, z, n) with matrices (N, batch, x, z) of the first N steps, the last of all later ones."""
    N, T, (batch, z, n) = len(matrices), len(v), v.shape[1:]
    if T <= N:
        return matrices[:T] @ v
    head, last = torch.bmm(matrices[: N - 1].flatten(0, 1), v[: N - 1].flatten(0, 1)), matrices[-1]
    if batch == n == 1:
        return torch.cat([head.squeeze(-1), v[N - 1 :].reshape(-1, z) @ last[0].mT]).view(T, 1, -1, 1)
    return torch.cat([head.unflatten(0, (N - 1, batch)), last @ v[N - 1 :]])


def _by_steps(y: Tensor, z: int) -> bool:
    """Whether a loop over time is fastest: one matrix for many columns."""
    return y.shape[1] == 1 and y.shape[-1] * z >= WIDE


def _step_by_step(m0: Tensor, Omega: Tensor, y: Tensor, f: Tensor | None) -> tuple[Tensor, Tensor]:
    """All (m_t, y_t) and w_t. In memory each step is m_t, y_t, w_t: what Omega_t reads and writes is in one piece."""
    (T, _, x, n), z = y.shape, Omega.shape[-1] - y.shape[-2]
    rows = y.new_empty(T * (z + 2 * x) + z, n)
    read = rows[: T * (z + 2 * x)].view(T, z + 2 * x, n)[:, : z + x]
    written = rows[z + x :][: T * (z + 2 * x) - x].as_strided((T, x + z, n), ((z + 2 * x) * n, n, 1))
    read[:, z:] = y[:, 0]
    read[0, :z] = m0[0]
    matrices = Omega[:, 0].unbind(0)
    for t, (before, after) in enumerate(zip(read.unbind(0), written.unbind(0), strict=True)):
        torch.mm(matrices[min(t, len(Omega) - 1)], before, out=after)
        if f is not None and t + 1 < T:
            after[x:] += f[t + 1, 0]
    return read.unsqueeze(1), written[:, :x].unsqueeze(1)
