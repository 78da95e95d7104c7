"""A pytest plugin: one JSON line before and after every test, in the file `SPECACHE_TEST_REPORT`.

So a crash leaves what was found until then, and which test crashed. Tests that the file has results
of are not run again. The process ends where the GPU's context is lost: all later tests would fail.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from specache.bench.gpu_check.process import die_with_parent

REPORT = "SPECACHE_TEST_REPORT"  # environment variable: the file
SHARE = "SPECACHE_TEST_SHARE"  # environment variable: `0/8` is the first of eight shares of the tests
LOST = 3  # exit code
_BROKEN = ("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a report, without one that was cut off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def add_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line to a report."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _write(**line: Any) -> None:
    add_line(Path(os.environ[REPORT]), line)


def pytest_configure(config: Any) -> None:
    die_with_parent()


@pytest.hookimpl(trylast=True)  # once `-m` and `-k` have chosen
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    done = {line["id"] for line in lines_of(Path(os.environ[REPORT])) if "outcome" in line}
    number, processes = map(int, os.environ.get(SHARE, "0/1").split("/"))
    kept = [item for item in items[number::processes] if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(id=nodeid)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        text = report.longreprtext if report.failed else (report.longrepr[-1] if report.skipped else "")
        _write(id=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), message=_end(str(text)))
        if report.failed and any(sign in str(text) for sign in _BROKEN):
            os._exit(LOST)


def _end(text: str) -> str:
    """Return the error's own lines, the last place first."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return "\n".join([*errors[:4], *lines[-1:]])[:1500]
