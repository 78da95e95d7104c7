"""Run one part in a process group of its own, within a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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


def run_limited(
    command: list[str],
    environment: Mapping[str, str],
    log: Path,
    limit_s: float,
    meanwhile: Callable[[], None] = lambda: None,
    folder: Path | None = None,
) -> Ended:
    """Run a command, its output appended to `log`, and kill it and its children after `limit_s`.

    Args:
        meanwhile: called a few times per second, and once after the end.
        folder: where it runs.
    """
    started = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=dict(environment), stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True, cwd=folder,
        )  # fmt: skip
        timed_out = False
        try:
            while process.poll() is None:
                if time.monotonic() - started >= limit_s:
                    timed_out = True
                    break
                meanwhile()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
        finally:  # also at Ctrl-C
            _end(process, ask=timed_out)
    meanwhile()
    return Ended(process.returncode, timed_out, time.monotonic() - started)


def python(*arguments: str) -> list[str]:
    """Return a command of this interpreter."""
    return [sys.executable, *arguments]


def _end(process: subprocess.Popen[bytes], ask: bool) -> None:
    """Kill what is left of a process group, which the process leads."""
    if ask and process.poll() is None and hasattr(signal, "SIGUSR1"):
        with suppress(OSError):
            process.send_signal(signal.SIGUSR1)  # `child` writes all threads' stacks
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
