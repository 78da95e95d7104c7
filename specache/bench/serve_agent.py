"""An agent's trace: a conversation with tools that is sent again, longer, at every turn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from specache.bench.serve_client import Answered
from specache.bench.serve_texts import Texts
from specache.bench.serve_trace import Message, TraceRequest

_TOOLS = {
    "read_file": ("Read a part of a file.", {"path": {"type": "string"}, "line": {"type": "integer"}}),
    "search": ("Search all files for a text.", {"text": {"type": "string"}}),
    "run": ("Run a command and return its output.", {"command": {"type": "string"}}),
}


def tools() -> list[dict[str, Any]]:
    """Return the tools of the agent, in OpenAI's form."""
    return [
        {"type": "function", "function": {"name": name, "description": text, "parameters": _schema(properties)}}
        for name, (text, properties) in _TOOLS.items()
    ]


def agent_trace(turns: int, first_tokens: int, turn_tokens: int, answer_tokens: int, texts: Texts) -> list[TraceRequest]:
    """Return the requests of an agent, in their order. Each repeats the one before and adds to it.

    A turn adds a call of a tool and its result. The calls are those of the trace, not those of the
    model that is measured, so that every server reads the same.

    Args:
        first_tokens: tokens of the first question.
        turn_tokens: tokens of a result.
        answer_tokens: most tokens of an answer.
    """
    messages: list[Message] = [{"role": "user", "content": texts.passage("agent", first_tokens)}]
    requests = []
    for turn in range(turns):
        requests.append(TraceRequest(0.0, tuple(messages), answer_tokens, tuple(tools())))
        messages += _turn(turn, texts.passage(f"turn {turn}", turn_tokens))
    return requests


def read_per_new_token(answers: Sequence[Answered]) -> float | None:
    """Return how many prompt tokens a server read for each that is new, after the first request.

    Return None if it does not report them.
    """
    if any(answer.prompt_tokens is None or answer.cached_tokens is None for answer in answers) or len(answers) < 2:
        return None
    prompts = [answer.prompt_tokens or 0 for answer in answers]
    read = sum(prompt - (answer.cached_tokens or 0) for prompt, answer in zip(prompts[1:], answers[1:], strict=True))
    return read / max(1, sum(later - earlier for earlier, later in pairwise(prompts)))


def _turn(turn: int, result: str) -> list[Message]:
    """Return a call and its result."""
    name, (_, properties) = list(_TOOLS.items())[turn % len(_TOOLS)]
    values = {key: turn if schema["type"] == "integer" else f"src/part{turn}.py" for key, schema in properties.items()}
    call = {"id": f"call{turn:05}", "type": "function", "function": {"name": name, "arguments": json.dumps(values)}}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": result},
    ]


def _schema(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
