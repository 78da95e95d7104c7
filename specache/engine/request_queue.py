"""Requests that wait, and those to be aborted: the part of an engine that any thread changes."""

from __future__ import annotations

from collections import deque

from specache.engine.handle import Handle
from specache.errors import UsageError
from specache.platform import forks


class RequestQueue:
    """Waiting requests, oldest first."""

    def __init__(self) -> None:
        self._lock = forks.lock()
        self._waiting: deque[Handle] = deque()
        self._aborted: set[Handle] = set()
        self._closed = False

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, handle: Handle) -> None:
        """Queue a request.

        Raises:
            UsageError: the queue is closed.
        """
        with self._lock:
            if self._closed:
                raise UsageError("This engine is closed. Make a new specache.Engine(model, config).")
            self._waiting.append(handle)

    def abort(self, handle: Handle) -> None:
        """Have a request, waiting or not, returned by `take_aborted`."""
        with self._lock:
            if not handle.done:
                self._aborted.add(handle)

    def take_aborted(self) -> set[Handle]:
        """Return the requests aborted since the last call, none of which waits any more."""
        with self._lock:
            aborted, self._aborted = self._aborted, set()
            self._waiting = deque(handle for handle in self._waiting if handle not in aborted)
        return aborted

    def first(self) -> Handle | None:
        """Return the oldest waiting request; it goes on waiting."""
        with self._lock:
            return self._waiting[0] if self._waiting else None

    def remove(self, handle: Handle) -> None:
        """Remove a request, if it waits."""
        with self._lock:
            if handle in self._waiting:
                self._waiting.remove(handle)

    def close(self) -> set[Handle]:
        """Refuse further requests and return those that wait."""
        with self._lock:
            self._closed = True
            return set(self._waiting)
