"""Multilayer perceptrons, and one whose first layer is split so that a part of it leaves the time loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class BySigmoid(torch.autograd.Function):
    """tanh(x) as 2 sigmoid(2 x) - 1: off by a unit in the last place of 1, like any sum."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.mul(x, 2).sigmoid_().mul_(2).sub_(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.ops.aten.tanh_backward(grad, *ctx.saved_tensors)  # type: ignore[no-any-return]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return torch.ops.aten.tanh_backward(tangent, *ctx.saved_tensors)  # type: ignore[no-any-return]


class Tanh(nn.Tanh):
    """tanh; of many numbers on a CPU through torch's sigmoid, which takes a third of the time of its tanh.

    Not in bfloat16 or half precision, where a unit in the last place of 1 is more than most activations can spare.
    """

    MANY = 2**14

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not x.is_cpu or x.dtype not in (torch.float32, torch.float64):
            return torch.tanh(x)
        return torch.tanh(x) if x.numel() < self.MANY else BySigmoid.apply(x)  # type: ignore[no-any-return]


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
}


class ClippedLeakyReLU(nn.Module):
    """Leaky ReLU of slope 1/3 clipped to [-3, 3], the activation of the published SRNN."""

    def forward(self, a: Tensor) -> Tensor:
        return nn.functional.leaky_relu(a, 1 / 3).clamp(-3, 3)


ACTIVATIONS["clipped_leaky_relu"] = ClippedLeakyReLU


def activation_layer(name: str) -> nn.Module:
    """The activation of this name; an unknown one is answered with the names there are."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; choose one of {', '.join(sorted(ACTIVATIONS))}.")
    return ACTIVATIONS[name]()


def check_layers(layers: Sequence[int], what: str = "layers") -> tuple[int, ...]:
    """Hidden widths as a tuple of positive integers."""
    if isinstance(layers, int):
        layers = (layers,)
    if not all(isinstance(width, int) and width > 0 for width in layers):
        raise ValueError(f"{what} should list positive widths, such as (256, 128); got {layers!r}.")
    return tuple(layers)


class MLP(nn.Sequential):
    """For each width: Linear, then optional LayerNorm, activation, dropout. No width: the identity.

    Args:
        in_dim: input features.
        layers: width of each hidden layer; the activation follows every one of them.
        activation: a name in :data:`ACTIVATIONS`.
        dropout: rate after each activation.
        norm: None or "layer".

    Example:
        >>> MLP(8, (16, 4))(torch.zeros(3, 8)).shape, MLP(8, ()).out_dim
        (torch.Size([3, 4]), 8)
    """

    def __init__(
        self,
        in_dim: int,
        layers: Sequence[int] = (),
        activation: str = "tanh",
        dropout: float = 0.0,
        norm: str | None = None,
    ) -> None:
        modules: list[nn.Module] = []
        for width in check_layers(layers):
            modules.append(nn.Linear(in_dim, width))
            modules += _after(width, activation, dropout, norm)
            in_dim = width
        super().__init__(*modules)
        self.out_dim = in_dim


def _after(width: int, activation: str, dropout: float, norm: str | None) -> list[nn.Module]:
    """What follows a linear layer of an MLP."""
    if norm not in (None, "layer"):
        raise ValueError(f"norm should be None or 'layer'; got {norm!r}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout should be in [0, 1); got {dropout}.")
    out: list[nn.Module] = [nn.LayerNorm(width)] if norm == "layer" else []
    out.append(activation_layer(activation))
    return out + ([nn.Dropout(dropout)] if dropout else [])


class SplitMLP(nn.Module):
    """An MLP on [e, z] with a linear output, whose first layer is kept as two matrices.

    `split(e)` = W_e e + b reads x only, so a model calls it in `evidence`, before the time loop; the loop
    then pays for W_z z alone. Mathematically the MLP on the concatenation.

    Args:
        e_dim, z_dim: features known before the loop, and within it.
        layers: hidden widths; none makes the map linear.
        out_dim: outputs.
    """

    def __init__(
        self,
        e_dim: int,
        z_dim: int,
        layers: Sequence[int],
        out_dim: int,
        activation: str = "tanh",
        dropout: float = 0.0,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        layers = check_layers(layers)
        width = layers[0] if layers else out_dim
        self.from_e = nn.Linear(e_dim, width)
        self.from_z = nn.Linear(z_dim, width, bias=False)
        bound = 1 / math.sqrt(e_dim + z_dim)  # as one Linear on the concatenation
        for parameter in (*self.from_e.parameters(), *self.from_z.parameters()):
            nn.init.uniform_(parameter, -bound, bound)
        rest: list[nn.Module] = []
        if layers:
            rest += _after(width, activation, dropout, norm)
            hidden = MLP(width, layers[1:], activation, dropout, norm)
            rest += [*hidden, nn.Linear(hidden.out_dim, out_dim)]
        self.rest = nn.Sequential(*rest)
        self.out_dim = out_dim

    def split(self, e: Tensor) -> Tensor:
        return self.from_e(e)

    def forward(self, split: Tensor, z: Tensor) -> Tensor:
        weight = self.from_z.weight
        if split.ndim == z.ndim == 2 and split.shape[:-1] == z.shape[:-1]:
            return self.rest(torch.addmm(split, z, weight.T))
        return self.rest(split + z @ weight.T)
