"""The kernel backends of `specache.kernels.dispatch` that benchmarks measure."""

from __future__ import annotations

import os

from specache.bench.compute_device import CUDA
from specache.kernels import triton
from specache.kernels.dispatch import OPERATIONS, TRITON, VARIABLE, active, available, using

PLAIN = "torch"
STATIC = "static"  # on a GPU: Triton's kernels in a step over static buffers, as `generate` runs them

__all__ = ["PLAIN", "STATIC", "VARIABLE", "active", "active_on", "available", "available_on", "layers_on", "using"]


def available_on(device: str) -> list[str]:
    """Return the backends for tensors on the CPU or on the GPU, the fastest last."""
    if device != CUDA:
        return available()
    return [PLAIN] if triton.unsupported_reason() else [PLAIN, TRITON]


def layers_on(device: str) -> list[str]:
    """Return the ways to measure one layer: a device's backends, with `STATIC` for Triton's."""
    return [STATIC if backend == TRITON else backend for backend in available_on(device)]


def active_on(device: str) -> dict[str, str]:
    """Return operation -> name of the backend that runs it on a device.

    Another backend takes over for dimensions that this one does not support.
    """
    if device != CUDA:
        return active()
    return dict.fromkeys(OPERATIONS, PLAIN if os.environ.get(VARIABLE) == PLAIN else available_on(CUDA)[-1])
