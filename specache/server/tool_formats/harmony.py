"""GPT-OSS: a call is a message on channel `commentary` to `functions.NAME`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from specache.server.tool_formats import lark
from specache.server.tool_formats.base import CallParser, Message, Token, new_call_id
from specache.server.tool_formats.one_call_each import one_call_each
from specache.server.tool_use import ToolUse

_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")


class HarmonyFormat:
    """`<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>`.

    `templates/channels.py` parses the messages of an answer. It ends with its first call.
    """

    name: ClassVar[str] = "harmony"
    markers: ClassVar[tuple[str, ...]] = ()
    ends: ClassVar[tuple[str, ...]] = ("<|call|>",)
    takes_tools: ClassVar[bool] = True
    after_reasoning: ClassVar[bool] = False

    @classmethod
    def of(cls, template: str, tokens: frozenset[str]) -> HarmonyFormat | None:
        return cls() if tokens.issuperset(_TOKENS) and "tools" in template else None

    def messages(self, messages: Sequence[Message], tools: ToolUse | None) -> list[Message]:
        return [_with_one_text(message) for message in one_call_each(messages)]

    def parser(self, tools: ToolUse) -> CallParser | None:
        return None

    def grammar(self, tools: ToolUse, token: Token, text: str | None) -> str:
        start, channel, message, end = map(token, _TOKENS)
        body = f'({token("<|constrain|>")}? "json")? {message}'
        recipient = "".join(f"to{i}: {lark.literal(f' to=functions.{one.name}')}\n" for i, one in enumerate(tools.callable))
        calls = "".join(
            f'call{i}: {channel} "commentary" to{i} " "? {body} args{i} {token("<|call|>")}\n'
            f'     | to{i} {channel} "commentary" " "? {body} args{i} {token("<|call|>")}\n'
            for i in range(len(tools.callable))
        )
        names = " | ".join(f"call{index}" for index in range(len(tools.callable)))
        before = f'before: {channel} ("analysis" | "commentary") {message} TEXT? {end} {start} "assistant"\n'
        rules = f"{before}TEXT: {lark.ANY}\ncall: {names}\n{calls}{recipient}{lark.arguments_rules(tools)}"
        if tools.required:
            return f"start: before* call\n{rules}"
        return f'start: before* (call | {channel} "final" {message} {"TEXT?" if text is None else text})\n{rules}'

    def new_call_id(self) -> str:
        return new_call_id()


def _with_one_text(message: Message) -> Message:
    """Return a message with its reasoning under the name that templates know.

    Beside a call they take either text or reasoning: both become reasoning.
    """
    reasoning = message.get("reasoning_content")
    if not reasoning:
        return message
    rest = {name: value for name, value in message.items() if name != "reasoning_content"}
    if rest.get("tool_calls") and rest["content"]:
        return {**rest, "thinking": f"{reasoning}\n\n{rest['content']}", "content": ""}
    return {**rest, "thinking": reasoning}
