"""What a run looked like: one self-contained HTML file.

`write_report` takes arrays and writes a page that needs no network, no folder beside it and no script:
pictures, sounds and MIDI files are embedded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from dynavae.report import html, sections, sequences
from dynavae.report.canvas import ROLLS_SHOWN, SHOWN, Canvas, choose_dims

Kind = Literal["binary", "real", "power", "categorical"]

__all__ = ["Kind", "write_report"]


def write_report(
    path: str | Path,
    *,
    title: str,
    setting: Mapping[str, Any] | None = None,
    scores: Sequence[Mapping[str, Any]] = (),
    history: Sequence[Mapping[str, Any]] | None = None,
    kl_per_dim: Any = None,
    latents: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    reconstructions: Sequence[Mapping[str, Any]] | None = None,
    samples: Sequence[Any] | None = None,
    forecasts: Sequence[Mapping[str, Any]] | None = None,
    imputations: Sequence[Mapping[str, Any]] | None = None,
    kind: Kind = "real",
    meta: Mapping[str, Any] | None = None,
    log: Sequence[object] | None = None,
) -> Path:
    """Write the report of a run as one HTML file. What is not given is not shown.

    Arrays may be numpy arrays, tensors or lists. NaN means missing in ``data``, ``context`` and ``truth``.

    Args:
        path: the file to write; its folder is made if need be.
        title: heading of the page.
        setting: what was run: single values, and groups of values as dictionaries (``options``, ``data``,
            ``versions``, ...).
        scores: one dictionary each, with the keys of `dynavae.tasks.Score`: ``nats_per_frame``,
            ``nats_per_frame_by_sequence``, ``bound``, ``particles``, ``frames``, ``sequences``,
            ``first_frame``, ``split``, ``data_sha256``, ``kl``, ``seed``, and ``measure`` ("density" or
            "mass"; by default that of ``kind``). What a score does not state is shown as such; further keys
            are shown too.
        history: one dictionary for each epoch or step: ``epoch`` or ``step``, and numbers such as
            ``train/loss``, ``valid/nats_per_frame``, ``kl_weight``. Keys may come and go from row to row.
        kl_per_dim: KL of each latent dimension in nats per frame, (z_dim,).
        latents: for each sequence ``mean`` (T, z_dim) and ``stddev`` (T, z_dim).
        reconstructions: for each sequence ``name``, ``data`` (T, x_dim), ``mean`` (T, x_dim), and
            ``observed`` (T, x_dim) or (T,); without ``observed`` everything finite is.
        samples: sequences (T, x_dim) drawn from the model.
        forecasts: for each ``name``, ``context`` (C, x_dim), ``samples`` (S, H, x_dim), and ``truth``
            (H, x_dim) or None.
        imputations: as reconstructions, with ``lower`` and ``upper`` quantile (T, x_dim) as an option;
            finite ``data`` where ``observed`` is False are held-out truth.
        kind: of the data. "binary" with ``lowest_midi`` and ``frame_seconds`` in ``meta`` is drawn as piano
            rolls, with sound and MIDI files; "real" as line charts; "power" as spectrograms in decibels; the
            rest as rasters.
        meta: ``frame_seconds`` (duration of a frame), ``lowest_midi`` (MIDI note of column 0),
            ``sample_rate`` (of the sound behind a spectrogram, Hz), ``x_names`` (of the dimensions).
        log: notes, one line each.

    Returns:
        The path of the file.

    Raises:
        ValueError: an unknown ``kind``, a missing key, or an array of the wrong shape; the message says
            which.

    Example:
        >>> import tempfile
        >>> scores = [{"bound": "iwae", "particles": 100, "nats_per_frame": 6.41, "split": "test"}]
        >>> history = [{"epoch": 0, "train/loss": 12.0}, {"epoch": 1, "train/loss": 9.0}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_report(f"{folder}/run.html", title="VRNN on JSB", scores=scores, history=history)
        ...     path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
        True
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind should be one of {', '.join(get_args(Kind))}; got {kind!r}.")
    meta = dict(meta or {})
    setting = dict(setting or {})
    kl = None if kl_per_dim is None else _array(kl_per_dim, "kl_per_dim", "z_dim")
    posterior = [
        _latent(item, i)
        for i, item in enumerate([latents] if isinstance(latents, Mapping) else latents or ())
    ]
    data = [_against_data(item, f"reconstructions[{i}]") for i, item in enumerate(reconstructions or ())]
    drawn = [
        _array(x, f"samples[{i}]", "T", "x_dim") for i, x in enumerate(samples if samples is not None else ())
    ]
    futures = [_forecast(item, f"forecasts[{i}]") for i, item in enumerate(forecasts or ())]
    filled = [_against_data(item, f"imputations[{i}]") for i, item in enumerate(imputations or ())]
    _same_width(kl, posterior)
    canvas = _canvas(kind, meta, data, drawn, futures, filled)

    found = [
        sections.score_section(scores, kind),
        sections.setting_section(setting),
        sections.history_section(history) if history else None,
        sections.kl_section(kl) if kl is not None else None,
        sections.latent_section(posterior, kl, canvas.frame_seconds) if posterior else None,
        sequences.reconstruction_section(data, canvas),
        sequences.sample_section(drawn, canvas),
        sequences.forecast_section(futures, canvas),
        sequences.imputation_section(filled, canvas),
        sections.note_section(list(log or ())),
    ]
    tiles = [
        html.tile(
            html.fixed(float(score["nats_per_frame"]), 3),
            "nats per frame",
            sections.score_title(score),
        )
        for score in list(scores)[:3]
        if score.get("nats_per_frame") is not None
    ]
    if kl is not None:
        active = int((kl > sections.ACTIVE_NATS).sum())
        tiles.append(html.tile(str(active), f"of {len(kl)}", "active latent dimensions"))
    subtitle = " · ".join(
        str(setting[key]) for key in ("model", "data", "time") if isinstance(setting.get(key), str)
    )
    text = html.page(title, subtitle, tiles, [section for section in found if section is not None])
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _canvas(
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
    return Canvas(kind, frame_seconds, lowest_midi, meta.get("sample_rate"), names, dims, clips)


def _array(x: Any, name: str, *shape: str) -> np.ndarray:
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


def _latent(item: Mapping[str, Any], index: int) -> tuple[np.ndarray, np.ndarray]:
    where = f"latents[{index}]"
    mean, stddev = (
        _array(_get(item, key, where), f"{where}[{key!r}]", "T", "z_dim") for key in ("mean", "stddev")
    )
    if mean.shape != stddev.shape:
        raise ValueError(
            f"{where}: mean and stddev should have the same shape; got {mean.shape} and {stddev.shape}."
        )
    return mean, stddev


def _against_data(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    data = _array(_get(item, "data", where), f"{where}['data']", "T", "x_dim")
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
    array = _array(x, name, "T", "x_dim")
    if array.shape != data.shape:
        raise ValueError(f"{name} should have the shape of the data, {data.shape}; got {array.shape}.")
    return array


def _forecast(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    samples = _array(_get(item, "samples", where), f"{where}['samples']", "S", "H", "x_dim")
    context = _array(_get(item, "context", where), f"{where}['context']", "C", "x_dim")
    truth = None if item.get("truth") is None else _array(item["truth"], f"{where}['truth']", "H", "x_dim")
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


def _same_width(kl: np.ndarray | None, posterior: list[tuple[np.ndarray, np.ndarray]]) -> None:
    widths = {f"latents[{i}]": mean.shape[1] for i, (mean, _) in enumerate(posterior)}
    if kl is not None:
        widths = {"kl_per_dim": len(kl), **widths}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"z_dim should be the same everywhere; got {', '.join(f'{k}: {v}' for k, v in widths.items())}."
        )
