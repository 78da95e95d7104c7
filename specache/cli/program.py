"""Run a command as a process: every end is an exit code and at most one line, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from specache.cli.console import EXIT_CLOSED_PIPE, EXIT_ERROR, EXIT_INTERRUPTED, EXIT_USAGE, err, print_error, wants_traceback
from specache.cli.standard_streams import ClosedPipeError, guarded_streams
from specache.errors import ConfigError, SpeCacheError


class Program(typer.Typer):
    """A typer application that ends through `run`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command of `sys.argv`, or of the given arguments, and exit."""
        run(lambda: super(Program, self).__call__(*args, **kwargs))


def run(program: Callable[[], Any]) -> NoReturn:
    """Run a program and exit with its code.

    Raises:
        SystemExit: always, except for an error with SPECACHE_DEBUG set, which is raised unchanged.
    """
    with guarded_streams() as streams:
        code = _exit_code(program) or _exit_code(sys.stdout.flush)
        if code == 0 and streams.messages_lost:
            code = EXIT_ERROR
    if sys.__stderr__ is not None and streams.messages_lost:
        _drop_unwritten_messages()
    sys.exit(code)


def _exit_code(program: Callable[[], Any]) -> int:
    try:
        program()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print_error(str(end.code))
        return EXIT_ERROR
    except KeyboardInterrupt:
        err.print("Interrupted.", style="yellow")
        return EXIT_INTERRUPTED
    except ClosedPipeError:
        return EXIT_CLOSED_PIPE
    except Exception as error:
        if wants_traceback():
            raise
        print_error(_described(error))
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_ERROR
    return 0


def _described(error: Exception) -> str:
    """Describe an error in a line: our own by its message, system errors with the file.

    Others are described with their type.
    """
    if isinstance(error, SpeCacheError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        text = f"{place}{error.strerror}"
    else:
        text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return f"{text.rstrip('.')}. (Set SPECACHE_DEBUG=1 for the traceback.)"


def _drop_unwritten_messages() -> None:
    """Redirect standard error to the null device, or the interpreter would retry its buffer."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
