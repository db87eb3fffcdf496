r"""The adjoints of the recursions of :mod:`dynavae.exact._kalman_kernels`, as loops that Numba compiles.

`of_a`, `ab` and, in formulas, a bar are derivatives with respect to a of what is differentiated in the end.
"""

from __future__ import annotations

import numpy as np

from dynavae.exact._kalman_kernels import (
    _copy,
    _gain,
    _regular_cholesky,
    _solve_rows,
    _take,
    _times,
    _transposed_times,
)
from dynavae.exact._numba import Array, helper, kernel, mask, matrix, numbers, vector


@helper
def _add_symmetric(source: Array, out: Array) -> None:
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            out[i, j] += 0.5 * (source[i, j] + source[j, i])


@kernel(
    *[matrix] * 4, *[vector] * 1, mask, *[vector, matrix] * 2,
    *[vector, matrix] * 2, numbers,
    numbers, vector, *[matrix] * 4, *[vector] * 2,
)  # fmt: skip
def filter_adjoint(
    first: int, last: int,
    A: Array, Q: Array, C: Array, R: Array, y: Array, seen: Array,
    mean: Array, covariance: Array, predicted_mean: Array, predicted_covariance: Array,
    of_mean: Array, of_covariance: Array, of_predicted_mean: Array, of_predicted_covariance: Array, of_value: Array,
    of_m0: Array, of_P0: Array, of_A: Array, of_Q: Array, of_C: Array, of_R: Array, of_f: Array, of_y: Array,
) -> int:  # fmt: skip
    r"""Add to the last eight the derivatives of what the five adjoints before them weigh.

    With :math:`J = I - K C` and :math:`v = S^{-1} e` they are those of :math:`P_{t|t} = J P J^\top + K R K^\top`, which to
    first order does not change with K, of :math:`m_{t|t} = m + K e` and of :math:`-\tfrac12 (e^\top v + \log |S|)`:

    .. math::
        \bar e &= K^\top \bar m - \bar\ell v, \qquad
        \bar S = \tfrac12 \bar\ell (v v^\top - S^{-1}), \qquad g = J^\top \bar m, \qquad w = C^\top v \\
        \bar m &\to g + \bar\ell w, \qquad
        \bar P \to J^\top \bar P J + \tfrac12 (g w^\top + w g^\top) + C^\top \bar S C \\
        \bar C &= v (P g)^\top - K^\top \bar m (P w)^\top - \bar e m^\top + 2 \bar S C P - 2 K^\top \bar P P_{t|t}, \qquad
        \bar R = K^\top \bar P K + \bar S - \tfrac12 (K^\top \bar m v^\top + v \bar m^\top K)
    """
    T, B, x = y.shape
    z = mean.shape[2]
    of_m0_, of_P0_ = np.empty((B, z)), np.empty((B, z, z))  # of_m0 may be one array for all sequences
    mb, g, w, Pg, Pw = np.empty(z), np.empty(z), np.empty(z), np.empty(z), np.empty(z)
    e, v, h, index = np.empty(x), np.empty(x), np.empty(x), np.empty(x, np.int64)
    Pb, P, P_f, F, J, X = (
        np.empty((z, z)), np.empty((z, z)), np.empty((z, z)), np.empty((z, z)), np.empty((z, z)), np.empty((z, z))
    )  # fmt: skip
    V, S, L, eye, W, Sb = (
        np.empty((x, x)), np.empty((x, x)), np.empty((x, x)), np.empty((x, x)), np.empty((x, x)), np.empty((x, x))
    )  # fmt: skip
    H, KPb, PC, K = np.empty((x, z)), np.empty((x, z)), np.empty((z, x)), np.empty((z, x))
    for t in range(T - 1, -1, -1):
        for b in range(first, last):
            nb, Nb = of_m0_[b], of_P0_[b]  # of the prediction of z_t+1, then of z_t
            _copy(covariance[t, b], P_f)
            for i in range(z):
                mb[i] = of_mean[t, b, i]
                for j in range(z):
                    Pb[i, j] = 0.5 * (of_covariance[t, b, i, j] + of_covariance[t, b, j, i])
            if t < T - 1:
                _copy(A[t + 1, b], F)
                _times(Nb, F, X, z, z, z)
                for i in range(z):
                    of_f[t + 1, b, i] += nb[i]
                    for j in range(z):
                        s = nb[i] * mean[t, b, j]
                        for a in range(z):
                            s += 2 * X[i, a] * P_f[a, j]
                        of_A[t + 1, b, i, j] += s
                        of_Q[t + 1, b, i, j] += Nb[i, j]
                        mb[i] += F[j, i] * nb[j]
                        s = 0.0
                        for a in range(z):
                            s += F[a, i] * X[a, j]
                        Pb[i, j] += s
            k = _take(C[t, b], R[t, b], seen[t, b], index, H, V)
            if k > 0:
                _copy(predicted_covariance[t, b], P)
                _gain(P, H, V, PC, S, L, K, z, k)
                for a in range(k):
                    for c in range(k):
                        eye[a, c] = 1.0 if a == c else 0.0
                    s = y[t, b, index[a]]
                    for j in range(z):
                        s -= H[a, j] * predicted_mean[t, b, j]
                    e[a] = s
                _solve_rows(L, eye, W, k, k)  # S^-1
                value = of_value[t, b]
                for a in range(k):
                    s = u = 0.0
                    for c in range(k):
                        s += W[a, c] * e[c]
                    for i in range(z):
                        u += K[i, a] * mb[i]
                    v[a], h[a] = s, u
                for a in range(k):
                    e[a] = h[a] - value * v[a]  # its adjoint
                    for c in range(k):
                        Sb[a, c] = 0.5 * value * (v[a] * v[c] - W[a, c])
                for i in range(z):
                    for j in range(z):
                        s = 1.0 if i == j else 0.0
                        for a in range(k):
                            s -= K[i, a] * H[a, j]
                        J[i, j] = s
                for i in range(z):
                    s = u = 0.0
                    for j in range(z):
                        s += J[j, i] * mb[j]
                    for a in range(k):
                        u += H[a, i] * v[a]
                    g[i], w[i] = s, u
                for i in range(z):
                    s = u = 0.0
                    for j in range(z):
                        s += P[i, j] * g[j]
                        u += P[i, j] * w[j]
                    Pg[i], Pw[i] = s, u
                _transposed_times(K, Pb, KPb, k, z, z)
                for a in range(k):
                    of_y[t, b, index[a]] += e[a]
                    for j in range(z):
                        s = v[a] * Pg[j] - h[a] * Pw[j] - e[a] * predicted_mean[t, b, j]
                        for c in range(k):
                            s += 2 * Sb[a, c] * PC[j, c]
                        for i in range(z):
                            s -= 2 * KPb[a, i] * P_f[i, j]
                        of_C[t, b, index[a], j] += s
                    for c in range(k):
                        s = Sb[a, c] - 0.5 * (h[a] * v[c] + h[c] * v[a])
                        for i in range(z):
                            s += KPb[a, i] * K[i, c]
                        of_R[t, b, index[a], index[c]] += s
                _times(Pb, J, X, z, z, z)
                _times(Sb, H, KPb, k, k, z)
                for i in range(z):
                    mb[i] = g[i] + value * w[i]
                    for j in range(z):
                        s = 0.5 * (g[i] * w[j] + g[j] * w[i])
                        for a in range(z):
                            s += J[a, i] * X[a, j]
                        for a in range(k):
                            s += H[a, i] * KPb[a, j]
                        Pb[i, j] = s
            _copy(Pb, Nb)
            _add_symmetric(of_predicted_covariance[t, b], Nb)
            for i in range(z):
                nb[i] = mb[i] + of_predicted_mean[t, b, i]
    for b in range(first, last):
        for i in range(z):
            of_m0[b, i] += of_m0_[b, i]
            for j in range(z):
                of_P0[b, i, j] += of_P0_[b, i, j]
    return 0


