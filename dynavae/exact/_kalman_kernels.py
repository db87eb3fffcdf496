r"""The Kalman filter and smoother and their adjoints as loops over numbers, which Numba compiles.

Called by :mod:`dynavae.exact.compiled`, for the sequences `first`, ..., `last` - 1. Steps come one after the other, and in
each the sequences: that is their order in memory. Every array is (T, B, ...), or without T, and may have strides of 0: a
parameter that all steps or sequences share is one array seen everywhere, and what is added to its gradient adds up.

Of the x coordinates of a frame the k observed ones are taken, C, R and y with them: others enter nothing.
"""

from __future__ import annotations

import math

import numpy as np

from dynavae.exact._numba import Array, helper, kernel, mask, matrix, numbers, vector

EPS = float(np.finfo(np.float64).eps)


@helper
def _cholesky(S: Array, L: Array, n: int) -> bool:
    """L L' = S, with the reciprocal of its diagonal in L; False unless S is positive definite."""
    for i in range(n):
        for j in range(i + 1):
            s = S[i, j]
            for a in range(j):
                s -= L[i, a] * L[j, a]
            if i > j:
                L[i, j] = s * L[j, j]
            elif s > 0.0 and s < math.inf:
                L[i, i] = 1.0 / math.sqrt(s)
            else:
                return False
    return True


@helper
def _regular_cholesky(S: Array, L: Array, n: int) -> bool:
    """As :func:`dynavae.exact._algebra.regular_cholesky`: where a pivot vanishes, one is added. False if S is indefinite."""
    largest = 0.0
    for i in range(n):
        largest = max(largest, abs(S[i, i]))
    for j in range(n):
        s = S[j, j]
        for a in range(j):
            s -= L[j, a] * L[j, a]
        tiny = 16 * n * EPS * abs(S[j, j])
        alive = s > tiny
        if not (s < math.inf and s > -math.sqrt(EPS) * largest):
            return False
        L[j, j] = 1.0 / math.sqrt(s if alive else S[j, j] if S[j, j] > 0.0 else 1.0)
        for i in range(j + 1, n):
            c = S[i, j]
            for a in range(j):
                c -= L[i, a] * L[j, a]
            if alive:
                L[i, j] = c * L[j, j]
            else:
                L[i, j] = 0.0
                if not abs(c) <= math.sqrt(EPS) * largest:
                    return False
    return True


@helper
def _solve_rows(L: Array, rows: Array, out: Array, m: int, n: int) -> None:
    """out = rows (L L')^-1 of m rows, L as :func:`_cholesky` leaves it."""
    for i in range(m):
        for j in range(n):
            s = rows[i, j]
            for a in range(j):
                s -= L[j, a] * out[i, a]
            out[i, j] = s * L[j, j]
        for j in range(n - 1, -1, -1):
            s = out[i, j]
            for a in range(j + 1, n):
                s -= L[a, j] * out[i, a]
            out[i, j] = s * L[j, j]


@helper
def _times(X: Array, Y: Array, out: Array, m: int, n: int, p: int) -> None:
    """out (m, p) = X (m, n) Y (n, p)."""
    for i in range(m):
        for j in range(p):
            s = 0.0
            for a in range(n):
                s += X[i, a] * Y[a, j]
            out[i, j] = s


@helper
def _times_transposed(X: Array, Y: Array, out: Array, m: int, n: int, p: int) -> None:
    """out (m, p) = X (m, n) Y' of Y (p, n)."""
    for i in range(m):
        for j in range(p):
            s = 0.0
            for a in range(n):
                s += X[i, a] * Y[j, a]
            out[i, j] = s


@helper
def _transposed_times(X: Array, Y: Array, out: Array, m: int, n: int, p: int) -> None:
    """out (m, p) = X' Y of X (n, m) and Y (n, p)."""
    for i in range(m):
        for j in range(p):
            s = 0.0
            for a in range(n):
                s += X[a, i] * Y[a, j]
            out[i, j] = s


