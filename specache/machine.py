"""Facts of this machine, from the system. Whatever it does not tell is `None` or empty."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def processor() -> dict[str, str]:
    """The first processor of `/proc/cpuinfo`; empty where there is none."""
    info: dict[str, str] = {}
    for line in _lines("/proc/cpuinfo"):
        name, colon, value = line.partition(":")
        if colon:
            info.setdefault(name.strip(), value.strip())
    return info


def processor_name() -> str:
    return processor().get("model name") or platform.processor() or platform.machine()


def usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def memory() -> dict[str, Any]:
    """Bytes of main memory; `usable_bytes` can still be allocated without swapping, the container's limit included."""
    meminfo = {name: value for name, _, value in (line.partition(":") for line in _lines("/proc/meminfo"))}
    total, available = _kilobytes(meminfo.get("MemTotal")), _kilobytes(meminfo.get("MemAvailable"))
    limit, used = control_group()
    if total is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    bounds = [bound for bound in (available, None if limit is None else limit - (used or 0)) if bound is not None]
    return {
        "total_bytes": total,
        "available_bytes": available,
        "container_limit_bytes": limit,
        "usable_bytes": min(bounds, default=None),
    }


def control_group() -> tuple[int | None, int | None]:
    """Memory limit of the container and what it uses, in bytes: control groups version 2, then version 1."""
    own = next((line.split("::", 1)[1] for line in _lines("/proc/self/cgroup") if line.startswith("0::")), "/")
    folders = [f"/sys/fs/cgroup{own.rstrip('/')}", "/sys/fs/cgroup"]
    files = [(f"{folder}/memory.max", f"{folder}/memory.current") for folder in folders]
    v1 = "/sys/fs/cgroup/memory/memory"
    for limit_file, usage_file in [*files, (f"{v1}.limit_in_bytes", f"{v1}.usage_in_bytes")]:
        limit = _number(limit_file)
        if limit is not None and limit < 1 << 60:  # version 1 writes "unlimited" as a huge number
            return limit, _number(usage_file)
    return None, None


def cuda_missing() -> str | None:
    """Why no model can compute on CUDA here, or `None`."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this PyTorch ({torch.__version__}) was built without CUDA"
    return "PyTorch sees no CUDA device (no GPU, no driver, or an empty CUDA_VISIBLE_DEVICES)"


def has_nvidia_gpu() -> bool:
    """Whether the system shows an NVIDIA GPU, whatever PyTorch makes of it (Linux)."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: str) -> int | None:
    text = next(iter(_lines(path)), "").strip()
    return int(text) if text.isdigit() else None


def _kilobytes(text: str | None) -> int | None:
    return None if text is None else int(text.split()[0]) * 1024
