"""Layers over time on buffers that hold all frames, each with its backward written by hand.

A layer runs `forward(t, .)` for t = 1..T, then `prepare()`, which takes every derivative for all t at once,
then `backward(t, .)` for t = T..1, which is one multiplication and one product, then `gradients(.)`: one
product per weight over all frames. They are the pieces of :mod:`dynavae.recursion`, which puts them into one
autograd function; nothing here is seen by autograd. N rows are K particles of B sequences. The recurrent ones
are in :mod:`dynavae.nn.cells`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Size(NamedTuple):
    """Steps, particles, sequences, and whether a backward will come."""

    T: int
    K: int
    B: int
    keep: bool

    @property
    def N(self) -> int:
        return self.K * self.B

    def buffer(self, like: Tensor, width: int, keep: bool | None = None) -> tuple[Tensor, list[Tensor]]:
        """(T, N, width) and its frames; without a backward one frame is enough, and shared."""
        keep = self.keep if keep is None else keep
        whole = like.new_empty(self.T if keep else 1, self.N, width)
        return whole, self.frames(whole)

    def frames(self, whole: Tensor) -> list[Tensor]:
        """Those of each t, of a tensor that has all of them or one to share."""
        return list(whole.unbind()) * (self.T if len(whole) == 1 else 1)

    def mask(self, like: Tensor, width: int, dropout: float, share: float) -> Tensor:
        """(T, N, width): share / (1 - dropout) where a unit survives, else 0."""
        survives = like.new_full((self.T, self.N, width), 1 - dropout)
        return torch.bernoulli(survives) * (share / (1 - dropout))

    def of_bias(self, grad: Tensor, bias: Tensor) -> Tensor:
        """The gradient of a bias (out,), or of one (T, B, out) that all particles share, from dL/dy (T, N, out)."""
        if bias.ndim == 1:
            return grad.sum((0, 1))
        return grad if self.K == 1 else grad.view(self.T, self.K, self.B, -1).sum(1)


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
        return grad.flatten(0, 1).t() @ x.flatten(0, 1), self.size.of_bias(grad, self.bias)


class TanhInto:
    """tanh into `out`; of many numbers on a CPU as 2 sigmoid(2 x) - 1, of which torch's own takes up to four times as long.

    That is off by a unit in the last place of 1, like any sum; not for use where tanh(x) / x matters. The constants
    are tensors, since a number has to be made into one at each call.
    """

    MANY = 1024

    def __init__(self, like: Tensor) -> None:
        self.two, self.minus_one = like.new_full((), 2.0), like.new_full((), -1.0)

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        if x.is_cpu and x.numel() >= self.MANY:
            return self.of_sigmoid(torch.mul(x, self.two, out=out).sigmoid_())
        return torch.tanh(x, out=out)

    def of_sigmoid(self, s: Tensor) -> Tensor:
        """tanh(x) in place of sigmoid(2 x)."""
        return torch.add(self.minus_one, s, alpha=2, out=s)


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
        factor: (T, N, out), share * mask_t from :meth:`Size.mask`; None where nothing is dropped.
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
        factor: Tensor | None,
        share: float,
        all_frames: bool,
    ) -> None:
        width = len(weight)
        self.size, self.affine, self.act, self.share = size, Affine(size, weight, before), act, share
        keep = size.keep or all_frames
        self.tanh = TanhInto(weight)
        self.factor, self.factors = factor, None if factor is None else factor.unbind()
        self.after = None if after is None else after.unbind()
        # a = W x + before; b = act(a); y = factor * b + after. These are known by their output.
        self.is_tanh, self.is_sigmoid, self.is_relu = (
            isinstance(act, kind) for kind in (nn.Tanh, nn.Sigmoid, nn.ReLU)
        )
        known = self.is_tanh or self.is_sigmoid or self.is_relu
        self.scaled = self.factor is not None or share != 1 or after is not None
        self.b, self.bs = size.buffer(weight, width, keep)
        self.a, self.as_ = (self.b, self.bs) if known or act is None else size.buffer(weight, width)
        self.y, self.ys = size.buffer(weight, width, keep) if self.scaled else (self.b, self.bs)

    def forward(self, t: int, x: Tensor) -> Tensor:
        a = self.affine.into(self.as_[t], t, x)
        if self.is_sigmoid:
            a.sigmoid_()
        elif self.is_tanh:
            self.tanh(a, out=a)
        elif self.is_relu:
            a.relu_()
        elif self.act is not None:
            self.bs[t].copy_(self.act(a))
        return self.scale(t) if self.scaled else self.bs[t]

    def scale(self, t: int) -> Tensor:
        """factor * b + after."""
        y = torch.mul(self.bs[t], self.share if self.factors is None else self.factors[t], out=self.ys[t])
        if self.after is not None:
            y.view(self.size.K, self.size.B, -1).add_(self.after[t])
        return y

    def prepare(self, grad: Tensor | None = None) -> None:
        """Derivatives for all t. `grad`: where dL/dy of a linear layer will be found, if it is at hand."""
        if self.act is None:
            slope = None
        elif self.is_tanh:
            slope = torch.addcmul(self.b.new_ones(()), self.b, self.b, value=-1)
        elif self.is_sigmoid:
            slope = torch.addcmul(self.b, self.b, self.b, value=-1)
        elif self.is_relu:
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
        d_after = None if self.g_y is None else self.size.of_bias(self.g_y, self.g_y)
        return [*self.affine.gradients(self.g, x), d_after]
