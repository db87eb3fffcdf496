"""The arguments that an object was built with, as JSON holds them: what a checkpoint stores."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor


def recording(init: Callable[..., None]) -> Callable[..., None]:
    """Wrap a constructor so that the outermost call leaves its arguments in `self.config`."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        outermost = not hasattr(self, "_config")
        if outermost:
            try:
                bound = signature.bind(self, *args, **kwargs)
            except TypeError as error:
                raise TypeError(_explain(type(self).__name__, signature, kwargs, error)) from None
            bound.apply_defaults()
            config = {k: _plain(v) for k, v in bound.arguments.items() if k != "self"}
            object.__setattr__(self, "_config", config)
        init(self, *args, **kwargs)
        if outermost:
            self.config = config

    return wrapped


def _plain(value: Any) -> Any:
    """A constructor argument as JSON holds it."""
    if dataclasses.is_dataclass(value) and hasattr(value, "to_config"):
        return value.to_config()
    if isinstance(value, Tensor):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _explain(name: str, signature: inspect.Signature, kwargs: dict[str, Any], error: TypeError) -> str:
    """An unknown option is answered with the nearest one and the list."""
    options = [p for p in signature.parameters if p != "self"]
    unknown = [k for k in kwargs if k not in options]
    if not unknown:
        return f"{name}: {error}. Options: {', '.join(options)}."
    near = difflib.get_close_matches(unknown[0], options, 1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown option {unknown[0]!r} for {name}{hint} Options: {', '.join(options)}."
