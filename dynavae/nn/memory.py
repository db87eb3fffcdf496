"""Memories: recurrent networks with one set of weights and two ways to run them.

A memory folds inputs into a state, m_{t+1} = f(m_t, u_t). `run` does it for a whole sequence in one
fused call; `step` does one step. The two agree: that is a law.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from dynavae import tree

State = tuple[tuple[Tensor, ...], ...]
"""One tuple of tensors (..., h_dim) per layer: (h,) or, for an LSTM, (h, c)."""


class Empty(nn.Module):
    """Remembers nothing: for a model whose generative part needs no summary of x alone."""

    out_dim = 0

    def initial(self, lead: tuple[int, ...] | torch.Size) -> tuple[()]:
        return ()

    def step(self, m: tuple[()], u: Tensor | None) -> tuple[()]:
        return ()

    def read(self, m: tuple[()]) -> None:
        return None

    def run(
        self, u: Any, m: Any = (), valid: Tensor | None = None, fused: bool = True
    ) -> tuple[None, tuple[()]]:
        return None, ()

    def before(
        self, u: Any, m: Any = (), valid: Tensor | None = None, fused: bool = True
    ) -> tuple[None, tuple[()]]:
        return None, ()


class Memory(nn.Module):
    """A GRU, LSTM or simple recurrent network, stacked if wanted.

    Args:
        in_dim: features of the input u_t.
        h_dim: units of each layer.
        cell: "gru", "lstm", "rnn" (tanh) or "relu_rnn".
        layers: number of stacked layers.
        dropout: rate between stacked layers, in training.
        learned_initial: learn the first state instead of zeros.
        orthogonal: orthogonal initial recurrent weights.

    Shapes: time leads; u (T, ..., in_dim), outputs (T, ..., h_dim).

    Example:
        >>> memory = Memory(3, 5, cell="lstm")
        >>> u = torch.randn(7, 2, 3)
        >>> after, state = memory.run(u)
        >>> before, _ = memory.before(u)
        >>> torch.equal(before[1:], after[:-1]), bool((before[0] == 0).all())
        (True, True)
    """

    def __init__(
        self,
        in_dim: int,
        h_dim: int,
        cell: str = "gru",
        layers: int = 1,
        dropout: float = 0.0,
        learned_initial: bool = False,
        orthogonal: bool = False,
    ) -> None:
        super().__init__()
        kinds = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN, "relu_rnn": nn.RNN}
        if cell not in kinds:
            raise ValueError(f"unknown cell {cell!r} of a memory; choose one of {', '.join(kinds)}.")
        if layers < 1:
            raise ValueError(f"a memory needs at least one layer; got layers={layers}.")
        options: dict[str, Any] = {"nonlinearity": "relu"} if cell == "relu_rnn" else {}
        self.rnn = kinds[cell](in_dim, h_dim, layers, dropout=dropout if layers > 1 else 0.0, **options)
        self.cell, self.layers, self.in_dim, self.out_dim = cell, layers, in_dim, h_dim
        self.dropout = dropout if layers > 1 else 0.0
        self.parts = 2 if cell == "lstm" else 1
        if orthogonal:
            for layer in range(layers):
                for block in getattr(self.rnn, f"weight_hh_l{layer}").data.split(h_dim):
                    nn.init.orthogonal_(block)
        self.start = nn.Parameter(torch.zeros(layers, self.parts, h_dim)) if learned_initial else None

    def initial(self, lead: tuple[int, ...] | torch.Size) -> State:
        """The state before the first step, for leading axes `lead`."""
        if self.start is not None:
            return tuple(
                tuple(self.start[i, j].expand(*lead, -1) for j in range(self.parts))
                for i in range(self.layers)
            )
        zero = self.rnn.weight_hh_l0.new_zeros(*lead, self.out_dim)
        return ((zero,) * self.parts,) * self.layers

    def read(self, m: State) -> Tensor:
        """The output of a state: the top layer's h."""
        return m[-1][0]

    def step(self, m: State, u: Tensor) -> State:
        """m_t and u_t give m_{t+1}; leading axes broadcast."""
        lead = m[0][0].shape[:-1]
        if u.ndim - 1 != len(lead) or u.shape[:-1] != lead:
            lead = torch.broadcast_shapes(u.shape[:-1], lead)
            u = u.expand(*lead, u.shape[-1])
            m = tree.tree_map(lambda a: a.expand(*lead, a.shape[-1]), m)
        many = len(lead) != 1
        if many:
            u = u.reshape(-1, u.shape[-1])
            m = tree.tree_map(lambda a: a.reshape(-1, a.shape[-1]), m)
        out = []
        for i, state in enumerate(m):
            if i and self.dropout:
                u = nn.functional.dropout(u, self.dropout, self.training)
            weights = self.weights(i)
            if self.cell == "lstm":
                new = torch.lstm_cell(u, state, *weights)
            elif self.cell == "gru":
                new = (torch.gru_cell(u, state[0], *weights),)
            elif self.cell == "rnn":
                new = (torch.rnn_tanh_cell(u, state[0], *weights),)
            else:
                new = (torch.rnn_relu_cell(u, state[0], *weights),)
            out.append(tuple(new))
            u = new[0]
        stepped = tuple(out)
        return tree.tree_map(lambda a: a.reshape(*lead, a.shape[-1]), stepped) if many else stepped

    def weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r, i = self.rnn, layer
        return (
            getattr(r, f"weight_ih_l{i}"),
            getattr(r, f"weight_hh_l{i}"),
            getattr(r, f"bias_ih_l{i}"),
            getattr(r, f"bias_hh_l{i}"),
        )

    def run(
        self, u: Tensor, m: State | None = None, valid: Tensor | None = None, fused: bool = True
    ) -> tuple[Tensor, State]:
        """Outputs after each step, (T, ..., h_dim), and the last state.

        `valid` (T, B), if given, keeps the state of a sequence at its own last frame; this, and
        `fused=False`, run step by step.
        """
        if m is None:
            m = self.initial(u.shape[1:-1])
        if not fused or valid is not None:
            return self._fold(u, m, valid)
        flat = u.reshape(len(u), -1, u.shape[-1])
        lead = u.shape[1:-1]
        states = [
            torch.stack([layer[j].expand(*lead, -1).reshape(-1, self.out_dim) for layer in m])
            for j in range(self.parts)
        ]
        if flat.is_cuda:
            flat, *states = (a.to(self.rnn.weight_hh_l0.dtype) for a in (flat, *states))
        with self._in_full(flat):
            out, last = self.rnn(flat, tuple(states) if self.cell == "lstm" else states[0])
        last = last if self.cell == "lstm" else (last,)
        state = tuple(
            tuple(part[i].reshape(*lead, self.out_dim) for part in last) for i in range(self.layers)
        )
        return out.reshape(*u.shape[:-1], self.out_dim), state

    def _in_full(self, u: Tensor) -> contextlib.ExitStack:
        """On a GPU: autocast to bfloat16 would run cuDNN in float16, and cuDNN has no backward in evaluation mode."""
        stack = contextlib.ExitStack()
        if u.is_cuda:
            stack.enter_context(torch.autocast("cuda", enabled=False))
            if torch.is_grad_enabled() and not self.training:
                enabled, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
                stack.callback(setattr, torch.backends.cudnn, "enabled", enabled)
        return stack

    def _fold(self, u: Tensor, m: State, valid: Tensor | None) -> tuple[Tensor, State]:
        out = []
        keep = None if valid is None else valid.unbind()
        for t, u_t in enumerate(u.unbind()):
            new = self.step(m, u_t)
            out.append(self.read(new))
            m = new if keep is None else tree.where(keep[t], new, m)
        return torch.stack(out), m

    def before(
        self, u: Tensor, m: State | None = None, valid: Tensor | None = None, fused: bool = True
    ) -> tuple[Tensor, State]:
        """m_t = m(u_<t): the output known before step t, and the last state."""
        if m is None:
            m = self.initial(u.shape[1:-1])
        out, last = self.run(u, m, valid, fused)
        first = self.read(m).expand(1, *out.shape[1:]) if len(out) else out
        return torch.cat([first, out[:-1]]), last

    def backward(self, u: Tensor, lengths: Tensor) -> Tensor:
        """g_t = g(u_{t:T}), each sequence read from its own last frame to its first.

        Args:
            u: inputs (T, ..., B, in_dim).
            lengths: frames of each sequence (B,).
        """
        return reverse(self.run(reverse(u, lengths))[0], lengths)


