r"""The Kalman filter and smoother in machine code, on a CPU, by Numba: no form is faster for small states.

A loop over steps of small matrices spends its time between the operations, not in them. Compiled
(:mod:`dynavae.exact._kalman_kernels`, and :mod:`dynavae.exact._kalman_adjoints`), a step of four states takes less than a
microsecond, whatever varies or is missing; large batches are divided among PyTorch's threads. The results are those of the
Joseph form, and so are the gradients: the adjoints of filter and smoother are written out. Derivatives of derivatives go
through the Joseph form itself. Everything is computed in float64.

Numba is optional, `pip install "dynavae[compiled]"`. The first call on a machine compiles, for some seconds; later processes
read the result from Numba's cache (`NUMBA_CACHE_DIR`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dynavae.exact._algebra import ordinary
from dynavae.exact._native import Gradients, again, arrays, for_sequences
from dynavae.exact._results import Filtered, Smoothed
from dynavae.exact.joseph import joseph_filter, joseph_smoother
from dynavae.exact.linear_gaussian import LinearGaussian, observed_emission

AXES = (1, 2, 2, 2, 2, 2, 1, 1)
"""Of m0, P0, A, Q, C, R, f and y, besides steps and sequences."""


def compiled_filter(params: LinearGaussian, x: Tensor, observed: Tensor, f: Tensor, g: Tensor) -> Filtered:
    """Filter; f (T, B, z_dim) and g (T, B, x_dim) are what is known of each transition and emission."""
    return Filtered(*_Filter.apply(*params[:6], f, x - g, observed))


def compiled_smoother(params: LinearGaussian, filtered: Filtered) -> Smoothed:
    """Smooth what was filtered."""
    return Smoothed(*_Smoother.apply(params.A, params.Q, *filtered[:4]))


@torch.no_grad()
def compiled_covariances(
    P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor, steps: int, tolerance: float
) -> tuple[int, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Predicted covariances, gains, filtered covariances and factors of C P C' + R of complete data: (N, ., .) each.

    Until nothing changes, or of so many steps, and their number; -t - 1 if S_t is not positive definite.
    """
    from dynavae.exact import _riccati_kernels

    x, z = C.shape
    shapes = (z, z), (z, x), (z, z), (x, x)
    out = tuple(A.new_empty(steps, *shape) for shape in shapes)
    found = _riccati_kernels.riccati(0, steps, *arrays(P0, A, Q, C, R), tolerance, *arrays(*out))
    P, K, P_f, L = (a[: max(found, 0)] for a in out)
    return found, (P, K, P_f, L)


@torch.no_grad()
def compiled_smoothed_covariances(
    gain: Tensor, spread: Tensor, last: Tensor, steps: int, tolerance: float
) -> Tensor:
    """P_{t|T} of steps 1, ..., N - 1, and of N, ..., T or as many of the last of them as differ from that of step N."""
    from dynavae.exact import _riccati_kernels

    early = torch.empty_like(gain[1:])
    late = gain.new_empty(steps - len(early), *last.shape)
    late[-1] = last
    start = _riccati_kernels.smoothed_covariances(
        0, 1, *arrays(gain, spread), tolerance, *arrays(early, late)
    )
    return torch.cat([early, late[start:]])


