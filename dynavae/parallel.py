"""Several processes that give the numbers of one: each takes some rows of the same global batch.

Whatever is random is drawn for the whole batch and cut, the loss is divided by the frames of the whole batch,
gradients are averaged and sums are added over processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.nn import Parameter

P = TypeVar("P")

STRATEGIES = ("auto", "ddp")


class Share(NamedTuple):
    """What part of a batch this process has. Without several processes there is no share."""

    index: list[int]  # rows of the whole batch; empty if there are more processes than sequences
    sequences: int  # of the whole batch
    frames: int  # of the whole batch
    processes: int


class Averaged(DDPStrategy):
    """Lightning's data parallelism with one exchange of gradients per update, whatever went before it.

    The wrapper that Lightning would put around the model exchanges them during each backward pass instead. That
    asks for a use of every parameter in every process, and for as many chunks of time as there are backward passes.
    """

    def configure_ddp(self) -> None:
        """Every process starts from the weights of the first."""
        assert self.model is not None
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            dist.broadcast(tensor.data, src=0)


def average_gradients(parameters: Iterable[Parameter]) -> None:
    """The mean of the gradients over processes; what no process has used keeps none."""
    parameters = list(parameters)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    used = torch.tensor([float(p.grad is not None) for p in parameters]).to(grads[0])
    flat = torch.cat([g.flatten() for g in grads] + [used])
    dist.all_reduce(flat)
    *means, users = (flat / processes()).split([g.numel() for g in grads] + [len(grads)])
    for p, mean, user in zip(parameters, means, users.tolist(), strict=True):
        p.grad = mean.view_as(p).to(p.dtype) if user else None


def processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def main_process() -> bool:
    """Whether this process writes, logs and prints; known before the processes have met."""
    return (getattr(rank_zero_only, "rank", 0) or 0) == 0


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in order of rank."""
    if processes() == 1:
        return [value]
    values: list[Any] = [None] * processes()
    dist.all_gather_object(values, value)
    return values


def summed(a: Tensor) -> Tensor:
    """The sum of all processes' tensors; no gradient passes."""
    if processes() > 1:
        a = a.clone()
        dist.all_reduce(a)
    return a


def trouble_anywhere(trouble: str, device: torch.device) -> str:
    """What has gone wrong in any process, known to all of them, so that they can end together; "" if nothing has."""
    if not agreed(int(bool(trouble)), device):
        return ""
    found = [(i, said) for i, said in enumerate(gathered(trouble)) if said]
    return found[0][1] if processes() == 1 else f"process {found[0][0]}: {found[0][1]}"


def agreed(number: int, device: torch.device) -> int:
    """The largest of all processes' numbers."""
    if processes() == 1:
        return number
    tensor = torch.tensor([number], device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor.item())


def layout(devices: int, strategy: str) -> dict[str, Any]:
    """Arguments of Lightning's Trainer for so many processes; those that torchrun has started count.

    Raises:
        ValueError: a strategy that does not leave the trained weights in this process, or no device.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy should be one of {', '.join(STRATEGIES)}; got {strategy!r}.")
    nodes = 1
    if dist.is_available() and dist.is_torchelastic_launched():
        started, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        if devices not in (1, local):
            raise ValueError(
                f"torchrun has started {local} processes on this machine, but devices={devices}: leave devices out."
            )
        devices, nodes = local, started // local
    if devices < 1:
        raise ValueError(f"devices should be a number of processes, 1 or more; got {devices!r}.")
    several = devices != 1 or nodes > 1 or strategy == "ddp"
    chosen: str | Strategy = Averaged() if several else "auto"
    return {"devices": devices, "num_nodes": nodes, "strategy": chosen}


def together(parts: Iterator[P], share: Share | None, device: torch.device) -> Iterator[P]:
    """The parts of a loss; if one is not finite in any process, all of them raise, and none waits for the others."""
    while True:
        part, trouble = None, ""
        try:
            part = next(parts, None)
        except FloatingPointError as error:
            trouble = str(error)
        if part is None and not trouble:  # all processes have as many
            return
        trouble = trouble if share is None else trouble_anywhere(trouble, device)
        if trouble:
            raise FloatingPointError(trouble)
        yield part
