"""What happens once at a public entry: arguments are checked, and autocast is switched off."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
Out = TypeVar("Out")


def entry(check: Callable[..., object]) -> Callable[[Callable[P, Out]], Callable[P, Out]]:
    """Decorate a function of tensors: call `check` on the same arguments, then compute in the caller's dtype.

    Exact inference loses its accuracy under autocast, which would multiply matrices in bfloat16.
    """

    def decorate(function: Callable[P, Out]) -> Callable[P, Out]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> Out:
            arguments = signature.bind(*args, **kwargs).arguments
            check(**arguments)
            first = next(iter(arguments.values()))
            device = (first if isinstance(first, Tensor) else first[0]).device
            if not torch.is_autocast_enabled(device.type):
                return function(*args, **kwargs)
            with torch.autocast(device.type, enabled=False):
                return function(*args, **kwargs)

        return wrapper

    return decorate


def check_float(name: str, tensor: Any, like: Tensor | None = None) -> None:
    """Require a float32 or float64 tensor, of the dtype and on the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} should be a torch.Tensor; got {type(tensor).__name__}.")
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} should be float32 or float64; got {tensor.dtype}. Convert it with .float()."
        )
    if like is not None and (tensor.dtype, tensor.device) != (like.dtype, like.device):
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}, but the other arguments are {like.dtype} on "
            f"{like.device}; move it with .to(dtype=..., device=...)."
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], axes: str) -> None:
    """Require exactly this shape; `axes` names it, as in "(T, B, x_dim)"."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} should have shape {axes} = {tuple(shape)}; got {tuple(tensor.shape)}.")


def check_broadcast(name: str, tensor: Tensor, shape: tuple[int, ...], axes: str) -> None:
    """Require a shape that broadcasts to `shape`, its last axes, those after "..., " in `axes`, exactly."""
    core = axes.count(",")
    if tuple(tensor.shape) == tuple(shape[-core:]):
        return
    leading = tensor.shape[: tensor.ndim - core]
    fits = tensor.ndim >= core and tuple(tensor.shape[tensor.ndim - core :]) == tuple(shape[-core:])
    target = shape[: len(shape) - core]
    if (
        not fits
        or len(leading) > len(target)
        or any(size not in (1, goal) for size, goal in zip(reversed(leading), reversed(target), strict=False))
    ):
        raise ValueError(
            f"{name} should have shape {axes} that broadcasts to {tuple(shape)}; got {tuple(tensor.shape)}."
        )
