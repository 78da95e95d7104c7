"""The kernels in Triton, for NVIDIA GPUs. Nothing is imported from Triton before it is asked for."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from specache.kernels.triton.backend import TritonKernels

CAPABILITY = (8, 0)  # bfloat16 on tensor cores
INTERPRETER = "TRITON_INTERPRET"


def missing(device: torch.device | None = None) -> str | None:
    """Why a CUDA device (the current one, if none is named) is not served, or `None`."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'specache[gpu]'"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}, Triton kernels need {CAPABILITY[0]}.{CAPABILITY[1]}"
    return None


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU: decided when it is first imported."""
    return os.environ.get(INTERPRETER) == "1" and importlib.util.find_spec("triton") is not None


def load() -> TritonKernels:
    """The backend. Imports Triton."""
    from specache.kernels.triton.backend import TritonKernels

    return TritonKernels()