class _Filter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, m0: Tensor, P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor,
        f: Tensor, y: Tensor, observed: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        from dynavae.exact import _kalman_kernels

        (T, B, _), z = y.shape, m0.shape[-1]
        inputs = m0, P0, A, Q, C, R, f, y
        mean, predicted_mean = y.new_empty(T, B, z), y.new_empty(T, B, z)
        covariance, predicted_covariance = y.new_empty(T, B, z, z), y.new_empty(T, B, z, z)
        out = mean, covariance, predicted_mean, predicted_covariance, y.new_empty(T, B)
        given = arrays(*_everywhere(inputs, T, B), observed, *out)
        failed = _first(for_sequences(_kalman_kernels.filter_, B, _work(T, B, z), lambda: given))
        if failed:
            t, b = divmod(failed - 1, B)
            raise ValueError(
                f"S_t = C P C' + R is not positive definite at t={t}, sequence {b}. Check that Q, R and P0 are positive "
                "definite; raise their diagonal."
            )
        ctx.save_for_backward(*map(ordinary, (*inputs, observed)), *out[:4])
        return out

    @staticmethod
    def backward(ctx: Any, *of: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            *inputs, observed = ctx.saved_tensors[:9]
            return *again(functools.partial(_joseph_filter, observed), inputs, of), None
        from dynavae.exact import _kalman_adjoints

        *inputs, observed, mean, covariance, predicted_mean, predicted_covariance = ctx.saved_tensors
        T, B, z = mean.shape
        into = Gradients(inputs, AXES)
        _, _, A, Q, C, R, _, y = _everywhere(inputs, T, B)
        known = A, Q, C, R, y, observed, mean, covariance, predicted_mean, predicted_covariance, *of
        read = arrays(*known)
        for_sequences(
            _kalman_adjoints.filter_adjoint, B, 2 * _work(T, B, z),
            lambda: (*read, *arrays(*_everywhere(into.more(), T, B))), into.most,
        )  # fmt: skip
        return *into.total(), None


class _Smoother(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, Q: Tensor, *moments: Tensor) -> tuple[Tensor, ...]:
        from dynavae.exact import _kalman_kernels

        T, B, z = moments[0].shape
        new = A.new_empty
        out = new(T, B, z), new(T, B, z, z), new(T - 1, B, z, z), new(T - 1, B, z, z)
        given = arrays(A.expand(T, B, z, z), Q.expand(T, B, z, z), *moments, *out)
        failed = _first(for_sequences(_kalman_kernels.smoother, B, _work(T, B, z), lambda: given))
        if failed:
            t, b = divmod(failed - 1, B)
            raise ValueError(
                f"P_{{t+1|t}} = A P A' + Q is not positive semidefinite at t={t}, sequence {b}. Check that Q, R and P0 are "
                "covariances."
            )
        ctx.save_for_backward(*map(ordinary, (A, Q, *moments)), *out[:3])
        return out

    @staticmethod
    def backward(ctx: Any, *of: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return tuple(again(_joseph_smoother, ctx.saved_tensors[:6], of))
        from dynavae.exact import _kalman_adjoints

        A, Q, *known = ctx.saved_tensors
        T, B, z = known[0].shape
        into, to_moments = Gradients([A, Q], [2, 2]), [torch.zeros_like(a) for a in known[:4]]
        read, to = arrays(A.expand(T, B, z, z), *known, *of), arrays(*to_moments)

        def given() -> tuple[Any, ...]:
            return *read, *arrays(*(a.expand(T, B, z, z) for a in into.more())), *to

        for_sequences(_kalman_adjoints.smoother_adjoint, B, 2 * _work(T, B, z), given, into.most)
        return *into.total(), *to_moments


def _joseph_filter(observed: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The same by automatic differentiation: of m0, P0, A, Q, C, R, f and y."""
    params = LinearGaussian(*inputs[:6])
    emission = observed_emission(params, inputs[7], observed, torch.zeros_like(inputs[7]))
    return tuple(joseph_filter(params, emission, inputs[6])[:5])


def _joseph_smoother(A: Tensor, Q: Tensor, *moments: Tensor) -> tuple[Tensor, ...]:
    params = LinearGaussian(A[..., 0], Q, A, Q, A, Q)  # the smoother reads A and Q only
    return tuple(joseph_smoother(params, Filtered(*moments, log_likelihood=moments[0][..., 0]))[:4])


def _work(T: int, B: int, z: int) -> float:
    """Microseconds, about, of a filter."""
    return T * B * (0.1 + 0.03 * z**2 + 0.005 * z**3)


def _everywhere(inputs: Sequence[Tensor], T: int, B: int) -> tuple[Tensor, ...]:
    """m0 and P0 of each sequence, the other six of each step and sequence: views, so what is added to one adds up."""
    leads = [(B,)] * 2 + [(T, B)] * 6
    return tuple(a.expand(*lead, *a.shape[-n:]) for a, lead, n in zip(inputs, leads, AXES, strict=True))


def _first(failed: list[int]) -> int:
    """The least that is not 0, if there is one."""
    return min(filter(None, failed), default=0)
