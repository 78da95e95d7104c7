"""Background reads: a bounded queue, served by a few threads, with cancellable requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from specache.tiers.transfer import Arrival

QUEUE_LIMIT = 1024  # unfinished requests of a cache; a step submits one per layer and sequence


class PrefetchRequest:
    """One background read.

    Its rows go to memory of its own, so a discarded read need not be waited for.
    """

    def __init__(self, future: Future[tuple[Arrival, float]]) -> None:
        self._future = future

    @property
    def done(self) -> bool:
        return self._future.done()

    def result(self) -> tuple[Arrival, float]:
        """Return the rows and the seconds that reading took, waiting for them.

        Raise what the read raised.
        """
        return self._future.result()

    def cancel(self) -> bool:
        """Discard the read and return True if it had not started.

        A running read's result or error is ignored.
        """
        return self._future.cancel()


class PrefetchWorker:
    """The prefetch threads of a cache, for all layers. Requests start in submission order.

    Args:
        threads: concurrent reads: one if reads are copies in memory, a few if they wait for a
            device.
    """

    def __init__(self, threads: int = 1) -> None:
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="specache-prefetch")
        self._room = threading.BoundedSemaphore(QUEUE_LIMIT)

    def submit(self, read: Callable[[], Arrival]) -> PrefetchRequest | None:
        """Read in the background; return None if the queue is full.

        The step that needs refused rows fetches them itself, which is only slower. Waiting here
        would delay layers whose rows have arrived.
        """
        if not self._room.acquire(blocking=False):
            return None
        room = self._room
        future = self._executor.submit(timed, read)
        future.add_done_callback(lambda _: room.release())  # the semaphore outlives a dropped worker
        return PrefetchRequest(future)

    def close(self) -> None:
        """Cancel requests that have not started and end the threads."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def abandon(self) -> None:
        """Do the same without waiting, for a cache that was never closed."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def __del__(self) -> None:
        if hasattr(self, "_executor"):  # not set if the thread pool could not be created
            self.abandon()


def timed(read: Callable[[], Arrival]) -> tuple[Arrival, float]:
    """Return the rows, and the seconds that reading them took."""
    started = time.perf_counter()
    arrival = read()
    return arrival, time.perf_counter() - started
