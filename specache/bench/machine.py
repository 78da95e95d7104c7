"""Where a result was measured: machine, kernels, versions; how much memory is free and how fast it is read."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import specache
from specache.bench import kernels

EVICTING_BYTES = 256 << 20  # far more than any last-level cache of a desktop; several times that of most servers


class LargeArray:
    """An array much larger than the last-level cache. Reading it measures the bandwidth, and leaves nothing else in the caches."""

    def __init__(self, nbytes: int = EVICTING_BYTES) -> None:
        self._array = torch.ones(nbytes // 4)  # float32: the sum that PyTorch vectorises best

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    def read(self) -> float:
        """One sum over the array, on all of PyTorch's threads -> milliseconds."""
        started = time.perf_counter()
        self._array.sum()
        return (time.perf_counter() - started) * 1e3


def describe() -> dict[str, Any]:
    """Machine, kernels and versions, JSON-ready."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "pytorch_uses": torch.backends.cpu.get_cpu_capability(),
            "usable_memory_bytes": usable_memory(),
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "system": platform.platform(),
        },
        "kernels": {"active": kernels.active(), "available": kernels.available()},
        "versions": {
            "specache": specache.__version__,
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
            "python": platform.python_version(),
        },
    }


def usable_memory() -> int | None:
    """Bytes that can still be allocated without swapping, where the system tells (Linux); the container's limit counts."""
    available = next((line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")), None)
    bounds = [] if available is None else [int(available) * 1024]
    limit, used = (next(iter(_lines(f"/sys/fs/cgroup/memory.{name}")), "") for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        bounds.append(int(limit) - int(used))
    return min(bounds, default=None)


def gigabytes(size: float) -> str:
    """`1.2 GB`, for messages."""
    return f"{size / 1e9:.1f} GB"


def _cpu_model() -> str:
    named = (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
