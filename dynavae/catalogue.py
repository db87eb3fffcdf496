"""The registry as data: which models there are, what they can do, as records and as a table."""

from __future__ import annotations

import inspect
from typing import Any

from dynavae.models import MODELS
from dynavae.tasks import TASKS, capabilities
from dynavae.testing import small


def records() -> list[dict[str, Any]]:
    """One record per model and named variant: what it is, its options, and task -> whether it is right for it.

    Example:
        >>> [r["tasks"]["filter"] for r in records() if r["name"] in ("VRNN", "DKF", "DKF (ST-L)")]
        [False, True, True]
    """
    out = []
    for name, cls in MODELS.items():
        for variant, options in {"": {}, **cls.variants}.items():
            model = small(cls, **options)
            parameters = inspect.signature(cls).parameters
            out.append(
                {
                    "name": f"{name} ({variant})" if variant else name,
                    "model": name,
                    "variant": options,
                    "summary": inspect.cleandoc(cls.__doc__ or "").splitlines()[0],
                    "causal": bool(model.causal),
                    "autoregressive": bool(model.autoregressive),
                    "exact": bool(model.exact),
                    "controls": "control_dim" in parameters,
                    "options": {k: _default(p) for k, p in parameters.items()},
                    "tasks": capabilities(model),
                }
            )
    return out


def _default(parameter: inspect.Parameter) -> Any:
    if parameter.default is inspect.Parameter.empty:
        return "required"
    return list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default


def task_table() -> str:
    """The model × task table as Markdown; variants that can do no more than their model are left out."""
    lines = ["| model | " + " | ".join(TASKS) + " |", "|---" * (len(TASKS) + 1) + "|"]
    seen: dict[str, list[dict[str, bool]]] = {}
    for record in records():
        rows = seen.setdefault(record["model"], [])
        if record["tasks"] in rows:
            continue
        rows.append(record["tasks"])
        marks = ["✓" if record["tasks"][task] else "–" for task in TASKS]
        lines.append(f"| {record['name']} | " + " | ".join(marks) + " |")
    return "\n".join(lines)
