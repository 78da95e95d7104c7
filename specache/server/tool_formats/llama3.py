"""Llama 3.1 to 3.3: a JSON object, alone or behind `<|python_tag|>`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from specache.server.tool_formats import lark
from specache.server.tool_formats.base import CallParser, Message, Token, new_call_id
from specache.server.tool_formats.call_parser import TextCallParser
from specache.server.tool_formats.one_call_each import one_call_each
from specache.server.tool_use import ToolUse

TAG = "<|python_tag|>"


class Llama3Format:
    """`{"name": ..., "parameters": {...}}`, several with `;` between them.

    The chat template writes one call per message, and no text beside it.
    """

    name: ClassVar[str] = "llama3"
    markers: ClassVar[tuple[str, ...]] = (TAG,)
    ends: ClassVar[tuple[str, ...]] = ("<|eom_id|>",)
    takes_tools: ClassVar[bool] = True
    after_reasoning: ClassVar[bool] = True

    @classmethod
    def of(cls, template: str, tokens: frozenset[str]) -> Llama3Format | None:
        found = "<|start_header_id|>" in template and "tools" in template and "parameters" in template
        return cls() if found else None

    def messages(self, messages: Sequence[Message], tools: ToolUse | None) -> list[Message]:
        return one_call_each(messages, text_apart=True)

    def parser(self, tools: ToolUse) -> CallParser | None:
        return TextCallParser(tools, (TAG,), (), self.new_call_id, bare=True, lists=True)

    def grammar(self, tools: ToolUse, token: Token, text: str | None) -> str:
        rules = lark.any_call(tools, lark.object_call("parameters"))
        calls = f'{token(TAG)}? call (";" " "? call)*' if tools.parallel else f"{token(TAG)}? call"
        if tools.required:
            return f"start: {calls}\n{rules}"
        if text is not None:
            return f"start: {text} | {calls}\n{rules}"
        names = "|".join(lark.pattern(one.name) for one in tools.callable)
        beginnings = [rf'\{{[ \n\t]*"name"[ \n\t]*:[ \n\t]*"({names})"', *([lark.pattern(TAG)] if token(TAG)[0] == '"' else [])]
        return f"start: TEXT? | {calls}\nTEXT: {lark.without_beginning(beginnings)}\n{rules}"

    def new_call_id(self) -> str:
        return new_call_id()
