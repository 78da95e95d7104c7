"""What a part does in its own process: named checks, tables, notes, and a state file.

The file is replaced before and after every check, so that whatever ends the process (a crash, a
kill, a limit), what was found until then is there, and which check was running.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specache.bench.gpu_check.states import CUDA, FAILED, PASSED, SKIPPED, PartJob
from specache.errors import SpeCacheError

if TYPE_CHECKING:
    from specache.bench.gpu_check.check_sizes import Sizes

_BROKEN = (
    *("illegal memory access", "device-side assert", "unspecified launch failure", "misaligned address"),
    *("illegal instruction", "CUDA_ERROR_LAUNCH_FAILED", "device kernel image is invalid", "uncorrectable ECC"),
)
_LINES = 6  # of a traceback that a result keeps


class Failed(Exception):
    """A check found something wrong."""


class Skipped(Exception):
    """A check cannot run here. The message says why."""


class PartBroken(BaseException):
    """The GPU's context is unusable: nothing more of this process can be trusted."""


@dataclass
class Check:
    """One check, and what it found.

    Attributes:
        details: figures, JSON-ready.
        warned: the warnings of specache and of PyTorch that it gave.
    """

    name: str
    status: str = PASSED
    message: str = ""
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._caught: list[warnings.WarningMessage] = []

    def messages(self) -> list[str]:
        """Return the warnings that the check has given so far."""
        return [str(one.message) for one in self._caught if issubclass(one.category, RuntimeWarning | UserWarning)]

    def require(self, condition: Any, message: str) -> None:
        """Fail the check unless the condition holds."""
        if not condition:
            raise Failed(message)

    def skip(self, reason: str) -> None:
        """End the check as skipped."""
        raise Skipped(reason)


class PartRun:
    """The run of one part.

    Attributes:
        sizes: what to run on this device and its memory.
        work, shared, tree: folders (see `PartJob`).
    """

    def __init__(self, job: PartJob) -> None:
        self.device, self.options = job.device, job.options
        self.work, self.shared, self.tree = Path(job.work), Path(job.shared), None if job.tree is None else Path(job.tree)
        self.checks: list[Check] = []
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self.notes: list[str] = []
        self.facts: dict[str, Any] = {}
        self._file = Path(job.state)
        self._ends = time.monotonic() + job.seconds
        self._running: str | None = None
        self._complete = False
        self._sizes: Sizes | None = None
        self._write()

    @property
    def sizes(self) -> Sizes:
        if self._sizes is None:
            from specache.bench.gpu_check.check_sizes import Sizes  # imports PyTorch and transformers

            self._sizes = Sizes.on(self.device)
            for note in self._sizes.notes:
                self.note(note)
        return self._sizes

    @property
    def seconds_left(self) -> float:
        """Return the time until the process is killed."""
        return self._ends - time.monotonic()

    @contextmanager
    def check(self, name: str) -> Iterator[Check]:
        """Run the block as a check. What it raises is its result; it does not end the part.

        Raises:
            PartBroken: the GPU can no longer be used.
        """
        check = Check(name)
        self.checks.append(check)
        self._running = name
        self._write()
        started = time.monotonic()
        broken = False
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                check._caught = warned
                yield check
        except Skipped as reason:
            check.status, check.message = SKIPPED, str(reason)
        except (Failed, SpeCacheError) as error:
            check.status, check.message = FAILED, f"{'' if isinstance(error, Failed) else type(error).__name__ + ': '}{error}"
        except Exception as error:
            check.status, check.message = FAILED, _described(error)
            broken = any(sign in str(error) for sign in _BROKEN)
        except BaseException as error:  # a library that calls `exit`
            check.status, check.message = FAILED, f"{type(error).__name__}: {error}"
            raise
        finally:
            check.warned = check.messages()
            check.seconds = round(time.monotonic() - started, 3)
            self._running = None
            self._write()
            if not broken:
                _release_memory()
        if broken:
            raise PartBroken(check.message)

    def run(self, name: str, function: Callable[[Check], None], needs_s: float = 0.0) -> Check:
        """Run a function as a check, unless too little time is left for it."""
        with self.check(name) as check:
            if self.seconds_left < needs_s:
                check.skip(f"{self.seconds_left:.0f} s were left, it takes about {needs_s:.0f}")
            function(check)
        return self.checks[-1]

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add rows to a table of results."""
        self.tables.setdefault(name, []).extend(rows)
        self._write()

    def note(self, text: str) -> None:
        """Add a sentence for the reader of the page."""
        if text not in self.notes:
            self.notes.append(text)
            self._write()

    def fact(self, **facts: Any) -> None:
        """Add facts that later parts, or the planner, use."""
        self.facts.update(facts)
        self._write()

    def finish(self) -> None:
        """Mark the part as complete: its function has returned."""
        self._complete = True
        self._write()

    def _write(self) -> None:
        state = {
            "checks": [asdict(check) for check in self.checks],
            "tables": self.tables,
            "notes": self.notes,
            "facts": self.facts,
            "running": self._running,
            "complete": self._complete,
        }
        temporary = self._file.with_suffix(".new")
        temporary.write_text(json.dumps(state, default=str))
        os.replace(temporary, self._file)


def on_gpu(part: PartRun) -> bool:
    """Return whether the part runs on a GPU."""
    return part.device == CUDA


def _described(error: BaseException) -> str:
    lines = [f"{type(error).__name__}: {str(error).strip()[:1500]}"]
    frames = traceback.extract_tb(error.__traceback__)[-_LINES:]
    lines += [f"  {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames]
    if type(error).__name__ == "OutOfMemoryError":
        traceback.clear_frames(error.__traceback__)  # they keep the tensors for which there was no room
    return "\n".join(lines)


def _release_memory() -> None:
    """Free what the check has left, if it has used PyTorch at all."""
    if "torch" in sys.modules:
        from specache.bench.compute_device import release_memory

        with suppress(RuntimeError):  # the GPU may be lost
            release_memory()
