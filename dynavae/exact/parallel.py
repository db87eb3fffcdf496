r"""The Kalman filter and smoother in O(log T) batched calls, by an associative scan over time.

The element of step t says what the step makes of a state before it, which it reads, and what it says about that state:

.. math::
    p(z_t \mid x_t, z_{t-1}) = N(A z_{t-1} + b, C), \qquad
    p(x_t \mid z_{t-1}) \propto \exp(\eta^\top z_{t-1} - \tfrac12 z_{t-1}^\top J z_{t-1})

Two elements in a row are one element again, and a product of the first t of them is the filter. The smoother is a product of
the maps :math:`z_{t+1} \mapsto N(G_t z_{t+1} + g_t, V_t)` from the end.

Reference: Särkkä and García-Fernández, Temporal Parallelization of Bayesian Smoothers, 2021, arXiv:1905.13002.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynavae.exact._algebra import cholesky, gaussian_log_density, into_later, matvec, symmetric
from dynavae.exact._results import Filtered, Smoothed
from dynavae.exact.joseph import joseph_update, reversed_kernel
from dynavae.exact.linear_gaussian import Emission, LinearGaussian
from dynavae.exact.scan import associative_scan


class Step(NamedTuple):
    """What one or more steps of the filter do, as above."""

    A: Tensor
    b: Tensor
    C: Tensor
    eta: Tensor
    J: Tensor


class Backward(NamedTuple):
    """What one or more steps of the smoother do: z -> N(G z + g, V)."""

    G: Tensor
    g: Tensor
    V: Tensor


def steps_of(params: LinearGaussian, emission: Emission, f: Tensor) -> Step:
    """The elements of all steps. The first reads no state: A = 0, and (b, C) are the update of (m0, P0)."""
    T, B, z = f.shape
    H, R = emission.C, emission.R
    # Before the first step the state is m0 with no spread, and the step adds P0: the first is like any other then.
    later = torch.arange(T, device=f.device).view(T, 1, 1, 1) > 0
    F = torch.where(later, params.A, 0.0).expand(T, B, z, z)
    Q = torch.where(later, params.Q, params.P0).expand(T, B, z, z)
    c = torch.where(later.squeeze(-1), f, params.m0)
    HQ = H @ Q
    L = cholesky(symmetric(HQ @ H.mT + R), "C Q C' + R, which the parallel form needs,")
    e = emission.y - matvec(H, c)
    HF = H @ F
    solved = torch.cholesky_solve(torch.cat([HQ, HF, e.unsqueeze(-1)], -1), L)
    K, information, weighted = solved[..., :z].mT, solved[..., z:-1], solved[..., -1]
    keep = torch.eye(z, dtype=f.dtype, device=f.device) - K @ H
    return Step(
        A=keep @ F,
        b=c + matvec(K, e),
        C=symmetric(keep @ Q @ keep.mT + K @ R @ K.mT),
        eta=matvec(HF.mT, weighted),
        J=symmetric(HF.mT @ information),
    )


def in_sequence(i: Step, j: Step) -> Step:
    """The step that does i and then j."""
    eye = torch.eye(i.C.shape[-1], dtype=i.C.dtype, device=i.C.device)
    right = torch.cat([i.A, i.C, (i.b + matvec(i.C, j.eta)).unsqueeze(-1)], -1)
    solved = torch.linalg.solve(eye + i.C @ j.J, right)  # (I + C J)^-1 [A, C, b + C eta]
    n = eye.shape[-1]
    A, C, b = solved[..., :n], solved[..., n:-1], solved[..., -1]
    # With D = (I + C J)^-1: A_i' (I + J C)^-1 v = (D A_i)' v.
    return Step(
        A=j.A @ A,
        b=matvec(j.A, b) + j.b,
        C=symmetric(j.A @ C @ j.A.mT + j.C),
        eta=matvec(A.mT, j.eta - matvec(j.J, i.b)) + i.eta,
        J=symmetric(A.mT @ j.J @ i.A + i.J),
    )


def backward_in_sequence(i: Backward, j: Backward) -> Backward:
    """The map that does j, the later one, and then i."""
    return Backward(i.G @ j.G, matvec(i.G, j.g) + i.g, symmetric(i.G @ j.V @ i.G.mT + i.V))


def parallel_filter(params: LinearGaussian, emission: Emission, f: Tensor) -> Filtered:
    """Filter; `f` (T, B, z_dim) is what is known of each transition."""
    _, B, z = f.shape
    prefix = associative_scan(in_sequence, steps_of(params, emission, f))
    m, P = prefix.b[:-1], prefix.C[:-1]
    A, Q = into_later(params.A), into_later(params.Q)
    predicted_m = torch.cat([params.m0.expand(1, B, z), matvec(A, m) + f[1:]])
    predicted_P = torch.cat([params.P0.expand(1, B, z, z), symmetric(A @ P @ A.mT + Q)])
    # One step of the ordinary filter, of all t at once, from these predictions: what the scan rounded off fades.
    e = emission.y - matvec(emission.C, predicted_m)
    K, P, L = joseph_update(predicted_P, emission.C, emission.R)
    log_likelihood = gaussian_log_density(e, L, emission.seen)
    return Filtered(predicted_m + matvec(K, e), P, predicted_m, predicted_P, log_likelihood)


def parallel_smoother(params: LinearGaussian, filtered: Filtered) -> Smoothed:
    """Smooth what was filtered."""
    G, V = reversed_kernel(params, filtered)
    m, P = filtered.mean, filtered.covariance
    g = m[:-1] - matvec(G, filtered.predicted_mean[1:])
    last = Backward(torch.zeros_like(P[-1:]), m[-1:], P[-1:])
    elements = Backward(*(torch.cat(pair) for pair in zip(Backward(G, g, V), last, strict=True)))
    suffix = associative_scan(backward_in_sequence, elements, reverse=True)
    return Smoothed(suffix.g, suffix.V, G, suffix.V[1:] @ G.mT)
