r"""Small binary videos of moving bodies, simulated: a ball between walls, a game of pong, a pendulum.

The videos are made on first use, the same ones for the same options, and kept in a cache. The true states stay aside, for
scoring: :func:`true_states`. The balls are simulated by pymunk, which comes with the extra `video`; the pendulum needs
nothing.

Reference: Fraccaro, Kamronn, Paquet and Winther, A Disentangled Recognition and Nonlinear Dynamics Model for Unsupervised
Learning, 2017, arXiv:1710.05741 (walls, speeds, sizes). Differs: rebuilt from these numbers, not the published files;
each frame takes ten steps of the physics engine; a frame and the state of the same index are of the same moment.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynavae.data.archives import arrays_of
from dynavae.data.dataset import SequenceDataset
from dynavae.data.splits import SPLITS, DataSplits
from dynavae.files import write_arrays

VERSION = 1
"""Raised when the same options would give other videos: an old cache is then not read."""

SIDE, RADIUS, FRAME, SUBSTEPS = 32, 3.0, 0.2, 10
SEEDS = {"train": 1234, "valid": 91011, "test": 5678}
SQUARE = ((2.0, 2.0), (2.0, 30.0), (30.0, 30.0), (30.0, 2.0), (2.0, 2.0))
POLYGON = ((3.0, 1.0), (1.0, 15.0), (8.0, 30.0), (25.0, 30.0), (30.0, 8.0), (15.0, 1.0), (3.0, 1.0))
PADDLES, HALF_PADDLE, REACH = (0.0, 30.0), 3.0, 2.0


@dataclass(frozen=True)
class World:
    """Where a ball moves: corners of the walls, and how it starts."""

    walls: tuple[tuple[tuple[float, float], ...], ...]
    spread: float  # standard deviation of the start around the centre
    speed: tuple[float, float]  # uniform between the two, per time unit: five frames
    gravity: float = 0.0
    elasticity: tuple[float, float] = (1.0, 1.0)  # of the ball and of everything else
    paddles: bool = False


WORLDS = {
    "box": World((SQUARE,), 10.0, (10.0, 15.0)),
    "box_gravity": World((SQUARE,), 8.0, (5.0, 10.0), gravity=-5.0),
    "polygon": World((POLYGON,), 2.5, (10.0, 15.0)),
    "pong": World(
        (((0.0, 1.0), (31.0, 1.0)), ((0.0, 32.0), (31.0, 32.0))),
        3.0,
        (10.0, 10.0),
        elasticity=(0.9, 0.99),
        paddles=True,
    ),
}


def load_box(
    *,
    train: int = 5000,
    valid: int = 500,
    test: int = 1000,
    steps: int = 20,
    folder: str | Path | None = None,
) -> DataSplits:
    """A ball of radius 3 that bounces in a square box, 32 x 32 pixels: x is (T, 1024), binary.

    Args:
        train, valid, test: sequences of each split; fewer are the first ones of more.
        steps: frames of each.
        folder: of the cache; default: `dynavae/video` in the user's cache folder (`XDG_CACHE_HOME`).

    Raises:
        ImportError: pymunk is missing; the sentence says how to install it.
        ValueError: sizes below 1.
    """
    return _load("box", train, valid, test, steps, folder)


def load_box_gravity(
    *,
    train: int = 5000,
    valid: int = 500,
    test: int = 1000,
    steps: int = 20,
    folder: str | Path | None = None,
) -> DataSplits:
    """The box with gravity, and a slower ball. Arguments as :func:`load_box`."""
    return _load("box_gravity", train, valid, test, steps, folder)


def load_polygon(
    *,
    train: int = 5000,
    valid: int = 500,
    test: int = 1000,
    steps: int = 20,
    folder: str | Path | None = None,
) -> DataSplits:
    """A ball within six slanted walls. Arguments as :func:`load_box`."""
    return _load("polygon", train, valid, test, steps, folder)


def load_pong(
    *,
    train: int = 5000,
    valid: int = 500,
    test: int = 1000,
    steps: int = 20,
    folder: str | Path | None = None,
) -> DataSplits:
    """A ball between two paddles that follow its height. Arguments as :func:`load_box`."""
    return _load("pong", train, valid, test, steps, folder)


def load_pendulum(
    *,
    train: int = 500,
    valid: int = 100,
    test: int = 100,
    steps: int = 20,
    folder: str | Path | None = None,
) -> DataSplits:
    r"""A pendulum pushed by a random torque, 16 x 16 pixels: x is (T, 256), binary, with one control.

    .. math:: \ddot\theta = -\tfrac{g}{l} \sin\theta - \mu\,\dot\theta + u_t, \qquad g / l = 9.81,\; \mu = 0.1

    A frame is 0.1 time units after the one before; u_t, uniform within 5, acts in between, so that it drives the step into
    frame t. Arguments as :func:`load_box`.

    Reference: Karl, Soelch, Bayer and van der Smagt, Deep Variational Bayes Filters, 2017, arXiv:1605.06432 (the task).
    """
    return _load("pendulum", train, valid, test, steps, folder)


VIDEOS: dict[str, Callable[..., DataSplits]] = {
    "box": load_box,
    "box_gravity": load_box_gravity,
    "polygon": load_polygon,
    "pong": load_pong,
    "pendulum": load_pendulum,
}


def true_states(splits: DataSplits, split: str = "test") -> NDArray[np.float32]:
    """The states behind the videos of a split, (B, T, .): no model is given them.

    Of a ball (x, y, velocity x, velocity y), and the heights of both paddles in pong; of the pendulum (angle, angular
    velocity). Positions are in pixels, x to the right and y upwards, which is from the last row of the image to the first.

    Raises:
        ValueError: these splits are no simulated videos, or there is no such split.

    Example:
        >>> import tempfile
        >>> from dynavae.data import load
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     splits = load("pendulum", train=4, valid=2, test=3, folder=folder)
        ...     true_states(splits).shape, splits.test
        ((3, 20, 2), SequenceDataset(3 sequences, 60 frames, x_dim=256, control_dim=1))
    """
    made = splits.meta.get("simulated")
    if made is None:
        raise ValueError(
            f"{splits.name!r} is no simulated video, so no true states are known; those are of {', '.join(VIDEOS)}."
        )
    splits.split(split)
    return _cached(made["name"], split, made["sequences"][split], made["steps"], made["folder"])["states"]


def _load(name: str, train: int, valid: int, test: int, steps: int, folder: str | Path | None) -> DataSplits:
    """Simulate what is not in the cache, and make it a data set."""
    sizes = dict(train=train, valid=valid, test=test)
    for what, number in {**sizes, "steps": steps}.items():
        if number < 1:
            raise ValueError(f"{what} of {name!r} should be at least 1; got {number}.")
    side = 16 if name == "pendulum" else SIDE
    sets, digest = {}, hashlib.sha256()
    for split in SPLITS:
        made = _cached(name, split, sizes[split], steps, None if folder is None else str(folder))
        bits = made["bits"]
        digest.update(bits.tobytes())
        x = np.unpackbits(bits, axis=-1)[..., : side * side]
        control = made.get("control")
        names = [f"{split}-{i}" for i in range(len(x))]
        sets[split] = SequenceDataset(list(x), None if control is None else list(control), names)
    simulated = dict(name=name, sequences=sizes, steps=steps, folder=None if folder is None else str(folder))
    seconds = 0.1 if name == "pendulum" else FRAME
    meta = {"image": [side, side], "frame_seconds": seconds, "simulated": simulated}
    return DataSplits(name, **sets, kind="binary", meta=meta, sha256=digest.hexdigest())


def _cached(name: str, split: str, number: int, steps: int, folder: str | None) -> dict[str, NDArray[Any]]:
    """The arrays of one split: packed frames, states, and controls if there are any; from the cache if they are there."""
    options: dict[str, Any] = dict(name=name, seed=SEEDS[split], steps=steps, version=VERSION)
    if name in WORLDS:
        options["world"] = asdict(WORLDS[name])
    key = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]
    path = cache_folder(folder) / f"{name}-{split}-{number}x{steps}-{key}.npz"
    if not path.is_file():
        made = _simulate(name, SEEDS[split], number, steps)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(path, **made)
    return arrays_of(path.read_bytes(), path, "delete it, and it is made again")


def cache_folder(folder: str | Path | None = None) -> Path:
    """Where simulated videos are kept."""
    if folder is not None:
        return Path(folder).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "dynavae" / "video"


def _simulate(name: str, seed: int, number: int, steps: int) -> dict[str, NDArray[Any]]:
    """Frames packed to bits, states, and controls, each (B, T, .); each sequence from its own random numbers."""
    streams = [np.random.default_rng([seed, i]) for i in range(number)]
    if name == "pendulum":
        states, control = _pendulum(streams, steps)
        at = np.stack([7.5 + 5.5 * np.sin(states[..., 0]), 7.5 - 5.5 * np.cos(states[..., 0])], -1)
        images = np.stack([_disc(positions, 16, 2.0) for positions in at])
        return {"bits": _packed(images), "states": states, "control": control}
    world = WORLDS[name]
    states = np.stack([_ball(world, rng, steps) for rng in streams]).astype(np.float32)
    still = functools.reduce(np.logical_or, (_line(wall) for wall in world.walls))
    images = np.stack([_disc(one[:, :2], SIDE, RADIUS) | still for one in states])
    if world.paddles:
        rows = np.arange(SIDE)[:, None]
        for column, side in enumerate(PADDLES):
            near = np.abs(rows - states[..., None, None, 4 + column]) <= HALF_PADDLE
            images |= near & (np.abs(np.arange(SIDE) - side) <= 1)
    return {"bits": _packed(images), "states": states}


def _ball(world: World, rng: np.random.Generator, steps: int) -> NDArray[np.float64]:
    """States (T, 4), or (T, 6) with paddles, of one ball."""
    pymunk = _pymunk()
    angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*world.speed)
    start = np.clip(SIDE / 2 + world.spread * rng.normal(size=2), 6, 26)
    space = pymunk.Space()
    space.gravity = (0.0, world.gravity)
    body = pymunk.Body(1.0, float("inf"))  # it does not spin
    body.position = tuple(start.tolist())
    body.velocity = (float(speed * np.cos(angle)), float(speed * np.sin(angle)))
    ball = pymunk.Circle(body, RADIUS)
    ball.elasticity = world.elasticity[0]
    fixed = [
        pymunk.Segment(space.static_body, a, b, 0.0)
        for wall in world.walls
        for a, b in itertools.pairwise(wall)
    ]
    players = []
    for side in PADDLES if world.paddles else ():
        player = pymunk.Body(body_type=pymunk.Body.KINEMATIC)
        player.position = (side, SIDE / 2)
        players.append(player)
        fixed.append(pymunk.Segment(player, (0.0, -HALF_PADDLE), (0.0, HALF_PADDLE), 1.0))
    for shape in fixed:
        shape.elasticity = world.elasticity[1]
    space.add(body, ball, *players, *fixed)
    states = []
    for _ in range(steps):
        for player in players:
            gap = body.position.y - player.position.y
            if abs(gap) > 1:
                player.position = (player.position.x, player.position.y + float(np.clip(gap, -REACH, REACH)))
        states.append([*body.position, *body.velocity, *(player.position.y for player in players)])
        for _ in range(SUBSTEPS):
            space.step(FRAME / SUBSTEPS)
    return np.array(states)


def _pendulum(
    streams: list[np.random.Generator], steps: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """States (B, T, 2) and torques (B, T, 1)."""
    start = np.array([rng.uniform((-np.pi, -4.0), (np.pi, 4.0)) for rng in streams])
    torque = np.array([rng.uniform(-5.0, 5.0, steps) for rng in streams])
    angle, velocity = start.T
    states = [start]
    for u in torque.T[1:]:
        for _ in range(20):  # symplectic Euler: energy drifts little
            velocity = velocity + 0.005 * (-9.81 * np.sin(angle) - 0.1 * velocity + u)
            angle = angle + 0.005 * velocity
        states.append(np.stack([angle, velocity], -1))
    return np.stack(states, 1).astype(np.float32), torque[..., None].astype(np.float32)


def _disc(centres: NDArray[Any], side: int, radius: float) -> NDArray[np.bool_]:
    """Frames (T, side, side) with y counted from below until they are packed: True within the disc."""
    grid = np.arange(side)
    dx = grid[None, None, :] - centres[:, 0, None, None]
    dy = grid[None, :, None] - centres[:, 1, None, None]
    return dx**2 + dy**2 <= radius**2


def _line(corners: tuple[tuple[float, float], ...]) -> NDArray[np.bool_]:
    """A frame (side, side) with the pixels that are within half a pixel of a line through these corners."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    drawn = np.zeros((SIDE, SIDE), dtype=bool)
    for (ax, ay), (bx, by) in itertools.pairwise(corners):
        dx, dy = bx - ax, by - ay
        along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx**2 + dy**2), 0, 1)
        drawn |= np.hypot(x - ax - along * dx, y - ay - along * dy) <= 0.5 + 1e-9
    return drawn


def _packed(images: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Eight pixels to a byte, first row on top: (B, T, bytes)."""
    return np.packbits(images[..., ::-1, :].reshape(*images.shape[:2], -1), axis=-1)


def _pymunk() -> Any:
    """The physics engine, or a sentence that says how to get it."""
    try:
        import pymunk
    except ImportError as error:
        raise ImportError(
            "the videos of balls are simulated by pymunk, which is not installed: pip install 'dynavae[video]'. "
            "load('pendulum') needs nothing."
        ) from error
    return pymunk
