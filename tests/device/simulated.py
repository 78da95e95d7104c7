"""Two queues without a GPU: work runs when it must, or when it may, in any order that the events
allow.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from specache.tiers.streams import Queue, Work


class Order(Enum):
    """Which of two queues goes on where both may."""

    COPY_LATE = "copy late"  # copies run only when somebody waits for them
    COPY_EARLY = "copy early"  # copies run before anything else that may run
    SHUFFLED = "shuffled"  # now this one, now that one, for long or short by chance, also while more is being queued


@dataclass
class _Record:
    """An event's mark in a queue."""

    done: bool = False


@dataclass
class SimulatedEvent:
    """What `Streams.event` gives: the mark that a wait refers to now."""

    latest: _Record | None = None


@dataclass
class _Wait:
    mark: _Record | None


_Operation = Work | _Record | _Wait


@dataclass
class SimulatedStreams:
    """`Streams` of a device that is slower than the host: what is queued runs when it is waited
    for, or before.

    Attributes:
        shared: what `share` was called with.
        watch: called around the work of each queue, to see what it touches.
    """

    order: Order
    seed: int = 0
    shared: list[Tensor] = field(default_factory=list)
    watch: Callable[[Queue, Work], None] | None = None

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._unrest = 0.5 ** self._random.randint(1, 6)  # how often the favourite changes
        self._favourite = Queue.COPY if self.order is Order.COPY_EARLY else Queue.COMPUTE
        self._queues: dict[Queue, deque[_Operation]] = {queue: deque() for queue in Queue}

    def event(self) -> SimulatedEvent:
        return SimulatedEvent()

    def run(self, queue: Queue, work: Work) -> None:
        self._queue(queue, work)

    def record(self, queue: Queue, event: SimulatedEvent) -> None:
        event.latest = _Record()
        self._queue(queue, event.latest)

    def wait(self, queue: Queue, event: SimulatedEvent) -> None:
        self._queue(queue, _Wait(event.latest))

    def finish(self, queue: Queue) -> None:
        self._run_until(lambda: not self._queues[queue])

    def share(self, tensor: Tensor) -> None:
        self.shared.append(tensor)

    def synchronize(self, event: SimulatedEvent) -> None:
        mark = event.latest
        self._run_until(lambda: mark is None or mark.done)

    def drain(self) -> None:
        self._run_until(lambda: not any(self._queues.values()))

    def _queue(self, queue: Queue, operation: _Operation) -> None:
        self._queues[queue].append(operation)
        if self.order is Order.SHUFFLED:
            while any(self._queues.values()) and self._random.random() < 0.4:
                self._advance()

    def _run_until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self._advance()

    def _advance(self) -> None:
        """One operation. There always is one: a wait refers to a mark that was queued before it."""
        ready = [queue for queue in Queue if self._queues[queue] and self._may_run(self._queues[queue][0])]
        if self.order is Order.SHUFFLED and self._random.random() < self._unrest:
            self._favourite = self._random.choice(list(Queue))
        queue = self._favourite if self._favourite in ready else ready[0]
        operation = self._queues[queue].popleft()
        if isinstance(operation, _Record):
            operation.done = True
        elif not isinstance(operation, _Wait):
            (self.watch or _just_run)(queue, operation)

    @staticmethod
    def _may_run(operation: _Operation) -> bool:
        return not isinstance(operation, _Wait) or operation.mark is None or operation.mark.done


def _just_run(queue: Queue, work: Work) -> None:
    work()


def orders(seeds: int) -> list[tuple[Order, int]]:
    """Both extremes, and that many by chance."""
    return [(Order.COPY_LATE, 0), (Order.COPY_EARLY, 0), *((Order.SHUFFLED, seed) for seed in range(seeds))]


class CapturedStreams:
    """Streams inside the capture of a graph, which refuse what CUDA refuses there.

    `Streams` of a device that is idle, so that `run` may as well run at once. `end` is the end of
    the capture.
    """

    def __init__(self) -> None:
        self._recorded: dict[int, int] = {}  # by the event's identity: how much of the copy queue it covers
        self._forked = False
        self._copied = self._joined = 0  # operations on the copy queue, and those that compute has waited for

    def event(self) -> object:
        return object()

    def run(self, queue: Queue, work: Work) -> None:
        if queue is Queue.COPY:
            self._check_forked()
            self._copied += 1
        work()

    def record(self, queue: Queue, event: object) -> None:
        if queue is Queue.COPY:
            self._check_forked()
        self._recorded[id(event)] = self._copied if queue is Queue.COPY else 0

    def wait(self, queue: Queue, event: object) -> None:
        assert id(event) in self._recorded, "an event that was not recorded in this capture is waited for"
        if queue is Queue.COPY:
            self._forked = True
        else:
            self._joined = max(self._joined, self._recorded[id(event)])

    def finish(self, queue: Queue) -> None:
        raise AssertionError("nobody may wait for the device in a capture")

    def share(self, tensor: Tensor) -> None:
        pass

    def synchronize(self, event: object) -> None:
        raise AssertionError("nobody may wait for the device in a capture")

    def drain(self) -> None:
        raise AssertionError("nobody may wait for the device in a capture")

    def end(self) -> None:
        """Check that the copy queue was joined; forget this capture's events."""
        assert self._joined == self._copied, "the copy queue was not joined before the capture ended"
        self.fail()

    def fail(self) -> None:
        """The capture ends somewhere in between."""
        self._recorded.clear()
        self._forked, self._joined = False, self._copied

    def _check_forked(self) -> None:
        assert self._forked, "the copy queue is not part of the capture"
