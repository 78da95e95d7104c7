"""A decode step as a CUDA graph: captured once, then one launch per step.

A graph holds the launches with their arguments as they were: addresses of tensors, and numbers. What a step does with one batch is
therefore captured once per `key`: whatever of it is no tensor. The first step of a key runs as it is, and is the warm-up that a
capture needs; the second is captured, which runs nothing, and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import torch
from torch import Tensor

Run = Callable[[], Tensor]  # a step over static tensors -> its logits
Replay = Callable[[], None]


class CaptureError(Exception):
    """A step could not be captured; the cause is its `__cause__`. Nothing of the step has run."""


class Graphs(Protocol):
    """Where graphs are captured."""

    def capture(self, run: Run) -> tuple[Replay, Tensor]:
        """Record what `run` launches, running nothing -> (launch it all again, the tensor that its result is in)."""


class CudaGraphs:
    """CUDA's graphs. Those of one batch share memory for what a step computes and drops: one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Run) -> tuple[Replay, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do meanwhile (a tokenizer's, a server's) is their business
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result


class GraphedSteps:
    """The steps of one batch, replayed where they were captured.

    Args:
        graphs: `None` runs every step as it is.

    Attributes:
        capturing: the step that is under way, or that failed, is being captured: it has run nothing.
    """

    def __init__(self, graphs: Graphs | None) -> None:
        self.capturing = False
        self._graphs = graphs
        self._warm: set[Hashable] = set()
        self._captured: dict[Hashable, tuple[Replay, Tensor]] = {}

    @property
    def captures(self) -> int:
        """Graphs that there are."""
        return len(self._captured)

    def __call__(self, key: Hashable, run: Run) -> Tensor:
        """Run a step -> its result, the caller's own.

        Raises:
            CaptureError: it cannot be captured; the caller may run it in another way.
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
    """CUDA's graphs, on CUDA."""
    return CudaGraphs(device) if device.type == "cuda" else None


def _reason(error: BaseException) -> str:
    """What went wrong first: that the capture as a whole failed is only its consequence."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip() or type(error).__name__).partition("\n")[0].rstrip(".")
