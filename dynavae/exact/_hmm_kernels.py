r"""The recursions of the hidden Markov model and their adjoints as loops over numbers, which Numba compiles.

Sums over states are of probabilities, in which products of matrices are made, and kept as logarithms: of the distribution
before a step and of the message after it, whose largest entries are at least 1 / S. Where what is left of such a sum is so
small that its terms have vanished, it is made of logarithms.

`of_a` is the derivative with respect to a of what is differentiated in the end. Frames from `lengths` on do not exist.
"""

from __future__ import annotations

import math

import numpy as np

from dynavae.exact._numba import Array, helper, integers, kernel, matrix, numbers, vector

TINY = 1e-200
lengths_ = "int64[:]"


@helper
def _exp(source: Array, out: Array) -> None:
    for j in range(source.shape[0]):
        for k in range(source.shape[1]):
            out[j, k] = math.exp(source[j, k])


@helper
def _varies(a: Array, first: bool) -> bool:
    """Whether a (T, B, ...) is not that of the step before, and for later sequences, not that of the first one."""
    steps = a.shape[0] > 1 and a.strides[0] != 0
    sequences = a.shape[1] > 1 and a.strides[1] != 0
    return (first and steps) or sequences


@helper
def _largest(a: Array, b: Array) -> float:
    """Of a + b; NaN if there is one."""
    top = -math.inf
    for k in range(len(a)):
        s = a[k] + b[k]
        if not s <= top:
            top = s
        if top != top:
            break
    return top


@helper
def _log_sum(a: Array, b: Array) -> float:
    """logsumexp(a + b)."""
    top, total = _largest(a, b), 0.0
    if not -math.inf < top < math.inf:
        return top
    for k in range(len(a)):
        total += math.exp(a[k] + b[k] - top)
    return top + math.log(total)


@helper
def _normalise(a: Array, b: Array, out: Array, p: Array) -> float:
    """out = a + b - logsumexp(a + b), which is returned, and p = exp(out); impossible everywhere stays so."""
    top, total = _largest(a, b), 0.0
    if not -math.inf < top < math.inf:
        for k in range(len(a)):
            out[k] = a[k] + b[k] - (0.0 if top == -math.inf else top)
            p[k] = math.exp(out[k])
        return top
    for k in range(len(a)):
        p[k] = math.exp(a[k] + b[k] - top)
        total += p[k]
    log_total = top + math.log(total)
    for k in range(len(a)):
        out[k] = a[k] + b[k] - log_total
        p[k] /= total
    return log_total


@kernel(numbers, matrix, vector, lengths_, vector, vector, numbers)
def forward(
    first: int, last: int, log_initial: Array, log_transition: Array, log_emission: Array, lengths: Array,
    log_filtered: Array, log_predicted: Array, evidence: Array,
) -> int:  # fmt: skip
    """Fill the last three: log p(s_t | x_1:t), log p(s_t | x_1:t-1), log p(x_t | x_1:t-1)."""
    T, B, S = log_emission.shape
    A, p, e, total = np.empty((S, S)), np.empty((B, S)), np.empty(S), np.empty(S)
    for t in range(T):
        for b in range(first, last):
            if t == 0:
                for k in range(S):
                    log_predicted[t, b, k] = log_initial[b, k]
            else:
                if (t == 1 and b == first) or _varies(log_transition, b == first):
                    _exp(log_transition[t, b], A)
                for k in range(S):
                    total[k] = 0.0
                for j in range(S):
                    for k in range(S):
                        total[k] += p[b, j] * A[j, k]
                for k in range(S):
                    log_predicted[t, b, k] = (
                        math.log(total[k])
                        if total[k] > TINY
                        else _log_sum(log_filtered[t - 1, b], log_transition[t, b, :, k])
                    )
            going = t < lengths[b]
            for k in range(S):
                e[k] = log_emission[t, b, k] if going else 0.0
            value = _normalise(log_predicted[t, b], e, log_filtered[t, b], p[b])
            evidence[t, b] = value if going else 0.0
    return 0


@kernel(matrix, lengths_, *[vector] * 2, *[vector] * 2, numbers, numbers, matrix, vector)
def forward_adjoint(
    first: int, last: int, log_transition: Array, lengths: Array, log_filtered: Array, log_predicted: Array,
    of_filtered: Array, of_predicted: Array, of_evidence: Array,
    of_initial: Array, of_transition: Array, of_emission: Array,
) -> int:  # fmt: skip
    """Add to the last three the derivatives of what the three before them weigh."""
    T, B, S = log_filtered.shape
    A, p, f, r = np.empty((S, S)), np.empty(S), np.empty(S), np.empty(S)
    ahead = np.empty((B, S))  # of log_predicted at t + 1
    for t in range(T - 1, -1, -1):
        for b in range(first, last):
            for k in range(S):
                f[k], p[k] = of_filtered[t, b, k], math.exp(log_filtered[t, b, k])
            if t < T - 1:
                if (t == T - 2 and b == first) or _varies(log_transition, b == first):
                    _exp(log_transition[t + 1, b], A)
                for k in range(S):
                    total = math.exp(log_predicted[t + 1, b, k])
                    r[k] = ahead[b, k] / total if total > TINY else 0.0
                    if total <= TINY and log_predicted[t + 1, b, k] > -math.inf:
                        for j in range(S):
                            w = (
                                log_filtered[t, b, j]
                                + log_transition[t + 1, b, j, k]
                                - log_predicted[t + 1, b, k]
                            )
                            w = ahead[b, k] * math.exp(w)
                            f[j] += w
                            of_transition[t + 1, b, j, k] += w
                for j in range(S):
                    s = 0.0
                    for k in range(S):
                        w = A[j, k] * r[k]
                        s += w
                        of_transition[t + 1, b, j, k] += p[j] * w
                    f[j] += p[j] * s
            going = t < lengths[b]
            rest = of_evidence[t, b] if going else 0.0
            for k in range(S):
                rest -= f[k]
            for k in range(S):
                w = f[k] + rest * p[k]
                if going:
                    of_emission[t, b, k] += w
                ahead[b, k] = w + of_predicted[t, b, k]
    for b in range(first, last):
        for k in range(S):
            of_initial[b, k] += ahead[b, k]
    return 0


