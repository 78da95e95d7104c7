"""A terminal for tests: a command runs on a pseudo-terminal, and keys are sent to it and its screen
is read as a user would.
"""

from __future__ import annotations

import os
import select
import sys
import time
from pathlib import Path

import pytest

pty = pytest.importorskip("pty")
pytest.importorskip("fcntl")

MARKS_PASTES, UNMARKS_PASTES = "\x1b[?2004h", "\x1b[?2004l"
PASTE_BEGINS, PASTE_ENDS = "\x1b[200~", "\x1b[201~"
CTRL_C, CTRL_D = "\x03", "\x04"
PATIENCE = 240.0  # seconds: only how long a test that fails takes to do so


class Terminal:
    """One command in a terminal of its own.

    Leave it with `with`, which ends a command that is still running.
    """

    def __init__(self, *arguments: str | Path, term: str = "xterm", **environment: str) -> None:
        program = str(Path(sys.executable).with_name("specache"))
        environment = {**os.environ, "TERM": term, "OMP_NUM_THREADS": "1", **environment}
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.execve(program, [program, *map(str, arguments)], environment)
        self.seen = ""
        self._read_to = 0
        self._code: int | None = None

    def press(self, keys: str) -> None:
        """Send keys."""
        os.write(self._fd, keys.encode())

    def interrupt_waiting(self) -> None:
        """Press Ctrl-C once the program sleeps: one that comes while it falls asleep is seen with
        the next key only.
        """
        asleep = 0
        while asleep < 5:
            time.sleep(0.05)
            asleep = asleep + 1 if self._sleeps() else 0
        self.press(CTRL_C)

    def _sleeps(self) -> bool:
        state = Path(f"/proc/{self._pid}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "S"

    def paste(self, text: str) -> None:
        """Paste text as terminals do: marked if the program asked for marks last."""
        marked = self.seen.rfind(MARKS_PASTES) > self.seen.rfind(UNMARKS_PASTES)
        self.press(f"{PASTE_BEGINS}{text}{PASTE_ENDS}" if marked else text)

    def wait_for(self, text: str) -> str:
        """Read until `text` appears after what was waited for before.

        Return what came, up to its end.
        """
        end = time.monotonic() + PATIENCE
        while (at := self.seen.find(text, self._read_to)) < 0:
            assert time.monotonic() < end and self._read(), (
                f"{text!r} did not come; after it last did: {self.seen[self._read_to :]!r}"
            )
        before, self._read_to = self._read_to, at + len(text)
        return self.seen[before : self._read_to]

    def exit_code(self) -> int:
        """Read to the end, and return the command's exit code."""
        end = time.monotonic() + PATIENCE
        while self._read():
            assert time.monotonic() < end, f"it did not end: {self.seen!r}"
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._code

    def _read(self) -> bool:
        if not select.select([self._fd], [], [], 1.0)[0]:
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the command ended
            return False
        self.seen += data.decode("utf-8", errors="replace")
        return bool(data)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)  # hangs up
        if self._code is None:
            os.waitpid(self._pid, 0)
