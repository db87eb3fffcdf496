"""The allocator keeps what a training step frees, and a user's own settings stay."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import dynavae.allocator

# The allocator's own books (mallinfo2) after 240 MB came and went, in blocks small and large, in a process with nothing but
# the module in it. Not the kernel's page faults, which some sandboxes do not count.
COUNT = """
import ctypes, runpy
module = runpy.run_path({path!r})
told = {told}
class Books(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used free f".split()]
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
pieces = [libc.malloc(size) for size in [8_000_000] * 5 + [100_000_000] * 2]
for piece in pieces:
    libc.free(piece)
books = getattr(libc, "mallinfo2", None)
if books is not None:
    books.restype = Books
print(told, -1 if books is None else books().free)
"""


def run(told: str, **environment: str) -> tuple[bool, int]:
    """Whether the allocator was told, and the free bytes that it holds (-1: it does not say)."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(told=told, path=dynavae.allocator.__file__)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    said, free = done.stdout.split()
    return said == "True", int(free)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    told, kept = run("module['keep_freed_memory']()")
    if not told or kept < 0:
        pytest.skip("the allocator is not glibc's, or is older than 2.33")
    _, usual = run("False")
    assert usual < 20_000_000 < 239_000_000 < kept


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"])
def test_the_users_settings_stay(name: str) -> None:
    told, _ = run("module['keep_freed_memory']()", **{name: "1000000"})
    assert not told
