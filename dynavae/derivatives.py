"""What hand-written backward passes have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Backward = Callable[..., Any]


def differentiable_once(otherwise: str) -> Callable[[Backward], Backward]:
    """For the `backward` of an autograd function: refuses second derivatives, and says what to do for them. PyTorch's own
    decorator gives wrong ones without a word where the derivative that comes in is constant, as that of a sum."""

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def once(ctx: Any, *of: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "this gradient was asked for with create_graph=True, but can be differentiated once only: for "
                    f"second derivatives {otherwise}."
                )
            return backward(ctx, *of)

        return once

    return decorate
