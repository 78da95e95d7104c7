"""Hermes, Qwen 2.5 and 3 and many others: `<tool_call>` and `</tool_call>` around a JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from specache.server.tool_formats import lark
from specache.server.tool_formats.base import CallParser, Message, Token, new_call_id
from specache.server.tool_formats.call_parser import TextCallParser
from specache.server.tool_use import ToolUse

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesFormat:
    """`<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`, one block per call."""

    name: ClassVar[str] = "hermes"
    markers: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)
    ends: ClassVar[tuple[str, ...]] = ()
    takes_tools: ClassVar[bool] = True

    @classmethod
    def recognises(cls, template: str, tokens: frozenset[str]) -> bool:
        """Return whether the template writes such blocks, with JSON inside rather than XML."""
        return OPEN in template and "tools" in template and "<function=" not in template and "<arg_key>" not in template

    def messages(self, messages: Sequence[Message], tools: ToolUse | None) -> list[Message]:
        return list(messages)

    def parser(self, tools: ToolUse) -> CallParser:
        return TextCallParser(tools, (OPEN,), (CLOSE,), new_call_id)

    def grammar(self, tools: ToolUse, token: Token) -> str:
        blocks = lark.objects(tools, "arguments", '"\\n"', f'"\\n" {token(CLOSE)}')
        return lark.answer(tools, OPEN, token, blocks, between='"\\n"?')

    def new_call_id(self) -> str:
        return new_call_id()
