"""The output of a response while its answer grows, and the events that tell of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from specache.engine.events import NewToken
from specache.server.answer_pieces import AnswerPiece, ReasoningPiece, TextPiece, ToolCallBegin

Event = dict[str, Any]  # an event of a stream, without its number
Logprobs = list[dict[str, Any]]
COMPLETED, INCOMPLETE, IN_PROGRESS = "completed", "incomplete", "in_progress"


class OutputItems:
    """Turns the pieces of an answer into items. Every method returns events.

    Args:
        new_id: returns the identifier of a new item, from how it begins and its place.
        logprobs_of: returns the log-probabilities of tokens, as the response shows them.

    Attributes:
        reasoning_tokens: how many of the tokens so far are reasoning.
    """

    def __init__(self, new_id: Callable[[str, int], str], logprobs_of: Callable[[Sequence[NewToken]], Logprobs]) -> None:
        self.reasoning_tokens = 0
        self._new_id = new_id
        self._logprobs_of = logprobs_of
        self._items: list[Event] = []
        self._open: _OpenItem | None = None
        self._waiting: list[NewToken] = []  # tokens whose text is not there yet

    def items(self) -> list[dict[str, Any]]:
        """Return the items so far. One that still grows is incomplete."""
        return self._items if self._open is None else [*self._items, self._open.to_json(INCOMPLETE)]

    def push(self, token: NewToken, pieces: Sequence[AnswerPiece]) -> list[Event]:
        """Add a token and the pieces that became final with it."""
        self._waiting.append(token)
        return self._add(pieces)

    def finish(self, pieces: Sequence[AnswerPiece], *, complete: bool) -> list[Event]:
        """Add the last pieces and end the output, which has at least one item.

        Args:
            complete: whether the answer ended by itself.
        """
        events = self._add(pieces)
        if isinstance(self._open, _OpenReasoning):
            self.reasoning_tokens += len(self._waiting)
        if self._open is None and not self._items:
            events += self._begin(_OpenMessage)
        return events + self._end(COMPLETED if complete else INCOMPLETE)

    def _add(self, pieces: Sequence[AnswerPiece]) -> list[Event]:
        events: list[Event] = []
        for place, piece in enumerate(pieces):
            tokens: list[NewToken] = []
            if place == len(pieces) - 1:
                tokens, self._waiting = self._waiting, []
            events += self._add_piece(piece, tokens)
        return events

    def _add_piece(self, piece: AnswerPiece, tokens: list[NewToken]) -> list[Event]:
        if isinstance(piece, ToolCallBegin):
            return self._begin(_OpenCall, piece)
        events: list[Event] = []
        if isinstance(piece, ReasoningPiece):
            self.reasoning_tokens += len(tokens)
        if isinstance(piece, TextPiece | ReasoningPiece):
            wanted = _OpenMessage if isinstance(piece, TextPiece) else _OpenReasoning
            if not isinstance(self._open, wanted):
                events += self._begin(wanted)
        assert self._open is not None, "arguments follow the beginning of their call"
        return [*events, self._open.grow(piece.text, self._logprobs_of(tokens))]

    def _begin(self, kind: type[_OpenItem], *arguments: Any) -> list[Event]:
        events = self._end(COMPLETED)
        place = len(self._items)
        self._open = kind(self._new_id(kind.prefix, place), place, *arguments)
        return events + self._open.begin()

    def _end(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        events = self._open.end(status)
        self._items.append(self._open.to_json(status))
        self._open = None
        return events


class _OpenItem:
    """An item that grows."""

    prefix: ClassVar[str]

    def __init__(self, item_id: str, place: int) -> None:
        self._id = item_id
        self._place = place
        self._texts: list[str] = []
        self._logprobs: Logprobs = []

    def to_json(self, status: str) -> dict[str, Any]:
        """Return the item with the text so far."""
        raise NotImplementedError

    def begin(self) -> list[Event]:
        """Return the first events."""
        return [{"type": "response.output_item.added", "output_index": self._place, "item": self.to_json(IN_PROGRESS)}]

    def grow(self, text: str, logprobs: Logprobs) -> Event:
        """Add text."""
        self._texts.append(text)
        self._logprobs += logprobs
        return self._delta(text, logprobs)

    def end(self, status: str) -> list[Event]:
        """Return the last events."""
        done = {"type": "response.output_item.done", "output_index": self._place, "item": self.to_json(status)}
        return [*self._last(), done]

    @property
    def _text(self) -> str:
        return "".join(self._texts)

    def _event(self, kind: str, **fields: Any) -> Event:
        return {"type": f"response.{kind}", "item_id": self._id, "output_index": self._place, **fields}

    def _delta(self, text: str, logprobs: Logprobs) -> Event:
        raise NotImplementedError

    def _last(self) -> list[Event]:
        raise NotImplementedError


class _OpenText(_OpenItem):
    """An item with one part, a text."""

    events: ClassVar[str]  # how its events begin

    def begin(self) -> list[Event]:
        return [*super().begin(), self._event("content_part.added", content_index=0, part=self._part())]

    def _part(self) -> dict[str, Any]:
        raise NotImplementedError

    def _content(self, status: str) -> list[dict[str, Any]]:
        return [] if status == IN_PROGRESS else [self._part()]

    def _shown_logprobs(self, logprobs: Logprobs) -> dict[str, Logprobs]:
        return {}

    def _delta(self, text: str, logprobs: Logprobs) -> Event:
        return self._event(f"{self.events}.delta", content_index=0, delta=text, **self._shown_logprobs(logprobs))

    def _last(self) -> list[Event]:
        logprobs = self._shown_logprobs(self._logprobs)
        text = self._event(f"{self.events}.done", content_index=0, text=self._text, **logprobs)
        return [text, self._event("content_part.done", content_index=0, part=self._part())]


class _OpenMessage(_OpenText):
    """The message."""

    prefix, events = "msg", "output_text"

    def to_json(self, status: str) -> dict[str, Any]:
        fields = {"id": self._id, "role": "assistant", "status": status}
        return {"type": "message", **fields, "content": self._content(status)}

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": list(self._logprobs)}

    def _shown_logprobs(self, logprobs: Logprobs) -> dict[str, Logprobs]:
        return {"logprobs": list(logprobs)}


class _OpenReasoning(_OpenText):
    """Reasoning in front of the message, or between calls. It is shown itself, with no summary."""

    prefix, events = "rs", "reasoning_text"

    def to_json(self, status: str) -> dict[str, Any]:
        fields: dict[str, Any] = {"id": self._id, "status": status, "summary": []}
        return {"type": "reasoning", **fields, "content": self._content(status)}

    def _part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self._text}


class _OpenCall(_OpenItem):
    """A call of a tool."""

    prefix = "fc"

    def __init__(self, item_id: str, place: int, call: ToolCallBegin) -> None:
        super().__init__(item_id, place)
        self._call = call

    def to_json(self, status: str) -> dict[str, Any]:
        names = {"call_id": self._call.call_id, "name": self._call.name}
        return {"type": "function_call", "id": self._id, "status": status, **names, "arguments": self._text}

    def _delta(self, text: str, logprobs: Logprobs) -> Event:
        return self._event("function_call_arguments.delta", delta=text)

    def _last(self) -> list[Event]:
        return [self._event("function_call_arguments.done", name=self._call.name, arguments=self._text)]
