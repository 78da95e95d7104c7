"""An answer as Anthropic's blocks of content, and the events by which they grow."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pydantic_core

from specache.server.answer_pieces import AnswerPiece, ReasoningPiece, TextPiece, ToolCallBegin
from specache.server.anthropic_blocks import hiding_signature

Event = dict[str, Any]  # `type` and what belongs to it


class ContentBlocks:
    """Grows an answer's blocks, one at a time: a piece of another kind begins the next one.

    Args:
        shows_thinking: whether blocks of reasoning have its text, or are empty.

    Attributes:
        content: the blocks, the last of which may still grow.
    """

    def __init__(self, shows_thinking: bool = True) -> None:
        self.content: list[dict[str, Any]] = []
        self._shows_thinking = shows_thinking
        self._kind: tuple[str, int] | None = None  # of the open block: its type, and the index of its call
        self._text: list[str] = []  # of the open block
        self._spaces = ""  # in front of what may become a block of text

    def push(self, piece: AnswerPiece) -> list[Event]:
        """Add a piece and return the events that tell of it."""
        if isinstance(piece, ToolCallBegin):
            block = {"type": "tool_use", "id": piece.call_id, "name": piece.name, "input": {}}
            return self._begin(("tool_use", piece.index), block)
        if isinstance(piece, TextPiece):
            return self._push_text(piece.text)
        if isinstance(piece, ReasoningPiece):
            empty = {"type": "thinking", "thinking": "", "signature": ""}
            delta = {"type": "thinking_delta", "thinking": piece.text} if self._shows_thinking else None
            return self._grow(("thinking", 0), empty, delta, piece.text)
        delta = {"type": "input_json_delta", "partial_json": piece.text}
        return self._grow(("tool_use", piece.index), None, delta, piece.text)

    def finish(self) -> list[Event]:
        """End the answer and return the events that tell of it."""
        held = [] if self.content or not self._spaces else self._push_text("", ends=True)
        return [*held, *self._end_block()]

    def _push_text(self, text: str, *, ends: bool = False) -> list[Event]:
        """Add text. Spaces alone begin no block: models write them between reasoning and calls."""
        if self._kind != ("text", 0):
            text, self._spaces = self._spaces + text, ""
            if not text.strip() and not ends:
                self._spaces = text
                return []
        return self._grow(("text", 0), {"type": "text", "text": ""}, {"type": "text_delta", "text": text}, text)

    def _end_block(self) -> list[Event]:
        """End the open block and return the events that tell of it."""
        if self._kind is None:
            return []
        index, block, text = len(self.content) - 1, self.content[-1], "".join(self._text)
        events: list[Event] = []
        if block["type"] == "text":
            block["text"] = text
        elif block["type"] == "thinking":
            signature = _signature(text) if self._shows_thinking else hiding_signature(text)
            block |= {"thinking": text if self._shows_thinking else "", "signature": signature}
            events.append(_delta(index, {"type": "signature_delta", "signature": block["signature"]}))
        else:
            block["input"] = _input(text)
        self._kind, self._text = None, []
        return [*events, {"type": "content_block_stop", "index": index}]

    def _grow(self, kind: tuple[str, int], empty: dict[str, Any] | None, delta: dict[str, Any] | None, text: str) -> list[Event]:
        """Add text to the open block, or to a new one."""
        events = [] if kind == self._kind or empty is None else self._begin(kind, empty)
        self._text.append(text)
        return events if delta is None else [*events, _delta(len(self.content) - 1, delta)]

    def _begin(self, kind: tuple[str, int], block: dict[str, Any]) -> list[Event]:
        events = self._end_block()
        self._kind, self._spaces = kind, ""
        self.content.append(block)
        return [*events, {"type": "content_block_start", "index": len(self.content) - 1, "content_block": dict(block)}]


def _delta(index: int, delta: dict[str, Any]) -> Event:
    return {"type": "content_block_delta", "index": index, "delta": delta}


def _signature(thinking: str) -> str:
    """Return what clients expect beside reasoning. Nothing checks it."""
    return f"specache-{hashlib.sha256(thinking.encode()).hexdigest()[:32]}"


def _input(text: str) -> dict[str, Any]:
    """Return the input of a call: what is there of it, if the answer ended in the middle."""
    try:
        value = pydantic_core.from_json(text, allow_partial=True)
    except ValueError:
        return {}
    return _finite(value) if isinstance(value, dict) else {}


def _finite(value: Any) -> Any:
    """Return a value of JSON with null for numbers that JSON has not (`NaN`, `1e999`)."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
