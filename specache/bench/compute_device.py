"""Wait for the compute device and read its memory: the CPU's main memory, or the GPU's own."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from specache.platform.machine import memory

CPU, CUDA = "cpu", "cuda"


def synchronise() -> None:
    """Wait until the GPU has finished its queued work. Return at once where no GPU is used.

    A call only queues work on a GPU, so a timing needs this before it starts and before it stops.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def host_ms(function: Callable[[], object]) -> float:
    """Return the milliseconds of a call by the host's clock, with the GPU idle before and after."""
    synchronise()
    started = time.perf_counter()
    function()
    synchronise()
    return (time.perf_counter() - started) * 1e3


def gpu_ms(function: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Return the milliseconds that a GPU takes for what `function` queues, by CUDA events.

    Args:
        before: queued right before. While the GPU does it, the host queues the function's work, so
            that the time has no gaps in which the GPU waits for the host.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before()
    start.record()
    function()
    end.record()
    end.synchronize()
    elapsed: float = start.elapsed_time(end)
    return elapsed


def free_bytes(device: str) -> int | None:
    """Return the bytes that can be allocated where the model computes, or `None` if unknown."""
    if device == CUDA:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    usable: int | None = memory()["usable_bytes"]
    return usable


def release_memory() -> None:
    """Free unreferenced objects, and PyTorch's cached GPU and page-locked memory."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        empty_host_cache = getattr(torch.accelerator, "empty_host_cache", None)  # not in every release of PyTorch
        if empty_host_cache is not None:
            empty_host_cache()


def reset_peak(device: str) -> None:
    """Restart the peak, on CUDA and Linux. Elsewhere it stays that of the whole process."""
    if device == CUDA:
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """Return the most bytes since `reset_peak`, allocated on the GPU or resident in the process."""
    if device == CUDA:
        return torch.cuda.max_memory_allocated()
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_bytes(device: str) -> int:
    """Return the memory in use now, or the peak where the system does not report it."""
    if device == CUDA:
        return torch.cuda.memory_allocated()
    resident = _status("VmRSS")
    return peak_bytes(device) if resident is None else resident


def _status(name: str) -> int | None:
    """Return a line of /proc/self/status in bytes, or `None` if there is no such line."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
