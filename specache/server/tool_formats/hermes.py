"""Hermes, Qwen 2.5, Qwen 3 and others: `<tool_call>` and `</tool_call>` around a JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from specache.server.tool_formats import lark
from specache.server.tool_formats.base import CallParser, Message, Token, new_call_id
from specache.server.tool_formats.call_parser import TextCallParser
from specache.server.tool_use import ToolUse

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_OTHER_BODIES = ("<function=", "<arg_key>")  # Qwen 3 Coder, GLM: no JSON between the markers


class HermesFormat:
    """`<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`, one block per call."""

    name: ClassVar[str] = "hermes"
    markers: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)
    ends: ClassVar[tuple[str, ...]] = ()
    takes_tools: ClassVar[bool] = True
    after_reasoning: ClassVar[bool] = True

    @classmethod
    def of(cls, template: str, tokens: frozenset[str]) -> HermesFormat | None:
        found = OPEN in template and "tools" in template and not any(text in template for text in _OTHER_BODIES)
        return cls() if found else None

    def messages(self, messages: Sequence[Message], tools: ToolUse | None) -> list[Message]:
        return list(messages)

    def parser(self, tools: ToolUse) -> CallParser | None:
        return TextCallParser(tools, (OPEN,), (CLOSE,), self.new_call_id)

    def grammar(self, tools: ToolUse, token: Token, text: str | None) -> str:
        block = f'"\\n" call "\\n" {token(CLOSE)}'
        rules = lark.any_call(tools, lark.object_call("arguments"))
        return lark.answer(tools, token(OPEN), text, block, f'"\\n"? {token(OPEN)} {block}', rules)

    def new_call_id(self) -> str:
        return new_call_id()
