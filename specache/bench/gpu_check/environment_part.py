"""Part 1: the machine and its versions. `build_part` is its other half."""

from __future__ import annotations

import subprocess
from importlib import metadata

import torch

from specache.bench.environment import describe
from specache.bench.gpu_check.build_part import doctor
from specache.bench.gpu_check.checks import Check, PartRun, on_gpu
from specache.kernels import triton as triton_kernels
from specache.platform import extension, machine

PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "safetensors", "typer", "rich", "accelerate", "filelock"),
    *("nanobind", "scikit-build-core", "cmake", "ninja", "pytest", "hypothesis", "psutil", "gguf"),
)


def run(part: PartRun) -> None:
    part.run("machine and versions", lambda check: _machine(part, check))
    if extension.native is not None:
        part.run("specache doctor", lambda check: doctor(part, check, None))
    if on_gpu(part):
        part.run("page-locked memory", lambda check: _locked(part, check))


def _machine(part: PartRun, check: Check) -> None:
    found = describe(part.device)
    versions = {name: _version(name) for name in PACKAGES}
    part.fact(machine=found["machine"], versions=versions)
    check.details = {
        **found["versions"],
        "cores": found["machine"]["cores"],
        "memory_gb": (machine.memory()["usable_bytes"] or 0) / 1e9,
    }
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        part.note(f"Not installed here: {', '.join(missing)}.")
    if on_gpu(part):
        gpu = found["machine"]["gpu"]
        check.details |= {"gpu": gpu["name"], "capability": gpu["capability"], "cuda": gpu["cuda"], "driver": _driver()}
        check.details["gpu_free_gb"] = torch.cuda.mem_get_info()[0] / 1e9
        part.sizes  # noqa: B018 -- its notes say what will be smaller
        reason = triton_kernels.unsupported_reason()
        check.require(reason is None, f"Triton's kernels do not run here: {reason}")


def _locked(part: PartRun, check: Check) -> None:
    """Lock as much memory as the largest part takes, and let it go."""
    size = 4 << 30
    block = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    check.require(block.is_pinned(), "memory that was asked for as page-locked is not")
    import resource  # not on every system

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    check.details = {"locked_gb": size / 1e9, "limit": "none" if limit == resource.RLIM_INFINITY else limit}


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
