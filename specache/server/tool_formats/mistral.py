"""Mistral: `[TOOL_CALLS]` and a list of JSON objects, or the name of a tool and `[ARGS]`."""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Sequence
from secrets import choice
from typing import ClassVar

from specache.server.tool_formats import lark
from specache.server.tool_formats.base import CallParser, Message, Token
from specache.server.tool_formats.call_parser import TextCallParser
from specache.server.tool_formats.call_readers import CallReader, NamedReader, ObjectReader
from specache.server.tool_use import ToolUse

OPEN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_ALPHABET = string.ascii_letters + string.digits
_ID = re.compile(r"[A-Za-z0-9]{9}")


class MistralFormat:
    """`[TOOL_CALLS] [{"name": ..., "arguments": {...}}]`, later `[TOOL_CALLS]name[ARGS]{...}`.

    The parser reads both. Templates refuse identifiers that are not nine letters and digits.

    Args:
        named: whether the model writes the later form.
        has_id: whether an identifier is part of it.
    """

    name: ClassVar[str] = "mistral"
    markers: ClassVar[tuple[str, ...]] = (OPEN, CALL_ID, ARGS)
    ends: ClassVar[tuple[str, ...]] = ()
    takes_tools: ClassVar[bool] = True
    after_reasoning: ClassVar[bool] = True

    def __init__(self, named: bool, has_id: bool) -> None:
        self._named = named
        self._has_id = has_id

    @classmethod
    def of(cls, template: str, tokens: frozenset[str]) -> MistralFormat | None:
        return cls(ARGS in template, CALL_ID in template) if OPEN in template else None

    def messages(self, messages: Sequence[Message], tools: ToolUse | None) -> list[Message]:
        return [_with_short_ids(message) for message in messages]

    def parser(self, tools: ToolUse) -> CallParser | None:
        def reader(first: str) -> CallReader | None:
            if first == "{":
                return ObjectReader(tools.names)
            return NamedReader(tools.names) if first.isalnum() or first in "_.:/-" else None

        return TextCallParser(tools, (OPEN,), (), self.new_call_id, lists=True, new_reader=reader)

    def grammar(self, tools: ToolUse, token: Token, text: str | None) -> str:
        if not self._named:
            rules = lark.any_call(tools, lark.object_call("arguments"))
            calls = '" "? "[" call ("," " "? call)* "]"' if tools.parallel else '" "? "[" call "]"'
            return lark.answer(tools, token(OPEN), text, calls, None, rules)
        identifier = f" {token(CALL_ID)} /[A-Za-z0-9]{{9}}/" if self._has_id else ""
        rules = lark.any_call(tools, lambda name, arguments: f"{lark.literal(name)}{identifier} {token(ARGS)} {arguments}")
        return lark.answer(tools, token(OPEN), text, "call", f"{token(OPEN)} call", rules)

    def new_call_id(self) -> str:
        return "".join(choice(_ALPHABET) for _ in range(9))


def _with_short_ids(message: Message) -> Message:
    if message.get("tool_calls"):
        return {**message, "tool_calls": [{**call, "id": _short(call["id"])} for call in message["tool_calls"]]}
    return {**message, "tool_call_id": _short(message["tool_call_id"])} if "tool_call_id" in message else message


def _short(call_id: str) -> str:
    """Return an identifier, or the nine letters and digits that always stand for it."""
    return call_id if _ID.fullmatch(call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]
