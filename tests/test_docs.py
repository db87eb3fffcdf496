"""The documentation says what is true: its Python runs, its commands parse, its files are there.

The snippets of a page run in their order, in one scope and an empty directory. `epochs=` is lowered to 1: what is tested is
that they run. The gallery's examples run when the documentation is built (`make docs`), which is a slow test.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynavae import cli
from dynavae.models import MODELS

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(page: Path) -> list[list[str]]:
    """The `dynavae ...` lines of a page, as arguments."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    found = [re.sub(r"^torchrun .* -m dynavae\.cli ", "dynavae ", line) for line in lines]
    return [shlex.split(line, comments=True)[1:] for line in found if line.startswith("dynavae ")]


ELSEWHERE = (
    "streaming",
    "own_data",
)  # run by test_streaming.py, with its numbers checked, and below, with its commands
WITH_PYTHON = [p for p in PAGES if blocks(p, "python") and p.stem not in ELSEWHERE]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    registered = dict(MODELS)
    scope: dict[str, object] = {"__name__": "docs"}
    torch.manual_seed(0)
    try:
        for number, source in enumerate(blocks(page, "python"), 1):
            short = re.sub(r"\bepochs=\d+", "epochs=1", source)
            exec(compile(short, f"{page.name}, python block {number}", "exec"), scope)
    finally:
        MODELS.clear()
        MODELS.update(registered)


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=lambda page: page.stem)
def test_commands_parse(page):
    for command, *arguments in commands(page):
        assert command in cli.COMMANDS, command
        if command == "fit":
            required = not {"--resume", "--preset"} & set(arguments)
            cli.fit_parser(model_required=required).parse_args(arguments)
        else:
            cli.other_parser(command).parse_args(arguments)


def test_the_commands_of_getting_started_run(tmp_path, monkeypatch, capsys):
    """As a reader would type them, with one epoch, networks of a few units, and few samples."""
    monkeypatch.chdir(tmp_path)
    smaller = {
        "fit": ["--epochs", "1", "--model.h_dim", "8", "--progress", "false", "--tensorboard", "false"],
        "evaluate": ["--bounds", "[elbo]"],
        "forecast": ["--samples", "2"],
        "generate": ["--batch", "1", "--length", "4"],
        "report": ["--samples", "2", "--sequences", "1"],
    }
    for command, *arguments in commands(ROOT / "docs" / "getting_started.md"):
        assert cli.main([command, *arguments, *smaller.get(command, [])]) == 0, capsys.readouterr().err
    assert (tmp_path / "compare.html").is_file()
    assert (tmp_path / "runs" / "vrnn" / "report.html").is_file()


def test_the_page_on_own_data_runs(tmp_path, monkeypatch, capsys):
    """Its table, its commands with one epoch and few samples, its Python on the runs they leave."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "own_data.md"
    table, python = blocks(page, "python")
    exec(compile(table, "make_air.py", "exec"), {})
    smaller = {
        "fit": ["--epochs", "1", "--progress", "false", "--tensorboard", "false"],
        "evaluate": ["--bounds", "[elbo]"],
        "impute": ["--samples", "2"],
        "forecast": ["--samples", "2"],
        "report": ["--samples", "2", "--sequences", "1"],
    }
    for command, *arguments in commands(page):
        if not any("pm25" in argument for argument in arguments):  # whose data do not ship
            assert cli.main([command, *arguments, *smaller[command]]) == 0, capsys.readouterr().err
    scope: dict[str, object] = {}
    exec(compile(python, "own_data.md", "exec"), scope)
    assert scope["celsius"].shape == (1, 6)
    assert (scope["band"][0] < scope["band"][1]).all()
    assert -20 < scope["expected"][0, 0] < 50


def test_links_between_pages_lead_somewhere():
    made = {"gallery", "_generated"}  # when the documentation is built
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")} | {"index"}
    for page in [*PAGES, *(ROOT / "docs" / "api").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:\s]+\.md)", page.read_text(encoding="utf-8")):
            target = page.parent / link
            if target.parent.name in made:
                assert target.stem in examples, (page.name, link)
            else:
                assert target.is_file(), (page.name, link)


def test_tables_of_videos_give_every_model_its_seeds(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    import generated

    assert generated.over_seeds([0.01, 0.03, 0.015], ".1%") == "1.8% ± 1.0%"
    assert generated.over_seeds([2.5], ".2f") == "2.50"
    records = json.loads((generated.RESULTS / "kvae.json").read_text(encoding="utf-8"))
    for table in generated.video().split("\n\n")[::2]:
        head, _, *rows = table.strip().splitlines()
        cells = [row.strip("| ").replace("**", "").split(" | ") for row in rows]
        data = head.strip("| ").split(" | ")[0]
        for row in cells:
            own = [r for r in records if (r["data"], r["model"]) == (data, row[0])]
            assert len(row) == len(cells[0]) and own
            seeds = sorted({r["seed"] for r in own if r["seed"] is not None})
            assert row[-1] == (", ".join(map(str, seeds)) or "–")
            assert ("±" in row[1]) == (len(seeds) > 1)


def test_one_setting_of_every_search_is_chosen(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    import generated

    rows = [row.split(" | ") for row in generated.video_search().splitlines()[2:] if row.startswith("|")]
    searches = [(row[0], row[1]) for row in rows]
    chosen = [search for search, row in zip(searches, rows, strict=True) if row[2].startswith("**")]
    assert len(set(searches)) >= 4 and sorted(chosen) == sorted(set(searches))


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_can_be_taken_apart(script, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    import gallery

    example = gallery.read(script)
    assert example.name in gallery.ORDER
    assert example.title and example.introduction and len(example.cells) >= 2
    for cell in example.cells:
        compile(cell.code, script.name, "exec")
        assert not cell.code.startswith("#"), cell.code


@pytest.mark.slow
def test_the_documentation_builds_without_warnings(tmp_path):
    pytest.importorskip("furo")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "docs", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert len(list((tmp_path / "_images").glob("*.png"))) >= 7
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / f"{page.stem}.html").is_file()
