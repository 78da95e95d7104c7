"""Describe where a result was measured: machine, kernels and versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

import specache
from specache.bench import kernel_backends
from specache.bench.compute_device import CPU, CUDA
from specache.platform import machine


def describe(device: str = CPU) -> dict[str, Any]:
    """Return machine, kernels and versions, JSON-ready.

    Args:
        device: where the model computes. A GPU is described only if it is one.
    """
    return {
        "machine": {
            "cpu": machine.processor_name(),
            "cores": machine.usable_cores(),
            "threads": torch.get_num_threads(),
            "pytorch_uses": torch.backends.cpu.get_cpu_capability(),
            "usable_memory_bytes": machine.memory()["usable_bytes"],
            "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "system": platform.platform(),
            "gpu": gpu() if device == CUDA else None,
        },
        "kernels": {"active": kernel_backends.active_on(device), "available": kernel_backends.available_on(device)},
        "versions": {
            "specache": specache.__version__,
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
            "python": platform.python_version(),
        },
    }


def gpu() -> dict[str, Any]:
    """Return name, memory and versions of the current GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def gigabytes(size: float) -> str:
    """Format a number of bytes for a message, as `1.2 GB`."""
    return f"{size / 1e9:.1f} GB"
