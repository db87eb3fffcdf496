"""An exponential moving average of the weights along training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage"]


class WeightAverage:
    r"""An exponential moving average of a model's weights over the updates of its training.

    .. math::
        \bar\theta_n = d_n \bar\theta_{n-1} + (1 - d_n)\, \theta_n, \qquad d_n = \min\{d, (1 + n) / (10 + n)\}

    so that the average begins near the present weights and reaches back about 1 / (1 - d) updates later on.

    Source: Polyak and Juditsky 1992, Acceleration of stochastic approximation by averaging. Weights that are no
    floating-point numbers are those of the last update.

    Args:
        model: whose weights are averaged; the average starts at those it has.
        decay: d, in (0, 1).

    Raises:
        ValueError: a decay outside (0, 1).

    Example:
        >>> line = nn.Linear(1, 1, bias=False)
        >>> average = WeightAverage(line, 0.9)
        >>> for value in (1.0, 2.0, 3.0):
        ...     _ = line.weight.data.fill_(value)
        ...     average.update()
        >>> round(average.weights()["weight"].item(), 2), line.weight.item()
        (2.6, 3.0)
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(
                f"ema is the decay per update of a moving average, in (0, 1), such as 0.998; got {decay}."
            )
        self.model, self.decay, self.updates = model, decay, 0
        self._average: dict[str, Tensor] = {}
        self.start()

    def start(self) -> None:
        """Begin at the present weights, if no update has been taken in yet."""
        if not self.updates:
            self._average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after one more update into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        values = self.model.state_dict()
        self._average = {name: self._average[name].to(value.device) for name, value in values.items()}
        floating = [name for name, value in values.items() if value.is_floating_point()]
        torch._foreach_lerp_(  # one kernel on a GPU
            [self._average[name] for name in floating], [values[name] for name in floating], 1 - decay
        )
        for name in values.keys() - set(floating):
            self._average[name].copy_(values[name])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the weights of the model, until called again."""
        for name, value in self.model.state_dict().items():
            average = self._average[name].to(value.device)
            self._average[name] = value.clone()
            value.copy_(average)

    def weights(self) -> dict[str, Tensor]:
        """The average, named as in the model's `state_dict`."""
        return self._average

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"updates": self.updates, "average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was made."""
        self.updates = state["updates"]
        self._average = {name: value.clone() for name, value in state["average"].items()}
