"""A plain read of memory: the bandwidth that floors are computed from, and what evicts the caches.

A floor is the time in which memory delivers bytes that must be read at least once. It is only as
honest as the read: the array must be much larger than every cache (on some servers the last-level
cache has 300 MB), and the read must wait for memory, not for its own arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specache.bench.compute_device import CPU, CUDA, free_bytes, gpu_ms, host_ms
from specache.platform import machine

CACHES = 4  # the array is this many times the last-level cache
SMALLEST_BYTES = 256 << 20  # of the array; four times the last-level cache of machines that do not report theirs
GPU_BYTES = 1 << 30  # of an array on a GPU, so that one read takes much longer than a launch
SHARE_OF_FREE_MEMORY = 4  # at most one in so many free bytes
CACHED_BYTES = 1 << 20  # of an array that caches hold, to see how fast a read is without memory
WIDTH = 1024  # columns of the array as a matrix
_TRIALS = 3

Reader = Callable[[Tensor], object]


def evicting_bytes(device: str = CPU) -> int:
    """Return the size of an array that evicts everything else from the caches of a device.

    It is `CACHES` times the last-level cache, at least `SMALLEST_BYTES` (`GPU_BYTES` on a GPU), and
    at most a quarter of the free memory.
    """
    if device == CUDA:
        cache = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0)
        wanted, free = max(GPU_BYTES, CACHES * int(cache)), free_bytes(CUDA)
    else:
        wanted, free = max(SMALLEST_BYTES, CACHES * (machine.last_level_cache() or 0)), machine.available_memory()
    return wanted if free is None else min(wanted, free // SHARE_OF_FREE_MEMORY)


class LargeArray:
    """An array much larger than the last-level cache. Reading it measures the bandwidth and evicts
    everything else from the caches.

    Args:
        nbytes: its size; None chooses `evicting_bytes`.
    """

    def __init__(self, nbytes: int | None = None, *, device: str = CPU) -> None:
        size = evicting_bytes(device) if nbytes is None else nbytes
        rows = max(size // (4 * WIDTH), 1)
        self._array = torch.ones(rows, WIDTH, dtype=torch.float32, device=device)
        self._reader = _fastest_reader(self._array)
        self._reads_ms: list[float] = []

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    def read(self) -> float:
        """Read the array once, on all of PyTorch's threads or on the GPU -> milliseconds."""
        elapsed = _read_ms(_READERS[self._reader], self._array)
        self._reads_ms.append(elapsed)
        return elapsed

    def queue(self) -> object:
        """Queue a read and do not wait for it."""
        return _READERS[self._reader](self._array)

    def best_gb_per_s(self, reads: int = 0) -> float:
        """Return the bandwidth of the fastest read so far, in 10^9 bytes per second.

        The fastest does not depend on the machine's load.

        Args:
            reads: further reads to make first. There must be at least one read.
        """
        for _ in range(reads):
            self.read()
        return self.nbytes / min(self._reads_ms) / 1e6

    def floor_ms(self, nbytes: float) -> float:
        """Return the milliseconds in which memory delivers `nbytes` at `best_gb_per_s`."""
        return nbytes / self.best_gb_per_s() / 1e6

    def describe(self) -> dict[str, Any]:
        """Return how the bandwidth was measured, JSON-ready.

        `cached_gb_per_s` is the rate of the same read from an array that caches hold. Where it is
        not well above the bandwidth, arithmetic limits the read, and the floor is too high.
        """
        small = torch.ones(max(min(self.nbytes, CACHED_BYTES) // (4 * WIDTH), 1), WIDTH, device=self._array.device)
        cached = min(_read_ms(_READERS[self._reader], small) for _ in range(20))
        return {
            "read_gb_per_s": self.best_gb_per_s(),
            "reader": self._reader,
            "cached_gb_per_s": small.nbytes / cached / 1e6,
            "array_bytes": self.nbytes,
            "last_level_cache_bytes": machine.last_level_cache(),
        }


def _sum(array: Tensor) -> object:
    return array.sum()


def _matrix_vector(array: Tensor) -> object:
    return array @ array[0]


_READERS: dict[str, Reader] = {"sum": _sum, "matrix-vector product": _matrix_vector}
"""Which of them is limited by memory alone depends on PyTorch's build: a sum reaches three quarters
of the bandwidth with AVX-512, and a product without MKL may use one thread."""


def _fastest_reader(array: Tensor) -> str:
    times: dict[str, float] = dict.fromkeys(_READERS, float("inf"))
    for _ in range(_TRIALS):
        for name, reader in _READERS.items():
            times[name] = min(times[name], _read_ms(reader, array))
    return min(times, key=lambda name: times[name])


def _read_ms(reader: Reader, array: Tensor) -> float:
    if array.is_cuda:
        return gpu_ms(lambda: reader(array), before=lambda: reader(array))
    return host_ms(lambda: reader(array))
