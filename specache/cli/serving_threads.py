"""CPU threads of a server, which shares the machine with its clients."""

from __future__ import annotations

import os
import sys

from specache.platform.machine import usable_cores

WAIT_POLICY = "PASSIVE"


def serving_threads(clients_are_here: bool) -> int:
    """Return how many threads compute: one core is left to clients on this machine."""
    cores = usable_cores() or 1
    return max(1, cores - 1) if clients_are_here else cores


def set_thread_environment(threads: int) -> bool:
    """Have OpenMP compute with so many threads, which sleep while they wait.

    Threads that wait actively take the core that a client needs: a step beside one busy process
    then takes several times as long.

    Returns:
        False if PyTorch is loaded already: OpenMP reads these variables then, and no more.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_WAIT_POLICY", WAIT_POLICY)
    return "torch" not in sys.modules
