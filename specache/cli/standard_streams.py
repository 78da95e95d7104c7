"""Standard output and standard error that may be full, closed, or a pipe that nobody reads any more.

What is written to standard output is the result: where it cannot be written the command has failed (`OutputError`). What is written
to standard error only accompanies it: the work goes on without, and the exit code says that something was lost.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from specache.errors import SpeCacheError

_STANDARD_DESCRIPTORS = 2  # the largest of 0, 1, 2


class OutputError(SpeCacheError):
    """Standard output cannot be written."""


class ClosedPipeError(OutputError):
    """The reader of standard output left, as `head` does: no mistake of anybody, and nothing to say."""


class StandardStreams:
    """What became of the standard streams of a command.

    Attributes:
        messages_lost: something could not be written to standard error, which was open.
    """

    def __init__(self) -> None:
        self.messages_lost = False

    def output_failed(self, error: OSError) -> None:
        """Raise `OutputError`. What is left in buffers is thrown away, or the interpreter would fail with it when it ends."""
        with suppress(OSError, ValueError, AttributeError):
            _redirect_to_nowhere(sys.__stdout__.fileno())  # type: ignore[union-attr]
        if error.errno in (errno.EPIPE, errno.ESHUTDOWN):
            raise ClosedPipeError("the reader of standard output left.") from error
        raise OutputError(f"cannot write to standard output: {error.strerror or error}.") from error

    def message_failed(self, error: OSError) -> None:
        """Go on without the message."""
        self.messages_lost = self.messages_lost or error.errno not in (errno.EPIPE, errno.EBADF)


class GuardedStream:
    """A text stream whose failures go to a function; everything else is the stream's own.

    Args:
        on_error: called for every write after the first failure too.
    """

    def __init__(self, stream: Any, on_error: Callable[[OSError], None]) -> None:
        self._stream = stream
        self._on_error = on_error
        self._broken: OSError | None = None

    def write(self, text: str) -> int:
        """Write text, as the stream does."""
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write several pieces of text."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream."""
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, action: Callable[[], Any]) -> None:
        if self._broken is None:
            try:
                action()
            except OSError as error:
                self._broken = error
        if self._broken is not None:
            self._on_error(self._broken)


class _ClosedStream(io.StringIO):
    """Stands for a standard stream that was closed before the program began (`>&-`)."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "it is closed")


@contextmanager
def guarded_streams() -> Iterator[StandardStreams]:
    """Guard `sys.stdout` and `sys.stderr` inside the block. A character that a terminal cannot show becomes a question mark."""
    streams = StandardStreams()
    before = sys.stdout, sys.stderr
    _occupy_closed_descriptors()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    sys.stdout = GuardedStream(sys.stdout or _ClosedStream(), streams.output_failed)
    sys.stderr = GuardedStream(sys.stderr or _ClosedStream(), streams.message_failed)
    try:
        yield streams
    finally:
        sys.stdout, sys.stderr = before


def _occupy_closed_descriptors() -> None:
    """Open what was closed of 0, 1 and 2 on nothing: else the next file that is opened would be standard output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STANDARD_DESCRIPTORS:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _redirect_to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, descriptor)
    finally:
        os.close(nowhere)
