"""Processes that keep cores busy beside a measurement, as a user's other programs do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PROGRAM = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(1000))"  # it ends with its parent


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run `count` busy processes until the block ends.

    Each has a session of its own: Linux gives sessions, not processes, equal shares of the cores.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            processes.append(
                subprocess.Popen([sys.executable, "-S", "-c", _PROGRAM], stdin=subprocess.DEVNULL, start_new_session=True)
            )
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
