"""A trained model as two files: `config.json` says what to build, `model.safetensors` holds the numbers.

Nothing is pickled, so loading a file runs none of its content.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from dynavae.files import explained, replacing
from dynavae.model import SequentialLVM

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_pretrained(
    model: SequentialLVM,
    directory: str | Path,
    extra: dict[str, Any] | None = None,
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write a model into a directory, which is made if need be; an earlier model in it is replaced.

    Each file appears complete or not at all: it is written beside its name and then moved there.

    Args:
        model: its constructor's arguments and its weights (in their own dtype) are stored.
        directory: where `config.json` and `model.safetensors` go.
        extra: further entries of `config.json`, such as the metrics of the run.
        weights: other weights of this model, such as those of an earlier epoch; default: those it has.

    Returns:
        The directory.

    Raises:
        ValueError: `extra` uses a name that the file needs itself.
        TypeError: the configuration or `extra` holds something that JSON cannot.
        OSError: the disk is full or read-only; what was there before stays.

    Example:
        >>> import tempfile
        >>> from dynavae.models import VRNN
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = save_pretrained(VRNN(x_dim=3, z_dim=2, h_dim=4), folder, extra={"epoch": 7})
        ...     load(folder).config["z_dim"]
        2
    """
    state = model.state_dict() if weights is None else weights
    weights = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    config: dict[str, Any] = {
        "format": FORMAT,
        "model": type(model).__name__,
        "config": model.config,
        "dtype": ", ".join(sorted({str(w.dtype).removeprefix("torch.") for w in weights.values()})),
        "dynavae": _version(),
        "torch": torch.__version__,
    }
    taken = sorted(set(config) & set(extra or {}))
    if taken:
        raise ValueError(f"extra may not hold {taken[0]!r}: config.json uses that name itself.")
    try:
        text = json.dumps({**config, **(extra or {})}, indent=2)
    except (TypeError, ValueError) as error:
        raise TypeError(f"config.json holds numbers, strings, lists and dicts only: {error}.") from None
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explained(error, directory) from error
    with replacing(directory / WEIGHTS) as path:
        path.write_bytes(save(weights))  # safetensors' own writer reports a full disk as no OSError
    with replacing(directory / CONFIG) as path:
        path.write_text(text + "\n", encoding="utf-8")
    return directory


def load(directory: str | Path, device: str | torch.device = "cpu") -> SequentialLVM:
    """The model that :func:`save_pretrained` wrote, in evaluation mode and in the dtype it was saved in.

    Args:
        directory: what holds `config.json` and `model.safetensors`.
        device: where the model goes.

    Raises:
        FileNotFoundError: the directory, or one of the two files, is not there.
        ValueError: files of a newer format, an unknown model, damaged files, weights that do not fit, or no GPU.
    """
    from dynavae.models import MODELS
    from dynavae.runs import choose_device

    device = choose_device(str(device)) if str(device).startswith("cuda") else device
    directory = Path(directory)
    config = read_config(directory)
    name = config["model"]
    if name not in MODELS:
        raise ValueError(
            f"{directory / CONFIG} names the model {name!r}, which is not registered; known are "
            f"{', '.join(MODELS)}. Add yours first: dynavae.models.MODELS[{name!r}] = {name}."
        )
    weights = read_weights(directory)
    try:
        with torch.random.fork_rng(devices=[]):  # the initial weights should not use up the caller's numbers
            model = MODELS[name](**config["config"])
    except TypeError as error:
        raise ValueError(f"{directory / CONFIG} does not fit this version of {name}: {error}") from None
    dtypes = {w.dtype for w in weights.values() if w.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    _check_weights(directory / WEIGHTS, weights, model)
    model.load_state_dict(weights)
    return model.to(device).eval()


def read_config(directory: str | Path) -> dict[str, Any]:
    """What `config.json` of a saved model holds, checked."""
    path = _existing(Path(directory), CONFIG)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}.") from None
    missing = [
        key for key in ("format", "model", "config") if not isinstance(config, dict) or key not in config
    ]
    if missing:
        raise ValueError(f"{path} has no entry {missing[0]!r}: it was not written by save_pretrained.")
    if config["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {config['format']}, written by dynavae {config.get('dynavae', '?')}; this "
            f"version reads formats up to {FORMAT}. Upgrade dynavae."
        )
    return config


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """The tensors of a saved model, on the CPU."""
    path = _existing(Path(directory), WEIGHTS)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}.") from None


def _existing(directory: Path, name: str) -> Path:
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {str(directory)!r}; give what save_pretrained wrote.")
    path = directory / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(directory)!r} holds no {name}; give a directory that save_pretrained wrote, "
            "such as best/ of a training run."
        )
    return path


def _check_weights(path: Path, weights: dict[str, Tensor], model: SequentialLVM) -> None:
    name, expected = type(model).__name__, model.state_dict()
    for what, keys in (
        ("lacks", expected.keys() - weights.keys()),
        ("has", weights.keys() - expected.keys()),
    ):
        if keys:
            raise ValueError(f"{path} does not fit {name}: it {what} {sorted(keys)[0]!r}.")
    for key, value in expected.items():
        if weights[key].shape != value.shape:
            raise ValueError(
                f"{path} does not fit {name}: {key!r} has shape {tuple(weights[key].shape)}, "
                f"and config.json asks for {tuple(value.shape)}."
            )


def _version() -> str:
    from dynavae import __version__

    return __version__
