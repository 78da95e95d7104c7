"""SIGTERM and SIGHUP (a `timeout`, a closed terminal) end a command as an error does: it removes
its temporary folders and ends its processes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))  # Windows has one
_EXIT_SIGNAL = 128  # exit code of a shell for a process that a signal ended, without its number


@contextmanager
def unwound_by_signals() -> Iterator[None]:
    """Raise `SystemExit` in the block when the process is told to end; a second signal ends it at
    once.

    Signals that are ignored (`nohup`) or handled already stay so, and all outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in _SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is _end:
                signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(_EXIT_SIGNAL + number)
