"""The kernel backends of `specache.kernels.dispatch`, each of which a benchmark measures."""

from __future__ import annotations

import os

from specache.bench.compute_device import CUDA
from specache.kernels import triton
from specache.kernels.dispatch import OPERATIONS, TRITON, VARIABLE, active, available, using

PLAIN = "torch"
STATIC = "static"  # on a GPU: Triton's kernels in a step over static buffers, as `generate` runs them

__all__ = ["PLAIN", "STATIC", "TRITON", "VARIABLE", "active", "active_on", "available", "available_on", "layers_on", "using"]


def available_on(device: str) -> list[str]:
    """Backends for tensors on the CPU or on the GPU, fastest last."""
    if device != CUDA:
        return available()
    return [PLAIN] if triton.unsupported_reason() else [PLAIN, TRITON]


def layers_on(device: str) -> list[str]:
    """What one layer can be measured with there: the backends, and on a GPU the layer as a static step has it."""
    backends = available_on(device)
    return [*backends, STATIC] if TRITON in backends else backends


def active_on(device: str) -> dict[str, str]:
    """Operation -> name of the backend that serves it there, unless a layer's dimensions are none of its own."""
    if device != CUDA:
        return active()
    return dict.fromkeys(OPERATIONS, PLAIN if os.environ.get(VARIABLE) == PLAIN else available_on(CUDA)[-1])
