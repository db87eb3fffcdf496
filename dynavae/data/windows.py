"""Long sequences in pieces."""

from __future__ import annotations


def windows(length: int, window: int | None, stride: int | None = None) -> list[tuple[int, int]]:
    """(start, end) of the pieces of a sequence: of `window` frames, every `stride`; the last may be shorter.

    Raises:
        ValueError: a window or a stride below 1, a stride without a window, or one that would skip frames.

    Example:
        >>> windows(10, 4), windows(6, 4, 2), windows(3, 4), windows(9, None)
        ([(0, 4), (4, 8), (8, 10)], [(0, 4), (2, 6)], [(0, 3)], [(0, 9)])
    """
    if window is None:
        if stride is not None:
            raise ValueError(f"stride={stride} needs a window: the frames of a piece.")
        return [(0, length)]
    stride = window if stride is None else stride
    if window < 1 or stride < 1 or stride > window:
        raise ValueError(
            f"window should be at least 1 frame, and stride from 1 to window; got {window} and {stride}."
        )
    starts = range(0, max(length - window, 0) + stride, stride)
    return [(s, min(s + window, length)) for s in starts if s < length]
