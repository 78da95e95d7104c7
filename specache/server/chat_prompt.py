"""A conversation as a model's chat template takes it, with its tools."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pydantic_core

from specache.server.chat_fields import ChatMessage
from specache.server.json_body import check_json
from specache.server.tool_fields import ToolCallFields
from specache.server.tool_formats.base import Message, ToolFormat
from specache.server.tool_formats.known_formats import tool_format
from specache.server.tool_use import ToolUse
from specache.templates.markers import template_text
from specache.templates.template import ChatTemplate, PromptError

_DEEPEST_ARGUMENTS, _MOST_ARGUMENTS = 64, 100_000
_REASONING = re.compile(r"""[.'"](reasoning_content|thinking)\b""")
_PROBE = {"probe": "a value"}


class ChatPrompt:
    """Writes messages for one chat template.

    Args:
        template: without variables.
    """

    def __init__(self, template: ChatTemplate) -> None:
        text = template_text(template.tokenizer)
        self.tool_format: ToolFormat = tool_format(template.tokenizer)
        self._knows_developers = "developer" in text
        self._knows_reasoning = _REASONING.search(text) is not None
        self._arguments_are_text = self.tool_format.takes_tools and _wants_text(template, self.tool_format)

    def messages(self, messages: Sequence[ChatMessage], tools: ToolUse | None) -> list[Message]:
        """Return the messages of a conversation, in the model's form."""
        names: dict[str, str] = {}  # of the calls so far: some clients number those of each answer anew
        written = []
        for message in messages:
            names |= {call.id: call.function.name for call in message.tool_calls or ()}
            written.append(self._message(message, names))
        return self.tool_format.messages(written, tools)

    def variables(self, tools: ToolUse | None) -> dict[str, Any]:
        """Return the template's variables about tools."""
        return {"tools": tools.described()} if tools is not None and self.tool_format.takes_tools else {}

    def _message(self, message: ChatMessage, names: dict[str, str]) -> Message:
        role = message.role
        if role == "developer" and not self._knows_developers:
            role = "system"
        written: Message = {"role": role, "content": message.content}
        if message.reasoning_content and role == "assistant" and self._knows_reasoning:
            written["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            written["tool_calls"] = [self._call(call) for call in message.tool_calls]
        if message.tool_call_id is not None:
            written["tool_call_id"] = message.tool_call_id
            if message.tool_call_id in names:
                written["name"] = names[message.tool_call_id]
        return written

    def _call(self, call: ToolCallFields) -> dict[str, Any]:
        text = call.function.arguments
        if not text.strip():  # as some clients write none
            text = "{}"
        arguments = text if self._arguments_are_text else _arguments(text)
        return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def characters(messages: Sequence[ChatMessage], tools: ToolUse | None) -> int:
    """Return the characters of a conversation, with those of its calls and of the tools."""
    calls = sum(len(call.function.arguments) for message in messages for call in message.tool_calls or ())
    described = 0 if tools is None else sum(len(one.description or "") + _length(one.parameters) for one in tools.functions)
    return calls + described + sum(len(message.content) for message in messages)


def _length(value: Any) -> int:
    """Return the characters of the texts of a JSON value."""
    if isinstance(value, dict):
        return sum(len(key) + _length(each) for key, each in value.items())
    if isinstance(value, list):
        return sum(map(_length, value))
    return len(value) if isinstance(value, str) else 0


def _arguments(text: str) -> Any:
    """Return arguments as an object, as most templates take them. What is no object stays text."""
    try:
        value = pydantic_core.from_json(text, allow_inf_nan=False)
        check_json(value, deepest=_DEEPEST_ARGUMENTS, most_values=_MOST_ARGUMENTS)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def _wants_text(template: ChatTemplate, form: ToolFormat) -> bool:
    """Return whether a template writes arguments well only if they are JSON text.

    DeepSeek's joins them to other texts, for example.
    """

    def written(arguments: Any) -> bool:
        call = {"id": "callcall0", "type": "function", "function": {"name": "probe", "arguments": arguments}}
        result = {"role": "tool", "content": "x", "tool_call_id": "callcall0", "name": "probe"}
        messages: list[Message] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            result,
        ]
        try:
            text = template.render(form.messages(messages, None))
        except PromptError:
            return False
        return re.search(r'"probe": ?"a value"', text) is not None

    return not written(_PROBE) and written('{"probe": "a value"}')
