"""Piano rolls as MIDI files and as sound."""

from __future__ import annotations

import io
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from dynavae import music

RATE = 8000


def random_roll(frames: int = 40, keys: int = 88, seed: int = 0) -> np.ndarray:
    roll = (np.random.default_rng(seed).random((frames, keys)) < 0.08).astype(np.uint8)
    roll[-1, 0] = 1  # a MIDI file ends with its last note
    return roll


def test_runs_are_the_maximal_ones() -> None:
    mask = random_roll(50, 7, seed=1)
    rebuilt = np.zeros_like(mask)
    found = music.runs(mask)
    for column, start, stop in found:
        rebuilt[start:stop, column] += 1
        assert start == 0 or mask[start - 1, column] == 0
        assert stop == len(mask) or mask[stop, column] == 0
    np.testing.assert_array_equal(rebuilt, mask)
    assert music.runs(np.zeros((5, 3))).shape == (0, 3)
    assert music.runs(np.zeros((0, 3))).shape == (0, 3)


class TestMidi:
    @pytest.mark.parametrize("frame_seconds", [0.5, 0.125, 0.02])
    def test_a_roll_survives_the_round_trip(self, frame_seconds: float, tmp_path: Path) -> None:
        pytest.importorskip("pretty_midi")
        roll = random_roll()
        path = tmp_path / "song.mid"
        data = music.to_midi(roll, path, frame_seconds=frame_seconds)
        assert path.read_bytes() == data
        for source in (path, str(path), data):
            back = music.from_midi(source, frame_seconds=frame_seconds)
            assert back.dtype == np.uint8
            np.testing.assert_array_equal(back, roll)

    def test_the_range_of_keys_follows_lowest_midi(self) -> None:
        pytest.importorskip("pretty_midi")
        roll = random_roll(keys=40)
        data = music.to_midi(roll, lowest_midi=36)
        np.testing.assert_array_equal(music.from_midi(data, lowest_midi=36, keys=40), roll)
        full = music.from_midi(data, lowest_midi=0, keys=128)
        np.testing.assert_array_equal(full[:, 36:76], roll)
        assert full.sum() == roll.sum()

    def test_consecutive_frames_are_one_note(self) -> None:
        pretty_midi = pytest.importorskip("pretty_midi")
        roll = np.zeros((6, 88))
        roll[1:4, 39] = roll[5, 39] = 1
        file = pretty_midi.PrettyMIDI(io.BytesIO(music.to_midi(roll, program=40)))
        notes = [(note.pitch, round(note.start, 3), round(note.end, 3)) for note in file.instruments[0].notes]
        assert notes == [(60, 0.5, 2.0), (60, 2.5, 3.0)]
        assert file.instruments[0].program == 40

    def test_drums_are_left_out_and_short_notes_kept(self) -> None:
        pretty_midi = pytest.importorskip("pretty_midi")
        file = pretty_midi.PrettyMIDI()
        drums, piano = pretty_midi.Instrument(0, is_drum=True), pretty_midi.Instrument(0)
        drums.notes.append(pretty_midi.Note(80, 60, 0.0, 4.0))
        piano.notes.append(pretty_midi.Note(80, 21, 0.5, 0.6))
        file.instruments += [drums, piano]
        buffer = io.BytesIO()
        file.write(buffer)
        roll = music.from_midi(buffer.getvalue(), frame_seconds=0.5)
        assert roll.shape == (2, 88)
        assert roll.sum() == roll[1, 0] == 1

    def test_silence(self) -> None:
        pytest.importorskip("pretty_midi")
        assert music.from_midi(music.to_midi(np.zeros((4, 88)))).shape == (0, 88)

    def test_a_note_outside_the_roll_is_an_error(self) -> None:
        pytest.importorskip("pretty_midi")
        data = music.to_midi(np.ones((1, 1)), lowest_midi=10)
        with pytest.raises(ValueError, match=r"note 10 \(B♭-1\).*lowest_midi=0, keys=128"):
            music.from_midi(data)

    def test_without_pretty_midi(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(music.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setitem(sys.modules, "pretty_midi", None)
        with pytest.raises(ImportError, match=r'pip install "dynavae\[music\]"'):
            music.to_midi(np.ones((1, 88)))
        with pytest.raises(ImportError, match=r'pip install "dynavae\[music\]"'):
            music.from_midi(b"")


class TestAudio:
    def test_length_peak_and_type(self) -> None:
        roll = random_roll(20)
        waveform = music.to_audio(roll, frame_seconds=0.1, rate=RATE)
        assert waveform.dtype == np.float32
        assert waveform.shape == (round((20 * 0.1 + music.RELEASE_SECONDS) * RATE),)
        assert abs(waveform).max() == pytest.approx(0.9, abs=1e-6)

    def test_silence_is_silent(self) -> None:
        assert not music.to_audio(np.zeros((3, 88)), rate=RATE).any()

    @pytest.mark.parametrize("midi", [33, 57, 69, 93])
    def test_the_pitch_is_right(self, midi: int) -> None:
        roll = np.zeros((2, 88))
        roll[:, midi - music.LOWEST_MIDI] = 1
        waveform = music.to_audio(roll, frame_seconds=1.0, rate=RATE)
        spectrum = abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
        loudest = np.fft.rfftfreq(len(waveform), 1 / RATE)[spectrum.argmax()]
        assert loudest == pytest.approx(440 * 2 ** ((midi - 69) / 12), abs=1.0)

    def test_nothing_aliases(self) -> None:
        """Of the highest key no harmonic but those below half the rate is there."""
        roll = np.zeros((2, 88))
        roll[:, -1] = 1  # C8, 4186 Hz: at 16 kHz its second harmonic would come back at 7628 Hz
        waveform = music.to_audio(roll, frame_seconds=1.0, rate=16000)
        spectrum = abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
        frequency = np.fft.rfftfreq(len(waveform), 1 / 16000)
        far = abs(frequency - 4186) > 200
        assert spectrum[far].max() < 1e-3 * spectrum.max()

    def test_no_clicks(self) -> None:
        """It starts and ends at zero, and no step is larger than a sine of its highest harmonic makes."""
        roll = np.zeros((4, 88))
        roll[1:3, 24] = 1  # A2, 110 Hz
        waveform = music.to_audio(roll, frame_seconds=0.25, rate=RATE)
        assert waveform[0] == 0
        assert abs(waveform[-1]) < 1e-3
        highest = music.HARMONICS * 110
        assert abs(np.diff(waveform)).max() < 2 * np.pi * highest / RATE * 0.9
        quiet = waveform[: round(0.25 * RATE)]
        assert not quiet.any()
        start = waveform[round(0.25 * RATE) :][: round(0.0005 * RATE)]
        assert abs(start).max() < 0.02

    def test_notes_add_up(self) -> None:
        """Up to the common scale, a chord is the sum of its notes."""
        single = np.zeros((2, 2, 88))
        single[0, :, 40] = single[1, 1, 47] = 1
        parts = [music.to_audio(roll, rate=RATE).astype(float) for roll in single]
        chord = music.to_audio(single.sum(0), rate=RATE).astype(float)
        design = np.stack(parts, axis=1)
        weights, *_ = np.linalg.lstsq(design, chord, rcond=None)
        np.testing.assert_allclose(design @ weights, chord, atol=1e-5)

    def test_wav_holds_the_waveform(self) -> None:
        waveform = music.to_audio(random_roll(6), frame_seconds=0.1, rate=RATE)
        with wave.open(io.BytesIO(music.wav_bytes(waveform, RATE))) as file:
            assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
        assert len(samples) == len(waveform)
        np.testing.assert_allclose(samples / 32767, waveform, atol=1 / 32767)


@pytest.mark.parametrize("function", [music.to_midi, music.to_audio])
class TestBadRolls:
    def test_probabilities(self, function) -> None:
        with pytest.raises(ValueError, match=r"binary, 0 or 1; got values from 0.2 to 0.7.*roll > 0.5"):
            function(np.array([[0.2, 0.7]]))

    def test_missing_values(self, function) -> None:
        with pytest.raises(ValueError, match=r"replace NaN by 0"):
            function(np.array([[0.0, np.nan]]))

    def test_shape(self, function) -> None:
        with pytest.raises(ValueError, match=r"shape \(T, keys\); got \(88,\)"):
            function(np.zeros(88))

    def test_range(self, function) -> None:
        with pytest.raises(ValueError, match=r"88 columns from lowest_midi=60 reach from 60 to 147"):
            function(np.zeros((2, 88)), lowest_midi=60)

    def test_frame_seconds(self, function) -> None:
        with pytest.raises(ValueError, match=r"frame_seconds should be a positive number of seconds; got 0"):
            function(np.zeros((2, 88)), frame_seconds=0)


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"program should be .* from 0 to 127; got 128"):
        music.to_midi(np.zeros((1, 88)), program=128)
    with pytest.raises(ValueError, match=r"rate should be at least 4000 samples per second; got 100"):
        music.to_audio(np.zeros((1, 88)), rate=100)
    with pytest.raises(ValueError, match=r"shape \(samples,\), one channel; got \(2, 3\)"):
        music.wav_bytes(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"NaN or infinite"):
        music.wav_bytes([0.0, np.nan])
    with pytest.raises(ValueError, match=r"got a peak of 1.5. Divide it by its peak"):
        music.wav_bytes([0.0, -1.5])
