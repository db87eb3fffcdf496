"""Layers over time on buffers that hold all frames, each with its backward written by hand.

A layer runs `forward(t, .)` for t = 1..T, then `prepare()`, which takes every derivative for all t at once,
then `backward(t, .)` for t = T..1, which is one multiplication and one product, then `gradients(.)`: one
product per weight over all frames. They are the pieces of :mod:`dynavae.recursion`, which puts them into one
autograd function; nothing here is seen by autograd. N rows are K particles of B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Size(NamedTuple):
    """Steps, particles, sequences, and whether a backward will come."""

    T: int
    K: int
    B: int
    keep: bool

    def buffer(self, like: Tensor, width: int, keep: bool | None = None) -> tuple[Tensor, list[Tensor]]:
        """(T, N, width) and its frames; without a backward one frame is enough, and shared."""
        keep = self.keep if keep is None else keep
        whole = like.new_empty(self.T if keep else 1, self.K * self.B, width)
        return whole, list(whole.unbind()) if keep else [whole[0]] * self.T


class Affine:
    """W x_t + before_t: one product per step; `before` is a bias (out,) or (T, B, out)."""

    def __init__(self, size: Size, weight: Tensor, before: Tensor) -> None:
        self.size, self.weight, self.transposed, self.bias = size, weight, weight.t(), before
        self.steps = list(before.unbind()) if before.ndim == 3 else [before] * size.T
        self.one = size.K == 1 or before.ndim == 1

    def into(self, y: Tensor, t: int, x: Tensor) -> Tensor:
        if self.one:
            return torch.addmm(self.steps[t], x, self.transposed, out=y)
        torch.mm(x, self.transposed, out=y)
        y.view(self.size.K, self.size.B, -1).add_(self.steps[t])
        return y

    def gradients(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the weight and of `before`, from all dL/dy (T, N, out) and all x (T, N, in)."""
        d_weight = grad.flatten(0, 1).t() @ x.flatten(0, 1)
        return d_weight, grad.sum((0, 1)) if self.bias.ndim == 1 else self.over_particles(grad)

    def over_particles(self, grad: Tensor) -> Tensor:
        K, B = self.size.K, self.size.B
        return grad if K == 1 else grad.view(self.size.T, K, B, -1).sum(1)


MANY = 8192


def tanh(x: Tensor, out: Tensor) -> Tensor:
    """tanh into `out`; of many numbers on a CPU as 2 sigmoid(2 x) - 1, of which torch's own takes three times as long.

    That is off by a unit in the last place of 1, like any sum; not for use where tanh(x) / x matters.
    """
    if x.is_cpu and x.numel() > MANY:
        return torch.mul(x, 2, out=out).sigmoid_().mul_(2).sub_(1)
    return torch.tanh(x, out=out)


def by_tanh(y: Tensor, times: Tensor, out: Tensor | None = None) -> Tensor:
    """times * (1 - y^2), the derivative of y = tanh(x), in one pass."""
    if out is None:
        return torch.ops.aten.tanh_backward(times, y)  # type: ignore[no-any-return]
    return torch.ops.aten.tanh_backward.grad_input(times, y, grad_input=out)  # type: ignore[no-any-return]


def by_sigmoid(y: Tensor, times: Tensor, out: Tensor) -> Tensor:
    """times * y (1 - y), the derivative of y = sigmoid(x), in one pass."""
    return torch.ops.aten.sigmoid_backward.grad_input(times, y, grad_input=out)  # type: ignore[no-any-return]


def derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f'(x) of a function that acts on each number by itself."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]


