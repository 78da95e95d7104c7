"""Guard standard output and standard error, which may be full, closed, or a pipe without a reader.

Standard output carries the result: if it cannot be written, the command fails (`OutputError`).
Standard error only accompanies it: the command continues, and the exit code reports the loss.
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
    """The reader of standard output closed the pipe, as `head` does.

    This is not an error of the user.
    """


class StandardStreams:
    """The state of a command's standard streams.

    Attributes:
        messages_lost: True if a write to an open standard error failed.
    """

    def __init__(self) -> None:
        self.messages_lost = False

    def output_failed(self, error: OSError) -> None:
        """Raise `OutputError`.

        Discard buffered data, which would fail again when the interpreter exits.
        """
        with suppress(OSError, ValueError, AttributeError):
            _redirect_to_nowhere(sys.__stdout__.fileno())  # type: ignore[union-attr]
        if error.errno in (errno.EPIPE, errno.ESHUTDOWN):
            raise ClosedPipeError("the reader of standard output left.") from error
        raise OutputError(f"cannot write to standard output: {error.strerror or error}.") from error

    def message_failed(self, error: OSError) -> None:
        """Record that a message was lost."""
        self.messages_lost = self.messages_lost or error.errno not in (errno.EPIPE, errno.EBADF)


class GuardedStream:
    """A text stream that passes write errors to a function. Everything else is forwarded.

    Args:
        on_error: called for the first failed write and every later one.
    """

    def __init__(self, stream: Any, on_error: Callable[[OSError], None]) -> None:
        self._stream = stream
        self._on_error = on_error
        self._failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write text to the stream."""
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
        if self._failure is None:
            try:
                action()
            except OSError as error:
                self._failure = error
        if self._failure is not None:
            self._on_error(self._failure)


class _ClosedStream(io.StringIO):
    """Replaces a standard stream that was closed before the program began (`>&-`)."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "it is closed")


@contextmanager
def guarded_streams() -> Iterator[StandardStreams]:
    """Guard `sys.stdout` and `sys.stderr` inside the block.

    Characters that a terminal cannot show become `?`.
    """
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
    """Open closed descriptors of 0, 1 and 2 on the null device, so that no later file gets them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= _STANDARD_DESCRIPTORS:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _redirect_to_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, descriptor)
    finally:
        os.close(nowhere)
