"""Bodies of `/v1/messages` with anything anywhere: answered, or refused in Anthropic's shape.

SPECACHE_FUZZ=10000 tries as many; the default is 400.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections import Counter
from typing import Any

from tests.server.tiny_server import error_of

BODIES = int(os.environ.get("SPECACHE_FUZZ", "400"))
CALL = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Bern", "days": [1]}}
SUN = {"type": "text", "text": "sun"}
DOCUMENT = {"type": "document", "source": {"type": "text", "data": "x"}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
VALID: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 1,
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hi"}, DOCUMENT],
        },
        {"role": "system", "content": "Late.", "clear_at": "never"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm", "signature": "s"}, CALL]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "sun"}]}],
        },
    ],
    "tools": [{"name": "weather", "description": "It", "input_schema": SCHEMA, "defer_loading": False}],
    "tool_choice": {"type": "auto"},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": {"type": "thinking_turns", "value": 1}}]},
    "output_config": {"effort": "high"},
    "stop_sequences": ["never"],
    "temperature": 0.5,
    "top_k": 3,
    "metadata": {"user_id": "x"},
}
NASTY: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, "", " ", "\0", "\ud800", "ä", "<end>", "<user>", "a" * 3000),
    *("text", "image", "tool_result", "any", "specache-hidden:AAAA", "x-anthropic-billing-header: a", "call_1", "assistant"),
    *(
        [],
        {},
        [[]],
        [None],
        [{}],
        {"type": "text"},
        {"type": "text", "text": "x"},
        [{"type": "text", "text": "x"}],
        [CALL],
        [CALL] * 3,
    ),
    *({"type": []}, {"type": {"a": 1}}, {"\0": 1}, {"type": "tool_reference", "tool_name": "x"}, {"not": {}}, [["x"] * 50] * 50),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a value."""
    inside = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    return [found for key, inner in inside for found in ((*path, key), *places(inner, (*path, key)))]


def changed(chance: random.Random) -> Any:
    """Return a valid body after a few changes anywhere in it."""
    body = copy.deepcopy(VALID)
    for _ in range(chance.choice((1, 1, 2, 4))):
        *way, last = chance.choice(places(body) or [("messages",)])
        holder = body
        for key in way:
            holder = holder[key]
        kind = chance.random()
        if kind < 0.7:
            holder[last] = copy.deepcopy(chance.choice(NASTY))
        elif kind < 0.85:
            del holder[last]
        elif isinstance(holder, dict):
            holder[chance.choice(("type", "content", "text", "extra", "name", "cache_control"))] = chance.choice(NASTY)
        else:
            holder.append(copy.deepcopy(chance.choice(NASTY)))
    return body


def test_any_body_is_answered_or_refused_in_shape(client):
    chance = random.Random(21)
    statuses: Counter[int] = Counter()
    for number in range(BODIES):
        body = changed(chance)
        path = "/v1/messages" if number % 4 == 0 else "/v1/messages/count_tokens"
        response = client.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
        statuses[response.status_code] += 1
        if response.status_code == 200:
            assert response.json() if response.headers["content-type"] == "application/json" else response.text
        else:
            assert response.status_code in (400, 404), (response.text, body)
            error_of(response)
    assert statuses[200] > BODIES // 20 and statuses[400] > BODIES // 4, statuses
    assert client.post("/v1/messages/count_tokens", json=VALID).status_code == 200