class Dense:
    """y_t = share * mask_t * act(W x_t + before_t) + after_t.

    Args:
        dropout: rate of the mask.
        after: (T, B, out), or None.
        all_frames: hold y_1..y_T whatever comes, since someone else reads them.
    """

    def __init__(
        self,
        size: Size,
        weight: Tensor,
        before: Tensor,
        after: Tensor | None,
        act: nn.Module | None,
        dropout: float,
        share: float,
        all_frames: bool,
    ) -> None:
        width = len(weight)
        self.size, self.affine, self.act, self.share = size, Affine(size, weight, before), act, share
        keep = size.keep or all_frames
        self.factor = None
        if dropout:
            survives = torch.full((size.T, size.K * size.B, width), 1 - dropout).to(weight)
            self.factor = torch.bernoulli(survives) * (share / (1 - dropout))
        self.factors = None if self.factor is None else self.factor.unbind()
        self.after = None if after is None else after.unbind()
        # a = W x + before; b = act(a); y = factor * b + after. tanh and relu are known by their output.
        self.known = isinstance(act, nn.Tanh | nn.ReLU)
        self.scaled = self.factor is not None or share != 1 or after is not None
        self.b, self.bs = size.buffer(weight, width, keep)
        self.a, self.as_ = (self.b, self.bs) if self.known or act is None else size.buffer(weight, width)
        self.y, self.ys = size.buffer(weight, width, keep) if self.scaled else (self.b, self.bs)

    def forward(self, t: int, x: Tensor) -> Tensor:
        a, b, y = self.as_[t], self.bs[t], self.ys[t]
        self.affine.into(a, t, x)
        if isinstance(self.act, nn.Tanh):
            tanh(a, out=a)
        elif isinstance(self.act, nn.ReLU):
            a.relu_()
        elif self.act is not None:
            b.copy_(self.act(a))
        if self.scaled:
            torch.mul(b, self.share if self.factors is None else self.factors[t], out=y)
            if self.after is not None:
                y.view(self.size.K, self.size.B, -1).add_(self.after[t])
        return y

    def prepare(self, grad: Tensor | None = None) -> None:
        """Derivatives for all t. `grad`: where dL/dy of a linear layer will be found, if it is at hand."""
        if self.act is None:
            slope = None
        elif isinstance(self.act, nn.Tanh):
            slope = torch.addcmul(self.b.new_ones(()), self.b, self.b, value=-1)
        elif isinstance(self.act, nn.ReLU):
            slope = (self.b > 0).to(self.b)
        else:
            slope = derivative(self.act, self.a)
        if self.factor is not None or self.share != 1:
            factor = torch.full_like(self.b, self.share) if self.factor is None else self.factor
            slope = factor if slope is None else slope.mul_(factor)
        self.slopes = None if slope is None else slope.unbind()
        self.mine = slope is not None or grad is None
        self.g = torch.empty_like(self.b) if grad is None or self.mine else grad
        self.gs = self.g.unbind()
        self.g_y = torch.empty_like(self.b) if self.after is not None else None
        self.g_ys = None if self.g_y is None else self.g_y.unbind()

    def backward(self, t: int, grad: Tensor, plus: Tensor | None = None) -> Tensor:
        """dL/dx_t (+ plus) from dL/dy_t."""
        if self.g_ys is not None:
            self.g_ys[t].copy_(grad)
        g = self.gs[t]
        if self.slopes is not None:
            torch.mul(grad, self.slopes[t], out=g)
        elif self.mine:
            g.copy_(grad)
        weight = self.affine.weight
        return torch.mm(g, weight) if plus is None else torch.addmm(plus, g, weight)

    def gradients(self, x: Tensor) -> list[Tensor | None]:
        """Of weight, before and after."""
        d_after = None if self.g_y is None else self.affine.over_particles(self.g_y)
        return [*self.affine.gradients(self.g, x), d_after]


