"""Facts about this machine, from the system. Unknown facts are None or empty."""

from __future__ import annotations

import os
import platform
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOST_CACHES = 10  # of one processor
_UNLIMITED = 1 << 60  # version 1 of the control groups writes "no limit" as a huge number


def processor() -> dict[str, str]:
    """Return the first processor of `/proc/cpuinfo`; empty if there is none."""
    info: dict[str, str] = {}
    for line in file_lines("/proc/cpuinfo"):
        name, colon, value = line.partition(":")
        if colon:
            info.setdefault(name.strip(), value.strip())
    return info


def processor_name() -> str:
    return processor().get("model name") or platform.processor() or platform.machine()


def usable_cores() -> int | None:
    """Return how many threads of this process can run at once.

    These are the processors that it may use, or fewer if a control group limits its time on them
    (`docker --cpus`, a CPU limit of Kubernetes): whole cores within that limit, at least 1. With
    more threads the limit is used up early in each period, and then none of them runs.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cpu_quota()
    return cores if cores is None or quota is None else max(1, min(cores, int(quota)))


def cpu_quota() -> float | None:
    """Return how many cores' time the control groups (versions 2 and 1) allow this process.

    None without a limit.
    """
    limits = [_line(f"{folder}/cpu.max").split() for folder in _upwards("/sys/fs/cgroup", _own_path(""))]
    for folder in _upwards("/sys/fs/cgroup/cpu", _own_path("cpu")):
        limits.append([_line(f"{folder}/cpu.cfs_quota_us"), _line(f"{folder}/cpu.cfs_period_us")])
    quotas = [int(limit[0]) / int(limit[1]) for limit in limits if len(limit) == 2 and all(map(_is_positive, limit))]
    return min(quotas, default=None)


def last_level_cache() -> int | None:
    """Return the bytes of the last-level caches of the processors that this process may use.

    A cache that several of them share counts once. None if the system does not report caches.
    """
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    caches: dict[tuple[int, str], int] = {}  # (level, the processors that share it): bytes
    for core in usable:
        for number in range(_MOST_CACHES):
            folder = f"/sys/devices/system/cpu/cpu{core}/cache/index{number}"
            level, size = _number(f"{folder}/level"), _cache_size(_line(f"{folder}/size"))
            if level is None:
                break
            if size is not None and _line(f"{folder}/type") != "Instruction":
                caches[level, _line(f"{folder}/shared_cpu_list") or str(core)] = size
    last = max((level for level, _ in caches), default=None)
    return None if last is None else sum(size for (level, _), size in caches.items() if level == last)


def memory() -> dict[str, Any]:
    """Return the bytes of main memory.

    `usable_bytes` can be allocated without swapping, within the container's limit.
    """
    total = _kilobytes(_meminfo().get("MemTotal"))
    if total is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "total_bytes": total,
        "available_bytes": _system_available(),
        "container_limit_bytes": control_group()[0],
        "usable_bytes": available_memory(),
    }


def available_memory() -> int | None:
    """Return the bytes that this process can still allocate without swapping; None if unknown.

    This is the least that the system and any control group around this process have left. Page
    cache counts as left, since the kernel gives it up; so do mapped files, even those in use
    (`mapped_bytes`).
    """
    bounds = [group.left for group in control_groups()]
    system = _system_available()
    return min(bounds if system is None else [*bounds, system], default=None)


def free_swap() -> int:
    """Return the free bytes of swap space; 0 if unknown."""
    return _kilobytes(_meminfo().get("SwapFree")) or 0


@dataclass(frozen=True)
class ControlGroup:
    """A control group that limits memory, in bytes.

    Attributes:
        used: memory of its processes, page cache included; None if unknown.
        reclaimable: page cache in `used`, which the kernel gives up before memory runs out.
    """

    limit: int
    used: int | None
    reclaimable: int

    @property
    def left(self) -> int:
        return max(0, self.limit - max(0, (self.used or 0) - self.reclaimable))


def control_groups() -> list[ControlGroup]:
    """Return the control groups (versions 2 and 1) around this process that limit memory, the
    innermost first.
    """
    found = [_group_v2(folder) for folder in _upwards("/sys/fs/cgroup", _own_path(""))]
    found += [_group_v1(folder) for folder in _upwards("/sys/fs/cgroup/memory", _own_path("memory"))]
    return [group for group in found if group is not None]


def control_group() -> tuple[int | None, int | None]:
    """Return (limit, used) in bytes of the control group with the least memory left."""
    tightest = min(control_groups(), key=lambda group: group.left, default=None)
    return (None, None) if tightest is None else (tightest.limit, tightest.used)


def mapped_bytes(blocks: Iterable[tuple[int, int]]) -> int:
    """Return the bytes of memory blocks (address, size) that are mapped files: page cache that
    stays in use.

    If the system does not list its mappings, all blocks count.
    """
    lines = file_lines("/proc/self/maps")
    if not lines:
        return sum(size for _, size in blocks)
    starts, of_files = [], []
    for line in lines:
        addresses, _, _, _, inode = line.split(maxsplit=5)[:5]
        starts.append(int(addresses.partition("-")[0], 16))
        of_files.append(inode != "0")
    return sum(size for address, size in blocks if address >= starts[0] and of_files[bisect_right(starts, address) - 1])


def cuda_missing() -> str | None:
    """Return the reason why CUDA is not available, or None if it is."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this PyTorch ({torch.__version__}) was built without CUDA"
    return "PyTorch sees no CUDA device (no GPU, no driver, or an empty CUDA_VISIBLE_DEVICES)"