@helper
def _joseph(
    P: Array, K: Array, PC: Array, C: Array, R: Array, D: Array, E: Array, out: Array, z: int, k: int
) -> None:  # fmt: skip
    """(I - K C) P (I - K C)' + K R K' as D - (D C' - K R) K' with D = P - K (P C')', see :mod:`dynavae.exact.joseph`."""
    for i in range(z):
        for j in range(z):
            s = P[i, j]
            for a in range(k):
                s -= K[i, a] * PC[j, a]
            D[i, j] = s
    for i in range(z):
        for a in range(k):
            s = 0.0
            for j in range(z):
                s += D[i, j] * C[a, j]
            for c in range(k):
                s -= K[i, c] * R[c, a]
            E[i, a] = s
    for i in range(z):
        for j in range(i + 1):
            s = D[i, j] + D[j, i]
            for a in range(k):
                s -= E[i, a] * K[j, a] + E[j, a] * K[i, a]
            out[i, j] = out[j, i] = 0.5 * s


@helper
def _copy(source: Array, out: Array) -> None:
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            out[i, j] = source[i, j]


@helper
def _take(C: Array, R: Array, seen: Array, index: Array, C_k: Array, R_k: Array) -> int:
    """Put the rows of what is observed into the first k of C_k and R_k, their coordinates into `index`; k."""
    k = 0
    for i in range(len(seen)):
        if seen[i]:
            index[k] = i
            k += 1
    for a in range(k):
        for j in range(C.shape[1]):
            C_k[a, j] = C[index[a], j]
        for c in range(k):
            R_k[a, c] = 0.5 * (R[index[a], index[c]] + R[index[c], index[a]])
    return k


@helper
def _gain(P: Array, C: Array, R: Array, PC: Array, S: Array, L: Array, K: Array, z: int, k: int) -> bool:
    """P C', S = C P C' + R = L L' and K = P C' S^-1; False unless S is positive definite."""
    _times_transposed(P, C, PC, z, z, k)
    for a in range(k):
        for c in range(a + 1):
            s = R[a, c]
            for j in range(z):
                s += C[a, j] * PC[j, c]
            S[a, c] = S[c, a] = s
    if not _cholesky(S, L, k):
        return False
    _solve_rows(L, PC, K, z, k)
    return True


@kernel(numbers, vector, *[matrix] * 4, *[vector] * 2, mask, vector, matrix, vector, matrix, numbers)
def filter_(
    first: int, last: int,
    m0: Array, P0: Array, A: Array, Q: Array, C: Array, R: Array, f: Array, y: Array, seen: Array,
    mean: Array, covariance: Array, predicted_mean: Array, predicted_covariance: Array, log_likelihood: Array,
) -> int:  # fmt: skip
    """Fill the last five; 0, or one more than t B + b of the first S_t that is not positive definite."""
    T, B, x = y.shape
    z = m0.shape[1]
    m, m_, e, index = np.empty(z), np.empty(z), np.empty(x), np.empty(x, np.int64)
    P, P_, F, FP, D = (
        np.empty((z, z)), np.empty((z, z)), np.empty((z, z)), np.empty((z, z)), np.empty((z, z))
    )  # fmt: skip
    H, V, S, L = np.empty((x, z)), np.empty((x, x)), np.empty((x, x)), np.empty((x, x))
    PC, K, E = np.empty((z, x)), np.empty((z, x)), np.empty((z, x))
    for t in range(T):
        for b in range(first, last):
            if t == 0:
                _copy(P0[b], P_)
                for i in range(z):
                    m_[i] = m0[b, i]
            else:
                _copy(A[t, b], F)
                _copy(covariance[t - 1, b], P)
                _times(F, P, FP, z, z, z)
                for i in range(z):
                    s = f[t, b, i]
                    for j in range(z):
                        s += F[i, j] * mean[t - 1, b, j]
                    m_[i] = s
                    for j in range(i + 1):
                        s = 0.5 * (Q[t, b, i, j] + Q[t, b, j, i])
                        for a in range(z):
                            s += FP[i, a] * F[j, a]
                        P_[i, j] = P_[j, i] = s
            k = _take(C[t, b], R[t, b], seen[t, b], index, H, V)
            value = 0.0
            if k == 0:
                _copy(P_, P)
                for i in range(z):
                    m[i] = m_[i]
            else:
                if not _gain(P_, H, V, PC, S, L, K, z, k):
                    return t * B + b + 1
                for a in range(k):
                    s = y[t, b, index[a]]
                    for j in range(z):
                        s -= H[a, j] * m_[j]
                    e[a] = s
                for i in range(z):
                    s = m_[i]
                    for a in range(k):
                        s += K[i, a] * e[a]
                    m[i] = s
                _joseph(P_, K, PC, H, V, D, E, P, z, k)
                for a in range(k):  # whitened: L^-1 e
                    s = e[a]
                    for c in range(a):
                        s -= L[a, c] * e[c]
                    e[a] = s * L[a, a]
                    value -= 0.5 * (e[a] * e[a] + math.log(2 * math.pi)) - math.log(L[a, a])
            log_likelihood[t, b] = value
            _copy(P, covariance[t, b])
            _copy(P_, predicted_covariance[t, b])
            for i in range(z):
                mean[t, b, i] = m[i]
                predicted_mean[t, b, i] = m_[i]
    return 0


