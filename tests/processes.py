"""Other processes, seen from a test: each may end between two questions about it."""

from __future__ import annotations

import time

import psutil


def ended(process: psutil.Process, within_s: float = 20.0) -> bool:
    """Wait until a process has ended, and say whether it has.

    Nobody may have asked for its exit code yet.
    """
    deadline = time.monotonic() + within_s
    while True:
        try:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:  # it ended after is_running had looked
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def servers() -> set[psutil.Process]:
    """Return the processes below this one that run `specache serve`."""
    return {process for process in psutil.Process().children(recursive=True) if "serve" in _command(process)}


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
