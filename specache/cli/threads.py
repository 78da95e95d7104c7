"""How many CPU threads a command computes with."""

from __future__ import annotations

import os

from specache.platform.machine import usable_cores


def set_threads(threads: int | None) -> None:
    """Have PyTorch compute with so many CPU threads; None sets `default_threads`."""
    import torch

    torch.set_num_threads(threads or default_threads())


def default_threads() -> int:
    """Return PyTorch's number of threads, but no more than can run at once.

    PyTorch does not see that a container may use only a share of the cores' time. A number in
    OMP_NUM_THREADS is used as it is.
    """
    import torch

    most = torch.get_num_threads()
    return most if os.environ.get("OMP_NUM_THREADS") else min(most, usable_cores() or most)
