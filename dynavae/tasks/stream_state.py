"""Where a stream is: snapshots of it, going back to one, and starting some sequences anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynavae import step, tree
from dynavae.model import SequentialLVM
from dynavae.scan import State


class StreamState(NamedTuple):
    """A snapshot of a stream: nothing in it is ever changed in place."""

    model: Any  # the engine's `State`, or an exact model's belief
    frames: Tensor  # (B,) frames since the start, or the last reset, of each sequence
    generator: Tensor  # state of the random numbers


class Stateful:
    """The part of a :class:`~dynavae.tasks.streaming.Stream` that keeps its state; nothing is changed in place."""

    model: SequentialLVM
    batch: int
    particles: int
    exact: bool
    gradients: bool
    dtype: torch.dtype
    device: torch.device
    _state: Any
    _frames: Tensor
    _generator: torch.Generator

    def reset(self, rows: int | Sequence[int] | Tensor | None = None) -> None:
        """Start some sequences anew; the others go on.

        Args:
            rows: row numbers (none, if there are none), or a mask (B,); default all.
        """
        if rows is not None and torch.as_tensor(rows).numel() == 0:
            return
        mask = torch.zeros(self.batch, dtype=torch.bool)  # on the CPU, where a wrong row is an error to catch
        try:
            mask[slice(None) if rows is None else torch.as_tensor(rows).cpu()] = True
        except IndexError:
            raise ValueError(f"rows should be among the {self.batch} of this stream; got {rows!r}.") from None
        mask = mask.to(self.device)
        fresh = self._start()
        self._frames = torch.where(mask, 0, self._frames)
        if self.exact:
            self._state = tree.where(mask, fresh, self._state)
            return
        old, fresh = self._complete(), self._complete(fresh)
        particles = mask.expand(self.particles, -1)
        self._state = State(
            tree.where(particles, fresh.h, old.h),
            tree.where(particles, fresh.m, old.m),
            tree.where(mask, fresh.c, old.c),
            tree.where(mask, fresh.g, old.g),
            None,
            tree.where(particles, fresh.log_w, old.log_w),
            old.drawn,
        )

    @property
    def state(self) -> StreamState:
        """Where the stream is; assign it to go back there, or to continue on another stream of the same sizes."""
        current = self._state if self.exact else self._complete()
        return StreamState(current, self._frames, self._generator.get_state())

    @state.setter
    def state(self, state: StreamState) -> None:
        have = [tuple(a.shape) for a in tree.leaves(self.state[:2])]
        got = [tuple(a.shape) for a in tree.leaves(state[:2])]
        if have != got:
            raise ValueError(
                "this state comes from a stream of another model, batch or number of particles: its tensors have "
                f"shapes {got}, this stream's {have}."
            )
        self._state, self._frames = state.model, state.frames
        self._generator.set_state(state.generator)

    def state_dict(self) -> dict[str, Tensor]:
        """The state as named tensors, for `torch.save` or safetensors."""
        state = self.state
        named = {f"state.{i}": a for i, a in enumerate(tree.leaves(state.model))}
        named |= {"frames": state.frames, "generator": state.generator}
        if not self.exact:
            named["drawn"] = torch.tensor(state.model.drawn)
        return {name: a.detach().clone(memory_format=torch.contiguous_format) for name, a in named.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Go to where `state_dict` was taken."""
        current = self.state
        missing = {f"state.{i}" for i in range(len(tree.leaves(current.model)))} | {"frames", "generator"}
        if missing - set(tensors):
            raise ValueError(
                f"this is no state of this stream: it lacks {', '.join(sorted(missing - set(tensors)))}."
            )
        found = iter(range(len(tensors)))
        place = tensors["frames"].to(self.device)
        new = tree.tree_map(
            lambda _: tensors[f"state.{next(found)}"].to(self.device, self.dtype), current.model
        )
        if not self.exact:
            new = new._replace(drawn=bool(tensors["drawn"]))
        self.state = StreamState(new, place, tensors["generator"].cpu())

    def detach(self) -> None:
        """Cut the state from the graph, with `gradients=True`."""
        self._state = tree.detach(self._state)

    def _start(self) -> Any:
        with torch.set_grad_enabled(self.gradients):
            if self.exact:
                return self.model.exact_start(self.batch)
            return step.start(self.model, self.particles, self.batch)

    def _complete(self, state: State | None = None) -> State:
        """The state as `scan` has it: the memory of x has a particle axis even before anything was drawn."""
        state = self._state if state is None else state
        if state.drawn:
            return state
        return state._replace(m=step.per_particle(state.c, self.particles))
