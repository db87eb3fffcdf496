"""The allocator keeps what a training step frees, and a user's own settings stay."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from dynavae.allocator import keep_freed_memory
torch.set_num_threads(1)
told = {told}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        pieces = [torch.ones(1_000_000) for _ in range(10)]
        del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(told, faults())
"""


def run(told: str, **environment: str) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(told=told)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    said, faults = done.stdout.split()
    return said == "True", int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    told, kept = run("keep_freed_memory()")
    if not told:
        pytest.skip("the allocator is not glibc's")
    _, usual = run("False")
    assert kept < 100 < usual


def test_the_users_settings_stay() -> None:
    told, _ = run("keep_freed_memory()", MALLOC_TRIM_THRESHOLD_="1000000")
    assert not told