class Cell:
    """A recurrent cell: reads x_t and its own state, (h,) or (h, c).

    Args:
        w_x: weight of the input; None if `before` holds all that the cell reads.
        before: all biases, or (T, B, .) with what else the gates read.
        w_h, b_h: weight of the state; the bias of its product, where it has one of its own (GRU).
        start: state before the first step, tensors (N, h_dim).
    """

    def __init__(
        self,
        size: Size,
        w_x: Tensor | None,
        before: Tensor,
        w_h: Tensor,
        b_h: Tensor | None,
        start: Sequence[Tensor],
    ) -> None:
        self.size, self.h_dim, self.start = size, w_h.shape[1], start
        self.input = None if w_x is None else Affine(size, w_x, before)
        self.before = before.unbind() if w_x is None else None
        self.w_h, self.w_h_t, self.b_h = w_h, w_h.t(), b_h
        self.gate, self.gates = size.buffer(w_h, len(w_h))  # pre-activations, then gates
        self.h, self.hs = size.buffer(w_h, self.h_dim, keep=True)
        self.before_h = [start[0], *self.hs]
        self.d_h: Tensor | None = None  # dL/dh_{t-1} through the recurrence
        self.allocate()

    @property
    def states(self) -> list[Tensor]:
        return [self.h]

    def allocate(self) -> None:
        """What a cell needs beside the buffers of its gates and its output."""

    def read(self, t: int, x: Tensor | None) -> Tensor:
        """What the gates owe to the input; it may lie in their buffer."""
        if self.before is not None:
            return self.before[t]
        assert self.input is not None and x is not None
        return self.input.into(self.gates[t], t, x)

    def forward(self, t: int, x: Tensor | None) -> Tensor:
        """h_t, given x_t and h_{t-1}."""
        raise NotImplementedError

    def prepare(self, outer: Sequence[Sequence[Tensor] | None]) -> None:
        """Derivatives for all t; `outer`: dL/d states from outside the recursion."""
        raise NotImplementedError

    def backward(self, t: int, d_h: Tensor) -> Tensor | None:
        """dL/dx_t from all of dL/dh_t; leaves dL/dh_{t-1} in `d_h`."""
        raise NotImplementedError

    def gradients(self, x: Tensor | None) -> list[Tensor | None]:
        """Of w_x, before, w_h and b_h."""
        d_w_h = self.g.flatten(0, 1).t() @ self.shifted().flatten(0, 1)
        return [*self.of_input(self.g, x), d_w_h, None]

    def of_input(self, g: Tensor, x: Tensor | None) -> tuple[Tensor | None, Tensor]:
        if self.input is None:
            return None, g
        assert x is not None
        return self.input.gradients(g, x)

    def d_start(self, d_h: Tensor) -> list[Tensor]:
        return [d_h]

    def shifted(self) -> Tensor:
        return torch.cat([self.start[0].unsqueeze(0), self.h[:-1]])


class LSTM(Cell):
    """i, f, o = sigmoid, g = tanh of the gates; c = f c + i g; h = o tanh(c)."""

    def allocate(self) -> None:
        h = self.h_dim
        self.c, self.cs = self.size.buffer(self.w_h, h, keep=True)
        self.tanh_c, self.tanh_cs = self.size.buffer(self.w_h, h)
        self.before_c = [self.start[1], *self.cs]
        self.cuts = [g.split(h, -1) for g in self.gates]
        self.i_f = [g[:, : 2 * h] for g in self.gates]

    @property
    def states(self) -> list[Tensor]:
        return [self.h, self.c]

    def forward(self, t: int, x: Tensor | None) -> Tensor:
        torch.addmm(self.read(t, x), self.before_h[t], self.w_h_t, out=self.gates[t])
        i, f, g, o = self.cuts[t]
        if (
            g.is_cpu
        ):  # one sigmoid for all gates: tanh(x) = 2 sigmoid(2 x) - 1, and the tanh of a part of a row is slow
            g.mul_(2)
            self.gates[t].sigmoid_()
            g.mul_(2).sub_(1)
        else:
            self.i_f[t].sigmoid_()
            g.tanh_()
            o.sigmoid_()
        c = torch.mul(f, self.before_c[t], out=self.cs[t]).addcmul_(i, g)
        return torch.mul(o, tanh(c, out=self.tanh_cs[t]), out=self.hs[t])

    def prepare(self, outer: Sequence[Sequence[Tensor] | None]) -> None:
        h = self.h_dim
        i, f, g, o = self.gate.split(h, -1)
        before_c = torch.cat([self.start[1].unsqueeze(0), self.c[:-1]])
        slope = torch.empty_like(self.gate)  # of i, f, g with respect to c, of o with respect to h
        by_i, by_f, by_g, by_o = slope.split(h, -1)
        by_sigmoid(i, g, out=by_i)
        by_sigmoid(f, before_c, out=by_f)
        by_tanh(g, i, out=by_g)
        by_sigmoid(o, self.tanh_c, out=by_o)
        self.by_c = slope[..., : 3 * h].unflatten(-1, (3, h)).unbind()
        self.by_o = by_o.unbind()
        self.c_by_h = by_tanh(self.tanh_c, o).unbind()
        self.forget = f.unbind()
        self.g = torch.empty_like(self.gate)
        self.gs = self.g.unbind()
        self.g_c = self.g[..., : 3 * h].unflatten(-1, (3, h)).unbind()
        self.g_o = self.g[..., 3 * h :].unbind()
        self.outer_c, self.d_c, self.d_h = outer[1], None, None
        self.both = self.w_h if self.input is None else torch.cat([self.w_h, self.input.weight], 1)

    def backward(self, t: int, d_h: Tensor) -> Tensor | None:
        d_c = self.d_c
        if self.outer_c is not None:
            d_c = self.outer_c[t] if d_c is None else d_c + self.outer_c[t]
        by_h = self.c_by_h[t]
        d_c = d_h * by_h if d_c is None else torch.addcmul(d_c, d_h, by_h)
        torch.mul(d_c.unsqueeze(1), self.by_c[t], out=self.g_c[t])
        torch.mul(d_h, self.by_o[t], out=self.g_o[t])
        self.d_c = d_c.mul_(self.forget[t])
        d_both = torch.mm(self.gs[t], self.both)
        if self.input is None:
            self.d_h = d_both
            return None
        self.d_h = d_both[:, : self.h_dim]
        return d_both[:, self.h_dim :]

    def d_start(self, d_h: Tensor) -> list[Tensor]:
        assert self.d_c is not None
        return [d_h, self.d_c]


