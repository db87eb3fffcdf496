"""The hand-written recursion: equal to the plain loop, whatever the layers, and no leak."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from recursive import build
from torch import Tensor, nn

from dynavae import Sequences, objectives, recursion
from dynavae.loss import Loss
from dynavae.models import DKF, RVAE, SRNN, VRNN
from dynavae.nn import cells
from dynavae.nn.mlp import ACTIVATIONS
from dynavae.nn.through_time import Dense, Size, TanhInto
from dynavae.noise import Noise, draw
from dynavae.recursion import stages
from dynavae.scan import Trajectory, scan
from dynavae.terms import compiled

CELLS = ("lstm", "gru", "rnn", "relu_rnn")


def sequences(x_dim: int = 3, control_dim: int = 0) -> Sequences:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 6, x_dim, generator=generator, dtype=torch.float64)
    control = (
        torch.randn(4, 6, control_dim, generator=generator, dtype=torch.float64) if control_dim else None
    )
    return Sequences.from_arrays(x, lengths=[6, 6, 4, 1], control=control).to(dtype=torch.float64)


def used(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of the model's `recursion` found a fast form."""
    found: list[bool] = []
    recursion = type(model).recursion

    def spy(self: object, *arguments: object) -> object:
        out = recursion(self, *arguments)
        found.append(out is not None)
        return out

    monkeypatch.setattr(type(model), "recursion", spy)
    return found


def loss(trajectory: Trajectory) -> Tensor:
    return objectives.elbo(trajectory).sum() + objectives.elbo(trajectory, kl="sample").sum()