def reverse(u: Tensor, lengths: Tensor) -> Tensor:
    """Reverse each sequence of (T, ..., B, d) within its own length; padding stays where it is."""
    steps = len(u)
    if lengths.device.type == "cpu" and bool((lengths == steps).all()):
        return u.flip(0)
    t = torch.arange(steps, device=u.device).unsqueeze(-1)
    index = torch.where(t < lengths, lengths - 1 - t, t)  # (T, B)
    index = index.reshape(steps, *[1] * (u.ndim - 3), -1, 1).expand_as(u)
    return torch.gather(u, 0, index)


class Bidirectional(nn.Module):
    """A forward and a backward memory side by side: g_t = [f(u_{1:t}), b(u_{t:T})]."""

    def __init__(
        self, in_dim: int, h_dim: int, cell: str = "gru", layers: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.forward_memory = Memory(in_dim, h_dim, cell, layers, dropout)
        self.backward_memory = Memory(in_dim, h_dim, cell, layers, dropout)
        self.out_dim = 2 * h_dim

    def forward(self, u: Tensor, lengths: Tensor) -> Tensor:
        return torch.cat([self.forward_memory.run(u)[0], self.backward_memory.backward(u, lengths)], -1)

    def ends(self, u: Tensor, lengths: Tensor) -> Tensor:
        """The last output of each direction, (..., B, 2 h_dim): a summary of the whole sequence."""
        both = self(u, lengths)
        ahead, back = both.chunk(2, -1)
        last = (lengths - 1).clamp(min=0).reshape(1, *[1] * (u.ndim - 3), -1, 1).expand(1, *ahead.shape[1:])
        return torch.cat([torch.gather(ahead, 0, last)[0], back[0]], -1)
