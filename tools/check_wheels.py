"""Fail if installing dynavae with its extras would bring a wheel that must never come in.

torchvision and torchaudio link CUDA libraries and break ``import lightning`` beside a CPU build of torch;
nvidia-* and triton wheels mean that a CUDA build of torch was chosen. The closure is asked of pip (a dry run
that installs nothing); where pip cannot resolve it, for instance offline, the installed packages are walked
instead.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = re.compile(r"torchvision|torchaudio|triton|pytorch-triton.*|nvidia-.*|cuda-.*")
SOURCE_ONLY = {"pesq"}  # no wheel: resolving it would compile it; it depends on numpy alone
SECONDS = 50


def normalize(name: str) -> str:
    """A distribution's name in its one canonical spelling."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[str]:
    """What the project and all of its extras require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [
        line for group in groups for line in group if normalize(Requirement(line).name) not in SOURCE_ONLY
    ]


def resolved_closure() -> dict[str, str]:
    """Name and version of everything pip would install into an empty environment."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    options = ["--dry-run", "--quiet", "--ignore-installed", "--only-binary", ":all:", "--report", "-"]
    command = [*pip, *options, "-c", str(ROOT / "constraints.txt"), *requirements()]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    items = [item["metadata"] for item in json.loads(answer.stdout)["install"]]
    return {normalize(item["name"]): item["version"] for item in items}


def installed_closure() -> dict[str, str]:
    """Name and version of what is installed here and required, directly or not, by the project."""
    found: dict[str, str] = {}
    queue = [(Requirement(line), "") for line in requirements()]
    seen: set[tuple[str, frozenset[str]]] = set()
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        key = (normalize(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        found[key[0]] = distribution.version
        for line in distribution.requires or ():
            queue += [(Requirement(line), extra) for extra in ("", *requirement.extras)]
    return found


def forbidden(names: Iterable[str]) -> list[str]:
    """Those names that must not occur, sorted."""
    return sorted(name for name in names if FORBIDDEN.fullmatch(name))


def main() -> int:
    """Print what was checked; 1 if a forbidden wheel is in the closure, else 0."""
    try:
        closure, how = resolved_closure(), "pip's resolution"
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        reason = (error.stderr or "").strip().splitlines() if isinstance(error.stderr, str) else []
        print(f"note: pip could not resolve the closure ({reason[-1] if reason else error}).")
        closure, how = installed_closure(), "the installed packages"
    bad = forbidden(closure)
    if bad:
        found = ", ".join(f"{name} {closure[name]}" for name in bad)
        print(
            f"check_wheels: {how} contain {found}. Find what requires it with `pip install --dry-run`; "
            "where nvidia-* come from torch itself, install the CPU build of torch."
        )
        return 1
    print(f"check_wheels: {len(closure)} packages in {how}, no CUDA wheel among them.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
