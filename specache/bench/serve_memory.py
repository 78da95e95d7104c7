"""The resident memory of a process and of all that it started."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

_EVERY_S = 0.5


class TreeMemory:
    """Measures the most resident bytes of a process's descendants inside a `with` block.

    The sum over all of them is sampled twice a second. On Linux a single process's own peak,
    which the kernel keeps, counts too, so that a short one is not missed.

    Args:
        root: id of the process whose descendants are measured, without itself.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="specache-memory", daemon=True)

    def __enter__(self) -> TreeMemory:
        for process in self._processes():
            with suppress(OSError):  # not Linux, or another user's process
                Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # restart the kernel's peak
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self._measure()

    @property
    def now(self) -> int:
        """Return the resident bytes in use."""
        total = 0
        for process in self._processes():
            with suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    @property
    def peak(self) -> int:
        """Return the most resident bytes in use since the beginning of the block."""
        return self._peak

    def _processes(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self._root).children(recursive=True)
        except psutil.Error:
            return []

    def _sample(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self._measure()

    def _measure(self) -> None:
        own = [_kernel_peak(process.pid) for process in self._processes()]
        self._peak = max(self._peak, self.now, *own, 0)


def _kernel_peak(pid: int) -> int:
    """Return the most resident bytes of a process as the kernel keeps it, or 0 if unknown."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
