"""Reads in the background: a bounded queue, served by a few threads, whose requests can be cancelled at any time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from specache.tiers.transfer import Arrival

QUEUE_LIMIT = 1024  # requests of a cache that are not finished: a step asks for one per layer and sequence


class PrefetchRequest:
    """One read in the background. Its rows land in memory of its own, so that nobody has to wait for it when it is not wanted."""

    def __init__(self, future: Future[tuple[Arrival, float]]) -> None:
        self._future = future

    @property
    def done(self) -> bool:
        return self._future.done()

    def result(self) -> tuple[Arrival, float]:
        """The rows and the seconds that reading took, waiting for them; raises what the read raised."""
        return self._future.result()

    def cancel(self) -> bool:
        """Nobody will ask for the result: a queued read is not begun, one that runs ends unheard, also with an error.

        Returns whether it had not begun.
        """
        return self._future.cancel()


class PrefetchWorker:
    """The threads that read ahead for all layers of a cache. Requests start in the order they were submitted.

    Args:
        threads: reads at a time. One where reads are copies in memory; a few where they wait for a device.
    """

    def __init__(self, threads: int = 1) -> None:
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="specache-prefetch")
        self._room = threading.BoundedSemaphore(QUEUE_LIMIT)

    def submit(self, read: Callable[[], Arrival]) -> PrefetchRequest | None:
        """Read in the background; `None` if the queue is full.

        Refused rows are fetched by the step that needs them: slower, and nothing else. Waiting here for room would hold up the
        layers whose rows are there.
        """
        if not self._room.acquire(blocking=False):
            return None
        room = self._room
        future = self._executor.submit(timed, read)
        future.add_done_callback(lambda _: room.release())  # it outlives a worker that is dropped
        return PrefetchRequest(future)

    def close(self) -> None:
        """Cancel what has not begun and end the threads."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def abandon(self) -> None:
        """The same without waiting, for a cache that was never closed."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def __del__(self) -> None:
        if hasattr(self, "_executor"):  # not where no thread pool could be made
            self.abandon()


def timed(read: Callable[[], Arrival]) -> tuple[Arrival, float]:
    """The rows, and the seconds that reading them took."""
    started = time.perf_counter()
    arrival = read()
    return arrival, time.perf_counter() - started
