"""Input of `specache chat`: lines, pasted text, messages of several lines, files."""

from __future__ import annotations

import io
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from specache.cli.console import err, write
from specache.cli.prompts import PromptError
from specache.platform.text_files import line_reader, read_text, typed_text

PROMPT = "\n> "
CONTINUED = ". "
QUOTES = '"""'
LEAVING = "Ctrl-C again, Ctrl-D or /exit leaves; /help says more."
_UNMARK_PASTES = "\x1b[?2004l"


@dataclass(frozen=True)
class Entry:
    """One input of the user.

    Attributes:
        text: the text, without the quotes of a message of several lines.
        is_message: True if it cannot be a command: it has several lines, or was quoted.
    """

    text: str
    is_message: bool


class ChatInput:
    """The user's entries, from a terminal, or line by line from a pipe."""

    def __init__(self) -> None:
        stdin = sys.stdin
        self._closed = stdin is None or stdin.closed
        self.is_terminal = not self._closed and stdin.isatty()
        self._edits = self.is_terminal and sys.stdout.isatty()
        self._marks_pastes = self._edits and _enable_line_editing()
        if self.is_terminal and isinstance(stdin, io.TextIOWrapper):
            stdin.reconfigure(errors="surrogateescape")  # `typed_text` reports the error
        self._lines = stdin if self._closed or self.is_terminal else line_reader(stdin.buffer)
        self._interrupted = False  # Ctrl-C was the last key

    def read(self) -> Entry | None:
        """Return the next entry; None at the end of input.

        Ctrl-C discards the current line. A second one directly after it ends the input.

        Raises:
            PromptError: the input is not text, or ends inside quotes.
        """
        while True:
            try:
                entry = self._entry()
            except KeyboardInterrupt:
                self._end_line()
                if self._interrupted:
                    return None
                self._interrupted = True
                err.print(LEAVING, style="dim")
                continue
            self._interrupted = False
            return entry

    def confirm(self, question: str) -> bool:
        """Ask a question on the terminal and return the answer.

        The answer is no if it begins with n, or on Ctrl-C or end of input.
        """
        try:
            reply = self._line(f"{question} [Y/n] ")
        except KeyboardInterrupt:
            reply = None
        if reply is None:
            self._end_line()
        return reply is not None and not reply.strip().lower().startswith("n")

    def _entry(self) -> Entry | None:
        line = self._line(PROMPT)
        if line is None:
            if self.is_terminal:
                self._end_line()
            return None
        text = typed_text(line, "the message", PromptError).strip()
        if "\n" in text:  # pasted
            return Entry(text, True)
        if text.startswith(QUOTES):
            return Entry(self._quoted(text.removeprefix(QUOTES)), True)
        return Entry(text, False)

    def _quoted(self, first: str) -> str:
        """Return the text up to the line that ends with quotes."""
        lines = [first]
        while not lines[-1].rstrip().endswith(QUOTES):
            line = self._line(CONTINUED)
            if line is None:
                raise PromptError(f"the message that began with {QUOTES} is not ended by {QUOTES}; it was not sent.")
            lines.append(typed_text(line, "the message", PromptError).rstrip("\n"))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str | None:
        if self._closed:
            return None
        if self._edits:
            try:
                return input(prompt)
            except EOFError:
                return None
        if self.is_terminal:
            err.print(prompt, end="", markup=False, highlight=False)
        return self._lines.readline() or None

    def _end_line(self) -> None:
        """Move the cursor to a new line and end line editing, which an interrupt leaves on."""
        if self._edits:
            write((_UNMARK_PASTES if self._marks_pastes else "") + "\n")
        elif self.is_terminal:
            err.print()


def file_and_message(arguments: str) -> tuple[Path, str]:
    """Split the arguments of `/file` into a path (quoted if it has blanks) and a message.

    Raises:
        PromptError: there is no path.
    """
    arguments = arguments.strip()
    if not arguments:
        raise PromptError("/file needs the path of a text file: /file PATH, or /file PATH MESSAGE.")
    whole = Path(os.path.expanduser(arguments))
    if _exists(whole):
        return whole, ""
    rest = io.StringIO(arguments)
    lexer = shlex.shlex(rest, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        path = lexer.get_token() or ""
    except ValueError:  # an unclosed quotation mark
        return whole, ""
    return Path(os.path.expanduser(path)), rest.read().strip()


def read_file(path: Path) -> str:
    """Return a file's text for a message.

    Raises:
        PromptError: the file cannot be read, or is empty.
    """
    text = read_text(path, PromptError).strip("\n")
    if not text.strip():
        raise PromptError(f"{path} is empty.")
    return text


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a path, for example
        return False


def _enable_line_editing() -> bool:
    """Enable history and cursor keys for `input`, and return True if pastes are marked.

    GNU readline inserts marked text with its line breaks. libedit, which some Pythons use, does not
    know the marks. There, and on terminals without them, pasted lines arrive one by one.
    """
    try:
        import readline
    except ImportError:
        return False
    if "libedit" in (readline.__doc__ or "") or os.environ.get("TERM", "dumb") == "dumb":
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")
    return True
