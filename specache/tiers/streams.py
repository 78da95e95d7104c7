"""Two queues of work on a device, ordered by events: `compute`, and `copy` for transfers of rows.

Code that queues work uses the interface `Streams`. `CudaStreams` is the only place that touches
CUDA's streams; `InlineStreams` runs everything at once; tests simulate any order of work that the
events allow. Work writes its results into preallocated buffers, never into a return value, because
it may run after the call.

Queues follow CUDA's rules. Work of one queue runs in order. Recording an event marks the current
end of the queue; an event may be recorded repeatedly. Waiting for an event refers to its latest
record at the time of the call, and is a no-op if there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

Work = Callable[[], object]  # its return value is ignored
Event = Any  # a `torch.cuda.Event`, or another implementation's marker of a queue's end


class Queue(Enum):
    """The two queues."""

    COMPUTE = "compute"  # the model's: PyTorch's current stream
    COPY = "copy"  # rows between the host and the device


class Streams(Protocol):
    """Both queues of a device. Only `synchronize` and `drain` block the host."""

    def event(self) -> Event:
        """Return a new, unrecorded event.

        Events are created once, with the buffers they guard, and recorded repeatedly.
        """

    def run(self, queue: Queue, work: Work) -> None:
        """Queue `work`."""

    def record(self, queue: Queue, event: Event) -> None:
        """Mark the current end of the queue."""

    def wait(self, queue: Queue, event: Event) -> None:
        """Make work queued on `queue` from now on run after the latest record of `event`."""

    def finish(self, queue: Queue) -> None:
        """Make the caller's own PyTorch operations from now on see the results of `queue`."""

    def share(self, tensor: Tensor) -> None:
        """Keep the memory of `tensor` until both queues are done with it.

        The tensor was made on the compute queue, and is used on the copy queue too.
        """

    def synchronize(self, event: Event) -> None:
        """Block the host until the latest record of `event` is reached."""

    def drain(self) -> None:
        """Block the host until both queues are empty, before memory that they use is freed."""


class InlineStreams:
    """Runs work where it is queued: on a CPU, which has one queue and no waits."""

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
    """CUDA's streams: compute is the current one, copy is a stream of its own.

    Compute is also the stream that a graph is captured on. During a capture the copy stream joins
    with the first `wait` for an event that the capture recorded on the compute stream, and must be
    joined back before the capture ends. An event recorded outside a capture, or in another one, may
    not be waited for inside it.
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
    """Return the queues of a device."""
    return CudaStreams(device) if device.type == "cuda" else InlineStreams()
