"""Keeps freed memory for the next step.

Training frees and asks for the same large buffers every step. glibc hands freed memory at the end of its heap back to the
system, and a page that comes back has to be mapped and cleared: 10,000 page faults in a step of 160 ms, 6 to 8 % of it. A
block of more than 32 MB that no hole of the heap can take is mapped by itself and always goes back, such as the 54 MB which
torch's LSTM over 150 frames of 32 sequences keeps for its backward: up to 15 % of a step.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
KEPT = 2**31 - 1  # the most that glibc takes


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process keep up to 2 GiB of freed memory, and no block apart; whether the allocator could be told.

    Does nothing where the allocator is not glibc's, or where the environment sets `MALLOC_TRIM_THRESHOLD_`,
    `MALLOC_MMAP_THRESHOLD_` or `MALLOC_MMAP_MAX_`, as a user who wants something else does.
    """
    own = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_"}
    if sys.platform != "linux" or own & os.environ.keys():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT) and mallopt(M_MMAP_MAX, 0))
