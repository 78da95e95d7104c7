"""Run the parts one after the other: none can stop the others, and a second run resumes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import specache
from specache.bench.gpu_check import report
from specache.bench.gpu_check.parts import Part
from specache.bench.gpu_check.process import python, run_limited
from specache.bench.gpu_check.report import Results, record_of
from specache.bench.gpu_check.states import PartJob

PACKAGE = Path(specache.__file__).parent
SOURCES = ("*.py", "*.cpp", "*.hpp", "*.toml", "*.txt")
VERSIONS = ("torch", "triton", "transformers")
MERGE_S = 1.0  # seconds between two looks at a running part's state
Log = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """The settings of a run.

    Attributes:
        out: folder of the results.
        device: `cpu` or `cuda`.
        again: repeat parts that have passed.
        slack: factor of every part's time.
        options: settings for the parts.
    """

    out: Path
    device: str
    again: bool = False
    slack: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


def source_tree() -> Path | None:
    """Return the source tree that holds the package and its tests, or `None` if installed alone."""
    root = PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "tests").is_dir() else None


def identity(device: str) -> dict[str, Any]:
    """Return what results depend on: the sources' hash, the device, the versions."""
    return {"tree": tree_hash(), "device": device, "machine": _machine(device), **{name: _version(name) for name in VERSIONS}}


def tree_hash() -> str:
    """Return a hash of all sources, by which a later run knows that they are the same."""
    tree, found = source_tree(), hashlib.sha256()
    folders = [PACKAGE] if tree is None else [tree / name for name in ("specache", "csrc", "tests")]
    for folder in folders:
        for file in sorted(path for pattern in SOURCES for path in folder.rglob(pattern)):
            found.update(f"{file.relative_to(folder.parent)}\0".encode() + file.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def work_folder(tree: str) -> Path:
    """Return a folder for what runs of these sources build. It stays between them."""
    folder = Path(tempfile.gettempdir()) / f"specache-gpu-check-{os.getuid() if hasattr(os, 'getuid') else 0}-{tree}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def run_parts(parts: Sequence[Part], run: Run, log: Log = print) -> Results:
    """Run what is missing or has failed of these parts. Return the results, which are written."""
    run.out.mkdir(parents=True, exist_ok=True)
    known = identity(run.device)
    results = Results(run.out, known)
    if results.dropped:
        log(f"{run.out} held results of other sources, of another device or of other versions: all parts run again.")
    work = work_folder(str(known["tree"]))
    ends = time.monotonic()
    for part in parts:
        ends += part.seconds * run.slack
        if results.passed(part.number) and not run.again:
            ends -= part.seconds * run.slack
            log(f"{part.number} {part.name}: passed before (--again repeats it)")
            continue
        log(f"{part.number} {part.name}: at most {ends - time.monotonic():.0f} s")
        record = _run_part(part, run, results, work, max(5.0, ends - time.monotonic()))
        log(f"{part.number} {part.name}: {record['status']} after {record['seconds']:.0f} s")
        for check in record["checks"]:
            if check["status"] == "failed":
                log(f"  failed: {check['name']}: {check['message']}"[:400])
        ends = max(ends, time.monotonic())
    results.write()
    return results


def _run_part(part: Part, run: Run, results: Results, work: Path, limit_s: float) -> dict[str, Any]:
    state, job_file = work / f"part-{part.number}.json", work / f"job-{part.number}.json"
    state.unlink(missing_ok=True)
    tree = source_tree()
    options = {**run.options, "facts": results.facts}
    job = PartJob(part.function, str(state), str(work), None if tree is None else str(tree), run.device, limit_s, options)
    job_file.write_text(job.to_json())
    log_file = run.out / report.LOG_NAME
    with log_file.open("a") as file:
        file.write(f"\n===== part {part.number}: {part.name}\n")
    started, looked = time.monotonic(), [0.0]

    def merge() -> None:
        if time.monotonic() - looked[0] >= MERGE_S:
            looked[0] = time.monotonic()
            results.set(part.number, record_of(part.name, _state(state), None, time.monotonic() - started, running=True))

    results.set(part.number, record_of(part.name, None, None, 0.0, running=True))
    command = python("-m", "specache.bench.gpu_check.child", str(job_file))
    ended = run_limited(command, environment(run.device, work, tree), log_file, limit_s, merge, folder=work)
    found = _state(state)
    broken = found is not None and found["complete"] and ended.exit_code is not None and ended.exit_code > 0
    record = record_of(part.name, found, None if broken else ended.reason(), ended.seconds)
    results.set(part.number, record)
    return record


def environment(device: str, work: Path, tree: Path | None) -> dict[str, str]:
    """Return the environment of a part: our sources or what part 1 built of them, the tests, and
    folders of its own for what Triton compiles and specache caches.
    """
    built = work / "site"
    paths = [str(built)] if (built / "specache").is_dir() else [str(PACKAGE.parent)]
    paths += [] if tree is None else [str(tree)]  # `tests`; `specache` is found before
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(work / "triton"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        found |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return found


def _state(path: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return state


def _machine(device: str) -> str:
    """Return the GPU's name, by the driver's own tool: PyTorch would take GPU memory for it."""
    if device == "cpu":
        return "CPU"
    with suppress(OSError, subprocess.TimeoutExpired):
        command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if found.returncode == 0 and found.stdout.strip():
            return found.stdout.strip().splitlines()[0]
    return "unknown"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
