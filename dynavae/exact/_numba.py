"""How loops over numbers are compiled by Numba; imported only where it is installed.

Every array is float64 (or what its name says) with any strides, (T, B, ...) or without T. A parameter that all steps or
sequences share has strides of 0: it is seen everywhere, and what is added to its gradient adds up. A kernel works on the
sequences `first`, ..., `last` - 1, step after step, which is their order in memory.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

Array = np.ndarray
numbers, vector, matrix = "float64[:,:]", "float64[:,:,:]", "float64[:,:,:,:]"  # for each step and sequence
mask, integers = "boolean[:,:,:]", "int64[:,:]"

OPTIONS: dict[str, Any] = dict(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})


def helper(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled into the kernels that call it."""
    made: Callable[..., Any] = numba.njit(inspect.unwrap(function), **OPTIONS)
    return made


def kernel(*types: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Compiled for these types at the first call; later processes read the result from Numba's cache."""

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        signature = f"int64(int64, int64, {', '.join(types)})"

        @functools.cache
        def compiled() -> Callable[..., int]:
            made: Callable[..., int] = numba.njit(signature, **OPTIONS)(inspect.unwrap(function))
            return made

        @functools.wraps(function)
        def call(first: int, last: int, *arguments: Any) -> int:
            return compiled()(first, last, *arguments)

        return call

    return decorate
