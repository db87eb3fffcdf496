"""Recorded loops: what plays again is what would run, whatever the layers, the order of passes and the memory."""

from __future__ import annotations

import contextlib
import inspect
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from emulated import Graph
from recursive import build
from torch import Tensor, nn

import dynavae
from dynavae import Sequences, cuda_graph, objectives, recording
from dynavae.models import DKF, RVAE, SRNN, VRNN
from dynavae.nn.mlp import ACTIVATIONS
from dynavae.noise import draw
from dynavae.recording import Recordings, recorded
from dynavae.scan import scan


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recordings]:
    """Recordings of emulated graphs, on the CPU."""
    ours = Recordings(Graph)
    monkeypatch.setattr(recording, "recordings", ours)
    monkeypatch.setattr(Graph, "recorded", 0)
    monkeypatch.setattr(Graph, "played", 0)
    with recorded():
        yield ours


def batch(B: int = 4, T: int = 6, control: int = 0, seed: int = 1) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, 3, generator=generator, dtype=torch.float64)
    u = torch.randn(B, T, control, generator=generator, dtype=torch.float64) if control else None
    lengths = [T] * (B - 1) + [1]
    return Sequences.from_arrays(x, lengths=lengths, control=u).to(dtype=torch.float64)


def loss(model: torch.nn.Module, data: Sequences, seed: int, particles: int = 1) -> Tensor:
    noise = draw(model, data.steps, particles, len(data), generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)  # dropout
    run = scan(model, data, particles=particles, noise=noise)
    return objectives.elbo(run).sum() + objectives.elbo(run, kl="sample").sum()


def grads(model: torch.nn.Module, value: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, list(model.parameters()), allow_unused=True, materialize_grads=True)


def same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


CASES = [
    (VRNN, {"x_layers": (4,), "z_layers": (4, 3)}),
    (VRNN, {"z_layers": (), "memory_layers": 2, "prior": "standard", "control_dim": 2, "memory": "gru"}),
    (VRNN, {"residual": True, "prior_layers": (4,), "posterior_layers": (4,), "memory": "rnn"}),
    (VRNN, {"dropout": 0.4, "memory": "relu_rnn", "posterior_layers": (4,)}),
    (SRNN, {"residual": True, "control_dim": 2, "scale": "softplus"}),
    (SRNN, {"residual": False, "posterior_layers": ()}),
    (DKF, {"inference": "ST-LR", "aug": True, "q_scale": "softplus_variance"}),
    (DKF, {"inference": "ST-R", "z_layers": (), "first": "learned"}),
    (RVAE, {"memory_layers": 2, "posterior_layers": (4,)}),
    *((SRNN, {"activation": name}) for name in sorted(ACTIVATIONS)),
]


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_played_is_run(kind: type, options: dict[str, object], particles: int, emulated: Recordings) -> None:
    """Values and gradients, of other weights, noise and data than were recorded."""
    model = build(kind, **options).train()
    control = model.control_dim
    for turn in range(3):
        data = batch(control=control, seed=turn)
        with recorded(False):
            expected = loss(model, data, turn, particles)
            d_expected = grads(model, expected)
        value = loss(model, data, turn, particles)
        same((value, *grads(model, value)), (expected, *d_expected))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    assert (Graph.recorded, len(emulated.held)) == (2, 1)  # forward and backward, at the second turn


def test_results_stay_when_the_memory_is_used_again(emulated: Recordings) -> None:
    model, data = build(VRNN), batch()
    with torch.no_grad():
        loss(model, data, 0)
        first = scan(model, data, generator=torch.Generator().manual_seed(0))
        kept = first.z.clone(), first.log_prior.clone()
        scan(model, data, generator=torch.Generator().manual_seed(1))
    assert Graph.recorded == 1 and Graph.played > 2
    same((first.z, first.log_prior), kept)


def test_several_forwards_before_the_first_backward(emulated: Recordings) -> None:
    """Each has memory of its own; beyond `each` they run step by step."""
    emulated.each = 2
    model, data = build(DKF), batch()
    grads(model, loss(model, data, 0))
    values = [loss(model, data, seed) for seed in range(4)]
    assert [len(several) for several in emulated.held.values()] == [2]
    for seed, value in reversed(list(enumerate(values))):
        with recorded(False):
            expected = grads(model, loss(model, data, seed))
        same(grads(model, value), expected)
    grads(model, loss(model, data, 0))
    assert [len(several) for several in emulated.held.values()] == [2]


