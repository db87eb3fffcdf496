"""Several processes that give the numbers of one: each takes some rows of the same global batch.

Whatever is random is drawn for the whole batch and cut, the loss is divided by the frames of the whole batch,
and sums are added over processes.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only

STRATEGIES = ("auto", "ddp")


class Share(NamedTuple):
    """What part of a batch this process has. Without several processes there is no share."""

    index: list[int]  # rows of the whole batch; empty if there are more processes than sequences
    sequences: int  # of the whole batch
    frames: int  # of the whole batch
    processes: int


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
    chosen: str | Strategy = DDPStrategy(find_unused_parameters=True) if several else "auto"
    return {"devices": devices, "num_nodes": nodes, "strategy": chosen}
