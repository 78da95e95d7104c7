"""Recognise out-of-memory errors of Python, PyTorch, CUDA and Triton."""

from __future__ import annotations

import errno

import torch

from specache.errors import SlowTierError

_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",  # PyTorch on the CPU
    "DefaultCPUAllocator: not enough memory",  # the same on Windows
    "CUDA error: out of memory",  # raised outside of PyTorch's allocator: pinned memory, streams, kernels
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if memory ran out, including the byte budget of `fast_memory`."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, SlowTierError):  # a background read has the system's error as its cause
        return error.__cause__ is not None and is_out_of_memory(error.__cause__)
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def on_the_gpu(error: BaseException) -> bool:
    """Return True if the GPU's memory ran out, as far as the error tells."""
    cause = error.__cause__ if isinstance(error, SlowTierError) and error.__cause__ is not None else error
    return isinstance(cause, torch.OutOfMemoryError) or "CUBLAS" in str(cause) or "Triton Error" in str(cause)
