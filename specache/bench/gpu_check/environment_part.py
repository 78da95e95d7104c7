"""Part 1: the machine and its versions, the C++ extension built without a network, `doctor`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from specache.bench.environment import describe
from specache.bench.gpu_check.checks import Check, PartRun, on_gpu
from specache.kernels import triton as triton_kernels
from specache.platform import extension, machine

LEFT_OUT = (".git", ".venv*", "__pycache__", ".*_cache", "build", "dist", "docs", "results", "gpu-check", "*.so")
PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "safetensors", "typer", "rich", "accelerate", "filelock"),
    *("nanobind", "scikit-build-core", "cmake", "ninja", "pytest", "hypothesis", "psutil", "gguf"),
)
OPTIONAL = ("gguf", "psutil", "accelerate", "filelock")  # the check needs none of them


def run(part: PartRun) -> None:
    part.run("machine and versions", lambda check: _machine(part, check))
    part.run("the C++ extension", lambda check: build_extension(part, check))
    part.run("specache doctor", lambda check: _doctor(part, check))
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


def build_extension(part: PartRun, check: Check) -> None:
    """Build the extension into the run's work folder, unless it is installed already."""
    if extension.native is not None and not part.options.get("rebuild"):
        check.details = {"found": "installed", "instruction_sets": " ".join(extension.instruction_sets())}
        return
    if part.tree is None:
        check.skip("specache is installed without its sources and without the extension")
    assert part.tree is not None
    site, copy = part.work / "site", part.work / "tree"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(part.tree, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    shutil.rmtree(site, ignore_errors=True)
    being_built = part.work / "site.new"
    shutil.rmtree(being_built, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--no-compile"),
        *("--disable-pip-version-check", "--no-cache-dir", "--target", str(being_built), str(copy)),
    ]
    built = subprocess.run(
        command, capture_output=True, text=True, env=_build_environment(), timeout=max(10.0, part.seconds_left - 12)
    )
    print(built.stdout[-4000:], built.stderr[-4000:], sep="\n", flush=True)
    check.require(built.returncode == 0, f"pip failed: {_last_line(built.stderr or built.stdout)}")
    check.require(list((being_built / "specache").glob("_native*")), "pip installed specache without the extension: no compiler?")
    being_built.rename(site)  # only a whole one is found by later parts
    code = "import json; from specache.platform import extension as e; print(json.dumps([e.IMPORT_ERROR, e.instruction_sets()]))"
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=with_site(site), cwd=part.work)
    check.require(tried.returncode == 0, f"the built package cannot be imported: {_last_line(tried.stderr)}")
    error, sets = json.loads(tried.stdout)
    check.require(error is None, f"the built extension cannot be imported: {error}")
    check.details = {"built": str(site), "instruction_sets": " ".join(sets)}


def with_site(site: Path) -> dict[str, str]:
    """Return this environment with `site` in front of every other place of packages."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def _build_environment() -> dict[str, str]:
    """Return an environment in which pip finds the build's tools of this interpreter."""
    scripts = os.path.dirname(sys.executable)
    hidden = ("PIP_CONSTRAINT", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**kept, "PATH": os.pathsep.join([scripts, kept.get("PATH", "")])}


def _doctor(part: PartRun, check: Check) -> None:
    site = part.work / "site"
    where = with_site(site) if site.is_dir() else dict(os.environ)
    command = [sys.executable, "-m", "specache.cli.main", "doctor", "--json"]
    found = subprocess.run(
        command, capture_output=True, text=True, env=where, cwd=part.work, timeout=max(10.0, part.seconds_left - 2)
    )
    try:
        facts: dict[str, Any] = json.loads(found.stdout)
    except ValueError:
        check.require(False, f"doctor printed no JSON: {_last_line(found.stderr or found.stdout)}")
        return
    for problem in facts.get("problems", []):
        part.note(f"doctor: {problem['what']}")
    check.details = {"exit_code": found.returncode, "gpu_kernels": str(facts["gpu_kernels"]["missing"] or "run")}
    missing = [name for name, version in facts["versions"].items() if version is None and name not in OPTIONAL]
    check.require(not missing, f"doctor misses {', '.join(missing)}")
    check.require(not facts["native_kernels"]["missing"], f"doctor: no C++ kernels: {facts['native_kernels']['missing']}")
    if on_gpu(part):
        check.require(facts["devices"]["cuda"], f"doctor sees no GPU: {facts['devices']['cuda_missing']}")
        check.require(facts["gpu_kernels"]["missing"] is None, f"doctor: no GPU kernels: {facts['gpu_kernels']['missing']}")


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


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
