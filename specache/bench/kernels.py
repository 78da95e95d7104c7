"""The kernel backends of `specache.kernels.dispatch`, each of which a benchmark measures."""

from __future__ import annotations

import os

from specache.bench.device import CUDA
from specache.kernels import triton
from specache.kernels.dispatch import OPERATIONS, TRITON, VARIABLE, active, available, using

PLAIN = "torch"

__all__ = ["PLAIN", "TRITON", "VARIABLE", "active", "active_on", "available", "available_on", "using"]


def available_on(device: str) -> list[str]:
    """Backends for tensors on the CPU or on the GPU, fastest last."""
    if device != CUDA:
        return available()
    return [PLAIN] if triton.missing() else [PLAIN, TRITON]


def active_on(device: str) -> dict[str, str]:
    """Operation -> name of the backend that serves it there, unless a layer's dimensions are none of its own."""
    if device != CUDA:
        return active()
    return dict.fromkeys(OPERATIONS, PLAIN if os.environ.get(VARIABLE) == PLAIN else available_on(CUDA)[-1])
