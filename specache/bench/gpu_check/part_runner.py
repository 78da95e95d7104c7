"""Run the parts one after the other: none can stop the others, and a second run resumes."""

from __future__ import annotations

import hashlib
import os
import shutil
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
from specache.bench.gpu_check import result_page as report
from specache.bench.gpu_check.beside import Beside, has_extension, read_state
from specache.bench.gpu_check.parts import BUILD, Part
from specache.bench.gpu_check.process import GROUPS, end_groups, python, run_limited
from specache.bench.gpu_check.result_page import Results, record_of
from specache.bench.gpu_check.states import CUDA, FAILED, PartJob
from specache.errors import ConfigError

PACKAGE = Path(specache.__file__).parent
SOURCES = ("*.py", "*.cpp", "*.hpp", "*.toml", "*.txt")
VERSIONS = ("torch", "triton", "transformers")
UNKNOWN, DRIVER = "unknown", "/dev/nvidiactl"
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
    if run.device == CUDA and known["machine"] == UNKNOWN and not Path(DRIVER).exists():
        raise ConfigError("There is no NVIDIA GPU here. --device cpu tries the check itself, on tiny sizes.")
    results = Results(run.out, known)
    if results.dropped:
        log(f"{run.out} held results of other sources, of another device or of other versions: all parts run again.")
    shared = work_folder(str(known["tree"]))
    work = Path(tempfile.mkdtemp(prefix="run-", dir=shared))  # several runs may go on at once
    try:
        _run_chosen(parts, run, results, work, log)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    results.write()
    return results


def _run_chosen(parts: Sequence[Part], run: Run, results: Results, work: Path, log: Log) -> None:
    """Run the parts that have not passed, and the build beside them."""
    chosen = [part for part in parts if run.again or not results.passed(part.number)]
    for part in parts:
        if part not in chosen:
            log(f"{part.number} {part.name}: passed before (--again repeats it)")
    ends = time.monotonic()
    beside = _started_beside(chosen, run, work)
    try:
        for part in chosen:
            ends = max(ends, time.monotonic()) + part.seconds * run.slack
            _report(part, _run_part(part, run, results, work, ends - time.monotonic(), log), log)
    except BaseException:
        if beside is not None:
            beside.end()
        raise
    if beside is not None:
        log("the C++ extension, which is built beside the parts")
        beside.join(results, ends - time.monotonic())
        _append(run.out / report.LOG_NAME, f"\n===== beside the parts\n{beside.log}")
        _report(BUILD, results.parts[BUILD.number], log)


def _started_beside(chosen: Sequence[Part], run: Run, work: Path) -> Beside | None:
    """Start to build the C++ extension if part 1 is to run and there is none."""
    if all(part.number != BUILD.number for part in chosen) or has_extension():
        return None
    tree = source_tree()
    folder = None if tree is None else str(tree)
    job = PartJob(
        BUILD.function, str(work / "part-beside.json"), str(work), str(work.parent), folder, run.device, BUILD.seconds * run.slack
    )
    return Beside(BUILD, job, environment(run.device, work.parent, tree))


def _report(part: Part, record: dict[str, Any], log: Log) -> None:
    log(f"{part.number} {part.name}: {record['status']} after {record['seconds']:.0f} s")
    for check in record["checks"]:
        if check["status"] == FAILED:
            log(f"  failed: {check['name']}: {check['message']}"[:400])


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def _run_part(part: Part, run: Run, results: Results, work: Path, limit_s: float, log: Log) -> dict[str, Any]:
    log(f"{part.number} {part.name}: at most {limit_s:.0f} s")
    state, job_file = work / f"part-{part.number}.json", work / f"job-{part.number}.json"
    state.unlink(missing_ok=True)
    tree = source_tree()
    options = {**run.options, "facts": results.facts}
    job = PartJob(
        part.function, str(state), str(work), str(work.parent), None if tree is None else str(tree), run.device, limit_s, options
    )
    job_file.write_text(job.to_json())
    log_file = run.out / report.LOG_NAME
    _append(log_file, f"\n===== part {part.number}: {part.name}\n")
    started, looked = time.monotonic(), [0.0]

    def merge() -> None:
        if time.monotonic() - looked[0] >= MERGE_S:
            looked[0] = time.monotonic()
            results.set(part.number, record_of(part.name, read_state(state), None, time.monotonic() - started, running=True))

    results.set(part.number, record_of(part.name, None, None, 0.0, running=True))
    command, where = (
        python("-m", "specache.bench.gpu_check.part_process", str(job_file)),
        environment(run.device, work.parent, tree),
    )
    groups = work / f"groups-{part.number}"
    groups.unlink(missing_ok=True)
    ended = run_limited(command, {**where, GROUPS: str(groups)}, log_file, limit_s, merge, folder=work)
    end_groups(groups)
    found = read_state(state)
    broken = found is not None and found["complete"] and ended.exit_code is not None and ended.exit_code > 0
    record = record_of(part.name, found, None if broken else ended.reason(), ended.seconds)
    results.set(part.number, record)
    return record


def environment(device: str, shared: Path, tree: Path | None) -> dict[str, str]:
    """Return the environment of a part: our sources or what part 1 built of them, the tests, and
    folders of its own for what Triton compiles and specache caches.
    """
    built = shared / "site"
    paths = [str(built)] if (built / "specache").is_dir() else [str(PACKAGE.parent)]
    paths += [] if tree is None else [str(tree)]  # `tests`; `specache` is found before
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(shared / "triton"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        found |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return found


def _machine(device: str) -> str:
    """Return the GPU's name, by the driver's own tool: PyTorch would take GPU memory for it."""
    if device == "cpu":
        return "CPU"
    with suppress(OSError, subprocess.TimeoutExpired):
        command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if found.returncode == 0 and found.stdout.strip():
            return found.stdout.strip().splitlines()[0]
    return UNKNOWN


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
