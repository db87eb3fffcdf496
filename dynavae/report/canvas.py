"""How the sequences of a report are drawn: their kind, their units, and how much of them is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dynavae import music
from dynavae.report import html, images, video

SHOWN = 4  # sequences of a section
ROLLS_SHOWN = 2  # piano rolls of a section, which come with sound
ROLL_SECONDS = 20.0  # of a piano roll and of a clip, at most
AUDIO_RATE = 11025
AUDIO_BYTES = 4_500_000  # of all clips of a page together, in base64
LINE_DIMS = 8
LINE_FRAMES = 600
PICTURE_FRAMES = 400


@dataclass(frozen=True)
class Canvas:
    """How the sequences of one report are drawn.

    Attributes:
        kind: "binary", "real", "power" or "categorical".
        frame_seconds: duration of a frame; None where it is not known, or not a time.
        lowest_midi: MIDI note of column 0; None unless the data are piano rolls.
        sample_rate: of the sound behind a power spectrogram, in Hz, or None.
        names: of the dimensions of x, or None.
        dims: of x that line charts show.
        clips: how many sound clips the page has, which share `AUDIO_BYTES`.
        image: (height, width) or (channels, height, width) of a frame, if x is a video.
    """

    kind: str
    frame_seconds: float | None
    lowest_midi: int | None
    sample_rate: float | None
    names: Sequence[str] | None
    dims: Sequence[int]
    clips: int
    image: tuple[int, ...] | None = None

    @property
    def rolls(self) -> bool:
        known = self.lowest_midi is not None and self.frame_seconds is not None
        return self.kind == "binary" and known and self.image is None

    @property
    def lines(self) -> bool:
        return self.kind == "real" and self.image is None

    @property
    def what(self) -> str:
        """What a picture of this kind of data shows, in words."""
        if self.image is not None:
            return "frames side by side"
        return (
            "power in decibels over time and frequency" if self.kind == "power" else "time against dimension"
        )

    @property
    def shown(self) -> int:
        return ROLLS_SHOWN if self.rolls else SHOWN

    @property
    def unit(self) -> str:
        return "time (s)" if self.frame_seconds else "frame"

    @property
    def step(self) -> float:
        return self.frame_seconds or 1.0

    @property
    def frames(self) -> int:
        """The largest number of frames of one picture."""
        if self.image is not None:
            return video.FRAMES
        if self.rolls:
            return max(1, int(ROLL_SECONDS / self.step))
        return LINE_FRAMES if self.lines else PICTURE_FRAMES

    @property
    def clip_frames(self) -> int:
        """The largest number of frames of one sound clip."""
        seconds = min(ROLL_SECONDS, AUDIO_BYTES / (max(self.clips, 1) * AUDIO_RATE * 2 * 4 / 3))
        return max(1, int(seconds / self.step))

    def label(self, dims: Sequence[int]) -> list[str]:
        return [str(self.names[dim]) if self.names else f"x {dim}" for dim in dims]

    def clip(self, label: str, roll: np.ndarray, file_name: str) -> str:
        """A roll (T, keys) as sound to play and as MIDI file to save."""
        assert self.frame_seconds is not None and self.lowest_midi is not None
        notes = np.nan_to_num(roll[: self.clip_frames]) > 0.5
        sound = music.to_audio(notes, self.frame_seconds, AUDIO_RATE, self.lowest_midi)
        midi = None
        if music.can_write_midi():
            midi = music.to_midi(notes, None, self.frame_seconds, self.lowest_midi)
        seconds = html.number(len(notes) * self.frame_seconds)
        return html.clip(f"{label}, {seconds} s", music.wav_bytes(sound, AUDIO_RATE), midi, file_name)

    def pictures(self, titles: Sequence[str], values: Sequence[np.ndarray], now: int | None = None) -> Any:
        if self.image is not None:
            return video.strips(titles, values, self.image, () if now is None else (now,))
        if self.kind == "power":
            return images.spectrograms(titles, values, self.frame_seconds, self.sample_rate, now)
        return images.rasters(titles, values, self.frame_seconds, now)


def choose_dims(sequences: Sequence[np.ndarray], gaps: np.ndarray | None = None) -> list[int]:
    """Up to `LINE_DIMS` columns to draw, in their order: those with most gaps, if gaps are given, then those
    that vary most."""
    x = np.concatenate(sequences)
    seen = np.isfinite(x)
    count = np.maximum(seen.sum(0), 1)
    centred = np.where(seen, x - np.where(seen, x, 0).sum(0) / count, 0)
    variance = (centred**2).sum(0) / count
    order = np.argsort(-variance, kind="stable") if gaps is None else np.lexsort((-variance, -gaps.sum(0)))
    return sorted(order[:LINE_DIMS].tolist())
