"""A guard: one call at a time may use a cache, in the process that made it. Others get an error."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from specache.errors import UsageError
from specache.platform import forks


class _Call:
    """A call that uses a cache: name and thread. It ends with its frame, which holds it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.thread = threading.get_ident()


class OneCallAtATime:
    """Tracks the call that uses a cache. It refuses other calls and never waits."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._mutex = forks.lock()
        self._call: weakref.ref[_Call] | None = None

    @property
    def forked(self) -> bool:
        """Whether this process was forked from the one that made the cache."""
        return os.getpid() != self._process

    @property
    def elsewhere(self) -> bool:
        """Whether a call on another thread uses the cache."""
        call = self._current()
        return call is not None and call.thread != threading.get_ident()

    def check_process(self) -> None:
        """Refuse to run in a forked process.

        Raises:
            UsageError: the process was forked.
        """
        if self.forked:
            raise UsageError(
                "This SpeCache was made before the process was forked: its threads and files belong to the parent process, and "
                "waiting for them here would never end. Start processes with multiprocessing's 'spawn' and make the cache there, "
                "or save a session (specache.Session) in one process and open it in the other."
            )

    @contextmanager
    def by(self, name: str, *, from_callbacks: bool = False) -> Iterator[None]:
        """Reserve the cache for a call of this name inside the block.

        Args:
            from_callbacks: allow it in a callback of the call that uses the cache, between two
                passes.

        Raises:
            UsageError: another call uses the cache, or the process was forked. Nothing changed.
        """
        self.check_process()
        call = _Call(name)
        with self._mutex:
            other = self._current()
            if other is None:
                self._call = weakref.ref(call)
        if other is not None:
            if from_callbacks and other.thread == threading.get_ident():
                yield
                return
            raise UsageError(_conflict(other, name))
        try:
            yield
        finally:
            self._call = None

    def _current(self) -> _Call | None:
        return None if self._call is None else self._call()


def _conflict(other: _Call, name: str) -> str:
    """Return the message for a call that meets another one."""
    if other.thread == threading.get_ident():
        return (
            f"{name} was called while {other.name} is using this SpeCache, from a streamer, a processor or another callback of "
            "that call. One cache serves one call at a time: wait until it returns, or use another cache. Its stats() can be asked."
        )
    return (
        f"{name} was called while {other.name} is using this SpeCache in another thread. One cache serves one call at a time: wait "
        "for the other call, or have one cache per thread; while no call is using it, cache.fork() makes an independent copy. To "
        "answer several requests at once use one specache.Engine(model, config)."
    )