class GRU(Cell):
    """r, z = sigmoid of the gates; n = tanh(W_n x + r (U_n h + b_n)); h = (1 - z) n + z h."""

    def allocate(self) -> None:
        h = self.h_dim
        self.recurrent = Affine(self.size, self.w_h, self.b_h)
        self.by_state, self.by_states = self.size.buffer(self.w_h, 3 * h)
        self.cuts = [g.split([2 * h, h], -1) for g in self.gates]
        self.state_cuts = [g.split([2 * h, h], -1) for g in self.by_states]
        self.r_z = [c[0].split(h, -1) for c in self.cuts]

    def forward(self, t: int, x: Tensor | None) -> Tensor:
        before = self.before_h[t]
        self.recurrent.into(self.by_states[t], t, before)
        read_r_z, read_n = self.read(t, x).split([2 * self.h_dim, self.h_dim], -1)
        (r_and_z, n), (state_r_z, state_n) = self.cuts[t], self.state_cuts[t]
        torch.add(read_r_z, state_r_z, out=r_and_z).sigmoid_()
        r, z = self.r_z[t]
        tanh(torch.addcmul(read_n, r, state_n, out=n), out=n)
        return torch.lerp(n, before, z, out=self.hs[t])

    def prepare(self, outer: Sequence[Sequence[Tensor] | None]) -> None:
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
        if self.input is not None:
            w_r, w_z, w_n = self.input.weight.split(h)
            self.w_x = torch.cat([w_n, w_r, w_z])

    def backward(self, t: int, d_h: Tensor) -> Tensor | None:
        torch.mul(d_h.unsqueeze(1), self.slopes[t], out=self.gs[t])
        self.d_h = torch.addmm(d_h * self.stays[t], self.g_h[t], self.w_h)
        return None if self.input is None else torch.mm(self.g_x[t], self.w_x)

    def gradients(self, x: Tensor | None) -> list[Tensor | None]:
        h = self.h_dim
        by_x = torch.cat([self.g[..., h : 3 * h], self.g[..., :h]], -1)
        by_h = self.g[..., h:].contiguous()
        return [*self.of_input(by_x, x), *self.recurrent.gradients(by_h, self.shifted())]


class RNN(Cell):
    """h = tanh(W x + U h)."""

    act = staticmethod(tanh)

    def forward(self, t: int, x: Tensor | None) -> Tensor:
        a = torch.addmm(self.read(t, x), self.before_h[t], self.w_h_t, out=self.hs[t])
        return self.act(a, out=a)

    def slope(self) -> Tensor:
        return torch.addcmul(self.h.new_ones(()), self.h, self.h, value=-1)

    def prepare(self, outer: Sequence[Sequence[Tensor] | None]) -> None:
        self.slopes = self.slope().unbind()
        self.g = torch.empty_like(self.h)
        self.gs = self.g.unbind()
        self.d_h = None

    def backward(self, t: int, d_h: Tensor) -> Tensor | None:
        g = torch.mul(d_h, self.slopes[t], out=self.gs[t])
        self.d_h = torch.mm(g, self.w_h)
        return None if self.input is None else torch.mm(g, self.input.weight)


class ReLURNN(RNN):
    """h = relu(W x + U h)."""

    @staticmethod
    def act(a: Tensor, out: Tensor) -> Tensor:
        return out.relu_()

    def slope(self) -> Tensor:
        return (self.h > 0).to(self.h)


CELLS: dict[str, type[Cell]] = {"lstm": LSTM, "gru": GRU, "rnn": RNN, "relu_rnn": ReLURNN}