def both(model: torch.nn.Module, particles: int) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    batch = sequences(control_dim=model.control_dim)
    noise = draw(model, batch.steps, particles, len(batch), generator=torch.Generator().manual_seed(3))
    out = []
    for fast in (True, False):
        value = loss(scan(model, batch, particles=particles, noise=noise, fast=fast))
        grads = torch.autograd.grad(
            value, list(model.parameters()), allow_unused=True, materialize_grads=True
        )
        out.append((value.detach(), grads))
    return out


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (VRNN, {"x_layers": (4,), "z_layers": (4, 3)}),
        (VRNN, {"z_layers": (), "memory_layers": 2, "prior": "standard", "control_dim": 2}),
        (VRNN, {"residual": True, "prior_layers": (4,), "posterior_layers": (4,), "control_dim": 2}),
        (SRNN, {"residual": True, "control_dim": 2, "scale": "softplus"}),
        (SRNN, {"residual": False, "posterior_layers": ()}),
        (DKF, {"inference": "ST-LR", "aug": True, "q_scale": "softplus_variance"}),
        (DKF, {"inference": "ST-R", "z_layers": (), "first": "learned"}),
        (RVAE, {"memory_layers": 2, "posterior_layers": (4,)}),
        (RVAE, {"decoder": "noncausal", "control_dim": 2}),
    ],
)
def test_equals_the_plain_loop(
    kind: type, options: dict[str, object], cell: str, particles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kind, memory=cell, **options)
    found = used(model, monkeypatch)
    (fast, d_fast), (slow, d_slow) = both(model, particles)
    assert found == [True]
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(d_fast, d_slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("kind", [VRNN, SRNN, DKF])
def test_every_activation(kind: type, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind, activation=activation)
    found = used(model, monkeypatch)
    (fast, d_fast), (slow, d_slow) = both(model, 2)
    assert found == [True]
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(d_fast, d_slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


class _Loss(torch.nn.Module):
    """The loss as a function of the model's parameters."""

    def __init__(self, model: torch.nn.Module, batch: Sequences, noise: Noise) -> None:
        super().__init__()
        self.model, self.batch, self.noise = model, batch, noise

    def forward(self) -> Tensor:
        return loss(scan(self.model, self.batch, particles=2, noise=self.noise))


def test_layer_norm_takes_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(SRNN, norm="layer")
    found = used(model, monkeypatch)
    (fast, d_fast), (slow, d_slow) = both(model, 2)
    assert found == [False]
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(d_fast, d_slow)


@pytest.mark.parametrize(
    ("kind", "options"), [(SRNN, {"activation": "relu"}), (VRNN, {"posterior_layers": (8,)}), (DKF, {})]
)
def test_gradient_under_dropout(
    kind: type, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against finite differences along a random direction, with the masks of one seed."""
    model = build(kind, dropout=0.4, **options).train()
    found = used(model, monkeypatch)
    batch = sequences()
    noise = draw(model, batch.steps, 2, len(batch), generator=torch.Generator().manual_seed(3))
    parameters = list(model.parameters())
    directions = [torch.randn_like(p) for p in parameters]

    def value(step: float = 0.0) -> Tensor:
        moved = {
            name: p + step * d for (name, p), d in zip(model.named_parameters(), directions, strict=True)
        }
        torch.manual_seed(5)
        return torch.func.functional_call(
            _Loss(model, batch, noise), {f"model.{k}": v for k, v in moved.items()}, ()
        )

    grads = torch.autograd.grad(value(), parameters, allow_unused=True, materialize_grads=True)
    slope = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True))
    eps = 1e-6
    numeric = float(value(eps).detach() - value(-eps).detach()) / (2 * eps)
    assert slope == pytest.approx(numeric, rel=1e-5)
    assert all(found) and value() == value()
    torch.manual_seed(6)
    assert value() != loss(scan(model, batch, particles=2, noise=noise))  # other masks


def test_dropout_keeps_the_mean() -> None:
    """A linear posterior layer's output is unbiased under its masks: three standard errors of 4000 draws."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(3, 2), torch.randn(3), torch.randn(4000, 2)[:1].expand(4000, 2)
    size = Size(1, 1, 4000, False)
    factor = size.mask(weight, 3, 0.4, 0.5)
    dense = Dense(size, weight, bias, None, None, factor, 0.5, True)
    y = dense.forward(0, x)
    error = y.std(0) / 4000**0.5
    assert ((y.mean(0) - 0.5 * (x[0] @ weight.T + bias)).abs() < 3 * error).all()
    assert ((y == 0).float().mean() - 0.4).abs() < 0.02


def test_backward_twice() -> None:
    model = build(VRNN)
    batch = sequences()
    value = loss(scan(model, batch, generator=torch.Generator().manual_seed(0)))
    first = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(value, list(model.parameters()))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_gradient_through_a_carried_state() -> None:
    """Two chunks, the second from the first's undetached state: the gradient flows through h and c."""
    model = build(VRNN, memory_layers=2)
    whole = Sequences.from_arrays(torch.randn(3, 8, 3)).to(dtype=torch.float64)
    noise = draw(model, 8, 2, 3, generator=torch.Generator().manual_seed(3))
    grads = []
    for fast in (True, False):
        state, value = None, torch.zeros((), dtype=torch.float64)
        for part in (slice(0, 4), slice(4, 8)):
            piece = Sequences.from_arrays(whole.x[:, part]).to(dtype=torch.float64)
            cut = noise._replace(z=noise.z[part])
            run = scan(model, piece, particles=2, noise=cut, state=state, carry=True, fast=fast)
            state, value = run.state, value + loss(run)
        grads.append(torch.autograd.grad(value, list(model.parameters())))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-8)


def test_memory_is_freed_without_the_collector() -> None:
    model = build(VRNN)
    trajectory = scan(model, sequences())
    node = trajectory.z.grad_fn
    while type(node).__name__ != "_RunBackward":
        node = node.next_functions[0][0]
    alive = weakref.ref(node)
    gc.collect()
    gc.disable()
    try:
        del node, trajectory
        assert alive() is None
    finally:
        gc.enable()


def test_autocast() -> None:
    """Under bfloat16 autocast the recursion itself stays in the model's own precision."""
    torch.manual_seed(0)
    model = VRNN(x_dim=3, z_dim=2, h_dim=5)
    batch = Sequences.from_arrays(torch.randn(4, 6, 3))
    noise = draw(model, 6, 1, 4)
    full = scan(model, batch, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        short = scan(model, batch, noise=noise)
        value = objectives.elbo(short).sum()
    value.backward()
    assert short.z.dtype == torch.float32
    torch.testing.assert_close(short.z, full.z, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("short", ["autocast", "bfloat16", "neither"])
def test_tanh_as_a_sigmoid_needs_numbers_of_full_length(short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """tanh(a) = 2 sigmoid(2 a) - 1 puts 2 W s and W 1 into the next layer's sum, which have to cancel."""
    made = []
    monkeypatch.setattr(recursion, "_by_sigmoid", lambda s, f=recursion._by_sigmoid: made.append(s) or f(s))
    model = VRNN(x_dim=3, z_dim=2, h_dim=5)
    batch = Sequences.from_arrays(torch.randn(4, 6, 3))
    noise = draw(model, 6, 1, 4)
    if short == "bfloat16":
        model, batch = model.bfloat16(), batch.to(dtype=torch.bfloat16)
        noise = Noise(*(None if a is None else a.bfloat16() for a in noise))  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16, enabled=short == "autocast"):
        scan(model, batch, noise=noise)
    assert len(made) == (2 if short == "neither" else 0)  # both layers of phi_z


def test_single_precision_where_the_constants_are_large() -> None:
    """Weights with large sums of rows, and activations near zero: what cancels costs a few units of the last place."""
    torch.manual_seed(0)
    model = VRNN(x_dim=3, z_dim=2, h_dim=5)
    with torch.no_grad():
        model.phi_z[-2].weight.mul_(1e-3)
        model.phi_z[-2].bias.mul_(1e-3)
        model.rnn.rnn.weight_ih_l0[:, -model.phi_z.out_dim :].add_(0.5)  # each row of 64 sums to 32
    batch = Sequences.from_arrays(torch.randn(4, 6, 3))
    noise = draw(model, 6, 1, 4)
    z = scan(model, batch, noise=noise).z
    double = scan(
        model.double(),
        batch.to(dtype=torch.float64),
        noise=Noise(*(None if a is None else a.double() for a in noise)),
    )  # type: ignore[arg-type]
    torch.testing.assert_close(z.double(), double.z, rtol=0, atol=3e-6)


def test_layers_of_ones_own_have_a_fast_form() -> None:
    for act in (nn.Tanh, nn.ReLU, *ACTIVATIONS.values()):
        assert stages(nn.Sequential(nn.Linear(2, 3), act(), nn.Linear(3, 2))) is not None
    assert stages(nn.Sequential(nn.Linear(2, 3), nn.Softmax(-1))) is None


@pytest.mark.slow
def test_compiled_terms() -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler on the path")
    script = Path(__file__).parent / "scripts" / "compiled.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert run.stdout == "equal\n", run.stderr


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compiled.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="no C\\+\\+ compiler on the path: install one"):
            Loss(VRNN(x_dim=3, z_dim=2, h_dim=5), compile=True)
    finally:
        compiled.cache_clear()


@pytest.mark.parametrize("cell", CELLS)
def test_cell_equals_torch(cell: str) -> None:
    """States and all gradients against torch's own cell, at a size at which tanh is taken by way of the sigmoid."""
    torch.manual_seed(0)
    T, K, B, x_dim, h_dim = 4, 2, 3, 7, 300
    assert K * B * h_dim > TanhInto.MANY
    options = {"nonlinearity": "relu"} if cell == "relu_rnn" else {}
    theirs = {"lstm": nn.LSTM, "gru": nn.GRU}.get(cell, nn.RNN)(x_dim, h_dim, dtype=torch.float64, **options)
    w_x, w_h, b_x, b_h = theirs.parameters()
    x = torch.randn(T, K * B, x_dim, dtype=torch.float64)
    start = [torch.randn(1, K * B, h_dim, dtype=torch.float64) for _ in range(2 if cell == "lstm" else 1)]
    out, _ = theirs(x.requires_grad_(), tuple(start) if cell == "lstm" else start[0])
    weight = torch.randn_like(out)
    own = cell == "gru"
    # What the gates read beside x, known for all t and the same for all particles: here the bias at each.
    before = (b_x if own else b_x + b_h).detach().expand(T, B, -1)
    ours = cells.CELLS[cell](
        Size(T, K, B, True),
        w_x.detach(),
        before.contiguous(),
        w_h.detach(),
        b_h.detach() if own else None,
        [part[0] for part in start],
    )
    for t in range(T):
        ours.forward(t, x[t].detach())
    torch.testing.assert_close(ours.h, out, rtol=1e-12, atol=1e-12)

    ours.prepare([None] * len(ours.states))
    d_x, d_h = [], torch.zeros_like(start[0][0])
    for t in reversed(range(T)):
        d_x.append(ours.backward(t, weight[t] + d_h).clone())
        d_h = ours.d_h
    d_w_x, d_before, d_w_h, d_b_h = ours.gradients(x.detach())
    grads = torch.autograd.grad((out * weight).sum(), [x, w_x, w_h, b_x, b_h])
    found = [
        torch.stack(d_x[::-1]),
        d_w_x,
        d_w_h,
        d_before.sum((0, 1)),
        d_b_h if own else d_before.sum((0, 1)),
    ]
    torch.testing.assert_close(found, list(grads), rtol=1e-10, atol=1e-10)
