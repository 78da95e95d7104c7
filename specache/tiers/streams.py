"""Two queues of work on a device, ordered by events: `compute`, and `copy` for what moves rows beside it.

Whoever queues work writes against `Streams`. `CudaStreams` is the only place that touches CUDA's streams; `InlineStreams` runs
everything at once; tests have a simulation that runs work in any order that the events allow. What work computes goes into buffers
that were made before, never into a return value: at the time of the call it may not have run.

Rules of the queues, CUDA's own. Work of one queue runs in the order it was queued. Recording an event marks the queue's end as it
is then; an event may be recorded again and again. Waiting for an event means the record that is the latest when `wait` is called,
and is nothing at all if it was never recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

Work = Callable[[], object]  # what it returns is dropped
Event = Any  # a `torch.cuda.Event`, or whatever else an implementation marks a queue's end with


class Queue(Enum):
    """Which of the two queues."""

    COMPUTE = "compute"  # the model's: PyTorch's current stream
    COPY = "copy"  # rows between the host and the device


class Streams(Protocol):
    """Both queues of a device. Nothing here waits for the device but `synchronize` and `drain`."""

    def event(self) -> Event:
        """A new event, never recorded. Events are made once, with the buffers that they guard, and recorded again and again."""

    def run(self, queue: Queue, work: Work) -> None:
        """Queue `work`."""

    def record(self, queue: Queue, event: Event) -> None:
        """Mark the end of what is queued now."""

    def wait(self, queue: Queue, event: Event) -> None:
        """What is queued on `queue` from now on runs after the latest record of `event`."""

    def finish(self, queue: Queue) -> None:
        """The caller's own PyTorch operations, from now on, see what `queue` computed."""

    def share(self, tensor: Tensor) -> None:
        """`tensor`, made on the compute queue, is used on the copy queue too: its memory is not reused before both are done."""

    def synchronize(self, event: Event) -> None:
        """Have the host wait for the latest record of `event`."""

    def drain(self) -> None:
        """Have the host wait for both queues: before host memory that they may use is given back."""


class InlineStreams:
    """Work runs where it is queued: a CPU, which has one queue and nothing to wait for."""

    def event(self) -> Event:
        return None

    def run(self, queue: Queue, work: Work) -> None:
        work()

    def record(self, queue: Queue, event: Event) -> None:
        pass

    def wait(self, queue: Queue, event: Event) -> None:
        pass

    def finish(self, queue: Queue) -> None:
        pass

    def share(self, tensor: Tensor) -> None:
        pass

    def synchronize(self, event: Event) -> None:
        pass

    def drain(self) -> None:
        pass


class CudaStreams:
    """CUDA's streams: compute is the current one (also the one that a graph is captured on), copy is one of its own.

    In a graph's capture the copy stream joins with the first `wait` for an event that the capture recorded on the compute stream,
    and must be joined back before the capture ends. An event recorded outside a capture, or in another one, may not be waited for
    inside it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copy = torch.cuda.Stream(device)

    def event(self) -> Event:
        return torch.cuda.Event()

    def run(self, queue: Queue, work: Work) -> None:
        with torch.cuda.stream(self._stream(queue)):
            work()

    def record(self, queue: Queue, event: Event) -> None:
        event.record(self._stream(queue))

    def wait(self, queue: Queue, event: Event) -> None:
        self._stream(queue).wait_event(event)

    def finish(self, queue: Queue) -> None:
        if queue is Queue.COPY:
            self._stream(Queue.COMPUTE).wait_stream(self._copy)

    def share(self, tensor: Tensor) -> None:
        tensor.record_stream(self._copy)

    def synchronize(self, event: Event) -> None:
        event.synchronize()

    def drain(self) -> None:
        self._stream(Queue.COMPUTE).synchronize()
        self._copy.synchronize()

    def _stream(self, queue: Queue) -> torch.cuda.Stream:
        return self._copy if queue is Queue.COPY else torch.cuda.current_stream(self.device)


def streams_for(device: torch.device) -> Streams:
    """The queues of a device."""
    return CudaStreams(device) if device.type == "cuda" else InlineStreams()
