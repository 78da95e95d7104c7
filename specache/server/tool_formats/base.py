"""What a tool format provides. `known_formats.py` lists the formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from secrets import token_hex
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
        name: how docs call it.
        markers: texts that the parser looks for. Special tokens among them are part of its text.
        ends: special tokens that end an answer with calls, beside the model's own.
        takes_tools: whether the chat template reads the variable `tools`.
        after_reasoning: whether the grammar describes what follows reasoning. If not, it describes
            the answer from its first token.
    """

    name: ClassVar[str]
    markers: ClassVar[tuple[str, ...]]
    ends: ClassVar[tuple[str, ...]]
    takes_tools: ClassVar[bool]
    after_reasoning: ClassVar[bool]

    @classmethod
    def of(cls, template: str, tokens: frozenset[str]) -> ToolFormat | None:
        """Return the format of a model; `None` if it is of another family.

        Args:
            template: the text of its chat template.
            tokens: the texts of its special and added tokens.
        """
        ...

    def messages(self, messages: Sequence[Message], tools: ToolUse | None) -> list[Message]:
        """Return a conversation as the chat template takes it.

        It depends on its arguments alone, and the beginning of a longer conversation stays as it
        is, so that stored prefixes can be used.
        """
        ...

    def parser(self, tools: ToolUse) -> CallParser | None:
        """Return the parser of an answer's text; `None` if calls are no part of the text.

        In the harmony format they are messages of their own (`templates/channels.py`).
        """
        ...

    def grammar(self, tools: ToolUse, token: Token, text: str | None) -> str:
        """Return the Lark grammar of an answer, in llguidance's dialect.

        If a call is not required, text may be there in its place or in front of it.

        Args:
            token: how the grammar names a marker.
            text: the grammar of text in place of a call, as an expression; `None` is any text.
        """
        ...

    def new_call_id(self) -> str:
        """Return the identifier of a new call."""
        ...


def new_call_id() -> str:
    """Return an identifier as OpenAI's look."""
    return f"call_{token_hex(12)}"
