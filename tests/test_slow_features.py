"""Slow features against a generalised eigenproblem, and the KVAE that starts from them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from dynavae import fit
from dynavae.data import SequenceDataset
from dynavae.exact.slow_features import slow_features
from dynavae.models import KVAE
from dynavae.training import calibrate


def mixed(n=6, frames=300, x_dim=8, seed=0):
    """Sequences of mixed sines of different speeds, and noise."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(5, x_dim))
    sequences = []
    for _ in range(n):
        t = np.arange(frames)[:, None] + rng.uniform(0, 1000)
        sources = np.sin(t / np.array([50.0, 23.0, 11.0, 5.0, 2.0]))
        x = torch.from_numpy(sources @ mixing + 0.01 * rng.normal(size=(frames, x_dim)))
        sequences.append((x, torch.ones_like(x, dtype=torch.bool)))
    return sequences


def moments(sequences):
    x = torch.cat([x for x, _ in sequences])
    centred = x - x.mean(0)
    steps = torch.cat([x[1:] - x[:-1] for x, _ in sequences])
    return centred.T @ centred / len(x), steps.T @ steps / len(steps)


def test_they_solve_the_generalised_eigenproblem():
    sequences = mixed()
    found = slow_features(sequences, dim=3)
    covariance, steps = moments(sequences)
    values, vectors = scipy.linalg.eigh(steps.numpy(), covariance.numpy())
    np.testing.assert_allclose(found.slowness.numpy(), values[:3], rtol=1e-9)
    y = found(torch.cat([x for x, _ in sequences]))
    torch.testing.assert_close(y.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(y.T @ y / len(y), torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0)
    for i in range(3):  # the same direction, up to its sign
        w, v = found.weights[:, i].numpy(), vectors[:, i]
        np.testing.assert_allclose(w * np.sign(w @ v), v, rtol=1e-6, atol=1e-9)


def test_few_components_of_many_coordinates_span_what_all_would():
    sequences = mixed(x_dim=150)
    state = torch.random.get_rng_state()
    found = slow_features(sequences, dim=2, components=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    x = torch.cat([x for x, _ in sequences])
    exact = slow_features(sequences, dim=2, components=150)
    a, b = found(x), exact(x)
    correlation = np.corrcoef(a.T.numpy(), b.T.numpy())[:2, 2:]
    assert (np.abs(np.diag(correlation)) > 0.99).all()


def test_missing_values_do_not_count():
    sequences = mixed()
    gaps = []
    for i, (x, seen) in enumerate(sequences):
        seen = seen.clone()
        seen[50 + i : 90] = False
        gaps.append((torch.where(seen, x, torch.nan), seen))
    found, full = slow_features(gaps, dim=2), slow_features(sequences, dim=2)
    x = torch.cat([x for x, _ in sequences])
    correlation = np.corrcoef(found(x).T.numpy(), full(x).T.numpy())[:2, 2:]
    assert (np.abs(np.diag(correlation)) > 0.99).all()
    x, seen = gaps[0]
    assert torch.equal(found(x, seen)[60], torch.zeros(2, dtype=torch.float64))


def test_refusals():
    sequences = mixed(x_dim=3)
    with pytest.raises(ValueError, match="4 slow features were asked for, but the frames have 3 independent"):
        slow_features(sequences, dim=4)
    frames = [(x[:1], seen[:1]) for x, seen in sequences]
    with pytest.raises(ValueError, match="two observed frames in a row"):
        slow_features(frames, dim=1)


SIZE = 10


def dots(videos=60, frames=16, seed=0):
    """A blurred dot that bounces in a box: (B, T, SIZE^2) in {0, 1}, and its positions."""
    rng = np.random.default_rng(seed)
    width = SIZE - 3.0
    start, speed = rng.uniform(0, width, (videos, 1, 2)), rng.uniform(-1, 1, (videos, 1, 2))
    path = start + speed * np.arange(frames)[None, :, None]
    position = 1 + np.abs((path + width) % (2 * width) - width)
    grid = np.arange(SIZE)
    distance = np.abs(grid[None, None, None] - position[..., None])
    image = (distance[:, :, 0, :, None] ** 2 + distance[:, :, 1, None, :] ** 2) < 1.7**2
    return image.reshape(videos, frames, -1).astype(np.float32), position


def r2(model, data, position):
    with torch.no_grad():
        a = model.states(data.batch()).a.reshape(-1, model.z_dim).double().numpy()
    codes = np.concatenate([a, np.ones((len(a), 1))], 1)
    truth = position.reshape(-1, 2)
    error = truth - codes @ np.linalg.lstsq(codes, truth, rcond=None)[0]
    return 1 - error.var(0).sum() / truth.var(0).sum()


@pytest.fixture(scope="module")
def video():
    x, position = dots()
    return SequenceDataset(list(x)), position


@pytest.mark.parametrize("seed", range(3))
def test_a_kvae_starts_with_an_unfolded_plane_at_constant_velocity(video, seed):
    data, position = video
    torch.manual_seed(seed)
    model = KVAE(x_dim=SIZE**2, layers=(64,), emission="bernoulli", mixtures=2)
    C = model.C.detach().clone()
    before = r2(model, data, position)
    assert calibrate(model, data)
    assert r2(model, data, position) > max(0.95, before)
    step = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert ((model.A - step).abs() < 0.1).all() and not torch.equal(model.A[0], model.A[1])
    torch.testing.assert_close(model.C.detach(), C + torch.eye(2, 4))
    a = model.states(data.batch()).a
    assert 0.5 < a.std().item() / model.start_variance**0.5 < 1.5
    assert all(p.grad is None for p in model.parameters())


def test_the_start_is_the_same_twice_and_leaves_the_noise_of_training_alone(video):
    data, _ = video
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = KVAE(x_dim=SIZE**2, layers=(16,), emission="bernoulli")
        state = torch.random.get_rng_state()
        calibrate(model, data)
        assert torch.equal(torch.random.get_rng_state(), state)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_a_random_start_moves_the_output_bias_only(video):
    data, _ = video
    model = KVAE(x_dim=SIZE**2, layers=(16,), emission="bernoulli", start="random")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert calibrate(model, data)
    moved = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
    assert moved == ["p_x.linear.bias"]


def test_data_without_slow_features_is_said_and_starts_at_random():
    model = KVAE(x_dim=1, z_dim=2)
    before = model.A.detach().clone()
    with pytest.warns(UserWarning, match="starts at random: 2 slow features were asked for"):
        fit(model, torch.randn(4, 6, 1), epochs=1, progress=False)
    assert model.A.shape == before.shape
    with pytest.raises(ValueError, match="start should be one of slow, random; got 'fast'"):
        KVAE(x_dim=4, start="fast")
