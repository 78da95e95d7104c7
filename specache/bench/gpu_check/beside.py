"""The build of the C++ extension beside the parts, and how its checks join those of part 1."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specache.bench.gpu_check.parts import Part
from specache.bench.gpu_check.process import GROUPS, Ended, Limited, end_groups, python
from specache.bench.gpu_check.result_page import Results, record_of
from specache.bench.gpu_check.states import FAILED, PartJob

LEAST_S = 20.0  # that a build may take on after everything else has ended


def has_extension() -> bool:
    """Return whether the C++ extension is installed, without importing PyTorch."""
    return importlib.util.find_spec("specache._native") is not None


class Beside:
    """A part whose process runs beside the others.

    Args:
        job: its job, with the whole time that it may take.
    """

    def __init__(self, part: Part, job: PartJob, environment: Mapping[str, str]) -> None:
        work = Path(job.work)
        self._part, self._job, self._ends = part, job, time.monotonic() + job.seconds
        self._groups, self._log = work / "groups-beside", work / "beside.log"
        for old in (Path(job.state), self._groups, self._log):
            old.unlink(missing_ok=True)
        file = work / "job-beside.json"
        file.write_text(job.to_json())
        command = python("-m", "specache.bench.gpu_check.part_process", str(file))
        self._process = Limited(command, {**environment, GROUPS: str(self._groups)}, self._log, folder=work)

    def join(self, results: Results, left_s: float) -> None:
        """Wait for its end, and add its checks to the record of its part.

        Args:
            left_s: the time that is left for everything.
        """
        ended = self._end(max(LEAST_S, min(left_s, self._ends - time.monotonic())))
        added = record_of(self._part.name, read_state(Path(self._job.state)), ended.reason(), ended.seconds)
        record = dict(results.parts.get(self._part.number) or {**added, "checks": []})
        record["checks"] = [*record["checks"], *added["checks"]]
        record["notes"] = list(dict.fromkeys([*record["notes"], *added["notes"]]))
        if added["status"] == FAILED:
            record["status"] = FAILED
        results.set(self._part.number, record)

    def end(self) -> None:
        """Kill it."""
        self._end(0.0)

    def _end(self, limit_s: float) -> Ended:
        try:
            return self._process.wait(limit_s)
        finally:
            end_groups(self._groups)

    @property
    def log(self) -> str:
        """Return what its process has written."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""


def read_state(path: Path) -> dict[str, Any] | None:
    """Return a part's state, or `None` if its process has written none."""
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return state