@kernel(matrix, vector, lengths_, vector, numbers)
def backward(
    first: int, last: int, log_transition: Array, log_emission: Array, lengths: Array,
    messages: Array, scales: Array,
) -> int:  # fmt: skip
    """Fill the last two: p(x_t:T | s_t) normalised over s_t, in logarithms, and the log of each step's normaliser."""
    T, B, S = log_emission.shape
    A, p, e, future = np.empty((S, S)), np.empty((B, S)), np.empty(S), np.empty(S)
    for t in range(T - 1, -1, -1):
        for b in range(first, last):
            for j in range(S):
                e[j] = log_emission[t, b, j] if t < lengths[b] else 0.0
                future[j] = 0.0
            if t < T - 1:
                if (t == T - 2 and b == first) or _varies(log_transition, b == first):
                    _exp(log_transition[t + 1, b], A)
            if t + 1 < lengths[b]:
                for j in range(S):
                    total = 0.0
                    for k in range(S):
                        total += A[j, k] * p[b, k]
                    future[j] = (
                        math.log(total)
                        if total > TINY
                        else _log_sum(log_transition[t + 1, b, j], messages[t + 1, b])
                    )
            value = _normalise(e, future, messages[t, b], p[b])
            scales[t, b] = value if t < lengths[b] else 0.0
    return 0


@kernel(matrix, lengths_, vector, vector, numbers, matrix, vector)
def backward_adjoint(
    first: int, last: int, log_transition: Array, lengths: Array, messages: Array,
    of_messages: Array, of_scales: Array, of_transition: Array, of_emission: Array,
) -> int:  # fmt: skip
    """Add to the last two the derivatives of what the two before them weigh."""
    T, B, S = messages.shape
    A, p, a = np.empty((S, S)), np.empty(S), np.empty(S)
    ahead = np.zeros((B, S))  # what comes to the message at t from those before it
    for t in range(T):
        for b in range(first, last):
            going = t < lengths[b]
            rest = of_scales[t, b] if going else 0.0
            for k in range(S):
                a[k] = of_messages[t, b, k] + ahead[b, k]
                ahead[b, k] = 0.0
                rest -= a[k]
            for k in range(S):
                a[k] += rest * math.exp(messages[t, b, k])
                if going:
                    of_emission[t, b, k] += a[k]
            if t < T - 1:
                if (t == 0 and b == first) or _varies(log_transition, b == first):
                    _exp(log_transition[t + 1, b], A)
            if t + 1 < lengths[b]:
                for k in range(S):
                    p[k] = math.exp(messages[t + 1, b, k])
                for j in range(S):
                    total = 0.0
                    for k in range(S):
                        total += A[j, k] * p[k]
                    if total > TINY:
                        r = a[j] / total
                        for k in range(S):
                            w = A[j, k] * p[k] * r
                            ahead[b, k] += w
                            of_transition[t + 1, b, j, k] += w
                    else:
                        log_total = _log_sum(log_transition[t + 1, b, j], messages[t + 1, b])
                        for k in range(S):
                            if log_total > -math.inf:
                                w = log_transition[t + 1, b, j, k] + messages[t + 1, b, k] - log_total
                                w = a[j] * math.exp(w)
                                ahead[b, k] += w
                                of_transition[t + 1, b, j, k] += w
    return 0


@kernel(numbers, matrix, vector, lengths_, integers, "float64[:]")
def best_path(
    first: int, last: int, log_initial: Array, log_transition: Array, log_emission: Array, lengths: Array,
    path: Array, log_joint: Array,
) -> int:  # fmt: skip
    """Fill the last two: the most probable states, the last one repeated after the end, and their log-probability."""
    T, _, S = log_emission.shape
    origin, best, arrival = np.empty((T, S), np.int32), np.empty(S), np.empty(S)
    for b in range(first, last):
        for k in range(S):
            best[k] = log_initial[b, k] + log_emission[0, b, k]
        for t in range(1, lengths[b]):
            for k in range(S):
                arrival[k], origin[t, k] = best[0] + log_transition[t, b, 0, k], 0
            for j in range(1, S):
                for k in range(S):
                    value = best[j] + log_transition[t, b, j, k]
                    if value > arrival[k]:
                        arrival[k], origin[t, k] = value, j
            for k in range(S):
                best[k] = arrival[k] + log_emission[t, b, k]
        state = 0
        for k in range(1, S):
            if best[k] > best[state]:
                state = k
        log_joint[b] = best[state]
        for t in range(T - 1, -1, -1):
            path[t, b] = state
            if 0 < t < lengths[b]:
                state = origin[t, state]
    return 0
