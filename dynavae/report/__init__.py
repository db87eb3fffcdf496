"""What a run looked like: one self-contained HTML file.

`write_report` takes arrays and writes a page that needs no network, no folder beside it and no script:
pictures, sounds and MIDI files are embedded. `write_comparison` puts several run directories on one such page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from dynavae.files import writable, write_text
from dynavae.report import arrays, html, sections, sequences, video
from dynavae.report.compare import write_comparison

Kind = Literal["binary", "real", "power", "categorical"]

__all__ = ["Kind", "write_comparison", "write_report"]


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
    dynamics: Mapping[str, Any] | None = None,
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
        dynamics: what a KVAE knows of one video with a gap, see :func:`~dynavae.report.video.dynamics_section`.
        kind: of the data. "binary" with ``lowest_midi`` and ``frame_seconds`` in ``meta`` is drawn as piano
            rolls, with sound and MIDI files; "real" as line charts; "power" as spectrograms in decibels; the
            rest as rasters.
        meta: ``frame_seconds`` (duration of a frame), ``lowest_midi`` (MIDI note of column 0),
            ``sample_rate`` (of the sound behind a spectrogram, Hz), ``x_names`` (of the dimensions), ``image`` (height and
            width of a frame, after channels if there are several): sequences are then strips of frames.
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
    kl = None if kl_per_dim is None else arrays.to_array(kl_per_dim, "kl_per_dim", "z_dim")
    posterior = [
        arrays.to_latent(item, i)
        for i, item in enumerate([latents] if isinstance(latents, Mapping) else latents or ())
    ]
    data = [
        arrays.to_reconstruction(item, f"reconstructions[{i}]")
        for i, item in enumerate(reconstructions or ())
    ]
    drawn = [
        arrays.to_array(x, f"samples[{i}]", "T", "x_dim")
        for i, x in enumerate(samples if samples is not None else ())
    ]
    futures = [arrays.to_forecast(item, f"forecasts[{i}]") for i, item in enumerate(forecasts or ())]
    filled = [arrays.to_reconstruction(item, f"imputations[{i}]") for i, item in enumerate(imputations or ())]
    arrays.same_width(kl, posterior)
    canvas = arrays.to_canvas(kind, meta, data, drawn, futures, filled)

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
        video.dynamics_section(dynamics, canvas.image, canvas.frame_seconds) if dynamics else None,
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
    writable(path.parent)
    return write_text(path, text)
