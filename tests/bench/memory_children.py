"""What children of `test_memory.py` run. Nothing here imports PyTorch, which takes seconds."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection


def hold(connection: Connection, size: int) -> None:
    """Fill `size` bytes of memory."""
    connection.send(None)
    connection.recv()
    memory = bytearray(size)
    memory[::4096] = b"x" * len(memory[::4096])
    connection.send(len(memory))
    time.sleep(60)


def fail(connection: Connection, message: str) -> None:
    raise ValueError(message)
