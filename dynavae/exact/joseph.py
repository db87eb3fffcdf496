r"""The Kalman filter and smoother one step after the other, with covariances in Joseph form.

.. math::
    P_{t|t} = (I - K_t C) P_{t|t-1} (I - K_t C)^\top + K_t R K_t^\top, \qquad
    V_t = (I - G_t A) P_{t|t} (I - G_t A)^\top + G_t Q G_t^\top

are sums of positive semidefinite matrices, whatever error the gain has, and the error of the gain enters squared.
V_t is the covariance of :math:`p(z_t \mid z_{t+1}, x_{1:t})`, so that
:math:`P_{t|T} = V_t + G_t P_{t+1|T} G_t^\top`.

Reference: Bucy and Joseph, Filtering for Stochastic Processes with Applications to Guidance, 1968.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynavae.exact._algebra import (
    cholesky,
    gaussian_log_density,
    into_later,
    matvec,
    per_step,
    regular_cholesky,
    symmetric,
)
from dynavae.exact._results import Filtered, Smoothed
from dynavae.exact.linear_gaussian import Emission, LinearGaussian


def joseph_update(P: Tensor, C: Tensor, R: Tensor, t: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gain, filtered covariance and Cholesky factor of S, from the predicted covariance."""
    PC = P @ C.mT
    L = cholesky(symmetric(PC.mT @ C.mT + R), "S_t = C P C' + R", t)
    return (*joseph_gain(P, PC, C, R, L), L)


def joseph_gain(P: Tensor, PC: Tensor, C: Tensor, R: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and filtered covariance, of S = L L'.

    Constant matrices stand on the right, where a product of many matrices with one is one product.
    """
    K = torch.cholesky_solve(PC.mT, L).mT
    return K, joseph_form(P, K, PC, C, R)


def joseph_form(P: Tensor, K: Tensor, PC: Tensor, C: Tensor, R: Tensor) -> Tensor:
    """(I - KC) P (I - KC)' + K R K', with PC = P C'. As D = (I - KC) P it is D - (D C' - K R) K': half the products."""
    if P.ndim > 2 and C.ndim == R.ndim == 2:
        shape = P.shape
        P, K, PC = (a.flatten(0, -3) for a in (P, K, PC))
        D = torch.baddbmm(P, K, PC.mT, alpha=-1)
        return symmetric(torch.baddbmm(D, D @ C.mT - K @ R, K.mT, alpha=-1)).view(shape)
    D = P - K @ PC.mT
    return symmetric(D - (D @ C.mT - K @ R) @ K.mT)


def joseph_filter(params: LinearGaussian, emission: Emission, f: Tensor) -> Filtered:
    """Filter; `f` (T, B, z_dim) is what is known of each transition."""
    T, B, _ = f.shape
    m, P = params.m0.expand(B, -1), params.P0.expand(B, -1, -1)
    predicted, updated, innovations, factors = [], [], [], []
    steps = zip(
        *(per_step(M, T) for M in (params.A, params.Q, emission.C, emission.R)),
        f.unbind(0), emission.y.unbind(0), strict=True,
    )  # fmt: skip
    for t, (A, Q, C, R, f_t, y) in enumerate(steps):
        if t > 0:
            m, P = matvec(A, m) + f_t, symmetric(A @ P @ A.mT + Q)
        predicted.append((m, P))
        e = y - matvec(C, m)
        K, P, L = joseph_update(P, C, R, t)
        m = m + matvec(K, e)
        updated.append((m, P))
        innovations.append(e)
        factors.append(L)
    log_likelihood = gaussian_log_density(torch.stack(innovations), torch.stack(factors), emission.seen)
    means, covariances = (torch.stack(moment) for moment in zip(*updated, strict=True))
    predicted_means, predicted_covariances = (torch.stack(moment) for moment in zip(*predicted, strict=True))
    return Filtered(means, covariances, predicted_means, predicted_covariances, log_likelihood)


def reversed_kernel(params: LinearGaussian, filtered: Filtered) -> tuple[Tensor, Tensor]:
    """Gain G_t and covariance V_t of p(z_t | z_{t+1}, x_1:t) = N(m_{t|t} + G_t (z_{t+1} - m_{t+1|t}), V_t)."""
    A, Q, P = into_later(params.A), into_later(params.Q), filtered.covariance[:-1]
    L = regular_cholesky(filtered.predicted_covariance[1:], "P_{t+1|t} = A P A' + Q")
    PA = P @ A.mT
    G = torch.cholesky_solve(PA.mT, L).mT
    return G, joseph_form(P, G, PA, A, Q)


def joseph_smoother(params: LinearGaussian, filtered: Filtered) -> Smoothed:
    """Smooth what was filtered."""
    gain, spread = reversed_kernel(params, filtered)
    m, P = filtered.mean[-1], filtered.covariance[-1]
    means, covariances = [m], [P]
    past = zip(
        filtered.mean[:-1].unbind(0), filtered.predicted_mean[1:].unbind(0), gain.unbind(0), spread.unbind(0),
        strict=True,
    )  # fmt: skip
    for filtered_mean, predicted_mean, G, V in reversed(list(past)):
        m = filtered_mean + matvec(G, m - predicted_mean)
        P = symmetric(V + G @ P @ G.mT)
        means.append(m)
        covariances.append(P)
    covariance = torch.stack(covariances[::-1])
    return Smoothed(torch.stack(means[::-1]), covariance, gain, covariance[1:] @ gain.mT)
