"""Console output: answers to standard output; progress, tables, errors to standard error."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from specache.cli.flags import in_flags
from specache.cli.numbers import check_numbers
from specache.cli.path_options import parse_paths
from specache.cli.standard_streams import ClosedPipeError
from specache.cli.termination import unwound_by_signals
from specache.errors import ConfigError, SpeCacheError

LOG_WIDTH = 200  # width of tables if there is no terminal
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # exit code of a shell for a process that SIGINT ended
EXIT_CLOSED_PIPE = 141  # exit code for SIGPIPE

_PACKAGE = Path(__file__).parent.parent

err = Console(stderr=True, highlight=False)

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def write(text: str) -> None:
    """Write text of an answer to standard output and flush it."""
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:  # a terminal that is not UTF-8
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
    sys.stdout.flush()


def print_error(message: str) -> None:
    """Print one red line to standard error."""
    err.print("error: ", style="bold red", end="", markup=False)
    err.print(message, markup=False, soft_wrap=True)


def print_table(table: RenderableType) -> None:
    """Print a table to standard error, wide if that is no terminal."""
    console = err if err.is_terminal else Console(stderr=True, highlight=False, width=LOG_WIDTH)
    console.print(table)


def print_note(message: str) -> None:
    """Print a message to standard error, all of it yellow."""
    err.print(message, style="yellow", markup=False, soft_wrap=True)


def print_warning(message: str) -> None:
    """Print one yellow line to standard error."""
    err.print("warning: ", style="bold yellow", end="", markup=False)
    err.print(message, markup=False, soft_wrap=True)


def wants_traceback() -> bool:
    """Return True if errors must be raised unchanged, so that Python prints a traceback."""
    return bool(os.environ.get("SPECACHE_DEBUG"))


def reports_errors(command: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Turn our errors and Ctrl-C into one line and an exit code.

    Paths are read by `read_path`. `SPECACHE_DEBUG=1` shows the traceback instead.
    """

    @functools.wraps(command)
    def wrapper(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        try:
            with unwound_by_signals(), _plain_warnings(kwargs):
                _check_current_folder()
                check_numbers(kwargs)
                return command(*args, **kwargs)
        except ClosedPipeError:
            raise typer.Exit(EXIT_CLOSED_PIPE) from None
        except SpeCacheError as error:
            if wants_traceback():
                raise
            print_error(in_flags(str(error), kwargs))
            raise typer.Exit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_ERROR) from None
        except KeyboardInterrupt:
            err.print("Interrupted.", style="yellow")
            raise typer.Exit(EXIT_INTERRUPTED) from None

    parse_paths(wrapper)
    return wrapper


def _check_current_folder() -> None:
    """Check that the current folder is there: without one, libraries end the process."""
    try:
        os.getcwd()
    except OSError:
        raise SpeCacheError("the current folder is no longer there: it was removed or replaced. Go to another one: cd") from None


@contextmanager
def _plain_warnings(parameters: Iterable[str]) -> Iterator[None]:
    """Print our own warnings inside the block as one line on standard error.

    Others are unchanged.
    """
    before = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
        if not Path(filename).is_relative_to(_PACKAGE):
            return before(message, category, filename, *rest, **more)
        print_warning(in_flags(str(message), parameters))

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Delay a Ctrl-C until the end of the block; raise a second one at once.

    This applies only in the main thread, and if Ctrl-C raises `KeyboardInterrupt` at all.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    interrupted = False

    def note(*_: Any) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted:
        raise KeyboardInterrupt


def quiet_libraries() -> None:
    """Silence the progress bars and advice of transformers and the hub client.

    Errors are still shown.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"transformers\..*")


@contextmanager
def status(message: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner (plain lines without a terminal) during work of unknown length.

    Yields:
        a function that changes the message.
    """
    if not err.is_terminal:
        yield _say_line
        return
    with err.status(escape(message)) as spinner:
        yield lambda text: spinner.update(escape(text))


def _say_line(message: str) -> None:
    err.print(message, style="dim", markup=False)


class PrefillProgress:
    """A progress bar for `progress=` of `prefill` and `generate`, removed when prefill ends.

    Nothing is drawn for prompts shorter than `minimum` tokens or if standard error is not a
    terminal.
    """

    def __init__(self, description: str = "Reading the prompt", minimum: int = 512) -> None:
        self._description = description
        self._minimum = minimum
        self._bar: Progress | None = None
        self.reused: int | None = None  # tokens already cached; `None` before the first call

    def __call__(self, done: int, total: int) -> None:
        if self.reused is None:
            self.reused = done
        if done >= total:
            self.close()
            return
        if self._bar is None:
            if not err.is_terminal or total < self._minimum:
                return
            self._start(total)
        assert self._bar is not None
        self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def _start(self, total: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=err, transient=True)
        self._bar.add_task(self._description, total=total)
        self._bar.start()

    def close(self) -> None:
        """Remove the bar. Safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
