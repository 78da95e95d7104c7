"""The pieces that an answer grows by, for every route: text, reasoning, calls of tools."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextPiece:
    """More of the final message."""

    text: str


@dataclass(frozen=True)
class ReasoningPiece:
    """More of the reasoning in front of the final message."""

    text: str


@dataclass(frozen=True)
class ToolCallBegin:
    """A call of a tool begins; pieces of its arguments follow, before the next call begins.

    Attributes:
        index: its place among the calls of the answer.
        call_id: its identifier, by which its result refers to it.
        name: the tool.
    """

    index: int
    call_id: str
    name: str


@dataclass(frozen=True)
class ToolArguments:
    """More of the JSON text of the arguments of call `index`."""

    index: int
    text: str


AnswerPiece = TextPiece | ReasoningPiece | ToolCallBegin | ToolArguments


@dataclass
class ToolCall:
    """A call of a tool, whole or so far. `arguments` is JSON text, as the model wrote it."""

    call_id: str
    name: str
    arguments: str = ""
