"""A server in a process of its own, on loopback and a free port, which always ends."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from specache.bench import serve_keeper
from specache.bench.serve_memory import TreeMemory
from specache.errors import BenchmarkError

HOST = "127.0.0.1"
_POLL_S = 0.1
_LOG_CHARACTERS = 600  # of the end of a server's output, in an error


def free_port() -> int:
    """Return a port of loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """A started server. The end of the `with` block ends it and everything that it started.

    It also ends when this process is killed (see `serve_keeper`).

    Args:
        command: its command line, which listens on `HOST` and `port`.
        cores: of the machine that it may run on; `None` for all.
        threads: it computes with.
        ready_path: answers with 200 when the server takes requests.

    Raises:
        BenchmarkError: the command cannot be started.
    """

    def __init__(
        self, command: Sequence[str], port: int, *, cores: set[int] | None, threads: int, ready_path: str, name: str
    ) -> None:
        self.url = f"http://{HOST}:{port}"
        self._port, self._ready_path, self._name = port, ready_path, name
        self._log: IO[bytes] = tempfile.TemporaryFile(prefix="specache-serve-log-")  # noqa: SIM115
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads must leave the cores to the others
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            "PYTHONUNBUFFERED": "1",
        }
        keeper = [sys.executable, "-I", str(Path(serve_keeper.__file__)), *command]
        try:
            with pinned(cores):
                self._keeper = subprocess.Popen(
                    keeper, stdin=subprocess.PIPE, stdout=self._log, stderr=subprocess.STDOUT, env=environment
                )
        except OSError as error:
            self._log.close()
            raise BenchmarkError(f"cannot start {name}: {error.strerror or error}.") from error

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the server answers.

        Raises:
            BenchmarkError: it ended instead, or is not ready in time. The message has the end of
                its output.
        """
        deadline = time.monotonic() + timeout_s
        while not self._answers():
            if self._keeper.poll() is not None:
                raise BenchmarkError(f"{self._name} ended with exit code {self._keeper.returncode}. {self.log_end()}")
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{self._name} was not ready after {timeout_s:,.0f} s. {self.log_end()}")
            time.sleep(_POLL_S)

    def log_end(self) -> str:
        """Return the end of the server's output, as a sentence."""
        self._log.seek(0)
        text = " ".join(self._log.read().decode(errors="replace").split())[-_LOG_CHARACTERS:]
        return f"It said: {text or 'nothing'}"

    def memory(self) -> TreeMemory:
        """Return a meter of the memory of the server's processes."""
        return TreeMemory(self._keeper.pid)

    @property
    def processes(self) -> list[psutil.Process]:
        """Return the server's processes that run."""
        try:
            return psutil.Process(self._keeper.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def close(self) -> None:
        """End the server: ask first, kill it after ten seconds."""
        left = self.processes
        try:
            if self._keeper.stdin is not None:
                self._keeper.stdin.close()
            self._keeper.wait(serve_keeper.GRACE_S + 10)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also after a second Ctrl-C
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            self._keeper.kill()
            self._keeper.wait()
            self._log.close()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=5)
        try:
            connection.request("GET", self._ready_path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


class pinned:
    """Run this thread on some cores inside the block; what it starts there inherits them.

    `None` changes nothing.
    """

    def __init__(self, cores: set[int] | None) -> None:
        self._cores = cores

    def __enter__(self) -> None:
        if self._cores is not None:
            self._before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, self._cores)

    def __exit__(self, *error: object) -> None:
        if self._cores is not None:
            os.sched_setaffinity(0, self._before)
