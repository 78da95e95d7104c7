"""Processes that keep cores busy beside a measurement, as a user's other programs do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PROGRAM = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(1000))"  # it ends with its parent


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run `count` busy processes, each on one core, until the block ends."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            processes.append(subprocess.Popen([sys.executable, "-S", "-c", _PROGRAM], stdin=subprocess.DEVNULL))
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
