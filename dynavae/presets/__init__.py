"""Presets: a model, its data and its training in one YAML file, each with what it should score.

`dynavae fit --preset NAME --out runs/NAME` runs one; further options change it. The comment at the head of each
file says where the recipe comes from, what differs, the score, the time and the hardware.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """All presets, sorted.

    Example:
        >>> "srnn-jsb" in names()
        True
    """
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def path(name: str) -> Path:
    """The YAML file of a preset, for `--config`.

    Raises:
        ValueError: there is no such preset; the sentence lists those there are.

    Example:
        >>> path("srnn-jsb").name
        'srnn-jsb.yaml'
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown preset {name!r}{hint} Presets: {', '.join(names())}.")
    return FOLDER / f"{name}.yaml"


def read(name: str) -> dict[str, Any]:
    """The options that a preset sets, as the file has them."""
    return yaml.safe_load(path(name).read_text(encoding="utf-8"))


def records() -> list[dict[str, Any]]:
    """One record per preset: preset, model, data, epochs, what (the first sentence of its comment)."""
    found = []
    for name in names():
        options, comment = read(name), _comment(name)
        model = options["model"]["class_path"].rsplit(".", 1)[-1]
        what = comment.split(". ")[0].rstrip(".")
        found.append(
            {
                "preset": name,
                "model": model,
                "data": options["data"],
                "epochs": options["epochs"],
                "what": what,
            }
        )
    return found


def _comment(name: str) -> str:
    """The comment at the head of the file, on one line."""
    lines = path(name).read_text(encoding="utf-8").splitlines()
    first = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:first])
