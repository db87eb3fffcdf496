"""Loops over time as recordings: on a GPU, one launch of a CUDA graph in place of thousands of small ones.

What happens frame by frame, :class:`~dynavae.recursion.Recursion`, is many kernels of some microseconds, and a GPU waits
for Python to launch them. It depends on shapes, not on values, so it can be recorded once and played again: the same
kernels on the same memory, for other weights, noise and data, which are copied in; results are copied out. The backward
has a recording of its own.

Inside :func:`recorded`, and in `scan(..., compile=True)`, a size is recorded when it comes for the second time.
Each recording is compared, on other numbers, with what it recorded before it is used. One that differs is reported once,
and its size runs step by step as before; if the driver refuses one, nothing more is recorded.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from dynavae.cuda_graph import CudaGraph, Tensors
from dynavae.derivatives import differentiable_once


@runtime_checkable
class Job(Protocol):
    """A function of tensors with its backward, both without any choice by value."""

    def forward(self, *inputs: Any) -> Tensors:
        """Outputs; what `backward` needs is kept."""
        ...

    def backward(self, *grads: Any) -> Tensors:
        """Gradients of the inputs from those of the outputs; good for any number of calls."""
        ...


def differentiable(job: Callable[[Any], Job], kind: Any, keep: bool, *inputs: Tensor | None) -> Any:
    """What `job(kind).forward(*inputs)` gives, for autograd.

    Args:
        kind: all that the job does and that is not a tensor; jobs of one repr do the same.
        keep: a backward will come.
    """
    run: Any = None
    if _active.get():
        run = recordings.lend(job, kind, inputs)
    run = job(kind) if run is None else run
    outputs = _Run.apply(run, *inputs)
    if isinstance(run, Loan) and not keep:
        run.end()
    return outputs


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Job, *inputs: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        ctx.run, ctx.device = run, next(a.device.type for a in inputs if a is not None)
        # Aliases, since what is returned points to this context, which points to the buffers.
        return tuple(None if a is None else a.detach() for a in run.forward(*inputs))

    @staticmethod
    @differentiable_once(
        "take the plain loop, scan(..., fast=False), on a GPU within torch.backends.cudnn.flags(enabled=False)"
    )
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.autocast(ctx.device, enabled=False):  # as in the forward
            return None, *ctx.run.backward(*grads)


# --- who records --------------------------------------------------------------------------------------

_active: ContextVar[bool] = ContextVar("recorded", default=False)


@contextlib.contextmanager
def recorded(on: bool = True) -> Iterator[None]:
    """Loops over time within are recorded as CUDA graphs and played from them; on a CPU, and where a model has no
    :mod:`~dynavae.recursion`, they run as ever.

    A size is recorded when it comes for the second time. Results are copies, so that they stay when the recording is
    played again; gradients are those of the loop, except that `retain_graph=True` holds only until then.

    Example:
        >>> from dynavae import VRNN, Sequences, scan
        >>> model, batch = VRNN(x_dim=2, z_dim=3, h_dim=4), Sequences.from_arrays(torch.zeros(1, 5, 2))
        >>> with recorded():
        ...     scan(model, batch).z.shape
        torch.Size([5, 1, 1, 3])
    """
    token = _active.set(on)
    try:
        yield
    finally:
        _active.reset(token)


class Differs(RuntimeError):
    """A recording that does not repeat what was recorded."""


class Tape:
    """A function of some memory, recorded, and compared with itself on other numbers than it was recorded with."""

    TOLERANCE = 1e-3  # of the largest entry: sums in another order, through many steps

    def __init__(self, run: Callable[[], Tensors], memory: Tensors, graph: Any) -> None:
        self.graph = graph
        given = _copies(memory)
        others = [None if a is None else 0.9 * a for a in given]
        _fill(memory, others)
        expected = run()  # libraries load, and choose their algorithms
        _fill(memory, given)
        self.outputs = graph.record(run)
        _fill(memory, others)
        graph.play()
        for a, b in zip(self.outputs, expected, strict=True):
            if a is not None and b is not None and not _close(a, b, self.TOLERANCE):
                raise Differs("played again, it gave other numbers")
        _fill(memory, given)

    def play(self) -> list[Tensor | None]:
        self.graph.play()
        out = [None if a is None else torch.empty_like(a) for a in self.outputs]
        _fill(out, self.outputs)
        return out


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    finite = b[b.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True)


class Recording:
    """One job at one size, on memory of its own: for one use at a time, from forward to backward."""

    def __init__(self, job: Job, inputs: Tensors, graph: Callable[[torch.device], Any]) -> None:
        self.job, self.inputs = job, _copies(inputs)
        device = next(a.device for a in inputs if a is not None)
        self.graph = lambda: graph(device)
        self.tape = Tape(lambda: job.forward(*self.inputs), self.inputs, self.graph())
        self.backwards: dict[tuple[bool, ...], tuple[list[Tensor | None], Tape | None]] = {}
        self.busy, self.turn, self.used = False, 0, 0

    def forward(self, *inputs: Tensor | None) -> list[Tensor | None]:
        _fill(self.inputs, inputs)
        self.turn += 1
        return self.tape.play()

    def backward(self, *grads: Tensor | None) -> Tensors:
        which = tuple(a is not None for a in grads)
        if which not in self.backwards:
            if recordings.stopped or torch.is_anomaly_enabled():
                return self.job.backward(*grads)
            own = _copies(grads)
            with _apart():
                tape, refusal = attempt(lambda: Tape(lambda: self.job.backward(*own), own, self.graph()))
            self.backwards[which] = own, tape
            report("its backward", refusal)
        own, tape = self.backwards[which]
        if tape is None:
            return self.job.backward(*grads)
        _fill(own, grads)
        return tape.play()


class Loan:
    """A recording while it is in use: until its backward is done, or nobody can ask for it any more."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.ended = recording, False
        recording.busy = True

    def forward(self, *inputs: Tensor | None) -> Tensors:
        outputs = self.recording.forward(*inputs)
        self.turn = self.recording.turn
        return outputs

    def backward(self, *grads: Tensor | None) -> Tensors:
        if self.recording.turn != self.turn:
            raise RuntimeError(
                "a second backward pass through a recorded loop, whose memory has been used again since: for "
                "retain_graph=True take compile=False, or 'terms'."
            )
        out = self.recording.backward(*grads)
        self.end()
        return out

    def end(self) -> None:
        if not self.ended:
            self.ended = True
            self.recording.busy = False

    def __del__(self) -> None:
        self.end()


