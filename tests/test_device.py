"""Models and tasks on an emulated device: what would meet a tensor of the wrong device on a GPU fails here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dynavae.models import MODELS

SCRIPT = Path(__file__).parent / "scripts" / "device.py"


@pytest.mark.parametrize("check", ["conditionals", "tasks", "training"])
def test_another_device_gives_the_numbers_of_the_cpu(check: str) -> None:
    """In a process of its own, where the device is registered for good."""
    run = subprocess.run([sys.executable, SCRIPT, check], capture_output=True, text=True, check=False)
    assert run.stdout.splitlines() == [f"{name}: equal" for name in MODELS], run.stderr


def test_what_would_fail_on_a_gpu_fails() -> None:
    run = subprocess.run([sys.executable, SCRIPT, "mutants"], capture_output=True, text=True, check=False)
    assert run.stdout == "mutants: equal\n", run.stderr