def has_nvidia_gpu() -> bool:
    """Return True if the system shows an NVIDIA GPU (Linux), whether or not PyTorch can use it."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _meminfo() -> dict[str, str]:
    return {name: value for name, _, value in (line.partition(":") for line in file_lines("/proc/meminfo"))}


def _system_available() -> int | None:
    """Return the system's free memory, page cache included."""
    available = _kilobytes(_meminfo().get("MemAvailable"))
    if available is None:
        with suppress(ImportError, OSError, RuntimeError):
            import psutil

            available = int(psutil.virtual_memory().available)
    return available


def _own_path(controller: str) -> str:
    """Return this process's group in the hierarchy of a version 1 controller; an empty name means
    version 2.
    """
    for line in file_lines("/proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"


def _upwards(mount: str, path: str) -> Iterator[str]:
    """Yield the group's folder and its parents.

    A container may see only its own group, as the root.
    """
    parts = path.strip("/").split("/") if path.strip("/") else []
    for depth in range(len(parts), -1, -1):
        yield "/".join([mount, *parts[:depth]])


def _group_v2(folder: str) -> ControlGroup | None:
    limits = [limit for name in ("max", "high") if (limit := _number(f"{folder}/memory.{name}")) is not None]
    if not limits:
        return None
    return ControlGroup(min(limits), _number(f"{folder}/memory.current"), _page_cache(folder, ""))


def _group_v1(folder: str) -> ControlGroup | None:
    limit = _number(f"{folder}/memory.limit_in_bytes")
    if limit is None or limit >= _UNLIMITED:
        return None
    return ControlGroup(limit, _number(f"{folder}/memory.usage_in_bytes"), _page_cache(folder, "total_"))


def _page_cache(folder: str, prefix: str) -> int:
    stat = dict(line.split() for line in file_lines(f"{folder}/memory.stat"))
    return sum(int(stat.get(f"{prefix}{name}", 0)) for name in ("inactive_file", "active_file"))


def file_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _line(path: str) -> str:
    return next(iter(file_lines(path)), "").strip()


def _number(path: str) -> int | None:
    text = _line(path)
    return int(text) if text.isdigit() else None


def _is_positive(text: str) -> bool:
    return text.isdigit() and int(text) > 0


def _cache_size(text: str) -> int | None:
    """Return the bytes of a cache's size in sysfs, such as `48K` or `320M`."""
    number, unit = text[:-1], {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    return int(number) * unit if unit is not None and number.isdigit() else None


def _kilobytes(text: str | None) -> int | None:
    return None if text is None else int(text.split()[0]) * 1024
