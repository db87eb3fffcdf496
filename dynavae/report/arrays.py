"""What a report is given, as arrays of the right shape; whatever else is refused with a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dynavae.report.canvas import ROLLS_SHOWN, SHOWN, Canvas, choose_dims


def to_canvas(
    kind: str,
    meta: dict[str, Any],
    data: list[dict[str, Any]],
    drawn: list[np.ndarray],
    futures: list[dict[str, Any]],
    filled: list[dict[str, Any]],
) -> Canvas:
    seen = [np.where(item["observed"], item["data"], np.nan) for item in data + filled]
    after = [item["samples"].mean(0) if item["truth"] is None else item["truth"] for item in futures]
    widths = sorted({x.shape[1] for x in seen + after + drawn})
    if len(widths) > 1:
        raise ValueError(
            f"x_dim should be the same in all sequences of a report; got {', '.join(map(str, widths))}."
        )
    names, frame_seconds, lowest_midi = (meta.get(key) for key in ("x_names", "frame_seconds", "lowest_midi"))
    if names is not None and widths and len(names) != widths[0]:
        raise ValueError(
            f"meta['x_names'] should have one name for each of {widths[0]} dimensions; got {len(names)}."
        )
    if frame_seconds is not None and not frame_seconds > 0:
        raise ValueError(
            f"meta['frame_seconds'] should be a positive number of seconds; got {frame_seconds!r}."
        )
    if kind == "binary" and lowest_midi is not None and widths and not 0 <= lowest_midi <= 128 - widths[0]:
        raise ValueError(
            f"meta['lowest_midi'] = {lowest_midi} with {widths[0]} columns leaves MIDI's notes 0 to 127; "
            "leave it out if the data are not piano rolls."
        )
    clips = 2 * min(len(data), ROLLS_SHOWN) + min(len(drawn), SHOWN)
    clips += sum(3 - (item["truth"] is None) for item in futures[:ROLLS_SHOWN])
    dims = choose_dims(seen + after + drawn) if widths else []
    image = meta.get("image")
    if image is not None and (len(image) not in (2, 3) or (widths and math.prod(image) != widths[0])):
        raise ValueError(
            f"meta['image'] should be (height, width) or (channels, height, width) of {widths[0] if widths else 'all'} "
            f"pixels; got {image!r}."
        )
    image = None if image is None else tuple(image)
    return Canvas(kind, frame_seconds, lowest_midi, meta.get("sample_rate"), names, dims, clips, image)


def to_array(x: Any, name: str, *shape: str) -> np.ndarray:
    """x as a numpy array with as many axes as ``shape`` names."""
    array = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
    if array.ndim != len(shape) or 0 in array.shape[-1:]:
        raise ValueError(
            f"{name} should have shape ({', '.join(shape)}{',' * (len(shape) == 1)}); got {array.shape}."
        )
    return array if array.dtype == bool else array.astype(np.float64)


def _get(item: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in item:
        raise ValueError(f"{where} has no {key!r}; it has {', '.join(map(repr, item)) or 'no key at all'}.")
    return item[key]


def to_latent(item: Mapping[str, Any], index: int) -> tuple[np.ndarray, np.ndarray]:
    where = f"latents[{index}]"
    mean, stddev = (
        to_array(_get(item, key, where), f"{where}[{key!r}]", "T", "z_dim") for key in ("mean", "stddev")
    )
    if mean.shape != stddev.shape:
        raise ValueError(
            f"{where}: mean and stddev should have the same shape; got {mean.shape} and {stddev.shape}."
        )
    return mean, stddev


def to_reconstruction(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    data = to_array(_get(item, "data", where), f"{where}['data']", "T", "x_dim")
    arrays: dict[str, Any] = {"name": str(item.get("name", where)), "data": data}
    for key in ("mean", "lower", "upper"):
        if key == "mean" or item.get(key) is not None:
            arrays[key] = _like(data, _get(item, key, where), f"{where}[{key!r}]")
    observed = item.get("observed")
    if observed is None:
        arrays["observed"] = np.isfinite(data)
    else:
        observed = np.asarray(observed.detach().cpu() if hasattr(observed, "detach") else observed).astype(
            bool
        )
        if observed.shape == data.shape[:1]:
            observed = np.broadcast_to(observed[:, None], data.shape)
        arrays["observed"] = _like(data, observed, f"{where}['observed']").astype(bool) & np.isfinite(data)
    return arrays


def _like(data: np.ndarray, x: Any, name: str) -> np.ndarray:
    array = to_array(x, name, "T", "x_dim")
    if array.shape != data.shape:
        raise ValueError(f"{name} should have the shape of the data, {data.shape}; got {array.shape}.")
    return array


def to_forecast(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    samples = to_array(_get(item, "samples", where), f"{where}['samples']", "S", "H", "x_dim")
    context = to_array(_get(item, "context", where), f"{where}['context']", "C", "x_dim")
    truth = None if item.get("truth") is None else to_array(item["truth"], f"{where}['truth']", "H", "x_dim")
    if context.shape[1] != samples.shape[2]:
        raise ValueError(
            f"{where}: context and samples should agree in x_dim; got {context.shape[1]} and "
            f"{samples.shape[2]}."
        )
    if truth is not None and truth.shape != samples.shape[1:]:
        raise ValueError(
            f"{where}: truth should have shape (H, x_dim) = {samples.shape[1:]}; got {truth.shape}."
        )
    return {"name": str(item.get("name", where)), "context": context, "truth": truth, "samples": samples}


def same_width(kl: np.ndarray | None, posterior: list[tuple[np.ndarray, np.ndarray]]) -> None:
    widths = {f"latents[{i}]": mean.shape[1] for i, (mean, _) in enumerate(posterior)}
    if kl is not None:
        widths = {"kl_per_dim": len(kl), **widths}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"z_dim should be the same everywhere; got {', '.join(f'{k}: {v}' for k, v in widths.items())}."
        )
