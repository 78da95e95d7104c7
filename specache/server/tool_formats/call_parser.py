"""Find calls in the text of an answer, while it arrives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specache.server.answer_pieces import AnswerPiece, TextPiece, ToolArguments, ToolCallBegin
from specache.server.tool_formats.call_readers import CallReader, ObjectReader
from specache.server.tool_use import ToolUse

_MOST_RETRIES = 16  # texts that begin like calls, and are searched again behind their beginning


class TextCallParser:
    """Parses text in which calls begin with a marker. What is no call is text, as it was written.

    White space around calls is omitted.

    Args:
        tools: the tools that there are.
        opens: markers in front of a call.
        closes: markers behind one, which may be missing.
        new_call_id: returns the identifier of a call.
        bare: an answer that begins with an object may be a call without a marker.
        lists: several calls may follow a marker: in brackets, or with a separator between them.
        new_reader: returns the reader of a call that begins with this character; `None` if none
            does.
    """

    def __init__(
        self,
        tools: ToolUse,
        opens: Sequence[str],
        closes: Sequence[str],
        new_call_id: Callable[[], str],
        *,
        bare: bool = False,
        lists: bool = False,
        new_reader: Callable[[str], CallReader | None] | None = None,
    ) -> None:
        self.ended = False
        self._tools = tools
        self._opens, self._closes = tuple(opens), tuple(closes)
        self._new_call_id = new_call_id
        self._may_be_bare, self._lists = bare, lists
        self._new_reader = new_reader or (lambda first: ObjectReader(tools.names) if first == "{" else None)
        self._held = ""  # text that is not decided
        self._marker = ""  # what stands in front of the call that is expected, or read
        self._reader: CallReader | None = None
        self._begun = self._after_call = self._has_text = False
        self._calls = self._retries = 0

    def push(self, text: str) -> list[AnswerPiece]:
        self._held += text
        return self._parse(last=False)

    def finish(self) -> list[AnswerPiece]:
        pieces = self._parse(last=True)
        self._held = ""
        return pieces

    def _parse(self, last: bool) -> list[AnswerPiece]:
        pieces: list[AnswerPiece] = []
        while not self.ended and (step := self._step(last)) is not None:
            pieces += step
        return pieces

    def _step(self, last: bool) -> list[AnswerPiece] | None:
        """Take some of the text; `None` if the rest of it is not decided."""
        if self._reader is not None:
            return self._read_call(self._reader, last)
        if not self._held and not self._marker:
            return None
        if self._marker:
            return self._read_marker(last)
        if self._after_call:
            return self._read_behind_call(last)
        return self._read_text(last)

    def _read_text(self, last: bool) -> list[AnswerPiece] | None:
        if self._may_be_bare:
            begins = self._held.lstrip()
            if not begins and not last:
                return None
            self._may_be_bare = False
            if begins.startswith("{"):
                self._expect(self._take(len(self._held) - len(begins)), ObjectReader(self._tools.names))
                return []
        place, marker = self._next_marker()
        if marker:
            text = self._take(place)
            self._expect(text[len(text.rstrip()) :] + self._take(len(marker)))
            return self._text(text.rstrip())
        return self._text(self._take(len(self._held) - (0 if last else self._undecided()))) or None

    def _read_marker(self, last: bool) -> list[AnswerPiece] | None:
        """Begin to read what stands behind a marker."""
        begins = self._held.lstrip()
        if not begins:
            return self._give_back(self._take(len(self._held))) if last else None
        self._marker += self._take(len(self._held) - len(begins))
        if self._lists and begins[0] == "[" and not self._marker.rstrip().endswith("["):
            self._marker += self._take(1)
            return []
        self._reader = self._new_reader(begins[0])
        return self._give_back("") if self._reader is None else []

    def _read_call(self, reader: CallReader, last: bool) -> list[AnswerPiece] | None:
        before = self._held
        self._take(reader.push(before))
        if last and not (reader.complete or reader.failed):
            reader.finish()
        pieces = self._pieces_of(reader)
        if reader.failed:
            return self._fail(reader)
        if reader.complete:
            self._reader, self._marker, self._after_call = None, "", True
            self.ended = not self._tools.parallel
            return pieces
        return pieces or None

    def _pieces_of(self, reader: CallReader) -> list[AnswerPiece]:
        pieces: list[AnswerPiece] = []
        if reader.name is None:
            return pieces
        if not self._begun:
            self._begun = True
            self._calls += 1
            pieces.append(ToolCallBegin(self._calls - 1, self._new_call_id(), reader.name))
        arguments = reader.take_arguments()
        if arguments:
            pieces.append(ToolArguments(self._calls - 1, arguments))
        return pieces

    def _fail(self, reader: CallReader) -> list[AnswerPiece]:
        """Give back what is no call. Calls may follow in it, behind its first character."""
        self._retries += 1
        again = self._retries <= _MOST_RETRIES
        kept = 1 if again else len(reader.raw)
        self._held = reader.raw[kept:] + self._held
        self._reader = None
        return self._give_back(reader.raw[:kept])

    def _read_behind_call(self, last: bool) -> list[AnswerPiece] | None:
        """Take the marker that ends a call, or the separator in front of the next one."""
        begins = self._held.lstrip()
        if not begins:
            self._held = "" if last else self._held
            return None
        for close in self._closes:
            if begins.startswith(close):
                self._held = begins[len(close) :]
                return []
            if close.startswith(begins) and (not last or len(begins) > 1):  # at the end: a marker cut by the length
                self._held = "" if last else self._held
                return None
        if self._lists and self._read_list(begins):
            return []
        self._after_call = False
        if not self._has_text:
            self._held = begins
        return []

    def _read_list(self, begins: str) -> bool:
        """Take a separator, the bracket that ends a list, or begin the next call of it."""
        if begins[0] in ",;]":
            self._held = begins[1:]
            return True
        if begins[0] == "{":
            self._held = begins
            self._expect("", ObjectReader(self._tools.names))
            return True
        return False

    def _expect(self, marker: str, reader: CallReader | None = None) -> None:
        self._marker, self._reader, self._begun, self._after_call = marker, reader, False, False

    def _give_back(self, text: str) -> list[AnswerPiece]:
        text, self._marker = self._marker + text, ""
        return self._text(text)

    def _text(self, text: str) -> list[AnswerPiece]:
        self._has_text = self._has_text or bool(text)
        return [TextPiece(text)] if text else []

    def _take(self, characters: int) -> str:
        taken, self._held = self._held[:characters], self._held[characters:]
        return taken

    def _next_marker(self) -> tuple[int, str]:
        found = [(place, -len(marker), marker) for marker in self._opens if (place := self._held.find(marker)) >= 0]
        place, _, marker = min(found, default=(0, 0, ""))
        return place, marker

    def _undecided(self) -> int:
        """Return how many characters at the end may be a marker's beginning, or in front of one."""
        part = max((_overlap(self._held, marker) for marker in self._opens), default=0)
        decided = self._held[: len(self._held) - part]
        return len(self._held) - len(decided.rstrip())


def _overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of `text` that begins `marker` and is not all of it."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)
