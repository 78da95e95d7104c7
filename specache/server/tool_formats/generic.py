"""Any model whose chat template does not know tools: they are described in the system message.

Calls are written as Hermes writes them, which many models have seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import ClassVar

from specache.server.tool_formats.base import Message
from specache.server.tool_formats.hermes import CLOSE, OPEN, HermesFormat
from specache.server.tool_use import ToolUse

_INTRODUCTION = """You may call the following functions to answer. Each line describes one, with the JSON schema of its arguments.
<tools>
{tools}
</tools>
To call a function, answer with a JSON object between tags, in this form:
{open}
{{"name": "the function's name", "arguments": {{"argument": "value"}}}}
{close}"""

_NO_SYSTEM = re.compile(r"system (role|message)s?( is| are)? not supported", re.IGNORECASE)


class GenericFormat(HermesFormat):
    """Hermes' blocks, explained by the prompt. Calls and results of earlier turns become text."""

    name: ClassVar[str] = "generic"
    takes_tools: ClassVar[bool] = False

    def __init__(self, template: str = "") -> None:
        self._has_system = _NO_SYSTEM.search(template) is None

    @classmethod
    def of(cls, template: str, tokens: frozenset[str]) -> GenericFormat | None:
        return cls(template)

    def messages(self, messages: Sequence[Message], tools: ToolUse | None) -> list[Message]:
        rewritten: list[Message] = []
        for index, message in enumerate(messages):
            if message["role"] != "tool":
                rewritten.append(_with_calls_as_text(message))
                continue
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if index and messages[index - 1]["role"] == "tool":
                rewritten[-1] = {**rewritten[-1], "content": f"{rewritten[-1]['content']}\n{result}"}
            else:
                rewritten.append({"role": "user", "content": result})
        return rewritten if tools is None else self._introduced(rewritten, tools)

    def _introduced(self, messages: list[Message], tools: ToolUse) -> list[Message]:
        """Describe the tools at the end of the system message, or in front of the first message."""
        described = "\n".join(json.dumps(one["function"], ensure_ascii=False) for one in tools.described())
        text = _INTRODUCTION.format(tools=described, open=OPEN, close=CLOSE)
        first = messages[0]
        if first["role"] == "system":
            return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
        if self._has_system:
            return [{"role": "system", "content": text}, *messages]
        return [{**first, "content": f"{text}\n\n{first['content']}"}, *messages[1:]]


def _with_calls_as_text(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    functions = [{name: one["function"][name] for name in ("name", "arguments")} for one in calls]
    blocks = [f"{OPEN}\n{json.dumps(one, ensure_ascii=False)}\n{CLOSE}" for one in functions]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": "\n".join([message["content"], *blocks] if message["content"] else blocks)}