def test_a_result_that_is_dropped_gives_its_memory_back(emulated: Recordings) -> None:
    model, data = build(SRNN), batch()
    for seed in range(6):
        value = loss(model, data, seed)
        del value
    assert [len(several) for several in emulated.held.values()] == [1]


def test_backward_twice(emulated: Recordings) -> None:
    model, data = build(VRNN), batch()
    loss(model, data, 0)
    value = loss(model, data, 0)
    first = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    same(torch.autograd.grad(value, list(model.parameters()), retain_graph=True), first)
    grads(model, loss(model, data, 1))
    with pytest.raises(RuntimeError, match="memory has been used again since: for retain_graph=True take"):
        torch.autograd.grad(value, list(model.parameters()))


def test_gradients_of_some_outputs(emulated: Recordings) -> None:
    """Each set of outputs that a loss reads has a backward of its own."""
    model, data = build(VRNN), batch()
    noise = draw(model, data.steps, 1, len(data), generator=torch.Generator().manual_seed(0))
    reads = (lambda run: run.z.sum(), lambda run: run.q.scale.sum(), lambda run: objectives.elbo(run).sum())
    loss(model, data, 0)
    for _ in range(2):
        for read in reads:
            ours = grads(model, read(scan(model, data, noise=noise)))
            with recorded(False):
                same(ours, grads(model, read(scan(model, data, noise=noise))))
    assert Graph.recorded == 1 + len(reads)


def test_truncated_chunks(emulated: Recordings) -> None:
    """An undetached state: two recordings in one backward."""
    model = build(VRNN, memory_layers=2)
    whole = Sequences.from_arrays(torch.randn(3, 8, 3)).to(dtype=torch.float64)
    noise = draw(model, 8, 2, 3, generator=torch.Generator().manual_seed(3))

    def run() -> tuple[Tensor, ...]:
        state, value = None, torch.zeros((), dtype=torch.float64)
        for part in (slice(0, 4), slice(4, 8)):
            piece = Sequences.from_arrays(whole.x[:, part]).to(dtype=torch.float64)
            out = scan(
                model, piece, particles=2, noise=noise._replace(z=noise.z[part]), state=state, carry=True
            )
            state, value = out.state, value + objectives.elbo(out).sum()
        return grads(model, value)

    with recorded(False):
        expected = run()
    for _ in range(3):
        same(run(), expected)
    assert Graph.recorded >= 2


def test_inference_mode_and_back(emulated: Recordings) -> None:
    model, data = build(RVAE), batch()
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        for seed in range(2):
            with mode():
                value = loss(model, data, seed)
                with recorded(False):
                    same((value,), (loss(model, data, seed),))
    value = loss(model, data, 0)
    with recorded(False):
        same(grads(model, value), grads(model, loss(model, data, 0)))


def test_a_size_is_recorded_when_it_comes_again(emulated: Recordings) -> None:
    model = build(VRNN)
    for steps in (3, 4, 5, 3, 4):
        loss(model, batch(T=steps), 0)
    assert [len(several) for several in emulated.held.values()] == [1, 1]


def test_recordings_are_few(emulated: Recordings) -> None:
    """A new one takes the place of one that has long been idle, and of no other."""
    emulated.most, emulated.idle = 2, 8
    model = build(VRNN)
    for steps in (3, 4, 5):
        for _ in range(2):
            loss(model, batch(T=steps), 0)
    assert Graph.recorded == 2
    for _ in range(8):
        loss(model, batch(T=4), 0)
    for _ in range(2):
        loss(model, batch(T=5), 0)
    assert Graph.recorded == 3 and sum(map(len, emulated.held.values())) == 2
    emulated.clear()
    assert not emulated.held


class Refusing(Graph):
    def record(self, run: object) -> object:
        raise RuntimeError("operation not permitted\nand a long explanation")


class Wrong(Graph):
    def play(self) -> None:
        super().play()
        for call in reversed(self.calls):
            for a in call.out:
                if a.is_floating_point():
                    a.add_(1.0)


