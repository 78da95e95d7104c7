"""Run one part in a process group of its own, within a time limit."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GROUPS = "SPECACHE_GPU_CHECK_GROUPS"  # environment variable: a file of process groups
_PR_SET_PDEATHSIG = 1  # of prctl(2)
POLL_S = 0.2
DUMP_S = 1.0  # time that a part has to write where it hangs
REAP_S = 10.0  # how long to wait for the end of a killed process: one inside the GPU's driver may never end


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        exit_code: negative for a signal; `None` if it did not end even when it was killed.
        timed_out: whether its time was up.
    """

    exit_code: int | None
    timed_out: bool
    seconds: float

    def reason(self) -> str | None:
        """Return why the process did not end by itself with 0, or `None`."""
        if self.timed_out:
            return f"its time was up after {self.seconds:.0f} s"
        if self.exit_code is not None and self.exit_code < 0:
            name = _signal_name(-self.exit_code)
            return f"its process was ended by {name}" + (" (main memory may have run out)" if name == "SIGKILL" else "")
        return None if self.exit_code == 0 else f"its process ended with exit code {self.exit_code}"


class Limited:
    """A command that runs in a process group of its own, its output appended to a log.

    Inside a part, whose process may be killed itself, the group is noted in the file `GROUPS` of
    the environment, so that the parent ends it too.

    Args:
        folder: where it runs.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path, folder: Path | None = None) -> None:
        self._started = time.monotonic()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                cwd=folder,
            )
        if GROUPS in os.environ:
            with Path(os.environ[GROUPS]).open("a") as file:
                file.write(f"{self._process.pid}\n")

    def wait(self, limit_s: float, meanwhile: Callable[[], None] = lambda: None) -> Ended:
        """Wait for its end, for `limit_s` at most; then kill it and its children.

        Args:
            meanwhile: called a few times per second, and once after the end.
        """
        timed_out, ends = False, time.monotonic() + limit_s
        try:
            while self._process.poll() is None:
                if time.monotonic() >= ends:
                    timed_out = True
                    break
                meanwhile()
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(POLL_S)
        finally:  # also at Ctrl-C
            _end(self._process, ask=timed_out)
        meanwhile()
        return Ended(self._process.returncode, timed_out, time.monotonic() - self._started)


def run_limited(
    command: list[str],
    environment: Mapping[str, str],
    log: Path,
    limit_s: float,
    meanwhile: Callable[[], None] = lambda: None,
    folder: Path | None = None,
) -> Ended:
    """Run a command to its end, for `limit_s` at most (see `Limited`)."""
    return Limited(command, environment, log, folder).wait(limit_s, meanwhile)


def end_groups(file: Path) -> None:
    """Kill what is left of the process groups that are noted in a file."""
    for line in file.read_text().split() if file.exists() else ():
        with suppress(OSError):
            os.killpg(int(line), signal.SIGKILL)


def die_with_parent() -> None:
    """Have the system kill this process once its parent has ended, on Linux.

    The parent may be killed without a chance to do so, and what is left would go on with the GPU.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def python(*arguments: str) -> list[str]:
    """Return a command of this interpreter."""
    return [sys.executable, *arguments]


def _end(process: subprocess.Popen[bytes], ask: bool) -> None:
    """Kill what is left of a process group, which the process leads."""
    if ask and process.poll() is None and hasattr(signal, "SIGUSR1"):
        with suppress(OSError):
            process.send_signal(signal.SIGUSR1)  # `part_process` writes all threads' stacks
            time.sleep(DUMP_S)
    with suppress(OSError):  # nobody is left
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(REAP_S)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
