"""Run tests in processes of their own, again after a crash without what was run."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from specache.bench.gpu_check import pytest_report
from specache.bench.gpu_check.checks import PartRun
from specache.bench.gpu_check.process import python, run_limited
from specache.bench.gpu_check.states import FAILED

RESTARTS = 5  # of a process, after a crash
_LOG_END = 4000  # characters of each process's output that the log of the part gets


def cuda_tests(tree: Path) -> list[str]:
    """Return the test files that have tests marked `cuda`."""
    marked = [path for path in sorted((tree / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text(encoding="utf-8")]
    return [str(path.relative_to(tree)) for path in marked if path.parts[-2] != "bench"]


def run_tests(
    part: PartRun,
    files: list[str],
    arguments: list[str],
    processes: int,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Run tests of the tree with pytest -> one result per test (see `pytest_report`).

    Args:
        files: of the tests, within the tree.
        arguments: of pytest.
        processes: among which the tests are divided.
        seconds: until all of them are killed.
        environment: further variables.
    """
    ends = time.monotonic() + seconds
    run = partial(_run_share, part, files, arguments, processes, ends, environment or {})
    with ThreadPoolExecutor(processes) as pool:  # a process dies with the thread that started it
        found = [one for results in pool.map(run, range(processes)) for one in results]
    return sorted(found, key=lambda one: one["outcome"] != FAILED)


def _run_share(
    part: PartRun,
    files: list[str],
    arguments: list[str],
    processes: int,
    ends: float,
    environment: Mapping[str, str],
    number: int,
) -> list[dict[str, Any]]:
    """Run one process's share of the tests."""
    assert part.tree is not None
    report, log = part.work / f"tests-{number}.jsonl", part.work / f"tests-{number}.log"
    for old in (report, log):
        old.unlink(missing_ok=True)
    command = python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "specache.bench.gpu_check.pytest_report"),
        *(*arguments, "--rootdir", str(part.tree), *(str(part.tree / file) for file in files)),
    )
    where = {**os.environ, **environment, pytest_report.REPORT: str(report), pytest_report.SHARE: f"{number}/{processes}"}
    for _ in range(RESTARTS):
        ended = run_limited(command, where, log, max(1.0, ends - time.monotonic()), folder=part.work)
        lines = pytest_report.lines_of(report)
        done = {line["id"] for line in lines if "outcome" in line}
        crashed = [line["id"] for line in lines if line["id"] not in done]
        if crashed:  # the next process leaves it out
            reason = f"while it ran: {ended.reason() or 'pytest ended'}"
            pytest_report.add_line(report, {"id": crashed[-1], "outcome": FAILED, "seconds": 0.0, "message": reason})
        if ended.timed_out or not (crashed or ended.exit_code == pytest_report.LOST):
            break
    print(log.read_text(errors="replace")[-_LOG_END:] if log.exists() else "", flush=True)
    return [line for line in pytest_report.lines_of(report) if "outcome" in line]
