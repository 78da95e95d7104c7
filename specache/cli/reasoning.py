"""What a model writes before its final message, shown dimmed on a terminal's standard error while it comes."""

from __future__ import annotations

from specache.cli.answering import Result
from specache.cli.console import err, write


class ReasoningDisplay:
    """Shows the reasoning of one answer on standard error, if that is a terminal, and its text on standard output."""

    def __init__(self) -> None:
        self._shows = err.is_terminal
        self._in_line = False

    def show(self, row: int, text: str) -> None:
        """New reasoning."""
        if self._shows:
            err.print(text, style="dim", end="", markup=False, soft_wrap=True)
            self._in_line = True

    def show_text(self, row: int, text: str) -> None:
        """New text of the final message, on standard output."""
        self.end()
        write(text)

    def end(self) -> None:
        """What comes next on the terminal is something else."""
        if self._in_line:
            err.print()
            self._in_line = False


def reasoning_note(result: Result) -> str | None:
    """One line about an answer without a final message."""
    if not result.is_reasoning_alone:
        return None
    if result.finish_reason == "length":
        return "The answer was cut in the model's reasoning, before its final message. Raise --max-new-tokens."
    return "The answer is reasoning alone: the model wrote no final message."
