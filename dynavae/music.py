r"""Piano rolls as MIDI files and as sound.

A *piano roll* is a binary matrix of shape (T, keys): row t is a frame of ``frame_seconds`` seconds and
column k says whether MIDI note ``lowest_midi + k`` sounds. 88 columns starting at MIDI note 21 (A0) are the
keys of a piano.

The data do not distinguish a note that is held from one that is repeated: two consecutive frames with the
same note on are written, and played, as **one longer note**. A MIDI file with repeated notes therefore comes
back from its roll with those notes joined, while a roll comes back from its MIDI file unchanged.
"""

from __future__ import annotations

import importlib.util
import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, UInt8
from numpy.typing import ArrayLike

LOWEST_MIDI = 21  # A0, the lowest key of a piano
VELOCITY = 80
NOTE_NAMES = ("C", "C♯", "D", "E♭", "E", "F", "F♯", "G", "A♭", "A", "B♭", "B")

# The sound of `to_audio`: a struck string, roughly.
HARMONICS = 7
ATTACK_SECONDS = 0.008
RELEASE_SECONDS = 0.12
PEAK = 0.9


def note_name(midi: int) -> str:
    """Name of a MIDI note number, middle C (60) being C4.

    Example:
        >>> note_name(21), note_name(60), note_name(66)
        ('A0', 'C4', 'F♯4')
    """
    return f"{NOTE_NAMES[midi % 12]}{midi // 12 - 1}"


