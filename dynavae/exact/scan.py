r"""Prefix "sums" of an associative operation in O(log T) batched calls: the parallel form of a recursion in time.

A recursion that can be written as :math:`a_1 \otimes a_2 \otimes \dots \otimes a_t` with an associative :math:`\otimes`
needs no loop over t: neighbours are combined pairwise, the half as long sequence is scanned, and the other half of the
prefixes follows by one more combination each. About 2 T combinations in :math:`2 \log_2 T` calls.

References: Blelloch, Prefix Sums and Their Applications, 1990. Särkkä and García-Fernández, Temporal Parallelization of
Bayesian Smoothers, 2021, arXiv:1905.13002.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from dynavae.tree import tree_map

Elements = TypeVar("Elements")


def associative_scan(
    combine: Callable[[Elements, Elements], Elements], elements: Elements, reverse: bool = False
) -> Elements:
    r"""All prefixes :math:`a_1 \otimes \dots \otimes a_t`, or all suffixes :math:`a_t \otimes \dots \otimes a_T`.

    Args:
        combine: (earlier, later) -> their combination; associative, for stacked elements at once: it must treat the
            leading axis as a batch.
        elements: a tensor, or a (named) tuple of tensors, whose leading axis is time.
        reverse: suffixes instead of prefixes; `combine` still gets the earlier element first.

    Returns:
        the combinations, of the structure and shapes of `elements`.

    Raises:
        ValueError: for elements of different lengths, or none.

    Example:
        >>> associative_scan(torch.add, torch.arange(1, 6))
        tensor([ 1,  3,  6, 10, 15])
        >>> associative_scan(torch.add, torch.arange(1, 6), reverse=True)
        tensor([15, 14, 12,  9,  5])
    """
    lengths = sorted({len(leaf) for leaf in _leaves(elements)})
    if len(lengths) != 1 or lengths[0] == 0:
        raise ValueError(f"elements should have one length along time, at least 1; got {lengths}.")
    if not reverse:
        return _prefixes(combine, elements)
    flipped = tree_map(lambda a: a.flip(0), elements)
    return tree_map(lambda a: a.flip(0), _prefixes(lambda i, j: combine(j, i), flipped))


def _prefixes(combine: Callable[[Elements, Elements], Elements], elements: Elements) -> Elements:
    T = len(next(_leaves(elements)))
    if T == 1:
        return elements
    pairs = combine(_part(elements, 0, T - 1, 2), _part(elements, 1, T, 2))
    odd = _prefixes(combine, pairs)  # of t = 2, 4, ... counted from 1
    if T == 2:
        return tree_map(_interleave, _part(elements, 0, 1, 1), odd)
    even = combine(_part(odd, 0, (T - 1) // 2, 1), _part(elements, 2, T, 2))  # of t = 3, 5, ...
    first = _part(elements, 0, 1, 1)
    return tree_map(_interleave, tree_map(lambda a, b: torch.cat([a, b]), first, even), odd)


def _part(elements: Elements, start: int, stop: int, step: int) -> Elements:
    return tree_map(lambda a: a[start:stop:step], elements)


def _interleave(a: Tensor, b: Tensor) -> Tensor:
    """a_1, b_1, a_2, b_2, ...; a may have one more than b."""
    n = len(b)
    both = torch.stack([a[:n], b], 1).flatten(0, 1)
    return both if len(a) == n else torch.cat([both, a[n:]])


def _leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for part in tree:
            yield from _leaves(part)
