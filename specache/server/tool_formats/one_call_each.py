"""Rewrite conversations for chat templates that know one call per message."""

from __future__ import annotations

from collections.abc import Sequence

from specache.server.tool_formats.base import Message


def one_call_each(messages: Sequence[Message], *, text_apart: bool = False) -> list[Message]:
    """Return a conversation in which every message has one call at most.

    Parallel calls become messages one after the other, each followed by its result. Results without
    a call stay where they are.

    Args:
        text_apart: the text of a message with calls becomes a message in front of them.
    """
    rewritten: list[Message] = []
    place = 0
    while place < len(messages):
        message = messages[place]
        place += 1
        calls = message.get("tool_calls") or []
        apart = text_apart and bool(calls) and bool(message["content"])
        if len(calls) < 2 and not apart:
            rewritten.append(message)
            continue
        if apart:
            rewritten.append({name: value for name, value in message.items() if name != "tool_calls"})
            message = {"role": message["role"], "content": ""}
        results = []
        while place < len(messages) and messages[place]["role"] == "tool":
            results.append(messages[place])
            place += 1
        rewritten += _with_results(message, calls, results)
    return rewritten


def _with_results(message: Message, calls: Sequence[Message], results: Sequence[Message]) -> list[Message]:
    """Return a message per call, with its results behind it, each of them once."""
    rewritten: list[Message] = []
    of_call: dict[str, list[Message]] = {call["id"]: [] for call in calls}
    others: list[Message] = []
    for one in results:
        of_call.get(one.get("tool_call_id", ""), others).append(one)
    for index, call in enumerate(calls):
        first = message if index == 0 else {"role": message["role"], "content": ""}
        rewritten.append({**first, "tool_calls": [call]})
        rewritten += of_call.pop(call["id"], ())  # another call may have the same identifier
    return rewritten + others
