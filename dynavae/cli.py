"""The command line: `dynavae fit | evaluate | generate | forecast | impute | report | list`.

Options come from constructor and function signatures through jsonargparse; `--config FILE.yaml` holds any
of them. What the commands do is in `commands`.
"""

from __future__ import annotations

import difflib
import inspect
import json
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from dynavae import commands, presets
from dynavae.model import SequentialLVM
from dynavae.models import MODELS
from dynavae.parallel import main_process
from dynavae.resume import FREE, unfinished
from dynavae.runs import Run

COMMANDS: dict[str, str] = {
    "fit": "train a model on data",
    "evaluate": "score a run: ELBO, IWAE, FIVO, exact",
    "generate": "draw new sequences from a run",
    "forecast": "continue sequences",
    "impute": "fill what is missing",
    "report": "write report.html of a run, or compare several on one page",
    "list": "models (with the model × task table), presets, data, emissions",
}
FROM_DATA = {"x_dim", "control_dim"}
FREE_TO_CHANGE = {
    *FREE, "resume", "progress", "tensorboard", "loggers", "threads", "num_workers", "accelerator", "devices",
    "strategy", "checkpoint_minutes",
}  # fmt: skip
"""Options that a resumed run may change: its numbers stay what they would have been, up to rounding."""
DATA_OPTIONS: dict[str, tuple[Any, str]] = {
    "id_column": (str, "column whose rows of one value are one sequence"),
    "time_column": (str, "column of the times: numbers or ISO dates"),
    "columns": (list[str], "columns to model; default: all others"),
    "controls": (list[str], "columns that are known inputs"),
    "step": (
        float | str,
        "of the time grid: a number, or 15min, 1h, 7d, month; default: found if times are regular",
    ),
    "window": (int, "cut long sequences into pieces of so many frames"),
    "stride": (int, "frames between the starts of training pieces; default: window"),
    "split_column": (str, "column that says train, valid or test"),
    "valid": (float | list[str | int | float], "share, or list of ids, to validate on"),
    "test": (float | list[str | int | float], "share, or list of ids, to test on"),
    "split_seed": (int, "seed of the split"),
    "standardize": (bool, "to mean 0 and standard deviation 1 over the training part; default: real values"),
    "kind": (str, "binary, real, categorical or power"),
    "frame_seconds": (float, "duration of a frame of MIDI files"),
}
"""Options of the data, as :func:`dynavae.data.load` takes them (`split_seed` is its `seed`)."""
ID_LISTS = ("valid", "test")
"""Options that may be lists of ids, which are text: YAML reads [3] as a number."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for bad input (a sentence on stderr), 2 for bad usage."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command in ("-V", "--version"):
        import dynavae

        print(f"dynavae {dynavae.__version__}")
        return 0
    if command not in COMMANDS:
        print(
            f"dynavae: unknown command {command!r}{_nearest(command, COMMANDS)}\n\n{_help()}", file=sys.stderr
        )
        return 2
    try:
        text = _fit(rest) if command == "fit" else _other(command, rest)
        if text:
            print(text)
    except KeyboardInterrupt as stop:
        what = f" ({stop})" if str(stop) else ""
        again = _again(arguments) if command == "fit" else ""
        if main_process():
            print(f"\ndynavae {command}: interrupted{what}.{again}", file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
        print(f"dynavae {command}: {error}", file=sys.stderr)
        return 1
    return 0


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: dynavae COMMAND [options]   (dynavae COMMAND --help says which)", "", *lines])


# --- fit: a model and its options, data, and the options of training ---------------------------------


def fit_parser(model_required: bool = True) -> ArgumentParser:
    """The parser of `dynavae fit`."""
    from dynavae import training

    parser = ArgumentParser(
        prog="dynavae fit", description="Train a model; the best weights are kept.", exit_on_error=True
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of these options")
    parser.add_argument(
        "--preset",
        type=str | None,
        default=None,
        help="a model, its data and its training by name (dynavae list presets); other options change it",
    )
    parser.add_subclass_arguments(
        SequentialLVM,
        "model",
        skip=FROM_DATA,
        required=model_required,
        help=f"one of {', '.join(MODELS)}, with --model.OPTION VALUE",
    )
    parser.add_argument(
        "--data",
        type=str,
        default="jsb",
        help="a data set by name; a path to a .csv, .tsv, .parquet or .npz; or a folder of tables or .mid files",
    )
    for name, (kind, what) in DATA_OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, default=None, help=f"own data: {what}")
    parser.add_argument("--out", type=str, required=True, help="run directory to write")
    parser.add_argument(
        "--threads", type=int | None, default=None, help="threads of torch; small models are fastest with 1"
    )
    parser.add_function_arguments(
        training.fit, skip={"model", "train", "valid", "out_dir"}, fail_untyped=False
    )
    return parser


def _fit(arguments: list[str]) -> str:
    arguments = _with_preset(arguments)
    _check_model_options(arguments)
    resumed = _resumed(arguments)
    if resumed is not None:
        return commands.fit(**resumed)
    parser = fit_parser()
    given = parser.parse_args(arguments, defaults=False)
    full = parser.parse_args(arguments)
    name, options = _model(given)
    values = full.as_dict()
    for key in ("model", "config"):
        values.pop(key, None)
    return commands.fit(name, options, data_options=_data_options(values), **values)


def _with_preset(arguments: list[str]) -> list[str]:
    """`--preset NAME` is `--config` with the file of that preset, before all other options."""
    for i, argument in enumerate(arguments):
        key, given, value = argument.partition("=")
        if key == "--preset":
            name = value if given else arguments[i + 1] if i + 1 < len(arguments) else ""
            return ["--config", str(presets.path(name)), *arguments]
    return arguments


def _data_options(values: dict[str, Any]) -> dict[str, Any]:
    """Take the options of the data out of all that were given, as :func:`dynavae.data.load` names them."""
    found = {name: values.pop(name, None) for name in DATA_OPTIONS}
    found |= {name: _ids(found[name]) for name in ID_LISTS}
    found["seed"] = found.pop("split_seed")
    return {name: value for name, value in found.items() if value is not None}


def _ids(value: Any) -> Any:
    """A list of ids as text; a share as it is."""
    return [str(name) for name in value] if isinstance(value, list) else value


def _model(given: Namespace) -> tuple[str, dict[str, Any]]:
    """Name of the model, and the options that were given for it."""
    model = given.model
    if not isinstance(model, Namespace):
        return str(model).rsplit(".", 1)[-1], {}
    return model.class_path.rsplit(".", 1)[-1], _plain(model.get("init_args", Namespace()))


def _resumed(arguments: list[str]) -> dict[str, Any] | None:
    """With `--resume true`: what the run in `--out` was begun with; what is given must agree with it."""
    if not any(a.partition("=")[0] in ("--resume", "--config") for a in arguments):
        return None
    given = fit_parser(model_required=False).parse_args(arguments, defaults=False)
    if not given.get("resume") or "out" not in given or not (Path(given.out) / "run.json").is_file():
        if given.get("resume") and "out" in given and "model" not in given:
            raise FileNotFoundError(f"there is no run to resume in {given.out!r}: it has no run.json.")
        return None
    before = Run.open(given.out).settings
    values = {**before["training"], "data": before["data"]["source"], "seed": before["seed"]}
    values["threads"], values["preset"] = before.get("threads"), before.get("preset")
    stored = before["data"].get("options", {})
    values |= {("split_seed" if name == "seed" else name): value for name, value in stored.items()}
    now = {k: v for k, v in given.as_dict().items() if k not in ("model", "config", "out")}
    now |= {name: _ids(now[name]) for name in ID_LISTS if name in now}
    for name, value in now.items():
        if (
            name not in FREE_TO_CHANGE
            and (name in values or name in DATA_OPTIONS)
            and not _same(values.get(name), value)
        ):
            raise ValueError(_contradiction(name, value, values.get(name), given.out))
    options = {k: v for k, v in before["options"].items() if k not in FROM_DATA}
    if "model" in given:
        model, asked = _model(given)
        if model != before["model"]:
            raise ValueError(_contradiction("model", model, before["model"], given.out))
        for name, value in asked.items():
            if not _same(before["options"].get(name), value):
                raise ValueError(
                    _contradiction(f"model.{name}", value, before["options"].get(name), given.out)
                )
    known = {a.dest for a in fit_parser(model_required=False)._actions}
    values = {name: value for name, value in {**values, **now}.items() if name in known}
    data_options = _data_options(values)
    return {
        **values,
        "data_options": data_options,
        "model": before["model"],
        "options": options,
        "out": given.out,
    }


def _same(stored: Any, given: Any) -> bool:
    """Whether a value is what run.json holds; a path may be spelt in two ways."""
    if isinstance(stored, str) and isinstance(given, str) and stored != given:
        return (
            Path(stored).exists() and Path(given).exists() and Path(stored).resolve() == Path(given).resolve()
        )
    return json.loads(json.dumps(given, default=str)) == stored


def _contradiction(name: str, given: Any, stored: Any, out: str) -> str:
    return (
        f"--{name} {given} contradicts {Path(out) / 'run.json'}, which says {stored}: leave it out to resume that run, "
        "or begin a new one with another --out."
    )


def _again(arguments: list[str]) -> str:
    """How to go on with an interrupted fit."""
    given = fit_parser(model_required=False).parse_args(_with_preset(arguments[1:]), defaults=False)
    if unfinished(given.out):
        return f" Continue with: dynavae fit --resume true --out {shlex.quote(given.out)}"
    return f" No update was finished. Start again with: dynavae {shlex.join(arguments)}"


def _plain(options: Any) -> dict[str, Any]:
    return options.as_dict() if isinstance(options, Namespace) else dict(options or {})


def _check_model_options(arguments: list[str]) -> None:
    """A misspelt model or option is answered with the nearest one."""
    name = None
    for i, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        if key == "--model":
            name = value or (arguments[i + 1] if i + 1 < len(arguments) else "")
            if name.rsplit(".", 1)[-1] not in MODELS and not name.startswith("{"):
                raise ValueError(
                    f"unknown model {name!r}{_nearest(name, MODELS)} Models: {', '.join(MODELS)}."
                )
        elif key.startswith("--model.") and name and name in MODELS:
            option = key.removeprefix("--model.").removeprefix("init_args.").split(".")[0].rstrip("+")
            known = [p for p in inspect.signature(MODELS[name]).parameters if p not in FROM_DATA]
            if option not in (*known, "help", "class_path"):
                hint = _nearest(option, known)
                raise ValueError(f"unknown option {option!r} for {name}{hint} Options: {', '.join(known)}.")


def _nearest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else "."


# --- the other commands: a function each ------------------------------------------------------------------


def other_parser(command: str) -> ArgumentParser:
    """The parser of any command but fit."""
    function = _function(command)
    parser = ArgumentParser(prog=f"dynavae {command}", description=inspect.getdoc(function))
    parser.add_argument("--config", action="config", help="a YAML file with any of these options")
    if command == "list":
        parser.add_argument(
            "what", nargs="?", default="models", choices=["models", "presets", "data", "emissions"]
        )
        parser.add_argument("--json", action="store_true", help="machine-readable")
        return parser
    several = {"nargs": "+"} if command == "report" else {}
    parser.add_argument("run", type=str, help="run directory, made by dynavae fit --out", **several)
    parser.add_function_arguments(function, skip={"run"})
    return parser


def _function(command: str) -> Callable[..., str]:
    return commands.list_all if command == "list" else getattr(commands, command)


def _other(command: str, arguments: list[str]) -> str:
    values = other_parser(command).parse_args(arguments).as_dict()
    values.pop("config", None)
    if command == "list":
        values["as_json"] = values.pop("json")
    return _function(command)(**values)


if __name__ == "__main__":
    sys.exit(main())
