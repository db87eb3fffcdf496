"""Recurrent cells on buffers that hold all frames, each with its backward written by hand.

They run as the other layers of :mod:`dynavae.nn.through_time` do. A cell also has a state before the first step,
and leaves dL/dh_{t-1} behind at each step of the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dynavae.nn.through_time import Affine, Size, TanhInto, by_sigmoid, by_tanh

Outer = Sequence[Sequence[Tensor] | None]
"""dL/d states from outside the recursion, of each part of the state: its T frames, or None."""


class Cell:
    """A recurrent cell: reads x_t and its own state, (h,) or (h, c).

    Args:
        w_x: weight of the input.
        before: all biases, or (T, B, .) with what else the gates read.
        w_h, b_h: weight of the state; the bias of its product, where it has one of its own (GRU).
        start: state before the first step, tensors (N, h_dim).
    """

    parts: ClassVar = 1  # tensors of a state
    d_h: Tensor | None  # dL/dh_{t-1} through the recurrence

    def __init__(
        self,
        size: Size,
        w_x: Tensor,
        before: Tensor,
        w_h: Tensor,
        b_h: Tensor | None,
        start: Sequence[Tensor],
    ) -> None:
        self.size, self.start, self.h_dim, self.tanh = size, start, w_h.shape[1], TanhInto(w_h)
        self.allocate(w_x, before, w_h, b_h)

    def allocate(self, w_x: Tensor, before: Tensor, w_h: Tensor, b_h: Tensor | None) -> None:
        """Weights and buffers as the cell needs them, among them its outputs `h` (T, N, h_dim)."""
        self.input = Affine(self.size, w_x, before)
        self.w_h, self.w_h_t = w_h, w_h.t()
        self.h, self.hs = self.size.buffer(w_h, self.h_dim, keep=True)
        self.before_h = [self.start[0], *self.hs]

    @property
    def states(self) -> list[Tensor]:
        return [self.h]

    def forward(self, t: int, x: Tensor) -> Tensor:
        """h_t, given x_t and h_{t-1}."""
        raise NotImplementedError

    def prepare(self, outer: Outer) -> None:
        """Derivatives for all t."""
        raise NotImplementedError

    def backward(self, t: int, d_h: Tensor) -> Tensor:
        """dL/dx_t from all of dL/dh_t; leaves dL/dh_{t-1} in `d_h`. Both are good until the next step."""
        raise NotImplementedError

    def gradients(self, x: Tensor) -> list[Tensor | None]:
        """Of w_x, before, w_h and b_h."""
        raise NotImplementedError

    def d_start(self, d_h: Tensor) -> list[Tensor]:
        return [d_h]

    def shifted(self) -> Tensor:
        """h_{t-1} for all t."""
        return torch.cat([self.start[0].unsqueeze(0), self.h[:-1]])


class LSTM(Cell):
    """i, f, o = sigmoid, g = tanh of the gates; c = f c + i g; h = o tanh(c).

    A step is one product of [x_t, h_{t-1}] with one block of weights per gate. Gate after gate, (T, 4, N, h_dim), two
    threads share it better than as one matrix, and each gate is a contiguous block to all that follows. One sigmoid does
    for the four of them, since tanh(a) = 2 sigmoid(2 a) - 1 and the weights of g are doubled.
    """

    parts: ClassVar = 2

    def allocate(self, w_x: Tensor, before: Tensor, w_h: Tensor, b_h: Tensor | None) -> None:
        (T, K, B, keep), h = self.size, self.h_dim
        self.widths = [w_x.shape[1], h]
        by_gate = w_h.new_ones(4, 1, 1)
        by_gate[2].fill_(2.0)
        self.bias, self.weight = before, torch.cat([w_x, w_h], 1)
        self.blocks = (self.weight.view(4, h, -1) * by_gate).transpose(1, 2)
        terms = before.view(1, 1, -1) if before.ndim == 1 else before  # (T or 1, B or 1, 4 h)
        terms = terms.unflatten(-1, (4, h)).transpose(1, 2)
        self.gate = w_h.new_empty(T if keep else 1, 4, self.size.N, h)
        self.gates = self.size.frames(self.gate)
        # Known for all t and one particle: one multiplication for all t.
        self.at_once = keep and K == 1 and terms.shape[0] == T and terms.shape[2] == B
        if self.at_once:
            torch.mul(terms, by_gate, out=self.gate)
        else:
            self.by_particle = self.size.frames(self.gate.unflatten(2, (K, B)))
            self.terms = self.size.frames(terms.unsqueeze(2).expand(-1, -1, K, B, -1))
            self.by_gate = by_gate.unsqueeze(1)
        self.cuts = list(zip(*(self.size.frames(gate) for gate in self.gate.unbind(1)), strict=True))
        self.tanh_c, self.tanh_cs = self.size.buffer(w_h, h)

        self.joined = w_h.new_empty(T + 1, self.size.N, sum(self.widths))  # x_t and h_{t-1}
        x, self.all_h = self.joined.split(self.widths, -1)
        self.all_c = w_h.new_empty(T + 1, self.size.N, h)
        self.all_h[0], self.all_c[0] = self.start[0], self.start[1]
        self.xs, self.hs, self.cs = x.unbind(), self.all_h.unbind(), self.all_c.unbind()
        self.read = self.joined.unsqueeze(1).expand(-1, 4, -1, -1).unbind()
        self.h = self.all_h[1:]

    @property
    def states(self) -> list[Tensor]:
        return [self.h, self.all_c[1:]]

    def shifted(self) -> Tensor:
        return self.all_h[:-1]

    def forward(self, t: int, x: Tensor) -> Tensor:
        self.xs[t].copy_(x)
        if not self.at_once:
            torch.mul(self.terms[t], self.by_gate, out=self.by_particle[t])
        self.gates[t].baddbmm_(self.read[t], self.blocks).sigmoid_()
        i, f, g, o = self.cuts[t]
        self.tanh.of_sigmoid(g)
        c = torch.mul(f, self.cs[t], out=self.cs[t + 1]).addcmul_(i, g)
        return torch.mul(o, self.tanh(c, out=self.tanh_cs[t]), out=self.hs[t + 1])

    def prepare(self, outer: Outer) -> None:
        i, f, g, o = self.gate.unbind(1)
        slope = torch.empty_like(self.gate)  # of i, f, g with respect to c, of o with respect to h
        by_i, by_f, by_g, by_o = slope.unbind(1)
        by_sigmoid(i, g, out=by_i)
        by_sigmoid(f, self.all_c[:-1], out=by_f)
        by_tanh(g, i, out=by_g)
        by_sigmoid(o, self.tanh_c, out=by_o)
        self.by_c, self.by_o = slope[:, :3].unbind(), by_o.unbind()
        self.c_by_h = by_tanh(self.tanh_c, o).unbind()
        self.forget = f.unbind()
        self.g = self.gate.new_empty(self.size.T, self.size.N, 4 * self.h_dim)
        self.gs = self.g.unbind()
        by_gate = self.g.unflatten(-1, (4, self.h_dim)).transpose(1, 2)
        self.g_c, self.g_o = by_gate[:, :3].unbind(), by_gate[:, 3].unbind()
        self.outer_c = outer[1]
        self.d_c = torch.zeros_like(self.all_c[0])
        self.d_joined, self.d_h = torch.empty_like(self.joined[0]), None
        self.d_parts = self.d_joined.split(self.widths, -1)

    def backward(self, t: int, d_h: Tensor) -> Tensor:
        d_c = self.d_c if self.outer_c is None else self.d_c.add_(self.outer_c[t])
        d_c.addcmul_(d_h, self.c_by_h[t])
        torch.mul(d_c, self.by_c[t], out=self.g_c[t])
        torch.mul(d_h, self.by_o[t], out=self.g_o[t])
        d_c.mul_(self.forget[t])
        torch.mm(self.gs[t], self.weight, out=self.d_joined)
        d_x, self.d_h = self.d_parts
        return d_x

    def gradients(self, x: Tensor) -> list[Tensor | None]:
        d_weight = self.g.flatten(0, 1).t() @ self.joined[:-1].flatten(0, 1)
        d_w_x, d_w_h = d_weight.split(self.widths, 1)
        return [d_w_x, self.size.of_bias(self.g, self.bias), d_w_h, None]

    def d_start(self, d_h: Tensor) -> list[Tensor]:
        return [d_h.clone(), self.d_c.clone()]


class GRU(Cell):
    """r, z = sigmoid of the gates; n = tanh(W_n x + r (U_n h + b_n)); h = (1 - z) n + z h."""

    def allocate(self, w_x: Tensor, before: Tensor, w_h: Tensor, b_h: Tensor | None) -> None:
        super().allocate(w_x, before, w_h, b_h)
        assert b_h is not None
        h = self.h_dim
        self.recurrent = Affine(self.size, w_h, b_h)
        self.gate, self.gates = self.size.buffer(w_h, 3 * h)  # pre-activations, then gates
        self.by_state, self.by_states = self.size.buffer(w_h, 3 * h)
        self.cuts = [g.split([2 * h, h], -1) for g in self.gates]
        self.state_cuts = [g.split([2 * h, h], -1) for g in self.by_states]
        self.r_z = [c[0].split(h, -1) for c in self.cuts]

    def forward(self, t: int, x: Tensor) -> Tensor:
        before = self.before_h[t]
        self.recurrent.into(self.by_states[t], t, before)
        self.input.into(self.gates[t], t, x)
        (r_and_z, n), (state_r_z, state_n) = self.cuts[t], self.state_cuts[t]
        r_and_z.add_(state_r_z).sigmoid_()
        r, z = self.r_z[t]
        self.tanh(n.addcmul_(r, state_n), out=n)
        return torch.lerp(n, before, z, out=self.hs[t])

    def prepare(self, outer: Outer) -> None:
        h = self.h_dim
        r, z, n = self.gate.split(h, -1)
        state_n = self.by_state[..., 2 * h :]
        slope = torch.empty(*self.gate.shape[:-1], 4 * h, dtype=r.dtype, device=r.device)
        by_n, by_r, by_z, by_u = slope.split(h, -1)  # pre-activations n, r, z, and U_n h + b_n
        by_tanh(n, 1 - z, out=by_n)
        torch.mul(by_n, r, out=by_u)
        by_sigmoid(r, by_n * state_n, out=by_r)
        by_sigmoid(z, self.shifted() - n, out=by_z)
        self.slopes = slope.unflatten(-1, (4, h)).unbind()
        self.stays = z.unbind()
        self.g = torch.empty_like(slope)
        self.gs = self.g.unflatten(-1, (4, h)).unbind()
        self.g_x = self.g[..., : 3 * h].unbind()
        self.g_h = self.g[..., h:].unbind()
        self.d_h = None
        w_r, w_z, w_n = self.input.weight.split(h)
        self.w_x = torch.cat([w_n, w_r, w_z])

    def backward(self, t: int, d_h: Tensor) -> Tensor:
        torch.mul(d_h.unsqueeze(1), self.slopes[t], out=self.gs[t])
        self.d_h = torch.addmm(d_h * self.stays[t], self.g_h[t], self.w_h)
        return torch.mm(self.g_x[t], self.w_x)

    def gradients(self, x: Tensor) -> list[Tensor | None]:
        h = self.h_dim
        by_x = torch.cat([self.g[..., h : 3 * h], self.g[..., :h]], -1)
        by_h = self.g[..., h:].contiguous()
        return [*self.input.gradients(by_x, x), *self.recurrent.gradients(by_h, self.shifted())]


class RNN(Cell):
    """h = tanh(W x + U h)."""

    def act(self, a: Tensor) -> Tensor:
        return self.tanh(a, out=a)

    def forward(self, t: int, x: Tensor) -> Tensor:
        return self.act(self.input.into(self.hs[t], t, x).addmm_(self.before_h[t], self.w_h_t))

    def slope(self) -> Tensor:
        return torch.addcmul(self.h.new_ones(()), self.h, self.h, value=-1)

    def prepare(self, outer: Outer) -> None:
        self.slopes = self.slope().unbind()
        self.g = torch.empty_like(self.h)
        self.gs = self.g.unbind()
        self.d_h = None

    def backward(self, t: int, d_h: Tensor) -> Tensor:
        g = torch.mul(d_h, self.slopes[t], out=self.gs[t])
        self.d_h = torch.mm(g, self.w_h)
        return torch.mm(g, self.input.weight)

    def gradients(self, x: Tensor) -> list[Tensor | None]:
        d_w_h = self.g.flatten(0, 1).t() @ self.shifted().flatten(0, 1)
        return [*self.input.gradients(self.g, x), d_w_h, None]


class ReLURNN(RNN):
    """h = relu(W x + U h)."""

    def act(self, a: Tensor) -> Tensor:
        return a.relu_()

    def slope(self) -> Tensor:
        return (self.h > 0).to(self.h)


CELLS: dict[str, type[Cell]] = {"lstm": LSTM, "gru": GRU, "rnn": RNN, "relu_rnn": ReLURNN}
