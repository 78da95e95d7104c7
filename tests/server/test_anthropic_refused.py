"""What Anthropic's requests may not have: refused by its name."""

from __future__ import annotations

from typing import Any

import pytest

from specache.server.error_responses import ApiError
from tests.server.test_anthropic_chat import CALL, RESULT, USER, WEATHER, chat

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}}
TEXT = {"type": "text", "text": "a"}


def refused(**fields: Any) -> str:
    """Return the field that a refusal names, which its message must begin with."""
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400 and caught.value.param and caught.value.param in caught.value.message
    return caught.value.param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "user", "content": [TEXT, IMAGE]}]}, "messages[1].content[1]"),
        ({"messages": [{"role": "user", "content": [PDF]}]}, "messages[0].content[0].source.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{**TEXT, "colour": 1}]}]}, "messages[0].content[0].colour"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "server_tool_use"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "content": [CALL]}]}, "messages"),
        ({"messages": [USER, {"role": "assistant", "content": "The answer is"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}]}]},
            "messages[0].content[0].content[0]",
        ),
        ({"messages": [USER, {"role": "user", "content": [TEXT, RESULT]}]}, "messages[1].content[1].tool_use_id"),
        ({"messages": [{**USER, "clear_at": "never"}]}, "messages[0].clear_at"),
        ({"messages": [{**USER, "output_config": {"effort": "low"}}]}, "messages[0].output_config"),
        ({"system": [IMAGE]}, "system[0]"),
        ({"system": {"type": "text"}}, "system"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 2.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"stop_sequences": ["a"] * 100}, "stop_sequences"),
        ({"tools": [{"type": "web_search_20260318", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [WEATHER, {"type": "bash_20250124", "name": "bash"}]}, "tools[1]"),
        ({"tools": [{"name": "weather"}]}, "tools[0].input_schema"),
        ({"tools": [{**WEATHER, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{**WEATHER, "input_schema": {"a": [[[]] * 5000]}}]}, "tools[0].input_schema"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [{**WEATHER, "defer_loading": True}], "tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{**WEATHER, "defer_loading": True}], "tool_choice": {"type": "tool", "name": "weather"}}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "disabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "much"}}, "thinking.type"),
        ({"output_config": {"effort": "some"}}, "output_config.effort"),
        ({"output_config": {"task_budget": {"type": "tokens", "total": 9}}}, "output_config.task_budget"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0]"),
        ({"mcp_servers": [{"type": "url", "url": "http://x", "name": "x"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"compaction": {"a": 1}}, "compaction"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ({"policy": "best"}, "policy"),
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
    ],
)
def test_what_would_change_the_answer_and_is_not_served_is_refused_by_its_name(fields, param):
    assert refused(**fields) == param