class WrongBackward(Graph):
    def record(self, run: object) -> object:
        if Graph.recorded:
            raise RuntimeError("out of memory")
        return super().record(run)


@pytest.mark.parametrize(
    ("graph", "said"),
    [
        (Refusing, r"a loop over time was not recorded \(RuntimeError: operation not permitted\)"),
        (Wrong, r"a loop over time was not recorded \(Differs: played again, it gave other numbers\)"),
        (
            WrongBackward,
            r"its backward was not recorded \(RuntimeError: out of memory\); it runs step by step",
        ),
    ],
)
def test_what_cannot_be_recorded_runs_as_before(graph: type, said: str, emulated: Recordings) -> None:
    emulated.graph = graph
    model, data = build(SRNN), batch()
    with recorded(False):
        expected = grads(model, loss(model, data, 0))
    same(grads(model, loss(model, data, 0)), expected)
    with pytest.warns(UserWarning, match=said):
        same(grads(model, loss(model, data, 0)), expected)
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        for _ in range(3):
            same(grads(model, loss(model, data, 0)), expected)


def test_after_a_refusal_of_the_driver_nothing_more_is_recorded(emulated: Recordings) -> None:
    """What was recorded before still plays."""
    model = build(VRNN)
    for _ in range(2):
        grads(model, loss(model, batch(T=3), 0))
    emulated.graph = Refusing
    with pytest.warns(UserWarning, match="Nothing more is recorded in this process"):
        for _ in range(2):
            loss(model, batch(T=4), 0)
    emulated.graph = Graph
    played = Graph.played
    for steps in (3, 4, 5):
        for _ in range(3):
            loss(model, batch(T=steps), 0)
    assert len(emulated.held) == 1 and Graph.played == played + 3


def test_a_second_one_that_fails_leaves_the_first(emulated: Recordings) -> None:
    model, data = build(VRNN), batch()
    loss(model, data, 0)
    first = loss(model, data, 0)
    emulated.graph = Wrong
    with pytest.warns(UserWarning, match="gave other numbers"):
        second = loss(model, data, 1)
    emulated.graph = Graph
    for value, seed in ((second, 1), (first, 0)):
        with recorded(False):
            expected = grads(model, loss(model, data, seed))
        same(grads(model, value), expected)
    played = Graph.played
    loss(model, data, 2)
    assert Graph.played == played + 1 and [len(several) for several in emulated.held.values()] == [1]


