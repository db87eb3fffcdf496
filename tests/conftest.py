"""Seeds, precision, and shape annotations that are enforced while the tests run.

`DYNAVAE_SEED` unlocks the seeds: an integer, or "random", to hunt for tests that pass by luck.
"""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import random
import sys
from collections.abc import Iterator
from unittest import mock

import beartype
import jaxtyping
import pytest

typecheck = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # an int is a float

assert "dynavae.scan" not in sys.modules, "dynavae was imported before its annotations could be enforced"
# Kept for good: every module that a test imports from here on is checked. Not the report, whose tests pass wrong
# types on purpose, to read the sentence with which it refuses them; not `tree` and `distributions`, which carry
# no shapes and run in the innermost loop: the laws would take three times as long.
UNCHECKED = {"report", "tree", "distributions"}
SPEC = importlib.util.find_spec("dynavae")
assert SPEC is not None
MODULES = [m.name for m in pkgutil.iter_modules(SPEC.submodule_search_locations) if m.name not in UNCHECKED]
HOOK = jaxtyping.install_import_hook([f"dynavae.{name}" for name in MODULES], f"{__name__}.typecheck")
HOOK.__enter__()

import numpy as np  # noqa: E402
import torch  # noqa: E402

from dynavae.exact import _native  # noqa: E402


def base_seed() -> int:
    """The seed of this run; 0 unless the environment says otherwise."""
    asked = os.environ.get("DYNAVAE_SEED", "0")
    return random.SystemRandom().randrange(2**31) if asked == "random" else int(asked)


SEED = base_seed()


def pytest_report_header() -> str:
    return f"dynavae: seed {SEED} (DYNAVAE_SEED), {torch.get_num_threads()} threads, cuda {torch.cuda.is_available()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="module", params=[True, False], ids=["compiled", "torch"])
def with_and_without_numba(request: pytest.FixtureRequest) -> Iterator[bool]:
    """A module that uses it is run with exact inference in machine code, and as it is where Numba is not installed."""
    if request.param and not _native.installed():
        pytest.skip("Numba is not installed")
    with mock.patch.object(_native, "installed", return_value=request.param):
        yield request.param


@pytest.fixture(autouse=True)
def fixed_seeds() -> Iterator[None]:
    """Every test starts from the same random state."""
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    random.seed(SEED)
    yield


@pytest.fixture
def seed() -> int:
    """The seed of this run, for generators of a test's own."""
    return SEED


@pytest.fixture
def float64() -> Iterator[None]:
    """float64 by default within the test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
