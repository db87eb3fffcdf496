"""Covariances of a model that does not change, with complete data, as loops that Numba compiles.

`first` and `last` are steps here.
"""

from __future__ import annotations

import math

import numpy as np

from dynavae.exact._kalman_kernels import _copy, _gain, _joseph, _times
from dynavae.exact._numba import Array, kernel, numbers, vector


@kernel(*[numbers] * 5, "float64", *[vector] * 4)
def riccati(
    first: int, last: int, P0: Array, A: Array, Q: Array, C: Array, R: Array, tolerance: float,
    predicted: Array, gain: Array, filtered: Array, factor: Array,
) -> int:  # fmt: skip
    """Fill the first `last` of the last four (T, ., .) for complete data, or fewer, until nothing changes; their number.

    Minus one less than the number if S_t is not positive definite. `tolerance` is in units of standard deviations.
    """
    x, z = C.shape
    H, V, F, N = np.empty((x, z)), np.empty((x, x)), np.empty((z, z)), np.empty((z, z))
    P, P_f, FP, D, d = np.empty((z, z)), np.empty((z, z)), np.empty((z, z)), np.empty((z, z)), np.empty(z)
    S, L, PC, K, E = np.empty((x, x)), np.zeros((x, x)), np.empty((z, x)), np.empty((z, x)), np.empty((z, x))
    _copy(C, H)
    _copy(A, F)
    for i in range(x):
        for j in range(x):
            V[i, j] = 0.5 * (R[i, j] + R[j, i])
    for i in range(z):
        for j in range(z):
            N[i, j] = 0.5 * (Q[i, j] + Q[j, i])
    _copy(P0, P)
    for t in range(last):
        if not _gain(P, H, V, PC, S, L, K, z, x):
            return -t - 1
        _joseph(P, K, PC, H, V, D, E, P_f, z, x)
        _copy(P, predicted[t])
        _copy(K, gain[t])
        _copy(P_f, filtered[t])
        _copy(L, factor[t])
        for i in range(x):
            factor[t, i, i] = 1.0 / L[i, i]
        for i in range(z):
            d[i] = math.sqrt(max(P[i, i], 0.0))
        _times(F, P_f, FP, z, z, z)
        steady = True
        for i in range(z):
            for j in range(i + 1):
                s = N[i, j]
                for a in range(z):
                    s += FP[i, a] * F[j, a]
                if not abs(s - P[i, j]) <= tolerance * d[i] * d[j]:
                    steady = False
                P[i, j] = P[j, i] = s
        if steady:
            return t + 1
    return last


@kernel(vector, vector, "float64", vector, vector)
def smoothed_covariances(
    first: int, last: int, gain: Array, spread: Array, tolerance: float, early: Array, late: Array
) -> int:
    """P_t = V_t + G_t P_{t+1} G_t' of one model from the last of `late` (T, ., .) on, which is given, back in time.

    There are N gains, the last of them of all later steps. Step N is the first of `late` that is filled: its index is
    returned, 0 unless nothing changed any more before it was reached. Steps 1, ..., N - 1 are put into `early`.
    """
    (N, z, _), T = gain.shape, len(late)
    G, V, P, GP = np.empty((z, z)), np.empty((z, z)), np.empty((z, z)), np.empty((z, z))
    _copy(late[T - 1], P)
    _copy(gain[N - 1], G)
    _copy(spread[N - 1], V)
    start = T - 1
    for t in range(T - 2, -1, -1):
        _times(G, P, GP, z, z, z)
        steady = True
        for i in range(z):
            for j in range(i + 1):
                s = V[i, j]
                for a in range(z):
                    s += GP[i, a] * G[j, a]
                if not abs(s - late[t + 1, i, j]) <= tolerance * math.sqrt(
                    max(late[t + 1, i, i], 0.0) * max(late[t + 1, j, j], 0.0)
                ):
                    steady = False
                late[t, i, j] = late[t, j, i] = s
        _copy(late[t], P)
        start = t
        if steady:
            break
    for t in range(N - 2, -1, -1):
        _copy(gain[t], G)
        _times(G, P, GP, z, z, z)
        for i in range(z):
            for j in range(i + 1):
                s = spread[t, i, j]
                for a in range(z):
                    s += GP[i, a] * G[j, a]
                P[i, j] = P[j, i] = s
        _copy(P, early[t])
    return start
