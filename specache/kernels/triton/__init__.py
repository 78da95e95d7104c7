"""The kernels in Triton, for NVIDIA GPUs. Triton is only imported when it is used."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from specache.platform.machine import cuda_missing
from specache.platform.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from specache.kernels.triton.backend import TritonKernels
    from specache.kernels.triton.hot_rows_backend import HotRowKernels

CAPABILITY = (8, 0)  # bfloat16 on tensor cores
INTERPRETER = "TRITON_INTERPRET"


def unsupported_reason(device: torch.device | None = None) -> str | None:
    """Return why a CUDA device (by default the current one) is unsupported, or `None`.

    If everything is installed, the smallest kernel is built and launched once; its error is the
    reason.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'specache[gpu]'"
    if reason := cuda_missing():
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, Triton kernels need {CAPABILITY[0]}.{CAPABILITY[1]}"
    return launch_failure(device or torch.device("cuda", torch.cuda.current_device()))


@cache
def launch_failure(device: torch.device) -> str | None:
    """Launch a trial kernel on `device`. Return why it failed, or `None`.

    Raises:
        Exception: memory ran out, which says nothing about Triton.
    """
    try:
        from specache.kernels.triton.trial import try_launch

        try_launch(device)
    except Exception as error:  # compilers, linkers and drivers fail in many ways; the kernel itself cannot
        if is_out_of_memory(error):
            raise
        return f"Triton cannot build and launch a kernel here ({error_summary(error)})"
    return None


def error_summary(error: BaseException) -> str:
    """Return type and last line of an error: compilers quote the source before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def build_errors() -> tuple[type[Exception], ...]:
    """Return Triton's errors when it cannot compile or load a kernel. Imports Triton."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return CompilationError, OutOfResources, PTXASError


def interpreted() -> bool:
    """Return whether Triton uses its interpreter, on the CPU, as set when it is imported."""
    return os.environ.get(INTERPRETER) == "1" and importlib.util.find_spec("triton") is not None


def load() -> TritonKernels:
    """Return the backend. Imports Triton."""
    from specache.kernels.triton.backend import TritonKernels

    return TritonKernels()


def load_hot_rows() -> HotRowKernels:
    """Return the kernels that fetch a decode step's rows. Imports Triton."""
    from specache.kernels.triton.hot_rows_backend import HotRowKernels

    return HotRowKernels()


def load_recent() -> ModuleType:
    """Return `recent_backend`, the kernels for tokens outside the low-bit copy. Imports Triton."""
    from specache.kernels.triton import recent_backend

    return recent_backend
