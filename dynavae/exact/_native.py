"""What calls of compiled loops share: whether they apply, arrays of tensors, threads, and gradients that threads add to."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

PART = 1000
"""Microseconds of work, about, for which a thread is started."""
SHARED_BYTES = 2**26
"""What gradients of shared parameters may take, of all threads."""


@functools.cache
def installed() -> bool:
    """Whether there is Numba, and it compiles."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        import numba

        from dynavae.exact import _numba

        return not numba.config.DISABLE_JIT and _numba.probe(0, 1, np.zeros(1)) == 1
    except (
        Exception
    ) as error:  # of whatever kind: a version that does not go with this NumPy, a library that is missing
        warnings.warn(
            f"Numba is installed, but does not work ({type(error).__name__}: {error}): exact inference runs without it.",
            stacklevel=2,
        )
        return False


def applies(a: Tensor) -> bool:
    """Whether Numba is there and the tensor is an ordinary one on a CPU, and nobody traces or transforms the computation."""
    return (
        installed()
        and a.device.type == "cpu"
        and type(a) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def arrays(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple(a.detach().resolve_neg().numpy() for a in tensors)


def again(
    reference: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], of: Sequence[Tensor]
) -> list[Tensor | None]:
    """The derivatives of compiled recursions where they are to be differentiated once more: those of `reference`."""
    free = [a for a in inputs if a.requires_grad]
    found = iter(torch.autograd.grad(reference(*inputs), free, of, create_graph=True, allow_unused=True))
    return [next(found) if a.requires_grad else None for a in inputs]


def for_sequences(
    kernel: Callable[..., int],
    B: int,
    work: float,
    given: Callable[[], tuple[Any, ...]],
    most: int | None = None,
) -> list[int]:
    """What the kernel returns, of all sequences, or of as many equal parts as there are threads that it pays to start.

    Args:
        kernel: a function of the first sequence, the one after the last, and arrays.
        B: sequences.
        work: microseconds that it takes, about.
        given: the arrays, for each part: parts may share what they read, and what they write to different places.
        most: parts.
    """
    parts = max(1, min(torch.get_num_threads(), B, int(work) // PART, B if most is None else most))
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

    @property
    def most(self) -> int:
        """Sets that take SHARED_BYTES together; at least one."""
        size = sum(
            a.numel() * a.element_size() for a, own in zip(self.inputs, self.shared, strict=True) if own
        )
        return max(1, SHARED_BYTES // max(1, size))

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
