r"""The Kalman filter and smoother in machine code, on a CPU, by Numba: no form is faster for small states.

A loop over steps of small matrices spends its time between the operations, not in them. Compiled
(:mod:`dynavae.exact._kernels`, and :mod:`dynavae.exact._adjoint_kernels`), a step of four states takes less than a
microsecond, whatever varies or is missing; large batches are divided among PyTorch's threads. The results are those of the
Joseph form, and so are the gradients: the adjoints of filter and smoother are written out, and can be differentiated once.
Everything is computed in float64.

Numba is optional, `pip install "dynavae[compiled]"`. The first call on a machine compiles, for some seconds; later processes
read the result from Numba's cache (`NUMBA_CACHE_DIR`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynavae.exact._results import Filtered, Smoothed
from dynavae.exact.linear_gaussian import LinearGaussian

PART = 1000
"""Microseconds of work, about, for which a thread is started."""
AXES = (1, 2, 2, 2, 2, 2, 1, 1)
"""Of m0, P0, A, Q, C, R, f and y, besides steps and sequences."""


@functools.cache
def installed() -> bool:
    """Whether there is Numba, and it compiles."""
    try:
        import numba
    except ImportError:  # also of a version that does not go with this NumPy
        return False
    return not numba.config.DISABLE_JIT


def applies(params: LinearGaussian) -> bool:
    """Whether Numba is there and the tensors are on a CPU, and nobody traces the computation to compile or export it."""
    return installed() and params.m0.device.type == "cpu" and not torch.compiler.is_compiling()


def compiled_filter(params: LinearGaussian, x: Tensor, observed: Tensor, f: Tensor, g: Tensor) -> Filtered:
    """Filter; f (T, B, z_dim) and g (T, B, x_dim) are what is known of each transition and emission."""
    return Filtered(*_Filter.apply(*params[:6], f, x - g, observed))


def compiled_smoother(params: LinearGaussian, filtered: Filtered) -> Smoothed:
    """Smooth what was filtered."""
    return Smoothed(*_Smoother.apply(params.A, params.Q, *filtered[:4]))


class _Filter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, m0: Tensor, P0: Tensor, A: Tensor, Q: Tensor, C: Tensor, R: Tensor,
        f: Tensor, y: Tensor, observed: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        from dynavae.exact import _kernels

        (T, B, _), z = y.shape, m0.shape[-1]
        inputs = m0, P0, A, Q, C, R, f, y
        mean, predicted_mean = y.new_empty(T, B, z), y.new_empty(T, B, z)
        covariance, predicted_covariance = y.new_empty(T, B, z, z), y.new_empty(T, B, z, z)
        out = mean, covariance, predicted_mean, predicted_covariance, y.new_empty(T, B)
        arrays = _arrays(*_everywhere(inputs, T, B), observed, *out)
        failed = _first(_for_sequences(_kernels.filter_, T, B, z, lambda: arrays))
        if failed:
            t, b = divmod(failed - 1, B)
            raise ValueError(
                f"S_t = C P C' + R is not positive definite at t={t}, sequence {b}. Check that Q, R and P0 are positive "
                "definite; raise their diagonal."
            )
        ctx.save_for_backward(*inputs, observed, *out[:4])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of: Tensor) -> tuple[Tensor | None, ...]:
        from dynavae.exact import _adjoint_kernels

        *inputs, observed, mean, covariance, predicted_mean, predicted_covariance = ctx.saved_tensors
        T, B, z = mean.shape
        into = _Gradients(inputs, AXES)
        _, _, A, Q, C, R, _, y = _everywhere(inputs, T, B)
        known = A, Q, C, R, y, observed, mean, covariance, predicted_mean, predicted_covariance, *of
        work = _arrays(*known)
        _for_sequences(
            _adjoint_kernels.filter_adjoint,
            T,
            B,
            z,
            lambda: (*work, *_arrays(*_everywhere(into.more(), T, B))),
        )
        return *into.total(), None


class _Smoother(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, Q: Tensor, *moments: Tensor) -> tuple[Tensor, ...]:
        from dynavae.exact import _kernels

        T, B, z = moments[0].shape
        new = A.new_empty
        out = new(T, B, z), new(T, B, z, z), new(T - 1, B, z, z), new(T - 1, B, z, z)
        arrays = _arrays(A.expand(T, B, z, z), Q.expand(T, B, z, z), *moments, *out)
        failed = _first(_for_sequences(_kernels.smoother, T, B, z, lambda: arrays))
        if failed:
            t, b = divmod(failed - 1, B)
            raise ValueError(
                f"P_{{t+1|t}} = A P A' + Q is not positive semidefinite at t={t}, sequence {b}. Check that Q, R and P0 are "
                "covariances."
            )
        ctx.save_for_backward(A, *moments, *out[:3])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of: Tensor) -> tuple[Tensor | None, ...]:
        from dynavae.exact import _adjoint_kernels

        A, *known = ctx.saved_tensors
        T, B, z = known[0].shape
        into, to_moments = _Gradients([A], [2]), [torch.zeros_like(a) for a in known[:4]]
        work, to = _arrays(A.expand(T, B, z, z), *known, *of), _arrays(*to_moments)
        _for_sequences(
            _adjoint_kernels.smoother_adjoint, T, B, z,
            lambda: (*work, *_arrays(into.more()[0].expand(T, B, z, z)), *to),
        )  # fmt: skip
        return into.total()[0], None, *to_moments


def _for_sequences(
    kernel: Callable[..., int], T: int, B: int, z: int, arrays: Callable[[], tuple[Any, ...]]
) -> list[int]:
    """What the kernel returns, of all sequences, or of as many equal parts as there are threads that it pays to start.

    `arrays` is called for each part: parts may share what they read, and what they write to different places.
    """
    parts = max(1, min(torch.get_num_threads(), B, int(T * B * (0.1 + 0.03 * z**2 + 0.005 * z**3)) // PART))
    if parts == 1:
        return [kernel(0, B, *arrays())]
    ends = [B * i // parts for i in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        made = [pool.submit(kernel, *ends[i : i + 2], *arrays()) for i in range(parts)]
        return [each.result() for each in made]


class _Gradients:
    """Zeros to add the derivatives of `inputs` to: another set for each thread, of what several sequences share."""

    def __init__(self, inputs: Sequence[Tensor], axes: Sequence[int]) -> None:
        self.inputs = inputs
        self.shared = [a.ndim == n or a.shape[-n - 1] == 1 for a, n in zip(inputs, axes, strict=True)]
        self.sets: list[list[Tensor]] = []

    def more(self) -> list[Tensor]:
        known = self.sets[0] if self.sets else [None] * len(self.inputs)
        self.sets.append([
            torch.zeros_like(a) if shared or old is None else old
            for a, shared, old in zip(self.inputs, self.shared, known, strict=True)
        ])  # fmt: skip
        return self.sets[-1]

    def total(self) -> list[Tensor]:
        sums = zip(self.shared, *self.sets, strict=True)
        return [functools.reduce(torch.add, parts) if shared else parts[0] for shared, *parts in sums]


def _everywhere(inputs: Sequence[Tensor], T: int, B: int) -> tuple[Tensor, ...]:
    """m0 and P0 of each sequence, the other six of each step and sequence: views, so what is added to one adds up."""
    leads = [(B,)] * 2 + [(T, B)] * 6
    return tuple(a.expand(*lead, *a.shape[-n:]) for a, lead, n in zip(inputs, leads, AXES, strict=True))


def _first(failed: list[int]) -> int:
    """The least that is not 0, if there is one."""
    return min(filter(None, failed), default=0)


def _arrays(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(a.detach().numpy() for a in tensors)
