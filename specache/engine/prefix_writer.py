"""A thread that writes prefixes to the disk while the engine goes on."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from specache.cache.prefix_index import Prefix
from specache.cache.sequence import Sequence
from specache.platform import modes
from specache.sessions.prefix_files import SavedPrefix, Stopped
from specache.sessions.prefix_folder import PrefixFolder

MOST_WAITING = 4  # prefixes that wait to be written, each a fork with a residual of its own
NICENESS = 10  # of the thread: decoding goes first


@dataclass(frozen=True)
class Written:
    """The end of a write: the prefix, and what was written or why nothing was."""

    prefix: Prefix
    saved: SavedPrefix | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class _Write:
    """A prefix to write from a fork that belongs to the writer."""

    prefix: Prefix
    sequence: Sequence


class PrefixWriter:
    """Writes one prefix after the other, in order.

    One thread at a time calls the methods.

    Args:
        wake: called, on the writer's thread, when a write has ended.
    """

    def __init__(self, folder: PrefixFolder, wake: Callable[[], None] = lambda: None) -> None:
        self._folder = folder
        self._wake = wake
        self._changed = threading.Condition()
        self._waiting: deque[_Write | SavedPrefix] = deque()  # to write, or to remove
        self._now: _Write | SavedPrefix | None = None  # what is being written or removed
        self._ended: deque[Written] = deque()
        self._stopping = self._closing = False
        self._thread = threading.Thread(target=self._run, name="specache-prefixes", daemon=True)
        self._thread.start()

    @property
    def is_full(self) -> bool:
        """Return whether no more prefixes may wait."""
        with self._changed:
            return sum(isinstance(one, _Write) for one in self._waiting) >= MOST_WAITING

    @property
    def waiting(self) -> int:
        """Return how many prefixes are not written yet."""
        return len(self.pending())

    def pending(self) -> list[Prefix]:
        """Return the prefixes that are being written, or wait for it."""
        with self._changed:
            return [one.prefix for one in (self._now, *self._waiting) if isinstance(one, _Write)]

    def has(self, prefix: Prefix) -> bool:
        """Return whether a prefix is being written, or waits for it."""
        with self._changed:
            return self._has(prefix)

    def write(self, prefix: Prefix, sequence: Sequence) -> None:
        """Write a prefix in the background. The fork `sequence` belongs to the writer from now."""
        with self._changed:
            self._waiting.append(_Write(prefix, sequence))
            self._changed.notify_all()

    def remove(self, saved: SavedPrefix) -> None:
        """Remove a prefix in the background."""
        with self._changed:
            self._waiting.append(saved)
            self._changed.notify_all()

    def ended(self) -> list[Written]:
        """Return the writes that ended since the last call."""
        found = []
        with suppress(IndexError):
            while True:
                found.append(self._ended.popleft())
        return found

    def wait_for(self, prefix: Prefix) -> None:
        """Wait until a prefix is written, or could not be."""
        with self._changed:
            self._changed.wait_for(lambda: not self._has(prefix))

    def close(self, seconds: float) -> None:
        """Write what waits for at most so many seconds, then stop. Safe to call twice."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and self._now is None, max(0.0, deadline - time.monotonic()))
            self._stopping = self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _has(self, prefix: Prefix) -> bool:
        return any(isinstance(one, _Write) and one.prefix is prefix for one in (self._now, *self._waiting))

    def _run(self) -> None:
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                self._now = job
            if isinstance(job, _Write):
                self._ended.append(self._write(job))
            else:
                with suppress(Exception):  # it stays, and is removed when its bytes are needed
                    self._folder.remove(job)
            del job
            with self._changed:
                self._now = None
                self._changed.notify_all()
            self._wake()

    def _write(self, job: _Write) -> Written:
        with modes.ours():
            try:
                if self._stopping:
                    raise Stopped
                saved = self._folder.write(job.prefix.owner, job.sequence, lambda: self._stopping)
                return Written(job.prefix, saved)
            except Exception as error:
                return Written(job.prefix, error=error)
            finally:
                job.sequence.clear()
