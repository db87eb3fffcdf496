"""Simulated videos: what is drawn is what was simulated, the same at every time, and physics holds."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from dynavae.data import load, true_states
from dynavae.data.video import VIDEOS, WORLDS

SMALL = dict(train=6, valid=2, test=3, steps=15)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_binary_and_have_states(name):
    splits = load(name, **SMALL)
    side = splits.meta["image"][0]
    assert (splits.kind, splits.x_dim, splits.meta["image"]) == ("binary", side**2, [side, side])
    assert [len(splits.split(s)) for s in splits.available] == [6, 2, 3]
    assert splits.control_dim == (1 if name == "pendulum" else 0)
    for split in splits.available:
        assert true_states(splits, split).shape[:2] == (len(splits.split(split)), 15)


@pytest.mark.parametrize("name", ["box", "pendulum"])
def test_the_same_options_give_the_same_videos(name, tmp_path):
    first = load(name, **SMALL)
    cached, made_again = load(name, **SMALL), load(name, **SMALL, folder=tmp_path / "other")
    assert first.sha256 == cached.sha256 == made_again.sha256
    more = load(name, **{**SMALL, "test": 5})
    assert all(np.array_equal(a, b) for a, b in zip(first.test.x, more.test.x, strict=False))
    assert not np.array_equal(first.test.x[0], first.valid.x[0])


@pytest.mark.parametrize("name", ["box", "box_gravity", "polygon"])
def test_the_ball_is_where_its_state_says(name):
    splits = load(name, **SMALL)
    x = np.stack(splits.test.x).reshape(3, 15, 32, 32)
    ball = x - x.min((0, 1))  # walls are in every frame
    states = true_states(splits)
    rows, columns = np.mgrid[:32, :32]
    inside = (states[..., :2] > 8).all(-1) & (states[..., :2] < 24).all(-1)  # nothing of it behind a wall
    if name != "polygon":
        for axis, grid in ((0, columns), (1, 31 - rows)):
            mean = (ball * grid).sum((2, 3)) / ball.sum((2, 3))
            assert np.abs(mean - states[..., axis])[inside].max() < 0.5
    assert inside.sum() > 5
    assert (ball.sum((2, 3))[inside] > 20).all()


def test_speed_is_kept_by_elastic_walls_and_energy_by_gravity():
    box, fallen = true_states(load("box", **SMALL)), true_states(load("box_gravity", **SMALL))
    speed = np.hypot(*box[..., 2:4].transpose(2, 0, 1))
    assert np.ptp(speed, axis=1).max() < 1e-3
    assert np.abs(np.diff(box[..., 0], axis=1)).max() <= 15 * 0.2 + 1e-3
    turned = (np.sign(box[:, 1:, 2:4]) != np.sign(box[:, :-1, 2:4])).any()
    assert turned
    energy = 0.5 * (fallen[..., 2:4] ** 2).sum(-1) - WORLDS["box_gravity"].gravity * fallen[..., 1]
    assert (np.ptp(energy, axis=1) / energy.mean(1)).max() < 0.1


def test_paddles_follow_the_ball():
    states = true_states(load("pong", **SMALL))
    assert np.abs(states[:, 5:, 4] - states[:, 5:, 1]).max() < 6
    assert np.abs(np.diff(states[..., 4], axis=1)).max() <= 2 + 1e-5


def test_the_torque_moves_the_pendulum():
    splits = load("pendulum", **SMALL)
    angle, velocity = true_states(splits).transpose(2, 0, 1)
    u = np.stack(splits.test.control)[..., 0]
    change = np.diff(velocity, axis=1)
    gravity = -0.981 * 0.5 * (np.sin(angle[:, 1:]) + np.sin(angle[:, :-1]))
    unexplained = change - gravity
    assert np.corrcoef(unexplained.ravel(), u[:, 1:].ravel())[0, 1] > 0.9
    assert abs(np.corrcoef(unexplained.ravel(), u[:, :-1].ravel())[0, 1]) < 0.5


def test_without_pymunk_a_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymunk", None)
    with pytest.raises(ImportError, match=r"pip install 'dynavae\[video\]'"):
        load("box", **SMALL)
    assert load("pendulum", **SMALL).x_dim == 256


def test_bad_sizes_and_other_data_are_refused():
    with pytest.raises(ValueError, match="steps of 'box' should be at least 1; got 0"):
        load("box", steps=0)
    with pytest.raises(ValueError, match=r"no simulated video.*those are of box"):
        true_states(load("jsb"))