def runs(mask: ArrayLike) -> Int[np.ndarray, "runs 3"]:
    """The maximal runs of true values down each column of a (T, columns) mask.

    Returns:
        One row (column, start, stop) per run, ``stop`` exclusive, ordered by column and then by start.

    Example:
        >>> runs([[1, 0], [1, 1], [0, 1]]).tolist()
        [[0, 0, 2], [1, 1, 3]]
    """
    columns = np.asarray(mask).astype(bool).T
    edges = np.diff(np.pad(columns, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    column, start = np.nonzero(edges == 1)
    _, stop = np.nonzero(edges == -1)
    return np.stack([column, start, stop], axis=1)


def to_midi(
    roll: ArrayLike,
    path: str | Path | None = None,
    frame_seconds: float = 0.5,
    lowest_midi: int = LOWEST_MIDI,
    program: int = 0,
) -> bytes:
    """A piano roll as a MIDI file; a note held over consecutive frames is one note.

    Args:
        roll: binary matrix of shape (T, keys): numbers 0 and 1 or booleans.
        path: where to write the file; ``None`` writes no file.
        frame_seconds: duration of one frame, in seconds.
        lowest_midi: MIDI note number of column 0.
        program: General MIDI instrument, from 0 (acoustic grand piano) to 127.

    Returns:
        The bytes of the MIDI file. Silent frames after the last note leave no trace in them.

    Raises:
        ImportError: ``pretty_midi`` is not installed.
        ValueError: the roll is not binary, a column lies outside MIDI's notes 0 to 127, or an argument is
            out of range.

    Example:
        >>> import numpy as np
        >>> roll = np.zeros((4, 88), dtype=np.uint8)
        >>> roll[:3, 39] = 1                                  # middle C for three frames
        >>> to_midi(roll)[:4]
        b'MThd'
        >>> from_midi(to_midi(roll)).shape                    # the last frame was silent
        (3, 88)
    """
    notes = _binary(roll)
    _check_frame_seconds(frame_seconds)
    _check_range(lowest_midi, notes.shape[1])
    if not 0 <= program <= 127:
        raise ValueError(f"program should be a General MIDI instrument from 0 to 127; got {program}.")
    pretty_midi = _pretty_midi()
    instrument = pretty_midi.Instrument(program=program)
    for key, start, stop in runs(notes).tolist():
        instrument.notes.append(
            pretty_midi.Note(VELOCITY, lowest_midi + key, start * frame_seconds, stop * frame_seconds)
        )
    file = pretty_midi.PrettyMIDI()
    file.instruments.append(instrument)
    buffer = io.BytesIO()
    file.write(buffer)
    if path is not None:
        Path(path).write_bytes(buffer.getvalue())
    return buffer.getvalue()


def from_midi(
    source: str | Path | bytes,
    frame_seconds: float = 0.5,
    lowest_midi: int = LOWEST_MIDI,
    keys: int = 88,
) -> UInt8[np.ndarray, "time keys"]:
    """A MIDI file as a piano roll, all its pitched instruments together.

    The beginning and the end of a note are rounded to the nearest frame boundary, and every note sounds for
    at least one frame. Drums are left out: their note numbers are not pitches.

    Args:
        source: path of a MIDI file, or its bytes.
        frame_seconds: duration of one frame, in seconds.
        lowest_midi: MIDI note number of column 0.
        keys: columns of the roll.

    Returns:
        A binary matrix of shape (T, keys) that ends with the last note; T is 0 if there is none.

    Raises:
        ImportError: ``pretty_midi`` is not installed.
        ValueError: a note of the file lies outside the columns of the roll.

    Example:
        >>> import numpy as np
        >>> roll = np.eye(88, dtype=np.uint8)                 # an upward chromatic scale
        >>> bool((from_midi(to_midi(roll, frame_seconds=0.1), frame_seconds=0.1) == roll).all())
        True
    """
    _check_frame_seconds(frame_seconds)
    _check_range(lowest_midi, keys)
    stream = io.BytesIO(source if isinstance(source, bytes) else Path(source).read_bytes())
    file = _pretty_midi().PrettyMIDI(stream)
    notes = [note for instrument in file.instruments if not instrument.is_drum for note in instrument.notes]
    spans = []
    for note in notes:
        key = note.pitch - lowest_midi
        if not 0 <= key < keys:
            raise ValueError(
                f"the MIDI file has note {note.pitch} ({note_name(note.pitch)}), but the roll covers "
                f"{lowest_midi} to {lowest_midi + keys - 1}; use lowest_midi=0, keys=128 to keep every note."
            )
        start = round(note.start / frame_seconds)
        spans.append((key, start, max(start + 1, round(note.end / frame_seconds))))
    roll = np.zeros((max((stop for _, _, stop in spans), default=0), keys), dtype=np.uint8)
    for key, start, stop in spans:
        roll[start:stop, key] = 1
    return roll


def to_audio(
    roll: ArrayLike,
    frame_seconds: float = 0.5,
    rate: int = 16000,
    lowest_midi: int = LOWEST_MIDI,
) -> Float32[np.ndarray, " samples"]:
    r"""A piano roll as sound: every note is a sum of decaying harmonics.

    Note n of frequency :math:`f = 440 \cdot 2^{(n - 69) / 12}` Hz, struck at time 0, sounds like

    .. math::
        a(t) \sum_{j=1}^{7} j^{-1.4}\, e^{-d_j t} \sin(2 \pi j f t), \qquad
        d_j = (0.6 + 0.35 j) \sqrt{f / 262}

    with harmonics near or above half the sampling rate left out. The envelope a rises as a raised cosine in
    8 ms and falls likewise in the 120 ms that follow the last frame of the note, so that nothing clicks.

    Args:
        roll: binary matrix of shape (T, keys).
        frame_seconds: duration of one frame, in seconds.
        rate: samples per second, at least 4000.
        lowest_midi: MIDI note number of column 0.

    Returns:
        A waveform of ``round((T * frame_seconds + 0.12) * rate)`` samples whose largest absolute value is
        0.9, or zeros if no note is on.

    Raises:
        ValueError: the roll is not binary, or an argument is out of range.

    Example:
        >>> import numpy as np
        >>> waveform = to_audio(np.eye(88)[30:34], frame_seconds=0.25, rate=8000)
        >>> waveform.dtype, waveform.shape, round(float(abs(waveform).max()), 3)
        (dtype('float32'), (8960,), 0.9)
    """
    notes = _binary(roll)
    _check_frame_seconds(frame_seconds)
    _check_range(lowest_midi, notes.shape[1])
    if rate < 4000:
        raise ValueError(f"rate should be at least 4000 samples per second; got {rate}.")
    waveform = np.zeros(round((len(notes) * frame_seconds + RELEASE_SECONDS) * rate))
    for key, start, stop in runs(notes).tolist():
        frequency = 440.0 * 2.0 ** ((lowest_midi + key - 69) / 12)
        note = _struck_note(frequency, (stop - start) * frame_seconds, rate)
        first = round(start * frame_seconds * rate)
        room = waveform[first : first + len(note)]
        room += note[: len(room)]
    peak = np.abs(waveform).max(initial=0.0)
    return (waveform * (PEAK / peak if peak > 0 else 0.0)).astype(np.float32)


def _struck_note(frequency: float, seconds: float, rate: int) -> np.ndarray:
    time = np.arange(int((seconds + RELEASE_SECONDS) * rate)) / rate
    harmonic = np.arange(1, HARMONICS + 1)
    harmonic = harmonic[harmonic * frequency < 0.45 * rate][:, None]
    decay = (0.6 + 0.35 * harmonic) * np.sqrt(frequency / 262)
    partials = harmonic**-1.4 * np.exp(-decay * time) * np.sin(2 * np.pi * harmonic * frequency * time)
    attack = np.clip(time / ATTACK_SECONDS, 0, 1)
    release = np.clip((seconds + RELEASE_SECONDS - time) / RELEASE_SECONDS, 0, 1)
    smooth = (0.5 - 0.5 * np.cos(np.pi * attack)) * (0.5 - 0.5 * np.cos(np.pi * release))
    return partials.sum(0) * smooth


def wav_bytes(waveform: ArrayLike, rate: int = 16000) -> bytes:
    """A mono waveform as a WAV file with 16 bits a sample.

    Args:
        waveform: shape (samples,), values in [-1, 1].
        rate: samples per second.

    Raises:
        ValueError: the waveform is not one-dimensional, not finite, or leaves [-1, 1].

    Example:
        >>> import numpy as np
        >>> data = wav_bytes(np.zeros(8000), rate=8000)       # one second of silence
        >>> data[:4], len(data)                               # a header of 44 bytes, then two bytes a sample
        (b'RIFF', 16044)
    """
    samples = np.asarray(waveform, dtype=np.float64)
    if samples.ndim != 1:
        raise ValueError(f"waveform should have shape (samples,), one channel; got {samples.shape}.")
    if not np.isfinite(samples).all():
        raise ValueError(
            "waveform has values that are NaN or infinite; remove them before writing a WAV file."
        )
    peak = np.abs(samples).max(initial=0.0)
    if peak > 1:
        raise ValueError(f"waveform should lie in [-1, 1]; got a peak of {peak:.4g}. Divide it by its peak.")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(samples * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def can_write_midi() -> bool:
    """Whether ``pretty_midi``, which `to_midi` and `from_midi` need, is installed."""
    return importlib.util.find_spec("pretty_midi") is not None


def _pretty_midi() -> Any:
    if not can_write_midi():
        raise ImportError('MIDI files need the package pretty_midi: pip install "dynavae[music]".')
    import pretty_midi

    return pretty_midi


def _binary(roll: ArrayLike) -> np.ndarray:
    notes = np.asarray(roll)
    if notes.ndim != 2:
        raise ValueError(f"roll should have shape (T, keys); got {notes.shape}.")
    if notes.dtype != bool and not np.isin(notes, (0, 1)).all():
        raise ValueError(
            f"roll should be binary, 0 or 1; got values from {np.min(notes):.4g} to {np.max(notes):.4g}. "
            "Threshold probabilities first, for example roll > 0.5, and replace NaN by 0."
        )
    return notes.astype(np.uint8)


def _check_frame_seconds(frame_seconds: float) -> None:
    if not frame_seconds > 0:
        raise ValueError(f"frame_seconds should be a positive number of seconds; got {frame_seconds}.")


def _check_range(lowest_midi: int, keys: int) -> None:
    highest = lowest_midi + keys - 1
    if lowest_midi < 0 or highest > 127:
        raise ValueError(
            f"MIDI notes run from 0 to 127, but {keys} columns from lowest_midi={lowest_midi} "
            f"reach from {lowest_midi} to {highest}; check lowest_midi and the number of columns."
        )
