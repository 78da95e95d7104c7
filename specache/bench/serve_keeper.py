"""Run a server and end it with its whole process group as soon as standard input closes.

A script of its own that imports nothing of specache: standard input closes when the process that
measures ends, whatever ended it, so that no server outlives it.

    python serve_keeper.py COMMAND...

Its exit code is the command's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

GRACE_S = 10.0  # the time that a server has to end by itself


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the server's process group: ask first, then kill."""
    for ending, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, ending)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _wait_for_end_of_input(process: subprocess.Popen[bytes]) -> None:
    while os.read(0, 1024):
        pass
    _end_group(process)


def main(command: list[str]) -> int:
    """Run the command until it ends or standard input closes. Return its exit code."""
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they reach the process that measures, which closes the input
        signal.signal(one, lambda number, frame: None)  # unlike SIG_IGN it is not inherited by the server
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_wait_for_end_of_input, args=(process,), daemon=True).start()
    code = process.wait()
    _kill_the_rest(process.pid)
    return code


def _kill_the_rest(group: int) -> None:
    """Kill what the server started and left in its group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
