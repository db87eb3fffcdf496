"""A saved model is the same model."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dynavae import MODELS, VRNN, SequentialLVM, load
from dynavae.batch import Sequences
from dynavae.checkpoint import save_pretrained
from dynavae.nn import Gaussian
from dynavae.scan import scan

SIZES = {"x_dim": 4, "z_dim": 3, "h_dim": 5}


def small(name: str, **options: Any) -> SequentialLVM:
    known = inspect.signature(MODELS[name]).parameters
    return MODELS[name](**{k: v for k, v in SIZES.items() if k in known}, **options)


def log_w(model: SequentialLVM) -> torch.Tensor:
    like = next(model.parameters())
    x = torch.linspace(-1, 1, 2 * 5 * 4).reshape(2, 5, 4).to(like)
    control = x[..., : model.control_dim] if model.control_dim else None
    with torch.no_grad():
        return scan(
            model, Sequences.from_arrays(x, control=control), generator=torch.Generator().manual_seed(0)
        ).log_w


@pytest.mark.parametrize("name", MODELS)
def test_every_model_loads_as_it_was_saved(name: str, tmp_path: Path) -> None:
    variants = [{}, *MODELS[name].variants.values()]
    for i, options in enumerate(variants):
        model = small(name, **{k: v for k, v in options.items()}).eval()
        save_pretrained(model, tmp_path / str(i))
        loaded = load(tmp_path / str(i))
        assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
        for key, value in model.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[key]), key
        assert torch.equal(log_w(model), log_w(loaded))


def test_the_dtype_is_kept(tmp_path: Path) -> None:
    model = small("SRNN").double().eval()
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float64"
    assert torch.equal(log_w(load(tmp_path)), log_w(model))


def test_emission_options_are_kept(tmp_path: Path) -> None:
    model = small("VRNN", emission=Gaussian(scale="fixed", value=0.1))
    save_pretrained(model, tmp_path)
    assert load(tmp_path).emission == Gaussian(scale="fixed", value=0.1)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["emission"]["value"] == 0.1


def test_extra_entries_and_replacement(tmp_path: Path) -> None:
    save_pretrained(small("VRNN"), tmp_path)
    second = small("DKF")
    save_pretrained(second, tmp_path, extra={"epoch": 3, "metrics": {"nats": 1.5}})
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["epoch"], config["metrics"]["nats"], config["model"]) == (3, 1.5, "DKF")
    assert type(load(tmp_path)).__name__ == "DKF"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_save_leaves_the_old_model(tmp_path: Path) -> None:
    model = small("VRNN")
    save_pretrained(model, tmp_path)
    with pytest.raises(TypeError, match=r"config\.json holds numbers, strings, lists and dicts only"):
        save_pretrained(small("DKF"), tmp_path, extra={"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="extra may not hold 'model'"):
        save_pretrained(small("DKF"), tmp_path, extra={"model": "x"})
    assert torch.equal(log_w(load(tmp_path)), log_w(model.eval()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_loading_uses_no_random_numbers(tmp_path: Path) -> None:
    save_pretrained(small("VRNN"), tmp_path)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    load(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load(tmp_path)
    save_pretrained(small("VRNN"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        load(tmp_path)


def test_what_is_damaged(tmp_path: Path) -> None:
    save_pretrained(small("VRNN"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not a JSON file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no entry 'format'"):
        load(tmp_path)


def test_what_does_not_fit(tmp_path: Path) -> None:
    save_pretrained(small("VRNN"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["config"]
    edit(tmp_path, config={**config, "h_dim": 6})
    with pytest.raises(ValueError, match=r"shape \(20, .*asks for \(24, "):
        load(tmp_path)
    edit(tmp_path, config={**config, "memory_layers": 2})
    with pytest.raises(ValueError, match="does not fit VRNN: it lacks 'rnn"):
        load(tmp_path)
    edit(tmp_path, config={**config, "zdim": 6})
    with pytest.raises(ValueError, match="does not fit this version of VRNN: unknown option 'zdim'"):
        load(tmp_path)
    edit(tmp_path, config=config, model="Transformer")
    with pytest.raises(ValueError, match="names the model 'Transformer', which is not registered"):
        load(tmp_path)
    edit(tmp_path, model="VRNN", format=99, dynavae="9.0")
    with pytest.raises(ValueError, match=r"format 99, written by dynavae 9\.0"):
        load(tmp_path)


def test_a_registered_model_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(VRNN):
        def __init__(self, x_dim: int) -> None:
            super().__init__(x_dim, z_dim=2, h_dim=3)

    save_pretrained(Mine(x_dim=4), tmp_path)
    with pytest.raises(ValueError, match=r"MODELS\['Mine'\] = Mine"):
        load(tmp_path)
    monkeypatch.setitem(MODELS, "Mine", Mine)
    assert load(tmp_path).config == {"x_dim": 4}
