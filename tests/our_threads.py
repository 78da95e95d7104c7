"""Threads of specache that a test started; not those of a server that other tests share."""

from __future__ import annotations

import threading

_before: set[threading.Thread] = set()


def note_threads() -> None:
    """Note the threads at the beginning of a test (`conftest.py` calls it)."""
    _before.clear()
    _before.update(threading.enumerate())


def our_new_threads() -> list[str]:
    """Return the names of specache's threads that run and did not when the test began."""
    return [thread.name for thread in threading.enumerate() if "specache" in thread.name and thread not in _before]