class Recordings:
    """All recordings of a process.

    Args:
        graph: what records.
        most: recordings that are held. A new one takes the place of one that was not asked for during the last `idle`
            calls; while there is none, other sizes run step by step.
        idle: see `most`.
        each: recordings of one size; more than one where several forwards come before the first backward.
    """

    def __init__(self, graph: Any = CudaGraph, most: int = 16, idle: int = 1000, each: int = 4) -> None:
        self.graph, self.most, self.idle, self.each = graph, most, idle, each
        self.lock = threading.RLock()
        self.stopped = False  # the driver has refused once
        self.clear()

    def clear(self) -> None:
        """Hand back the memory of all recordings; those in use end with their backward."""
        with self.lock:
            self.seen: set[Any] = set()
            self.enough: set[Any] = set()  # no more of this
            self.held: dict[Any, list[Recording]] = {}
            self.calls = 0

    def lend(self, job: Callable[[Any], Job], kind: Any, inputs: Tensors) -> Loan | None:
        """A recording of this job for inputs like these; None where it has to run step by step."""
        like = next(a for a in inputs if a is not None)
        if not self.graph.applies(like.device):
            return None
        shapes = tuple(None if a is None else tuple(a.shape) for a in inputs)
        key = job, repr(kind), shapes, like.dtype, like.device, self.graph.context(like.device)
        refusal = None
        with self.lock:
            self.calls += 1
            if key not in self.seen:
                self.seen.add(key)
                return None
            mine = self.held.get(key, [])
            found = next((r for r in mine if not r.busy), None)
            if found is None and len(mine) < self.each and self._room(key):
                with _apart():
                    found, refusal = attempt(lambda: Recording(job(kind), inputs, self.graph))
                if found is None:
                    self.enough.add(key)
                else:
                    self.held.setdefault(key, []).append(found)
            loan = None
            if found is not None:
                found.used = self.calls
                loan = Loan(found)
        report("a loop over time", refusal)
        return loan

    def _room(self, key: Any) -> bool:
        """Whether another recording may be made; the one that was idle longest goes for it."""
        if self.stopped or key in self.enough:
            return False
        used = [(r.used, i, key, r) for key, several in self.held.items() for i, r in enumerate(several)]
        if len(used) < self.most:
            return True
        last, _, key, oldest = min(used, key=lambda u: u[:2])
        if self.calls - last < self.idle:
            return False
        self.held[key].remove(oldest)
        if not self.held[key]:
            del self.held[key]
        return True


recordings = Recordings()
"""Those of this process."""


def attempt(make: Callable[[], Any]) -> tuple[Any, RuntimeError | None]:
    """What was made; or why not. After a refusal by the driver nothing more is recorded in this process."""
    try:
        return make(), None
    except Differs as error:
        return None, error
    except RuntimeError as error:
        recordings.stopped = True
        return None, error.with_traceback(None)  # which would hold the memory


def report(what: str, refusal: RuntimeError | None) -> None:
    if refusal is None:
        return
    reason = (str(refusal).strip() or "no reason given").splitlines()[0]
    more = "" if isinstance(refusal, Differs) else " Nothing more is recorded in this process."
    warnings.warn(
        f"{what} was not recorded ({type(refusal).__name__}: {reason}); it runs step by step, which gives the same "
        f"numbers.{more} compile='terms' leaves the recording out.",
        stacklevel=2,
    )


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Memory of recordings belongs to no graph of autograd, and may be written in every mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _copies(tensors: Tensors) -> list[Tensor | None]:
    return [None if a is None else a.detach().clone(memory_format=torch.contiguous_format) for a in tensors]


def _fill(own: Tensors, tensors: Tensors) -> None:
    """Copy, in one launch what lies alike in memory."""
    pairs = [(a, b) for a, b in zip(own, tensors, strict=True) if a is not None and b is not None]
    alike = [a.dtype == b.dtype and a.stride() == b.stride() and a.device == b.device for a, b in pairs]
    together = [pair for pair, same in zip(pairs, alike, strict=True) if same]
    if together:
        torch._foreach_copy_(*map(list, zip(*together, strict=True)))
    for (mine, given), same in zip(pairs, alike, strict=True):
        if not same:
            mine.copy_(given)
