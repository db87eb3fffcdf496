"""The gallery: runs `examples/*.py` and writes a page of text, code, output and pictures for each into `docs/gallery`.

An example is a plain script. Its docstring gives title and introduction; `# %%` begins a cell, and comment lines right
after it are text, in MyST. What a cell prints and the figures it leaves open follow its code.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import re
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
ORDER = (
    "tracking",
    "ball",
    "structural",
    "imputation",
    "video",
    "chorales",
    "regimes",
    "latent_space",
    "anomalies",
    "bounds",
)
STYLE = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
}


class Cell(NamedTuple):
    """Text in MyST, and code."""

    text: str
    code: str


class Example(NamedTuple):
    """A script taken apart."""

    name: str
    title: str
    introduction: str
    cells: list[Cell]


def read(path: Path) -> Example:
    """Take a script apart."""
    source = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source))
    if not docstring:
        raise ValueError(f"{path} should begin with a docstring: a title, and an introduction.")
    title, _, introduction = docstring.partition("\n")
    _, *blocks = re.split(r"^# %%.*\n", source, flags=re.M)
    cells = []
    for block in blocks:
        lines = block.split("\n")
        count = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
        text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:count])
        cells.append(Cell(text, "\n".join(lines[count:]).strip()))
    return Example(path.stem, title, introduction.strip(), cells)


def run(example: Example, folder: Path) -> str:
    """Execute an example and return its page; its pictures go into the folder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import torch

    torch.set_num_threads(1)
    logging.getLogger("dynavae").setLevel(logging.WARNING)
    scope: dict[str, Any] = {"__name__": "__main__"}
    page = [f"# {example.title}", "", example.introduction, ""]
    pictures = 0
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*non-interactive.*")  # plt.show() in a script
        warnings.filterwarnings("ignore", module="lightning")
        for number, cell in enumerate(example.cells):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(cell.code, f"{example.name}.py, cell {number + 1}", "exec"), scope)
            page += [cell.text, ""]
            if cell.code:
                page += ["```python", cell.code, "```", ""]
            if printed.getvalue():
                page += ["```text", printed.getvalue().rstrip(), "```", ""]
            for figure in map(plt.figure, plt.get_fignums()):
                pictures += 1
                file = f"{example.name}_{pictures}.png"
                figure.savefig(folder / file, metadata={"Software": None})
                page += [f"![{example.title}, picture {pictures}]({file})", ""]
            plt.close("all")
    if not pictures:
        raise ValueError(f"examples/{example.name}.py left no figure open.")
    page += [f"This page is `examples/{example.name}.py`, run when the documentation was built.", ""]
    return "\n".join(page)


def index(examples: list[Example]) -> str:
    """The front page, with a picture of each example."""
    names = "\n".join(example.name for example in examples)
    lines = [
        "# Gallery",
        "",
        "Scripts of the folder `examples`, run when this documentation is built: each takes seconds on one CPU thread.",
        "",
        *("```{toctree}", ":hidden:", "", names, "```", ""),
        *(":::::{container} gallery", ""),
    ]
    for example in examples:
        lines += [
            *("::::{container} example", ""),
            f"[![{example.title}]({example.name}_1.png)]({example.name}.md)",
            "",
            f"[{example.title}]({example.name}.md)",
            *("", "::::", ""),
        ]
    return "\n".join([*lines, ":::::", ""])


def build(app: Any) -> None:
    """Write `docs/gallery`, which git ignores."""
    from sphinx.util.logging import getLogger

    folder = Path(app.srcdir) / "gallery"
    folder.mkdir(exist_ok=True)
    files = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
    if set(files) != set(ORDER):
        raise ValueError(f"ORDER in docs/_ext/gallery.py should name the examples: {sorted(files)}.")
    examples = [read(files[name]) for name in ORDER]
    for example in examples:
        start = time.perf_counter()
        (folder / f"{example.name}.md").write_text(run(example, folder), encoding="utf-8")
        seconds = time.perf_counter() - start
        getLogger(__name__).info(f"examples/{example.name}.py: {seconds:.1f} s")
    (folder / "index.md").write_text(index(examples), encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", build)
    return {"parallel_read_safe": True}
