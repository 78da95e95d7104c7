"""A process of its own for a measurement: what it holds and how it ends is its alone."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from specache.errors import BenchmarkError, SpeCacheError

Serve = Callable[[Connection, Any], None]  # runs in the process, given its end of the pipe and the job


class ChildEnded(BenchmarkError):
    """The process is gone. `exit_code` is negative for a signal: -9 is what the system does when memory runs out."""

    def __init__(self, exit_code: int | None) -> None:
        super().__init__(f"the process that measures ended with exit code {exit_code}; -9 means that memory ran out.")
        self.exit_code = exit_code


class Child:
    """A started process and a pipe to it. Close it.

    Args:
        serve: a function of a module, called there with the pipe and `job`; its exceptions are raised here by `receive`.
        around: entered while the process is started.
    """

    def __init__(self, serve: Serve, job: Any, around: AbstractContextManager[None] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # a helper of multiprocessing's, which outlives this process: not to be started `around`
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(serve, other, job), daemon=True)
        with around or nullcontext():
            self._process.start()
        other.close()

    def send(self, message: Any) -> None:
        """Raises `ChildEnded` if nobody is there."""
        try:
            self._connection.send(message)
        except OSError:
            raise self._ended() from None

    def receive(self) -> Any:
        """What the process sends next.

        Raises:
            ChildEnded: it ended instead.
            BenchmarkError: it failed; the message says how.
        """
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, _Failure):
            raise BenchmarkError(answer.message)
        return answer

    def close(self) -> None:
        """End the process, if it has not ended."""
        self._connection.close()
        self._process.join(timeout=1)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _ended(self) -> ChildEnded:
        self._process.join(timeout=5)
        return ChildEnded(self._process.exitcode)


class _Failure:
    def __init__(self, message: str) -> None:
        self.message = message


def _serve(serve: Serve, connection: Connection, job: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the other side ends this one
    try:
        serve(connection, job)
    except EOFError:
        return  # the other side is gone
    except Exception as error:  # whatever it was, the other side has to know
        message = str(error) if isinstance(error, SpeCacheError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):
            connection.send(_Failure(message))
