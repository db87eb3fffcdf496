"""The README says what is true: its example runs, its commands parse, its tables are up to date."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from dynavae import cli, presets

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_python_examples_run():
    examples = blocks("python")
    scopes: list[dict[str, object]] = [{} for _ in examples]
    for example, scope in zip(examples, scopes, strict=True):
        torch.manual_seed(0)
        exec(compile(example, "README.md", "exec"), scope)
    batch, stream = (next(s for s in scopes if name in s) for name in ("filled", "stream"))
    assert not batch["filled"].x.isnan().any()
    assert batch["future"].mean.shape == (4, 10, 3)
    assert stream["future"].mean.shape == (1, 10, 3)


def test_commands_parse():
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("dynavae ")]
    assert {c[0] for c in commands} >= {"fit", "evaluate", "generate", "report", "list"}
    for command in commands:
        if command[0] == "fit" and "--preset" in command:
            assert command[command.index("--preset") + 1] in presets.names()
        elif command[0] == "fit":
            given = cli.fit_parser().parse_args(command[1:])
            assert given.model.class_path.endswith("SRNN")
            assert given.model.init_args.h_dim == 200
        else:
            assert command[0] in cli.COMMANDS
            cli.other_parser(command[0]).parse_args(command[1:])


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_tables_are_up_to_date():
    found = subprocess.run(
        [sys.executable, ROOT / "tools" / "tables.py", "--check"], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_skeleton_of_the_contributing_guide_passes_the_laws():
    from dynavae.testing import check_model

    text = (ROOT / "CONTRIBUTING.md").read_text()
    source = next(b for b in re.findall(r"```python\n(.*?)```", text, flags=re.S) if "class MyModel" in b)
    scope: dict[str, object] = {"__name__": "mymodel"}
    exec(compile(source, "CONTRIBUTING.md", "exec"), scope)
    check_model(scope["MyModel"])
