"""How loops over numbers are compiled by Numba; imported only where it is installed.

Every array is float64 (or what its name says) with any strides, (T, B, ...) or without T. A parameter that all steps or
sequences share has strides of 0: it is seen everywhere, and what is added to its gradient adds up. A kernel works on the
sequences `first`, ..., `last` - 1, step after step, which is their order in memory.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

Array = np.ndarray
numbers, vector, matrix = "float64[:,:]", "float64[:,:,:]", "float64[:,:,:,:]"  # for each step and sequence
mask, integers = "boolean[:,:,:]", "int64[:,:]"

OPTIONS: dict[str, Any] = dict(nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})


def _stamp() -> str:
    """Of everything that is compiled: Numba looks at a function's own file only, not at those of what it calls."""
    sources = sorted(Path(__file__).parent.glob("*_kernels.py")) + sorted(
        Path(__file__).parent.glob("*_adjoints.py")
    )
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()


STAMP = _stamp()


def _dispatcher(function: Callable[..., Any]) -> Any:
    """With a cache, if there is a folder for it."""
    function = inspect.unwrap(function)  # not the type checks that tests put around it
    try:
        made = numba.njit(cache=True, **OPTIONS)(function)
        made._cache._cache_file._source_stamp = STAMP
    except (RuntimeError, AttributeError):
        made = numba.njit(**OPTIONS)(function)
    return made


def helper(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled into the kernels that call it."""
    made: Callable[..., Any] = _dispatcher(function)
    return made


def kernel(*types: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Compiled for these types at the first call; later processes read the result from Numba's cache."""

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        @functools.cache
        def compiled() -> Callable[..., int]:
            made = _dispatcher(function)
            made.compile(f"int64(int64, int64, {', '.join(types)})")
            made.disable_compile()
            done: Callable[..., int] = made
            return done

        @functools.wraps(function)
        def call(first: int, last: int, *arguments: Any) -> int:
            return compiled()(first, last, *arguments)

        return call

    return decorate


@kernel("float64[:]")
def probe(first: int, last: int, a: Array) -> int:
    """The number of sequences, to see whether anything compiles."""
    return last - first
