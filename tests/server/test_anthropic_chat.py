"""Anthropic's requests as the rest of the server understands them, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from specache.server.anthropic_blocks import hiding_signature
from specache.server.anthropic_chat import anthropic_name, chat_body
from specache.server.anthropic_fields import CountBody, MessagesBody
from specache.server.error_responses import ApiError
from specache.server.json_body import parse_body

USER = {"role": "user", "content": "Hello"}
CALL = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Zürich", "days": [1, 2]}}
WEATHER = {"name": "weather", "description": "Tells it.", "input_schema": {"type": "object", "properties": {}}}
HI = {"type": "text", "text": "Hi"}
RESULT = {"type": "tool_result", "tool_use_id": "call_1"}
THINKING = {"type": "thinking", "thinking": "Hm.", "signature": "abc"}


def parsed(kind: type[CountBody] = MessagesBody, **fields: Any) -> CountBody:
    body = {"model": "tiny", "max_tokens": 10, "messages": [USER], **fields}
    return parse_body(json.dumps(body).encode(), kind)


def chat(**fields: Any) -> Any:
    return chat_body(parsed(**fields))


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def messages(*given: Any, **fields: Any) -> list[tuple[str, str]]:
    return [(one.role, one.content) for one in chat(messages=list(given), **fields).messages]


def refused(**fields: Any) -> str:
    """Return the field that a refusal names, which its message must begin with."""
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.status == 400 and caught.value.param and caught.value.param in caught.value.message
    return caught.value.param


def test_a_text_and_a_list_of_blocks_are_the_same():
    block = {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    assert messages({"role": "user", "content": [block]}) == messages(USER) == [("user", "Hello")]
    assert messages({"role": "user", "content": [block, block]}) == [("user", "Hello\nHello")]


def test_the_system_comes_first_as_a_text_or_in_blocks():
    block = {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
    for system in ("Be brief.", [block]):
        assert messages(USER, system=system) == [("system", "Be brief."), ("user", "Hello")]
    assert messages(USER, system=[block, block])[0] == ("system", "Be brief.\nBe brief.")
    assert messages(USER, system=[]) == messages(USER, system=None) == [("user", "Hello")]


@pytest.mark.parametrize("header", ["x-anthropic-billing-header: cc_version=2.1.9.a3f; cch=0a9b;", "x-anthropic-billing-header: b"])
def test_the_line_of_claude_code_that_changes_with_each_request_is_left_out(header):
    blocks = [{"type": "text", "text": header}, {"type": "text", "text": "Be brief."}]
    assert messages(USER, system=blocks)[0] == ("system", "Be brief.")
    assert messages(USER, system=f"{header}\n\nBe brief.")[0] == ("system", "Be brief.")
    assert messages(USER, system=header) == [("user", "Hello")]
    assert messages(USER, system=f"Look: {header}")[0] == ("system", f"Look: {header}")


def test_messages_of_a_role_in_a_row_are_one_turn():
    answer = {"role": "assistant", "content": "Hi"}
    assert messages(USER, USER, answer, answer, USER) == [("user", "Hello\nHello"), ("assistant", "Hi\nHi"), ("user", "Hello")]


def test_a_note_of_the_system_in_the_middle_is_a_part_of_the_users_turn():
    first, note = {"role": "system", "content": "Be brief."}, {"role": "system", "content": "It is late."}
    answer = {"role": "assistant", "content": "Hi"}
    found = messages(first, USER, note, answer, USER, system="You help.")
    assert found[0] == ("system", "You help.\nBe brief.")
    assert found[1] == ("user", "Hello\n<system-reminder>\nIt is late.\n</system-reminder>")
    short = {**note, "clear_at": "next_user_message"}
    assert messages(USER, short, answer, USER)[0] == ("user", "Hello")
    assert "late" in messages(USER, answer, USER, short)[-1][1]


def test_calls_and_results_are_messages_in_their_order():
    answer = {
        "role": "assistant",
        "content": [{"type": "text", "text": "Let me see."}, CALL, {**CALL, "id": "call_2", "input": {}}],
    }
    results = [
        {
            "type": "tool_result",
            "tool_use_id": "call_1",
            "content": [{"type": "text", "text": "sun"}, {"type": "text", "text": "5 °C"}],
        },
        {"type": "tool_result", "tool_use_id": "call_2", "content": "no such city", "is_error": True},
        {"type": "text", "text": "And now?"},
    ]
    body = chat(messages=[USER, answer, {"role": "user", "content": results}], tools=[WEATHER])
    _, said, first, second, last = body.messages
    assert said.content == "Let me see." and [call.id for call in said.tool_calls] == ["call_1", "call_2"]
    assert said.tool_calls[0].function.name == "weather"
    assert json.loads(said.tool_calls[0].function.arguments) == CALL["input"] and "ü" in said.tool_calls[0].function.arguments
    assert (first.role, first.tool_call_id, first.content) == ("tool", "call_1", "sun\n5 °C")
    assert (second.tool_call_id, second.content) == ("call_2", "Error: no such city")
    assert (last.role, last.content) == ("user", "And now?")


@pytest.mark.parametrize(("content", "text"), [(None, ""), ([], ""), ("", "")])
def test_a_result_may_be_empty(content, text):
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": content}
    answer = {"role": "assistant", "content": [CALL]}
    assert messages(USER, answer, {"role": "user", "content": [result]})[-1] == ("tool", text)
    failed = messages(USER, answer, {"role": "user", "content": [{**result, "is_error": True}]})[-1]
    assert failed == ("tool", "Error:")


def test_documents_of_text_and_search_results_are_text():
    plain = {
        "type": "document",
        "title": "A tale",
        "context": "From 1900",
        "source": {"type": "text", "media_type": "text/plain", "data": "Once."},
    }
    parts = {
        "type": "document",
        "source": {"type": "content", "content": [{"type": "text", "text": "Upon"}, {"type": "text", "text": "a time"}]},
    }
    found = {
        "type": "search_result",
        "source": "https://example.org",
        "title": "Page",
        "content": [{"type": "text", "text": "End."}],
    }
    assert messages({"role": "user", "content": [plain, parts, found]}) == [
        ("user", "A tale\nFrom 1900\nOnce.\nUpon\na time\nPage\nhttps://example.org\nEnd.")
    ]


def test_reasoning_goes_back_to_the_template_and_what_nobody_can_read_is_left_out():
    answer = {
        "role": "assistant",
        "content": [THINKING, {"type": "redacted_thinking", "data": "xyz"}, HI],
    }
    said = chat(messages=[USER, answer, USER]).messages[1]
    assert (said.content, said.reasoning_content) == ("Hi", "Hm.")


def test_reasoning_that_an_answer_did_not_show_goes_back_too():
    hidden = {"type": "thinking", "thinking": "", "signature": hiding_signature("Hm – ja.")}
    said = chat(messages=[USER, {"role": "assistant", "content": [hidden, HI]}, USER]).messages[1]
    assert (said.content, said.reasoning_content) == ("Hi", "Hm – ja.")


def test_older_reasoning_is_cleared_as_the_request_says():
    answer = {"role": "assistant", "content": [THINKING, HI]}
    conversation = [USER, answer, USER, answer, USER, answer, USER]

    def kept(*edits: Any) -> list[str | None]:
        body = chat(messages=conversation, context_management={"edits": list(edits)} if edits else None)
        return [one.reasoning_content for one in body.messages if one.role == "assistant"]

    clear = {"type": "clear_thinking_20251015"}
    assert kept() == kept({**clear, "keep": "all"}) == kept({**clear, "keep": {"type": "all"}}) == ["Hm."] * 3
    assert kept(clear) == [None, None, "Hm."]
    assert kept({**clear, "keep": {"type": "thinking_turns", "value": 2}}) == [None, "Hm.", "Hm."]


def test_tools_and_their_choice_are_those_of_openai():
    body = chat(
        tools=[{**WEATHER, "strict": True, "cache_control": {"type": "ephemeral"}, "defer_loading": False, "type": "custom"}]
    )
    function = body.tools[0].function
    assert (function.name, function.description, function.parameters) == ("weather", "Tells it.", WEATHER["input_schema"])
    assert function.strict and body.tool_choice is None and body.parallel_tool_calls is None
    for choice, expected in (("auto", "auto"), ("any", "required"), ("none", "none")):
        assert chat(tools=[WEATHER], tool_choice={"type": choice}).tool_choice == expected
    one = chat(tools=[WEATHER], tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True})
    assert one.tool_choice.function.name == "weather" and one.parallel_tool_calls is False
    assert chat(tools=[], tool_choice={"type": "auto"}).tool_use is None


def test_a_deferred_tool_is_shown_once_it_was_found():
    tools = [WEATHER, {**WEATHER, "name": "late", "defer_loading": True}, {**WEATHER, "name": "later", "defer_loading": True}]
    assert [tool.function.name for tool in chat(tools=tools).tools] == ["weather"]
    assert chat(tools=tools[1:]).tools is None
    found = {**RESULT, "content": [{"type": "tool_reference", "tool_name": "late"}]}
    body = chat(tools=tools, messages=[USER, {"role": "assistant", "content": [CALL]}, {"role": "user", "content": [found]}])
    assert [tool.function.name for tool in body.tools] == ["weather", "late"]
    assert body.messages[-1].content == "The tool late can be called now."


@pytest.mark.parametrize(
    ("thinking", "variables"),
    [
        (None, {}),
        ({"type": "disabled"}, {"enable_thinking": False, "thinking": False}),
        ({"type": "adaptive", "display": "omitted"}, {"enable_thinking": True, "thinking": True}),
        ({"type": "between_tools"}, {"enable_thinking": True, "thinking": True}),
        ({"type": "enabled", "budget_tokens": 2000}, {"enable_thinking": True, "thinking": True, "thinking_budget": 2000}),
    ],
)
def test_thinking_sets_the_variables_by_which_templates_switch_it(thinking, variables):
    assert chat(thinking=thinking).variables() == variables
    own = chat(thinking=thinking, chat_template_kwargs={"enable_thinking": "maybe"}).variables()
    assert own == {**variables, "enable_thinking": "maybe"}


@pytest.mark.parametrize(("effort", "known"), [("low", "low"), ("high", "high"), ("xhigh", "high"), ("max", "high")])
def test_effort_is_the_templates(effort, known):
    assert chat(output_config={"effort": effort}).variables() == {"reasoning_effort": known}


def test_settings_of_sampling_and_our_own_are_passed_on():
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "min_p": 0.1, "repetition_penalty": 1.2}
    ours = {"policy": "on-demand", "top_k_pairs": 32, "session": "a"}
    body = chat(**given, **ours, stop_sequences=["a", "b"], stream=True, max_tokens=77)
    assert {name: getattr(body, name) for name in (*given, *ours)} == {**given, **ours}
    assert body.stop == ["a", "b"] and body.stream and body.wanted_tokens == 77
    assert chat(top_k=-1).top_k == -1


WITHOUT_EFFECT = {
    "metadata": {"user_id": "x"},
    "service_tier": "auto",
    "cache_control": {"type": "ephemeral"},
    "speed": "standard",
    "inference_geo": "eu",
    "diagnostics": {"previous_message_id": None},
    "fallbacks": "default",
    "billing_policy": None,
    "mcp_servers": [],
    "container": None,
    "context_management": {"edits": []},
    "thinking": None,
    "output_config": {},
}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_has_no_effect_is_accepted(name):
    assert chat(**{name: WITHOUT_EFFECT[name]}) == chat()


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}}
TEXT = {"type": "text", "text": "a"}


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


def test_a_count_needs_no_limit_and_may_end_with_an_answer():
    body = parse_body(json.dumps({"messages": [USER, {"role": "assistant", "content": "Hi"}]}).encode(), CountBody)
    assert [one.role for one in chat_body(body).messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("stop", "stop_sequences"),
        ("stop[1]", "stop_sequences[1]"),
        ("tools[3].function.parameters", "tools[3].input_schema"),
        ("tools[3].function.name", "tools[3].name"),
        ("response_format.json_schema.schema", "output_config.format.schema"),
        ("stopper", "stopper"),
        ("", ""),
    ],
)
def test_a_field_is_called_as_in_the_request(ours, theirs):
    assert anthropic_name(ours) == theirs
