"""What depends on where the model computes: waiting until it is done, and how much memory it takes there."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress
from pathlib import Path

import torch

from specache.platform.machine import memory

CPU, CUDA = "cpu", "cuda"


def synchronise() -> None:
    """Wait until a GPU has done all it was given. Its work is only queued when a call returns, so that nothing can be timed
    otherwise. Returns at once where no GPU was used.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def free_bytes(device: str) -> int | None:
    """Memory that can still be allocated where the model computes; `None` where the system does not tell."""
    if device == CUDA:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    usable: int | None = memory()["usable_bytes"]
    return usable


def release_memory() -> None:
    """Free what nobody holds, what PyTorch keeps of the GPU's memory and of page-locked memory included."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)  # not in every release
        if empty_host_cache is not None:
            empty_host_cache()


def reset_peak(device: str) -> None:
    """Begin a new peak where the system can (CUDA, Linux); elsewhere it is that of the whole process."""
    if device == CUDA:
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """Most memory since `reset_peak`: allocated on the GPU, or resident in this process."""
    if device == CUDA:
        return torch.cuda.max_memory_allocated()
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_bytes(device: str) -> int:
    """Memory in use now; where the system does not tell, the peak."""
    if device == CUDA:
        return torch.cuda.memory_allocated()
    resident = _status("VmRSS")
    return peak_bytes(device) if resident is None else resident


def _status(name: str) -> int | None:
    """A line of /proc/self/status, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
