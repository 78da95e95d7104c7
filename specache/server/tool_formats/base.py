"""What a tool format provides. `registry.py` lists the formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from specache.server.answer_pieces import AnswerPiece
from specache.server.tool_use import ToolUse

Message = dict[str, Any]  # as chat templates take it; arguments of calls are objects
Token = Callable[[str], str]  # a marker -> how a Lark grammar names it: as a token, or as its characters


class CallParser(Protocol):
    """Parses one answer as its text arrives, in pieces of any length.

    Attributes:
        ended: the answer is complete, although the model would go on.
    """

    ended: bool

    def push(self, text: str) -> list[AnswerPiece]:
        """Add text and return the pieces that became final."""
        ...

    def finish(self) -> list[AnswerPiece]:
        """End the answer and return the pieces held back. What is no call is text."""
        ...


class ToolFormat(Protocol):
    """The form of one family of models.

    Attributes:
        name: how the log and docs call it.
        markers: texts that the parser looks for. Special tokens among them are part of its text.
        ends: special tokens that end an answer with calls, beside the model's own.
        takes_tools: whether the chat template reads the variable `tools`.
    """

    name: ClassVar[str]
    markers: ClassVar[tuple[str, ...]]
    ends: ClassVar[tuple[str, ...]]
    takes_tools: ClassVar[bool]

    @classmethod
    def recognises(cls, template: str, tokens: frozenset[str]) -> bool:
        """Return whether a model is of this family.

        Args:
            template: the text of its chat template.
            tokens: the texts of its special and added tokens.
        """
        ...

    def messages(self, messages: Sequence[Message], tools: ToolUse | None) -> list[Message]:
        """Return a conversation as the chat template takes it.

        It depends on nothing but its arguments, message by message: the beginning of a longer
        conversation has the same tokens, so that stored prefixes can be used.
        """
        ...

    def parser(self, tools: ToolUse) -> CallParser:
        """Return the parser of an answer's text."""
        ...

    def grammar(self, tools: ToolUse, token: Token) -> str:
        """Return the Lark grammar of an answer, in llguidance's dialect.

        If a call is not required, any text may be there in its place or in front of it.
        """
        ...

    def new_call_id(self) -> str:
        """Return the identifier of a new call."""
        ...
