"""Trees of tensors: nested tuples (named or not) whose leaves are tensors or None.

States of a recursion, and distributions, are such trees; these few functions move them along time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply `function` to the tensors of a tree (and of others of the same shape).

    Example:
        >>> tree_map(lambda a: a.shape, (torch.zeros(2), (torch.zeros(3), None)))
        (torch.Size([2]), (torch.Size([3]), None))
    """
    if isinstance(tree, Tensor):
        return function(tree, *others)
    if isinstance(tree, tuple):
        items = [tree_map(function, *parts) for parts in zip(tree, *others, strict=True)]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return tree


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    found: list[Tensor] = []
    tree_map(found.append, tree)
    return found


def stack(trees: Sequence[Any]) -> Any:
    """Trees of one shape, one per time step, stacked along a new leading axis."""
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


def shifted(first: Tensor, values: Tensor) -> Tensor:
    """The value before each step, (T, ...): `first`, then all values but the last."""
    return torch.cat([first.unsqueeze(0), values[:-1]])


def unbind(tree: Any, length: int) -> list[Any]:
    """The inverse of :func:`stack`.

    Unbind, never index: the backward of `a[t]` allocates a full-size zero tensor per step.
    """
    if isinstance(tree, Tensor):
        return list(tree.unbind())
    if isinstance(tree, tuple):
        if not tree:
            return [tree] * length
        columns = zip(*(unbind(part, length) for part in tree), strict=True)
        return [type(tree)(*c) if hasattr(tree, "_fields") else tuple(c) for c in columns]
    return [tree] * length


def where(mask: Tensor, tree: Any, other: Any) -> Any:
    """Choose between two trees; `mask` has the leading axes that the leaves share."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        extra = max(a.ndim, b.ndim) - mask.ndim
        return torch.where(mask.reshape(*mask.shape, *[1] * extra), a, b)

    return tree_map(choose, tree, other)


def same_structure(tree: Any, other: Any) -> bool:
    """Whether two trees have the same nesting and tensors in the same places."""
    if isinstance(tree, tuple):
        return (
            type(tree) is type(other)
            and len(tree) == len(other)
            and all(same_structure(a, b) for a, b in zip(tree, other, strict=True))
        )
    return isinstance(tree, Tensor) == isinstance(other, Tensor)


def select(tree: Any, ancestors: Tensor) -> Any:
    """Follow `ancestors` (S, B) in every (K, B, ...) tensor of a tree: (S, B, ...)."""

    def follow(a: Tensor) -> Tensor:
        index = ancestors.reshape(*ancestors.shape, *[1] * (a.ndim - 2)).expand(-1, *a.shape[1:])
        return torch.gather(a, 0, index)

    return tree_map(follow, tree)


def detach(tree: Any) -> Any:
    """The same values, cut from the graph."""
    return tree_map(Tensor.detach, tree)


def cat(*parts: Tensor | None) -> Tensor:
    """Concatenate features, broadcasting the leading axes and skipping None.

    (B, a) with (K, B, b) gives (K, B, a + b): what depends on x alone has no particle axis.

    Example:
        >>> cat(torch.zeros(3, 2), None, torch.zeros(5, 3, 4)).shape
        torch.Size([5, 3, 6])
    """
    present = [p for p in parts if p is not None]
    lead = present[0].shape[:-1]
    # Number of axes first: a tuple is compared item by item, which would set the batch against the particles.
    if any(p.ndim != present[0].ndim or p.shape[:-1] != lead for p in present):
        lead = torch.broadcast_shapes(*[p.shape[:-1] for p in present])
        present = [p.expand(*lead, p.shape[-1]) for p in present]
    return present[0] if len(present) == 1 else torch.cat(present, -1)
