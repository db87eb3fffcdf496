"""A CUDA graph of a function that works on memory of its own."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]


class CudaGraph:
    """The kernels that a function starts, to be started again by one launch."""

    one_at_a_time: ClassVar = threading.RLock()  # while one captures, no other thread may synchronise
    failed: ClassVar[list[CudaGraph]] = []  # kept for good: the driver may still look at them

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.graph, self.pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()

    @staticmethod
    def applies(device: torch.device) -> bool:
        if device.type != "cuda" or torch.is_anomaly_enabled():  # which looks at values
            return False
        with torch.cuda.device(device):
            return not torch.cuda.is_current_stream_capturing()

    @staticmethod
    def context(device: torch.device) -> Hashable:
        """What a recording depends on beside its function: two streams should not share its memory, nor may the precision
        of products change."""
        return torch.cuda.current_stream(device).cuda_stream, torch.backends.cuda.matmul.fp32_precision

    def record(self, run: Callable[[], Tensors]) -> Tensors:
        """What `run` returns, in memory that :meth:`play` fills; it holds nothing yet.

        Raises:
            RuntimeError: the driver refuses. The stream is as before, but no other graph should be recorded.
        """
        device = self.device
        with (
            self.one_at_a_time,
            torch.cuda.device(device),
            torch.cuda.stream(torch.cuda.current_stream(device)),  # restored whatever happens within
        ):
            # cuBLAS keeps a workspace per stream. That of a capture has to come from the pool of its own graph, and nobody
            # after it may have it: it goes when that graph does.
            _clear_workspaces()
            try:
                with torch.cuda.graph(
                    self.graph, self.pool, stream=_capturing(device), capture_error_mode="thread_local"
                ):
                    return run()
            except RuntimeError:
                self.failed.append(self)
                # If the end of the capture did not come to it; it refuses otherwise, and is torch's own affair.
                with contextlib.suppress(RuntimeError, AttributeError):
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
                raise
            finally:
                _clear_workspaces()

    def play(self) -> None:
        self.graph.replay()


@functools.cache
def _capturing(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _clear_workspaces() -> None:
    torch._C._cuda_clearCublasWorkspaces()
