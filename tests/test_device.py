"""Models and tasks on an emulated device: what would meet a tensor of the wrong device on a GPU fails here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynavae.models import MODELS
from dynavae.runs import choose_device

SCRIPT = Path(__file__).parent / "scripts" / "device.py"


@pytest.mark.parametrize("check", ["conditionals", "tasks", "training"])
def test_another_device_gives_the_numbers_of_the_cpu(check: str) -> None:
    """In a process of its own, where the device is registered for good."""
    run = subprocess.run([sys.executable, SCRIPT, check], capture_output=True, text=True, check=False)
    assert run.stdout.splitlines() == [f"{name}: equal" for name in MODELS], run.stderr


@pytest.mark.parametrize("check", ["from_the_command_line", "mutants"])
def test_commands_and_what_would_fail_on_a_gpu(check: str) -> None:
    run = subprocess.run([sys.executable, SCRIPT, check], capture_output=True, text=True, check=False)
    assert run.stdout.splitlines()[-1] == f"{check}: equal", run.stdout + run.stderr


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [choose_device(name) for name in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(ValueError, match=r"device='cuda:1' needs a GPU, and this torch .* sees none: take"):
        choose_device("cuda:1")
    with pytest.raises(ValueError, match="device should be auto, cpu, cuda or cuda:1; got 'gpu'"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(name) for name in ("auto", "cpu", "cuda:1")] == ["cuda", "cpu", "cuda:1"]
