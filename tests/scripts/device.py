"""Every model gives the numbers of the CPU on another device, and its gradients. Run by test_laws.py, in a process of its own.

    python tests/scripts/device.py [NAME ...]
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from emulated import Device, register

from dynavae.testing import cases, law_device


def main() -> None:
    register()
    chosen = [c for c in cases() if not sys.argv[1:] or c.name in sys.argv[1:]]
    failed = 0
    for case in chosen:
        torch.manual_seed(0)
        try:
            with Device():
                law_device(case.build, "apart")
        except Exception as error:
            failed += 1
            print(f"{case.name}: {type(error).__name__}: {error}")
    print(f"{len(chosen) - failed} of {len(chosen)} equal")


if __name__ == "__main__":
    main()