@kernel(*[matrix] * 2, *[vector, matrix] * 3, *[matrix] * 2)
def smoother(
    first: int, last: int,
    A: Array, Q: Array, mean: Array, covariance: Array, predicted_mean: Array, predicted_covariance: Array,
    smoothed_mean: Array, smoothed_covariance: Array, gain: Array, cross: Array,
) -> int:  # fmt: skip
    """Fill the last four; 0, or one more than t B + b of the predicted covariance that is not positive semidefinite."""
    T, B, z = mean.shape
    m, d = np.empty(z), np.empty(z)
    P, P_, F, N, PA, L, G, D, E, V = (
        np.empty((z, z)), np.empty((z, z)), np.empty((z, z)), np.empty((z, z)), np.empty((z, z)),
        np.empty((z, z)), np.empty((z, z)), np.empty((z, z)), np.empty((z, z)), np.empty((z, z)),
    )  # fmt: skip
    for t in range(T - 1, -1, -1):
        for b in range(first, last):
            if t == T - 1:
                _copy(covariance[t, b], P)
                for i in range(z):
                    m[i] = mean[t, b, i]
            else:
                _copy(smoothed_covariance[t + 1, b], P)
                _copy(A[t + 1, b], F)
                _copy(Q[t + 1, b], N)
                _copy(predicted_covariance[t + 1, b], P_)
                if not _regular_cholesky(P_, L, z):
                    return (t + 1) * B + b + 1
                _copy(covariance[t, b], P_)
                _times_transposed(P_, F, PA, z, z, z)
                _solve_rows(L, PA, G, z, z)
                _joseph(P_, G, PA, F, N, D, E, V, z, z)
                _times(G, P, D, z, z, z)  # of P_{t+1|T}
                for i in range(z):
                    d[i] = smoothed_mean[t + 1, b, i] - predicted_mean[t + 1, b, i]
                for i in range(z):
                    s = mean[t, b, i]
                    for j in range(z):
                        s += G[i, j] * d[j]
                        gain[t, b, i, j] = G[i, j]
                        cross[t, b, i, j] = D[j, i]
                    m[i] = s
                    for j in range(i + 1):
                        s = V[i, j]
                        for a in range(z):
                            s += D[i, a] * G[j, a]
                        P[i, j] = P[j, i] = s
            _copy(P, smoothed_covariance[t, b])
            for i in range(z):
                smoothed_mean[t, b, i] = m[i]
    return 0