@kernel(matrix, *[vector, matrix] * 3, matrix, vector, *[matrix] * 3, *[matrix] * 2, *[vector, matrix] * 2)
def smoother_adjoint(
    first: int, last: int,
    A: Array, mean: Array, covariance: Array, predicted_mean: Array, predicted_covariance: Array,
    smoothed_mean: Array, smoothed_covariance: Array, gain: Array,
    of_mean: Array, of_covariance: Array, of_gain: Array, of_cross: Array,
    to_A: Array, to_Q: Array,
    to_mean: Array, to_covariance: Array, to_predicted_mean: Array, to_predicted_covariance: Array,
) -> int:  # fmt: skip
    r"""Add to the last six the derivatives of what the four adjoints before them weigh; the arrays of moments hold zeros.

    With :math:`J = I - G A` they are those of :math:`m_{t|T} = m_{t|t} + G (m_{t+1|T} - m_{t+1|t})`, of
    :math:`P_{t|T} = J P_{t|t} J^\top + G Q G^\top + G P_{t+1|T} G^\top`, whose first two terms to first order do not change
    with G, of :math:`P_{t+1|T} G^\top`, and of :math:`G = P_{t|t} A^\top P_{t+1|t}^{-1}`.
    """
    T, _, z = mean.shape
    mb, d = np.empty(z), np.empty(z)
    Pb, P, P_f, F, L, G, J, X, Gb, Y = (
        np.empty((z, z)), np.empty((z, z)), np.empty((z, z)), np.empty((z, z)), np.empty((z, z)),
        np.empty((z, z)), np.empty((z, z)), np.empty((z, z)), np.empty((z, z)), np.empty((z, z)),
    )  # fmt: skip
    for t in range(T):
        for b in range(first, last):
            # What came from step t - 1 is already there.
            _add_symmetric(of_covariance[t, b], to_covariance[t, b])
            _copy(to_covariance[t, b], Pb)
            for i in range(z):
                to_mean[t, b, i] += of_mean[t, b, i]
                mb[i] = to_mean[t, b, i]
            if t == T - 1:
                continue
            _copy(A[t + 1, b], F)
            _copy(gain[t, b], G)
            _copy(covariance[t, b], P_f)
            _copy(predicted_covariance[t + 1, b], P)
            _regular_cholesky(P, L, z)
            _copy(smoothed_covariance[t + 1, b], P)
            for i in range(z):
                d[i] = smoothed_mean[t + 1, b, i] - predicted_mean[t + 1, b, i]
            _times(Pb, G, X, z, z, z)
            for i in range(z):
                for j in range(z):
                    s = mb[i] * d[j] + of_gain[t, b, i, j]
                    for a in range(z):
                        s += 2 * X[i, a] * P[a, j] + of_cross[t, b, a, i] * P[a, j]
                    Gb[i, j] = s
            _transposed_times(G, X, Y, z, z, z)  # of Q and of P_{t+1|T}
            for i in range(z):
                s = 0.0
                for j in range(z):
                    s += G[j, i] * mb[j]
                to_predicted_mean[t + 1, b, i] -= s
                to_mean[t + 1, b, i] += s
                for j in range(z):
                    to_Q[t + 1, b, i, j] += Y[i, j]
                    s = Y[i, j]
                    for a in range(z):
                        s += 0.5 * (of_cross[t, b, i, a] * G[a, j] + of_cross[t, b, j, a] * G[a, i])
                    to_covariance[t + 1, b, i, j] += s
                    s = 1.0 if i == j else 0.0
                    for a in range(z):
                        s -= G[i, a] * F[a, j]
                    J[i, j] = s
            _times(Pb, J, X, z, z, z)
            _transposed_times(G, X, Y, z, z, z)
            _transposed_times(J, X, Pb, z, z, z)
            _solve_rows(L, Gb, X, z, z)  # of P A'
            _times(X, F, Gb, z, z, z)
            for i in range(z):
                for j in range(z):
                    # In place of the weight of P_{t|T}, which was added above.
                    to_covariance[t, b, i, j] = Pb[i, j] + 0.5 * (Gb[i, j] + Gb[j, i])
                    s = 0.0
                    for a in range(z):
                        s += (X[a, i] - 2 * Y[i, a]) * P_f[a, j]
                    to_A[t + 1, b, i, j] += s
                    s = 0.0
                    for a in range(z):
                        s += 0.5 * (G[a, i] * X[a, j] + G[a, j] * X[a, i])
                    to_predicted_covariance[t + 1, b, i, j] -= s
    return 0
