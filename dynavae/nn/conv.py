"""Convolutional front-ends of frame models: an image to features, and features to the distribution of an image.

Frames stay flat, x is (..., channels * height * width), so that a model with a convolutional front-end is used like any
other; `image` says how they fold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynavae.nn.emissions import Categorical, Emission
from dynavae.nn.heads import EmissionHead
from dynavae.nn.mlp import MLP, activation_layer, check_layers


def check_image(image: Sequence[int], x_dim: int) -> tuple[int, int, int]:
    """`image` as (channels, height, width), if it has x_dim pixels."""
    shape = tuple(image)
    if len(shape) not in (2, 3) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(
            f"image should be (height, width) or (channels, height, width), such as (32, 32); got {image!r}."
        )
    if math.prod(shape) != x_dim:
        raise ValueError(f"image {shape} has {math.prod(shape)} pixels, but x_dim is {x_dim}.")
    channels, height, width = shape if len(shape) == 3 else (1, *shape)
    return channels, height, width


def frame_encoder(
    in_dim: int, x_dim: int, layers: Sequence[int], image: Sequence[int] | None, **net: Any
) -> MLP | ConvEncoder:
    """From a frame to features: an MLP of these widths, or with `image` convolutions of so many filters."""
    return MLP(in_dim, layers, **net) if image is None else ConvEncoder(in_dim, x_dim, layers, image, **net)


def halved(size: int, times: int) -> int:
    """A length after so many convolutions of stride 2."""
    return size if times == 0 else halved(-(-size // 2), times - 1)


class ConvEncoder(nn.Module):
    """For each number of filters: a 3 x 3 convolution of stride 2, activation; then everything flat.

    Args:
        in_dim: features of the input: the pixels, once more as many if a mask follows them, then any others, which are
            passed on as they are.
        x_dim: pixels of a frame.
        filters: of each convolution.
        image: (height, width) or (channels, height, width).
        activation: a name in :data:`~dynavae.nn.mlp.ACTIVATIONS`.
        dropout: rate after each activation, of whole channels.

    Example:
        >>> net = ConvEncoder(in_dim=64, x_dim=64, filters=(4, 8), image=(8, 8))
        >>> net(torch.zeros(5, 3, 64)).shape, net.out_dim
        (torch.Size([5, 3, 32]), 32)
    """

    def __init__(
        self,
        in_dim: int,
        x_dim: int,
        filters: Sequence[int],
        image: Sequence[int],
        activation: str = "relu",
        dropout: float = 0.0,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        if norm is not None:
            raise ValueError(f"convolutions take norm=None; got {norm!r}.")
        filters = check_layers(filters, "filters")
        channels, height, width = check_image(image, x_dim)
        self.planes = (in_dim // x_dim * channels, height, width)
        self.pixels = math.prod(self.planes)
        modules: list[nn.Module] = []
        before = self.planes[0]
        for after in filters:
            modules += [
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                activation_layer(activation),
                *([nn.Dropout2d(dropout)] if dropout else []),
            ]
            before = after
        self.net = nn.Sequential(*modules)
        depth = len(filters)
        self.out_dim = before * halved(height, depth) * halved(width, depth) + in_dim - self.pixels

    def forward(self, frame: Tensor) -> Tensor:
        pixels, others = frame.split([self.pixels, frame.shape[-1] - self.pixels], -1)
        out = self.net(pixels.reshape(-1, *self.planes)).reshape(*frame.shape[:-1], -1)
        return out if others.shape[-1] == 0 else torch.cat([out, others], -1)


class ConvEmissionHead(EmissionHead):
    """p(x_t | features) of an image: a linear layer, then for each number of filters a 3 x 3 convolution, activation,
    and a rearrangement of every four channels into twice the height and width; last a 1 x 1 convolution.

    Each pixel has a bias of its own: what never moves is in the picture from the start (see
    :func:`~dynavae.training.calibrate`).

    Args:
        emission: of a pixel; one that treats pixels alike and apart.
        in_dim: features.
        x_dim: pixels of a frame.
        filters: of each convolution, multiples of 4.
        image: (height, width) or (channels, height, width).
        activation: a name in :data:`~dynavae.nn.mlp.ACTIVATIONS`.

    Example:
        >>> from dynavae.nn import Bernoulli
        >>> head = ConvEmissionHead(Bernoulli(), in_dim=2, x_dim=64, filters=(16, 8), image=(8, 8))
        >>> head(torch.zeros(5, 3, 2)).mean.shape
        torch.Size([5, 3, 64])
    """

    def __init__(
        self,
        emission: Emission,
        in_dim: int,
        x_dim: int,
        filters: Sequence[int],
        image: Sequence[int],
        activation: str = "relu",
    ) -> None:
        nn.Module.__init__(self)
        self.emission, self.x_dim = emission, x_dim
        channels, height, width = check_image(image, x_dim)
        filters = check_layers(filters, "filters")
        if not filters or any(number % 4 for number in filters):
            raise ValueError(
                f"each convolution of a decoder needs a multiple of 4 filters, such as (64, 64, 64): it doubles the "
                f"image with every four; got {filters}."
            )
        outputs = emission.outputs(x_dim)
        if outputs % x_dim or isinstance(emission, Categorical):
            raise ValueError(
                f"a convolutional decoder emits each pixel on its own; it has no {type(emission).__name__} emission. "
                "Take bernoulli or gaussian, or leave image=None."
            )
        depth = len(filters)
        self.start_shape = (filters[0] // 4, halved(height, depth), halved(width, depth))
        self.sizes = [(halved(height, depth - i), halved(width, depth - i)) for i in range(1, depth + 1)]
        self.linear = nn.Linear(in_dim, math.prod(self.start_shape))
        planes = [filters[0] // 4, *(number // 4 for number in filters)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, number, 3, padding=1)
            for before, number in zip(planes[:-1], filters, strict=True)
        )
        self.act = activation_layer(activation)
        self.last = nn.Conv2d(planes[-1], outputs // x_dim * channels, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.extra = nn.ParameterDict({k: nn.Parameter(v) for k, v in emission.extra(x_dim).items()})

    def forward(self, h: Tensor) -> Any:
        a = self.act(self.linear(h)).reshape(-1, *self.start_shape)
        for convolution, (height, width) in zip(self.convolutions, self.sizes, strict=True):
            a = nn.functional.pixel_shuffle(self.act(convolution(a)), 2)[..., :height, :width]
        raw = self.last(a).reshape(*h.shape[:-1], -1) + self.bias
        return self.emission.distribution(raw, dict(self.extra.items()))

    @torch.no_grad()
    def start(self, mean: Tensor, stddev: Tensor) -> None:
        """Set the bias of each pixel to the marginal of the data."""
        bias, extra = self.emission.start(mean, stddev)
        self.bias.copy_(bias)
        for name, value in extra.items():
            self.extra[name].copy_(value)
