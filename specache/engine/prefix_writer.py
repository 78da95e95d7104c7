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


@dataclass(eq=False)
class _Write:
    """A prefix to write.

    Attributes:
        sequence: holds it. Nobody changes or clears it before the write has ended.
        owned: whether the writer clears the sequence then.
        stopped: whether the write is to end without a result.
        ended: whether the sequence is not read any more.
    """

    prefix: Prefix
    sequence: Sequence
    owned: bool
    stopped: bool = False
    ended: bool = False


class PrefixWriter:
    """Writes one prefix after the other, in order.

    One thread at a time calls the methods.

    Attributes:
        wake: called, on the writer's thread, when a write has ended.
    """

    def __init__(self, folder: PrefixFolder) -> None:
        self.wake: Callable[[], None] = lambda: None
        self._folder = folder
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
            return [write.prefix for write in self._writes()]

    def has(self, prefix: Prefix) -> bool:
        """Return whether a prefix is being written, or waits for it."""
        with self._changed:
            return self._has(prefix)

    def write(self, prefix: Prefix, sequence: Sequence, owned: bool) -> None:
        """Write a prefix in the background.

        Args:
            sequence: nobody else may change it before the write has ended. Forks may be taken.
            owned: whether the writer clears it then. Else its owner must ask `release` before it
                clears it.
        """
        with self._changed:
            self._waiting.append(_Write(prefix, sequence, owned))
            self._changed.notify_all()

    def release(self, sequence: Sequence) -> bool:
        """Have the writer clear a sequence, if it still needs it; return whether it does."""
        with self._changed:
            write = next((one for one in self._writes() if one.sequence is sequence and not one.ended), None)
            if write is not None:
                write.owned = True
            return write is not None

    def reads(self, sequence: Sequence | None) -> bool:
        """Return whether a sequence is being written now."""
        now = self._now
        return isinstance(now, _Write) and now.sequence is sequence

    def cancel(self, prefix: Prefix | None = None) -> bool:
        """Drop writes that have not begun: those of a prefix, or the newest one.

        A write that has begun is stopped soon. Returns whether one was dropped, and its sequence
        is not needed any more.
        """
        with self._changed:
            writes = [one for one in self._waiting if isinstance(one, _Write) and (prefix is None or one.prefix is prefix)]
            dropped = writes if prefix is not None else writes[-1:]
            for write in dropped:
                self._waiting.remove(write)
            now = self._now
            if not dropped and isinstance(now, _Write) and (prefix is None or now.prefix is prefix):
                now.stopped = True
            self._changed.notify_all()
        for write in dropped:
            if write.owned:
                write.sequence.clear()
        return bool(dropped)

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

    def _writes(self) -> list[_Write]:
        return [one for one in (self._now, *self._waiting) if isinstance(one, _Write)]

    def _has(self, prefix: Prefix) -> bool:
        return any(one.prefix is prefix for one in self._writes())

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
            self.wake()

    def _write(self, job: _Write) -> Written:
        with modes.ours():
            try:
                if self._stopping or job.stopped:
                    raise Stopped
                saved = self._folder.write(job.prefix.owner, job.sequence, lambda: self._stopping or job.stopped)
                return Written(job.prefix, saved)
            except Exception as error:
                return Written(job.prefix, error=error)
            finally:
                with self._changed:
                    job.ended = True
                if job.owned:  # it does not change any more
                    job.sequence.clear()
