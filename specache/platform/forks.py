"""What a forked process must not inherit: locks that a thread of its parent held.

A forked process has one thread, that which forked. A lock that another thread held at that moment
would never be released there. Those of `lock` are free in a forked process, whoever held them in
the parent. What they guard may have been changed halfway; objects of the parent are only freed
there (see `cache/one_call.py`), and what belongs to the process is begun anew.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable

_locks: weakref.WeakSet[threading.Lock | threading.RLock] = weakref.WeakSet()


def lock() -> threading.Lock:
    """Return a lock that a forked process finds free. A thread that holds it must not fork."""
    made = threading.Lock()
    _locks.add(made)
    return made


def reentrant_lock() -> threading.RLock:
    """Return such a lock that the thread that holds it may take again. It may fork then."""
    made = threading.RLock()
    _locks.add(made)
    return made


def in_child(function: Callable[[], None]) -> Callable[[], None]:
    """Call this function in every forked process, before the program goes on there."""
    if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
        os.register_at_fork(after_in_child=function)
    return function


@in_child
def _free_locks() -> None:
    """Free all locks but the reentrant ones that this thread holds.

    By the method with which the standard library frees its own.
    """
    for made in list(_locks):
        held_here: Callable[[], bool] | None = getattr(made, "_is_owned", None)  # reentrant ones have it
        if held_here is None or not held_here():
            free: Callable[[], None] = getattr(made, "_at_fork_reinit")  # noqa: B009 -- typeshed lacks it
            free()
