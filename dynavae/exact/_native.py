"""What calls of compiled loops share: whether they apply, arrays of tensors, threads, and gradients that threads add to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

PART = 1000
"""Microseconds of work, about, for which a thread is started."""


@functools.cache
def installed() -> bool:
    """Whether there is Numba, and it compiles."""
    try:
        import numba
    except ImportError:  # also of a version that does not go with this NumPy
        return False
    return not numba.config.DISABLE_JIT


def applies(a: Tensor) -> bool:
    """Whether Numba is there and the tensor is on a CPU, and nobody traces the computation to compile or export it."""
    return installed() and a.device.type == "cpu" and not torch.compiler.is_compiling()


def arrays(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(a.detach().numpy() for a in tensors)


def for_sequences(
    kernel: Callable[..., int], B: int, work: float, given: Callable[[], tuple[Any, ...]]
) -> list[int]:
    """What the kernel returns, of all sequences, or of as many equal parts as there are threads that it pays to start.

    Args:
        kernel: a function of the first sequence, the one after the last, and arrays.
        B: sequences.
        work: microseconds that it takes, about.
        given: the arrays, for each part: parts may share what they read, and what they write to different places.
    """
    parts = max(1, min(torch.get_num_threads(), B, int(work) // PART))
    if parts == 1:
        return [kernel(0, B, *given())]
    ends = [B * i // parts for i in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        made = [pool.submit(kernel, *ends[i : i + 2], *given()) for i in range(parts)]
        return [each.result() for each in made]


class Gradients:
    """Zeros to add the derivatives of `inputs` to: another set for each thread, of what several sequences share.

    `axes` are those of each input besides steps and sequences.
    """

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
