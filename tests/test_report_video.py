"""Videos in a report: strips of frames, and the dynamics of a KVAE."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynavae import cli
from dynavae.data import DataSplits, SequenceDataset, save_npz
from dynavae.report import write_report
from dynavae.report.video import MISSING, _side_by_side, strips, weights_map


def test_frames_lie_side_by_side_and_what_is_missing_is_grey():
    video = np.arange(2 * 6, dtype=float).reshape(2, 6) / 11
    video[1, 4] = np.nan
    picture = _side_by_side(video, 1, 2, 3, 1)
    assert picture.shape == (2, 7, 4)
    np.testing.assert_allclose(picture[:, :3, 0], video[0].reshape(2, 3))
    np.testing.assert_allclose(picture[1, 5], MISSING)
    assert (picture[:, 3] == 0).all()  # between frames
    colours = _side_by_side(np.tile([0.1, 0.5, 0.9], (1, 1)), 3, 1, 1, 1)
    np.testing.assert_allclose(colours[0, 0], [0.1, 0.5, 0.9, 1.0])


def test_sequences_of_images_are_strips(tmp_path):
    x = (np.random.default_rng(0).random((9, 12)) > 0.5).astype(float)
    item = {"name": "one", "data": x, "mean": x, "observed": np.arange(9) < 5}
    path = write_report(
        tmp_path / "r.html",
        title="a video",
        reconstructions=[item],
        imputations=[item],
        samples=[x],
        forecasts=[{"context": x[:4], "truth": x[4:], "samples": np.stack([x[4:]] * 3)}],
        kind="binary",
        meta={"image": [3, 4], "frame_seconds": 0.2},
    )
    text = path.read_text()
    assert text.count("frames side by side") >= 4
    assert "time against dimension" not in text
    with pytest.raises(ValueError, match=r"meta\['image'\] should be .* of 12 pixels; got \[3, 5\]"):
        write_report(path, title="", samples=[x], kind="binary", meta={"image": [3, 5]})


def test_marks_lie_between_frames():
    drawing = strips(["truth", "seen"], [np.zeros((14, 6))] * 2, [2, 3], marks=[4, 9])
    for (
        axis
    ) in drawing.axes:  # frames of 3 pixels and gaps of 1; the gap before frame t is centred at 4 t - 1
        np.testing.assert_allclose([line.get_xdata()[0] for line in axis.lines], [15.0, 35.0])


def test_weights_are_averaged_over_cells_with_one_scale():
    corners = np.array([[0.0, 0.0], [0.0, 10.0], [10.0, 0.0], [10.0, 10.0]])
    first = np.array([0.1, 0.1, 0.9, 0.9])
    points = np.concatenate([corners, corners])
    weights = np.concatenate([first - 0.05, first + 0.05])
    maps = [axis.collections[0] for axis in weights_map(points, np.stack([weights, 1 - weights], 1)).axes[:2]]
    for cells, x in zip(maps, (0.1, 0.9), strict=True):
        left = cells.get_offsets()[:, 0] < 5
        np.testing.assert_allclose(cells.get_array()[left], x)
        np.testing.assert_allclose(cells.get_array()[~left], 1 - x)
        np.testing.assert_allclose(cells.get_clim(), (0.1, 0.9))


def test_the_report_of_a_kvae_shows_its_dynamics(tmp_path, capsys):
    torch.manual_seed(0)
    x = np.zeros((12, 10, 16), dtype=np.uint8)
    for i in range(12):
        x[i, np.arange(10), (i + np.arange(10)) % 16] = 1
    splits = DataSplits(
        "blink",
        train=SequenceDataset(x[:8]),
        valid=SequenceDataset(x[8:10]),
        test=SequenceDataset(x[10:]),
        kind="binary",
        meta={"image": [4, 4]},
    )
    save_npz(tmp_path / "blink.npz", splits)
    out = str(tmp_path / "run")
    fit = ["fit", "--model", "KVAE", "--data", str(tmp_path / "blink.npz"), "--out", out, "--epochs", "1"]
    quiet = ["--progress", "false", "--tensorboard", "false", "--accelerator", "cpu"]
    assert cli.main([*fit, "--freeze", '["rnn"]', "--freeze_until", "1", *quiet]) == 0
    assert cli.main(["report", out, "--horizon", "3"]) == 0
    text = (tmp_path / "run" / "report.html").read_text()
    for said in ('id="dynamics"', "smoothed", "generated", "weight of dynamics 3"):
        assert said in text
