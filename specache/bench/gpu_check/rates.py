"""The rates of a device: its memory, its matrix units, and the link to main memory."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from specache.bench.compute_device import gpu_ms, host_ms
from specache.bench.gpu_check.checks import PartRun, on_gpu
from specache.bench.plain_read import LargeArray
from specache.device.sources import row_source

REPEATS = 7
PRODUCT = 8192  # rows and columns of the matrices that are multiplied
ROW_PAIRS = 64  # fetched per head, as in a step
HEADS, WIDTH = 8, 256  # of the rows that are gathered: 8 heads of 128 channels, keys and values


def measure_rates(part: PartRun) -> dict[str, float]:
    """Return the rates, in 10^9 bytes or 10^12 operations per second, as the best of several."""
    found = {"read_gb_per_s": LargeArray(device=part.device).best_gb_per_s(REPEATS)}
    found |= _copy_rates(part)
    found["gather_gb_per_s"] = _gather_rate(part)
    found["matrix_tflops"] = _matrix_rate(part)
    return found


def _copy_rates(part: PartRun) -> dict[str, float]:
    """Return the rates of copies on the device (bytes read and written), to it and from it."""
    size, device = part.sizes.transfer_bytes, part.device
    source, into = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.ones(size, dtype=torch.uint8, pin_memory=on_gpu(part))
    return {
        "copy_gb_per_s": 2 * size / _best(part, lambda: into.copy_(source)) / 1e6,
        "to_device_gb_per_s": size / _best(part, lambda: into.copy_(host, non_blocking=True)) / 1e6,
        "to_host_gb_per_s": size / _best(part, lambda: host.copy_(into, non_blocking=True)) / 1e6,
    }


def _gather_rate(part: PartRun) -> float:
    """Return the rate at which a kernel reads scattered rows of 512 bytes of page-locked memory."""
    tokens = max(1024, part.sizes.transfer_bytes // (HEADS * WIDTH * 2))
    if not on_gpu(part):
        tokens = 256
    rows = torch.ones(HEADS, tokens, WIDTH, dtype=torch.bfloat16, pin_memory=on_gpu(part))
    batch = 16 if on_gpu(part) else 1
    source = row_source([rows] * batch, torch.device(part.device))
    places = torch.stack([torch.randperm(tokens)[:ROW_PAIRS].sort().values for _ in range(batch * HEADS)])
    positions: Tensor = places.view(batch, HEADS, ROW_PAIRS).to(part.device)
    nbytes = positions.numel() * WIDTH * rows.element_size()
    return nbytes / _best(part, lambda: source.gather(positions)) / 1e6


def _matrix_rate(part: PartRun) -> float:
    n = PRODUCT if on_gpu(part) else 64
    a, b = (torch.randn(n, n, device=part.device, dtype=torch.float32).to(torch.bfloat16) for _ in range(2))
    return 2 * n**3 / _best(part, lambda: a @ b) / 1e9


def _best(part: PartRun, function: Callable[[], Any]) -> float:
    """Return the fewest milliseconds of a call, on random data the median of the best three."""
    timer = gpu_ms if on_gpu(part) else host_ms
    for _ in range(2):
        timer(function)
    return median(sorted(timer(function) for _ in range(REPEATS))[:3])
