"""The other half of part 1: build the C++ extension without a network, and ask `doctor`.

It takes a minute or more of a few cores, so it runs beside the other parts, which need a GPU and no
C++. What it finds is added to part 1.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from specache.bench.gpu_check.checks import Check, PartRun, on_gpu
from specache.bench.gpu_check.process import run_limited

LEFT_OUT = (".git", ".venv*", "__pycache__", ".*_cache", "build", "dist", "docs", "results", "gpu-check", "*.so")
OPTIONAL = ("gguf", "psutil", "accelerate", "filelock")  # the check needs none of them


def run(part: PartRun) -> None:
    site = part.shared / "site"
    part.run("the C++ extension is built", lambda check: build_extension(part, check, site))
    if site.is_dir():
        part.run("specache doctor", lambda check: doctor(part, check, site))


def build_extension(part: PartRun, check: Check, site: Path) -> None:
    """Install a copy of the tree into `site`, by this interpreter's own build tools."""
    if part.tree is None:
        check.skip("specache is installed without its sources and without the extension")
    assert part.tree is not None
    if list((site / "specache").glob("_native*")):
        check.details = {"built": "before"}
        return
    copy, log = part.work / "tree", part.work / "build.log"
    log.unlink(missing_ok=True)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(part.tree, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    being_built = part.work / "site.new"
    shutil.rmtree(being_built, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--no-compile"),
        *("--disable-pip-version-check", "--no-cache-dir", "--target", str(being_built), str(copy)),
    ]
    ended = run_limited(command, _build_environment(), log, max(10.0, part.seconds_left - 20))
    said = log.read_text(errors="replace") if log.exists() else ""
    print(said[-4000:], flush=True)
    check.require(ended.reason() is None, f"pip failed, {ended.reason()}: {_last_line(said)}")
    check.require(list((being_built / "specache").glob("_native*")), "pip installed specache without the extension: no compiler?")
    with suppress(OSError):  # another run has built the same meanwhile
        being_built.rename(site)  # only a whole one is found by later parts
    code = "import json; from specache.platform import extension as e; print(json.dumps([e.IMPORT_ERROR, e.instruction_sets()]))"
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=with_site(site), cwd=part.work)
    check.require(tried.returncode == 0, f"the built package cannot be imported: {_last_line(tried.stderr)}")
    error, sets = json.loads(tried.stdout)
    check.require(error is None, f"the built extension cannot be imported: {error}")
    check.details = {"seconds": round(ended.seconds, 1), "instruction_sets": " ".join(sets)}


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


def doctor(part: PartRun, check: Check, site: Path | None) -> None:
    """Ask `specache doctor`, of the package in `site` or of the one that runs."""
    where = dict(os.environ) if site is None else with_site(site)
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


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
