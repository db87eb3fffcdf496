"""Activations: tanh of many numbers on a CPU goes through the sigmoid, and nothing else may tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian, jacfwd, vmap

from dynavae.nn.mlp import ACTIVATIONS, BySigmoid, Tanh


def through_sigmoid(x: Tensor) -> bool:
    """Whether autograd saw the function of our own."""
    return "BySigmoid" in type(Tanh()(x.requires_grad_()).grad_fn).__name__


def test_tanh_is_the_one_by_name() -> None:
    assert isinstance(ACTIVATIONS["tanh"](), nn.Tanh)
    assert not Tanh().state_dict()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 5e-16), (torch.float32, 3e-7)])
def test_values_of_many_and_of_few(dtype: torch.dtype, tolerance: float) -> None:
    many = 5 * torch.randn(2, Tanh.MANY // 2, dtype=dtype)
    few = many[:, :-1]
    assert through_sigmoid(many.clone()) and not through_sigmoid(few.clone())
    assert float((Tanh()(many) - many.tanh()).abs().max()) < tolerance
    assert torch.equal(Tanh()(few), few.tanh())


def test_ends_and_not_a_number() -> None:
    x = torch.tensor([1e4, -1e4, torch.inf, -torch.inf, torch.nan, 0.0])
    assert torch.allclose(BySigmoid.apply(x), x.tanh(), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_numbers_keep_the_small_ones(dtype: torch.dtype) -> None:
    x = torch.full((Tanh.MANY,), 1e-3, dtype=dtype)
    assert torch.equal(Tanh()(x), x.tanh())


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own, in forward mode
def test_derivatives_of_every_kind() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(BySigmoid.apply, (x,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(BySigmoid.apply, (x,))
    x = x.detach()
    for transform in (jacfwd, lambda f: hessian(lambda a: f(a).sum()), lambda f: vmap(jacfwd(f))):
        assert torch.allclose(transform(BySigmoid.apply)(x), transform(torch.tanh)(x), atol=1e-14)


def test_compiled_and_exported_code_has_the_tanh_of_torch() -> None:
    """The number of values is not asked for, which would tie an export to one size."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x)

    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(Step(), (torch.randn(4, 128),), dynamic_shapes=({0: batch},))
    assert any(node.target is torch.ops.aten.tanh.default for node in exported.graph.nodes)
    x = torch.randn(Tanh.MANY // 64, 128)
    assert torch.allclose(exported.module()(x), x.tanh(), atol=1e-6)
