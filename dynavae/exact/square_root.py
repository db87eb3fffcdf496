r"""The Kalman filter and smoother in square-root form: factors of the covariances, never the covariances, are propagated.

With :math:`P = L L^\top`, and :math:`\Theta` orthogonal, from a QR decomposition, so that the right-hand sides are lower
triangular:

.. math::
    \begin{pmatrix} A L_{t-1|t-1} & Q^{1/2} \end{pmatrix} \Theta &= \begin{pmatrix} L_{t|t-1} & 0 \end{pmatrix} \\
    \begin{pmatrix} C L_{t|t-1} & R^{1/2} \\ L_{t|t-1} & 0 \end{pmatrix} \Theta &=
    \begin{pmatrix} S_t^{1/2} & 0 \\ \bar K_t & L_{t|t} \end{pmatrix}, \qquad K_t = \bar K_t S_t^{-1/2} \\
    \begin{pmatrix} A L_{t|t} & Q^{1/2} \\ L_{t|t} & 0 \end{pmatrix} \Theta &=
    \begin{pmatrix} L_{t+1|t} & 0 \\ \bar G_t & V_t^{1/2} \end{pmatrix}, \qquad G_t = \bar G_t L_{t+1|t}^{-1} \\
    \begin{pmatrix} V_t^{1/2} & G_t L_{t+1|T} \end{pmatrix} \Theta &= \begin{pmatrix} L_{t|T} & 0 \end{pmatrix}

A factor has half the orders of magnitude of its covariance: float32 does what float64 does with covariances. What is
large comes first in an array: a reflection then turns a zero into something small without cancellation. Q, P0 and R may be
singular as long as S_t is not.

The derivative of a factor does not exist where it loses rank, but that of everything computed from covariances does. So
values come from the factors, and derivatives from the covariance recursions at those values (:func:`with_derivative`); they
can be taken once.

References: Kaminski, Bryson and Schmidt, Discrete Square Root Filtering, 1971. Park and Kailath, New Square-Root Smoothing
Algorithms, 1996. Kailath, Sayed and Hassibi, Linear Estimation, 2000, chapter 12.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dynavae.exact._algebra import (
    into_later,
    matvec,
    once,
    per_step,
    semidefinite_cholesky,
    symmetric,
)
from dynavae.exact._results import Filtered, Smoothed
from dynavae.exact.linear_gaussian import Emission, LinearGaussian


class _WithDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, derivative: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def with_derivative(value: Tensor, derivative: Tensor) -> Tensor:
    """The number `value` with the derivative of another expression of the same quantity."""
    if not derivative.requires_grad:
        return value
    return _WithDerivative.apply(value, derivative.expand_as(value))  # type: ignore[no-any-return]


@torch.no_grad()
def triangular(*blocks: Tensor) -> Tensor:
    """Lower triangular L, diagonal not negative, with L L' = M M' of the array M of these blocks side by side."""
    lead = torch.broadcast_shapes(*(block.shape[:-2] for block in blocks))
    array = torch.cat([block.expand(*lead, *block.shape[-2:]) for block in blocks], -1)
    L = torch.linalg.qr(array.mT, mode="r").R.mT
    sign = torch.where(L.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return L * sign.unsqueeze(-2).to(L.dtype)


@torch.no_grad()
def root(matrix: Tensor, name: str) -> Tensor:
    """A lower factor of a parameter, taken in float64 where there is that."""
    wide = matrix if matrix.device.type == "mps" else matrix.double()
    factor, info = torch.linalg.cholesky_ex(wide)
    if info.any():
        factor = semidefinite_cholesky(wide, name, eps=torch.finfo(matrix.dtype).eps)
    return factor.to(matrix.dtype)


def stacked(upper: Tensor, lower: Tensor) -> Tensor:
    """One above the other, leading axes broadcast."""
    lead = torch.broadcast_shapes(upper.shape[:-2], lower.shape[:-2])
    return torch.cat([part.expand(*lead, *part.shape[-2:]) for part in (upper, lower)], -2)


def square_root_filter(params: LinearGaussian, emission: Emission, f: Tensor) -> Filtered:
    """Filter; `f` (T, B, z_dim) is what is known of each transition."""
    T, B, z = f.shape
    x = emission.y.shape[-1]
    m, P, L = (
        params.m0.expand(B, -1),
        params.P0.expand(B, -1, -1),
        root(params.P0, "params.P0").expand(B, -1, -1),
    )
    tracked = torch.is_grad_enabled() and any(
        a.requires_grad for a in (*params[:6], f, emission.y) if a is not None
    )
    roots = root(params.Q, "params.Q"), root(emission.R, "params.R")
    fixed = (params.A, params.Q, roots[0], emission.C, emission.R, roots[1])
    steps = zip(*(per_step(M, T) for M in fixed), f.unbind(0), emission.y.unbind(0), strict=True)
    eye = torch.eye(z, dtype=f.dtype, device=f.device)
    outputs: list[tuple[Tensor, ...]] = []
    for t, (A, Q, Q_root, C, R, R_root, f_t, y) in enumerate(steps):
        if t > 0:
            m, L = matvec(A, m) + f_t, triangular(A @ L, Q_root)
            P = with_derivative(L @ L.mT, symmetric(A @ P @ A.mT + Q))
        m_, P_, L_ = m, P, L
        with torch.no_grad():
            noise = torch.cat([R_root, R_root.new_zeros(*R_root.shape[:-2], z, x)], -2)
            post = triangular(stacked(C @ L, L), noise)
            S_root, L = post[..., :x, :x], post[..., x:, x:]
            _check_S(S_root, C, R, t)
            K = torch.linalg.solve_triangular(S_root, post[..., x:, :x], upper=False, left=False)
        e = y - matvec(C, m)
        with torch.no_grad():
            white = torch.linalg.solve_triangular(S_root, e.unsqueeze(-1), upper=False)
            log_det = S_root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            density = (
                -0.5 * (math.log(2 * math.pi) * emission.seen[t] + white.square().sum((-1, -2))) - log_det
            )
        P = L @ L.mT
        if tracked:
            S_inverse = torch.cholesky_inverse(S_root)
            CP = C @ P_
            S = symmetric(CP @ C.mT + R)
            density = with_derivative(density, _density(e, S, S_inverse))
            K = with_derivative(K, (CP - S @ K.mT).mT @ S_inverse)  # dK = (d(P C') - K dS) S^-1
            keep = eye - K.detach() @ C  # the Joseph form does not change with the gain, to first order
            P = with_derivative(P, symmetric(keep @ P_ @ keep.mT + K.detach() @ R @ K.detach().mT))
        m = m + matvec(K, e)
        outputs.append((m, P, m_, P_, density, L, L_))
    return Filtered(*(torch.stack(moment) for moment in zip(*outputs, strict=True)))


def _density(e: Tensor, S: Tensor, S_inverse: Tensor) -> Tensor:
    """An expression with the derivative of log N(e; 0, S), given S^-1 as a constant."""
    a = matvec(S_inverse, e.detach())
    quadratic = 0.5 * (a * matvec(S, a)).sum(-1) - 0.5 * (S_inverse * S).sum((-1, -2))
    return quadratic - (a * e).sum(-1)


def _check_S(S_root: Tensor, C: Tensor, R: Tensor, t: int) -> None:
    bad = ~(S_root.diagonal(dim1=-2, dim2=-1) > 0).all(-1)
    if bad.any():
        raise ValueError(
            f"S_t = C P C' + R is singular at t={t}, sequence {int(bad.nonzero()[0])}. Check that R is positive "
            "definite where the state leaves no uncertainty."
        )


@torch.no_grad()
def reversed_roots(params: LinearGaussian, filtered: Filtered) -> tuple[Tensor, Tensor, Tensor]:
    """Gain G_t, factor of V_t, and P_{t+1|t}^-1 (on its range) of p(z_t | z_{t+1}, x_1:t)."""
    A, Q_root = into_later(params.A), root(into_later(params.Q), "params.Q")
    assert filtered.factor is not None
    L = filtered.factor[:-1]
    z = L.shape[-1]
    lower = torch.cat([L, torch.zeros_like(L)], -1)
    shape = (*L.shape[:-2], z, z)
    upper = torch.cat([A @ L, Q_root.expand(shape)], -1)
    post = triangular(torch.cat([upper, lower], -2))
    L_next, G_bar, V_root = post[..., :z, :z], post[..., z:, :z], post[..., z:, z:]
    # Rows of one length: then a small singular value means dependence, not a small unit.
    length = L_next.norm(dim=-1, keepdim=True)
    length = torch.where(length > 0, length, 1.0)
    scaled = L_next / length
    small = 8 * z * torch.finfo(L.dtype).eps
    if (scaled.diagonal(dim1=-2, dim2=-1) > small).all():
        inverse = (
            torch.linalg.solve_triangular(scaled, torch.eye(z).to(L).expand(shape), upper=False) / length.mT
        )
        return G_bar @ inverse, V_root, inverse.mT @ inverse
    inverse = torch.linalg.pinv(scaled, rtol=small) / length.mT
    G = G_bar @ inverse
    # Where L_{t+1|t} has no rank, a column of G_bar is free and belongs to V.
    return G, triangular(V_root, G_bar - G @ L_next), inverse.mT @ inverse


def reversed_kernel_of_roots(params: LinearGaussian, filtered: Filtered) -> tuple[Tensor, Tensor, Tensor]:
    """Gain G_t, covariance V_t and its factor, of p(z_t | z_{t+1}, x_1:t)."""
    G, V_root, inverse = reversed_roots(params, filtered)
    A, Q = into_later(params.A), into_later(params.Q)
    P_f, P_next = filtered.covariance[:-1], filtered.predicted_covariance[1:]
    keep = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device) - G @ A
    V = with_derivative(V_root @ V_root.mT, symmetric(keep @ P_f @ keep.mT + G @ Q @ G.mT))
    return with_derivative(G, (A @ P_f - P_next @ G.mT).mT @ inverse), V, V_root


def square_root_smoother(params: LinearGaussian, filtered: Filtered) -> Smoothed:
    """Smooth what was filtered in square-root form."""
    assert filtered.factor is not None
    G, V, V_root = reversed_kernel_of_roots(params, filtered)
    m, P, L = filtered.mean[-1], filtered.covariance[-1], filtered.factor[-1]
    outputs = [(m, P, L)]
    columns = (filtered.mean[:-1], filtered.predicted_mean[1:], G, V, V_root)
    past = zip(*(column.unbind(0) for column in columns), strict=True)
    for m_f, m_next, G_t, V_t, V_t_root in reversed(list(past)):
        m = m_f + matvec(G_t, m - m_next)
        L = triangular(V_t_root, G_t @ L)
        P = with_derivative(L @ L.mT, symmetric(V_t + G_t @ P @ G_t.mT))
        outputs.append((m, P, L))
    means, covariance, factor = (torch.stack(part[::-1]) for part in zip(*outputs, strict=True))
    return Smoothed(means, covariance, G, covariance[1:] @ G.mT, factor)
