"""Background reads: a bounded queue, served by a few threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

QUEUE_LIMIT = 1024  # unfinished requests of a cache; a step submits one per layer and sequence


class PrefetchWorker:
    """The prefetch threads of a cache, for all layers. Requests start in submission order.

    Args:
        threads: concurrent reads: one if reads are copies in memory, a few if they wait for a
            device.
    """

    def __init__(self, threads: int = 1) -> None:
        self._executor = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="specache-prefetch")
        self._room = threading.BoundedSemaphore(QUEUE_LIMIT)

    def submit(self, read: Callable[[], Result]) -> Future[Result] | None:
        """Call `read` in a thread; return None if the queue is full.

        Its result is in memory of its own, so one that is not wanted need not be waited for.
        The step that needs refused rows fetches them itself, which is only slower. Waiting here
        would delay layers whose rows have arrived.
        """
        if not self._room.acquire(blocking=False):
            return None
        room = self._room
        future = self._executor.submit(read)
        future.add_done_callback(lambda _: room.release())  # the semaphore outlives a dropped worker
        return future

    def close(self) -> None:
        """Cancel requests that have not started and end the threads."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def abandon(self) -> None:
        """Do the same without waiting, for a cache that was never closed."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def __del__(self) -> None:
        if hasattr(self, "_executor"):  # not set if the thread pool could not be created
            self.abandon()
