"""A decode step as a CUDA graph: captured once, then replayed with one launch per step.

A graph fixes the arguments of its launches: addresses of tensors, and numbers. So the steps of a
batch are captured once per `key`, the part of their arguments that is not in tensors. The first
step of a key runs eagerly, which is the warm-up that a capture needs. The second is captured, which
runs nothing, and replayed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from specache.platform import forks

Run = Callable[[], Tensor]  # a step over static tensors -> its logits
Replay = Callable[[], None]


class CaptureError(Exception):
    """A step could not be captured, for the reason in `__cause__`. Nothing of the step has run."""


class Graphs(Protocol):
    """Captures graphs."""

    def capture(self, run: Run) -> tuple[Replay, Tensor]:
        """Record what `run` launches, without running it -> (replay, the tensor of its result)."""


_capturing = forks.lock()  # a capture begins with a wait for the whole device, which fails during another thread's


class CudaGraphs:
    """CUDA's graphs. Those of one batch share memory for temporaries: one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _capture_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Run) -> tuple[Replay, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads (a tokenizer's, a server's) may use CUDA during the capture
        captured = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        # set outside as well: where a capture fails, `captured` does not set the stream back
        with _capturing, _no_collection(), torch.cuda.stream(self._stream), captured:
            result = run()
        return graph.replay, result


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which all graphs of a device are captured.

    PyTorch's own is on the device of the process's first capture: work on another device would run
    instead of being captured. One for all graphs, as cuBLAS keeps memory for each stream.
    """
    return torch.cuda.Stream(device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage inside the block: a cache that is freed waits for the GPU, which ends a
    capture.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class GraphedSteps:
    """Runs the steps of one batch, as replays once they are captured.

    Args:
        graphs: `None` to run every step eagerly.

    Attributes:
        capturing: whether the current or failed step is a capture, which has run nothing.
    """

    def __init__(self, graphs: Graphs | None) -> None:
        self.capturing = False
        self._graphs = graphs
        self._warm: set[Hashable] = set()
        self._captured: dict[Hashable, tuple[Replay, Tensor]] = {}

    @property
    def captures(self) -> int:
        """Number of captured graphs."""
        return len(self._captured)

    def __call__(self, key: Hashable, run: Run) -> Tensor:
        """Run a step -> a copy of its result.

        Raises:
            CaptureError: the step cannot be captured; the caller may run it in another way.
        """
        if self._graphs is None:
            return run()
        if key not in self._captured:
            if key not in self._warm:
                self._warm.add(key)
                return run()
            self.capturing = True
            try:
                self._captured[key] = self._graphs.capture(run)
            except Exception as error:
                raise CaptureError(_reason(error)) from error
            self.capturing = False
        replay, result = self._captured[key]
        replay()
        return result.clone()


def graphs_for(device: torch.device) -> Graphs | None:
    """Return CUDA's graphs on CUDA, else `None`."""
    return CudaGraphs(device) if device.type == "cuda" else None


def _reason(error: BaseException) -> str:
    """Return the first error in the chain: the failure of the capture is only its consequence."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
