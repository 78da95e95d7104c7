"""Run a measurement in a child process, so that its memory and its crashes stay its own."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from specache.errors import BenchmarkError, SpeCacheError

Serve = Callable[[Connection, Any], None]  # runs in the child, given its end of the pipe and the job


class ChildEnded(BenchmarkError):
    """The child process has ended. A negative `exit_code` is a signal: -9 when memory ran out."""

    def __init__(self, exit_code: int | None) -> None:
        super().__init__(f"the process that measures ended with exit code {exit_code}; -9 means that memory ran out.")
        self.exit_code = exit_code


class Child:
    """A started process and a pipe to it. Call `close` at the end.

    Args:
        serve: a module-level function. The child calls it with its end of the pipe and `job`;
            `receive` raises its exceptions here.
        around: a context that is entered while the process is started.
    """

    def __init__(self, serve: Serve, job: Any, around: AbstractContextManager[None] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        # multiprocessing's helper process outlives the child: do not start it inside `around`.
        resource_tracker.ensure_running()
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(serve, other, job), daemon=True)
        with around or nullcontext():
            self._process.start()
        other.close()

    def send(self, message: Any) -> None:
        """Send a message to the process. Raise `ChildEnded` if it has ended."""
        try:
            self._connection.send(message)
        except OSError:
            raise self._ended() from None

    def receive(self) -> Any:
        """Return the next message of the process.

        Raises:
            ChildEnded: the process ended instead.
            BenchmarkError: the process failed. The message says how.
        """
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, _Failure):
            raise BenchmarkError(answer.message)
        return answer

    def close(self) -> None:
        """End the process, if it still runs."""
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent ends this process
    try:
        serve(connection, job)
    except EOFError:
        return  # the parent has ended
    except Exception as error:  # the parent must learn of any failure
        message = str(error) if isinstance(error, SpeCacheError) else f"{type(error).__name__}: {error}"
        with suppress(OSError):
            connection.send(_Failure(message))
