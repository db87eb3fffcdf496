"""What autodoc shows of our docstrings: fields of NamedTuples with the comments beside them, paragraphs, bars."""

from __future__ import annotations

import inspect
import re
from typing import Any

FIELD = re.compile(r"^    (?P<name>\w+): (?P<kind>[^#=]+?)(?: = (?P<default>[^#]+?))?(?:  # (?P<said>.*))?$")
PARAGRAPH = re.compile(r"(Reads|References?|Differs from the papers?|Not this model|Shapes): ")
LITERAL = re.compile(r"(``.*?``|`.*?`)")


def fields(cls: type) -> list[str]:
    """The fields of a NamedTuple as a list, in reStructuredText."""
    lines = ["", ":Fields:", ""]
    for line in inspect.getsource(cls).splitlines():
        found = FIELD.match(line)
        if found and found["name"] in cls._fields:  # type: ignore[attr-defined]
            said = re.sub(r"([*|`\\])", r"\\\1", found["said"] or "")
            lines.append(
                f"   * **{found['name']}**: {said + ', ' if said else ''}``{found['kind'].strip()}``"
            )
    return [*lines, ""]


def line_as_meant(line: str) -> str:
    """A line in which |x| is no substitution, (*, T) no emphasis, and "K." begins no enumeration."""
    if not line.startswith((" ", ">>>", "..")):
        parts = LITERAL.split(line)
        line = "".join(p if p.startswith("`") else re.sub(r"(?<!\\)\|", r"\\|", p) for p in parts)
    if line.startswith(":vartype"):
        line = line.replace("*", r"\*")
    return re.sub(r"^(:(?:param|ivar) \w+: )(\w\.)", r"\1\\\2", line)


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what == "class" and issubclass(obj, tuple) and hasattr(obj, "_fields"):
        if lines and lines[0].startswith(f"{obj.__name__}("):  # namedtuple's own text
            lines.clear()
        if not any(line.startswith(":ivar") for line in lines):  # it describes them itself
            lines += fields(obj)
    shown: list[str] = []
    for line in lines:
        if PARAGRAPH.match(line):
            shown.append("")
        shown.append(line_as_meant(line))
    lines[:] = shown


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process, priority=900)  # after napoleon
    return {"parallel_read_safe": True}