def test_the_backward_stays_in_the_precision_of_the_model(emulated: Recordings) -> None:
    """Whatever autocast surrounds it, also when it is recorded there and played elsewhere."""
    model, data = build(VRNN).float(), batch().to(dtype=torch.float32)
    with recorded(False):
        expected = grads(model, loss(model, data, 0))
    loss(model, data, 0)
    for on in (True, False, True):
        value = loss(model, data, 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            ours = grads(model, value)
        error = max(
            float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
            for a, b in zip(ours, expected, strict=True)
        )
        assert (
            error < 0.02 if on else error < 1e-5
        )  # the scoring, which is not of the recursion, is short under autocast


def test_no_recording_while_anomalies_are_sought(emulated: Recordings) -> None:
    model, data = build(VRNN), batch()
    loss(model, data, 0)
    value = loss(model, data, 0)
    with torch.autograd.set_detect_anomaly(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        found = grads(model, value)
        same(grads(model, loss(model, data, 0)), found)
    with recorded(False):
        same(found, grads(model, loss(model, data, 0)))
    assert Graph.recorded == 1


class Power(nn.Module):
    """An activation that does not say what it is."""

    def __init__(self, exponent: float = 1.0) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, a: Tensor) -> Tensor:
        return a.sigmoid() ** self.exponent


def test_activations_that_look_alike(emulated: Recordings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ACTIVATIONS, "power", Power)
    monkeypatch.setitem(ACTIVATIONS, "prelu", nn.PReLU)
    data = batch()
    for exponent in (1.0, 3.0):
        model = build(DKF, activation="power", inference="ST-R")
        for module in model.modules():
            if isinstance(module, Power):
                module.exponent = exponent
        for seed in range(3):
            with recorded(False):
                expected = loss(model, data, seed)
            same((loss(model, data, seed),), (expected,))
    learned = build(VRNN, activation="prelu", posterior_layers=(4,))
    slopes = [m.weight for m in learned.modules() if isinstance(m, nn.PReLU)]
    found = torch.autograd.grad(loss(learned, data, 0), slopes)  # by the plain loop
    assert all(bool(g.abs().sum() > 0) for g in found)


def test_training_is_the_same_and_ends_with_no_memory_held(emulated: Recordings) -> None:
    """fit, with pieces of one length, several of them per epoch."""
    x = torch.randn(12, 10, 3, generator=torch.Generator().manual_seed(0))
    losses = []
    for on in (True, False):
        torch.manual_seed(0)
        model = VRNN(x_dim=3, z_dim=2, h_dim=5, dropout=0.1)
        with recorded(on):
            result = dynavae.fit(model, x, epochs=3, batch_size=4, crop=5, progress=False)
        losses.append([row["train/loss"] for row in result.history])
    assert Graph.recorded and not emulated.held
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_options() -> None:
    model, data = build(VRNN), batch()
    with pytest.raises(ValueError, match="compile should be True, False, 'terms' or 'recursion'; got 'all'"):
        scan(model, data, compile="all")
    with pytest.raises(ValueError, match=r"compile='recursion' makes a CUDA graph .* sequences are on cpu"):
        scan(model, data, compile="recursion")
    with pytest.raises(
        RuntimeError, match=r"for second derivatives take the plain loop, scan\(..., fast=False\)"
    ):
        torch.autograd.grad(loss(model, data, 0), list(model.parameters()), create_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_a_gpu_plays_what_it_runs(kind: type, options: dict[str, object], particles: int) -> None:
    recording.recordings.clear()
    model = build(kind, **options).cuda().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for turn in range(4):
            data = batch(control=model.control_dim, seed=turn).to("cuda")
            expected = loss(model, data, turn, particles)
            d_expected = grads(model, expected)
            with recorded():
                value = loss(model, data, turn, particles)
            ours = (value, *grads(model, value))
            torch.testing.assert_close(ours, (expected, *d_expected), rtol=1e-9, atol=1e-9)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    assert sum(map(len, recording.recordings.held.values())) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["recursion", "True"])
def test_training_on_a_gpu(compile: str) -> None:
    script = Path(__file__).parent / "scripts" / "gpu_training.py"
    run = subprocess.run([sys.executable, script, compile], capture_output=True, text=True, check=False)
    assert run.stdout == "equal\n", run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["SRNN", "RVAE"])
def test_gradients_in_evaluation_mode_on_a_gpu(kind: str) -> None:
    """cuDNN has a backward in training mode only."""
    model = build(dynavae.MODELS[kind]).to("cuda").eval()
    value = loss(model, batch().to("cuda"), 0, 1)
    assert all(bool(d.isfinite().all()) for d in grads(model, value))


def test_the_driver_s_refusal_leaves_everything_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's calls in order, and a driver that refuses when the capture ends, as it does after a mistake within."""
    events: list[str] = []

    class Stream:
        def __init__(self, *_: object) -> None:
            self.name = "side" if _ else "user"

    class On:
        def __init__(self, stream: Stream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            events.append(f"enter {self.stream.name}")

        def __exit__(self, *_: object) -> None:
            events.append(f"leave {self.stream.name}")

    class Capture:
        def __init__(self, graph: object, pool: object, *, stream: Stream, capture_error_mode: str) -> None:
            inspect.signature(real).bind(graph, pool, stream=stream, capture_error_mode=capture_error_mode)

        def __enter__(self) -> None:
            events.append("capture")

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("capture was invalidated")

    real = torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", On)
    monkeypatch.setattr(cuda_graph, "_capturing", lambda device: Stream(device))
    monkeypatch.setattr(cuda_graph.CudaGraph, "failed", [])
    for name in ("clearCublasWorkspaces", "endAllocateToPool"):
        monkeypatch.setattr(torch._C, f"_cuda_{name}", lambda *_, n=name: events.append(n), raising=False)
    graph = cuda_graph.CudaGraph(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="capture was invalidated"):
        graph.record(lambda: [])
    assert events == [
        "enter user",
        "clearCublasWorkspaces",
        "capture",
        "endAllocateToPool",
        "clearCublasWorkspaces",
        "leave user",
    ]
    assert cuda_graph.CudaGraph.failed == [graph]
