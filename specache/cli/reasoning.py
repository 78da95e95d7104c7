"""Show a model's reasoning, dimmed, on a terminal's standard error while it is generated."""

from __future__ import annotations

from specache.cli.answering import Result
from specache.cli.console import err, write


class ReasoningDisplay:
    """Shows reasoning on standard error, if that is a terminal, and text on standard output."""

    def __init__(self) -> None:
        self._shows = err.is_terminal
        self._in_line = False

    def show(self, row: int, text: str) -> None:
        """Print new reasoning."""
        if self._shows:
            err.print(text, style="dim", end="", markup=False, soft_wrap=True)
            self._in_line = True

    def show_text(self, row: int, text: str) -> None:
        """Print new text of the final message on standard output."""
        self.end()
        write(text)

    def end(self) -> None:
        """End the line of reasoning, before other output."""
        if self._in_line:
            err.print()
            self._in_line = False


def reasoning_note(result: Result) -> str | None:
    """Return a note about an answer without a final message, or None."""
    if not result.is_reasoning_alone:
        return None
    if result.finish_reason == "length":
        return "The answer was cut in the model's reasoning, before its final message. Raise --max-new-tokens."
    return "The answer is reasoning alone: the model wrote no final message."
