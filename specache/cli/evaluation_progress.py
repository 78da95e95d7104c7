"""A progress bar over the cells of an evaluation; plain lines without a terminal."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from specache.cli.console import err, print_note
from specache.eval.runner import Progress as RunProgress

_LINES = 20  # most plain lines of a run


class CellProgress(RunProgress):
    """Shows the current item and method, the number of finished cells, and each warning once."""

    def __init__(self) -> None:
        columns = (
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._bar = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
        self._cells = self._done = 0
        self._warned: set[str] = set()
        self._catcher = warnings.catch_warnings()

    def __enter__(self) -> CellProgress:
        self._catcher.__enter__()
        warnings.showwarning = self._warn
        self._bar.start()
        self._task = self._bar.add_task("reading the task", total=None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.stop()
        self._catcher.__exit__(kind, error, traceback)

    def begin(self, cells: int, done: int) -> None:
        self._cells, self._done = cells, done
        self._bar.reset(self._task, total=cells, completed=done, description="")
        if done:
            self._say(f"{done} of {cells} cells were finished earlier.")

    def prefill(self, item: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=f"{escape(item)}: reading {done:,} of {total:,} tokens")

    def cell(self, item: str, method: str) -> None:
        self._bar.update(self._task, description=f"{escape(item)}: {escape(method)}")

    def finished(self, cells: int = 1) -> None:
        before, self._done = self._done, self._done + cells
        self._bar.update(self._task, completed=self._done)
        step = max(1, -(-self._cells // _LINES))
        if not err.is_terminal and before // step != self._done // step:
            self._say(f"{self._done} of {self._cells} cells")

    def skipped(self, method: str, reason: str) -> None:
        print_note(f"{method} is skipped: {reason}")

    def _warn(self, message: Warning | str, *where: Any, **more: Any) -> None:
        text = str(message)
        if text not in self._warned:
            self._warned.add(text)
            print_note(f"warning: {text}")

    def _say(self, text: str) -> None:
        err.print(text, style="dim", markup=False)
