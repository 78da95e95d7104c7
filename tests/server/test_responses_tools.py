"""Responses with tools and of a certain form: forced, free, over several turns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

from specache.engine.prefix_store import PrefixStore
from tests.server.response_events import PATH, checked_item, respond, streamed, text_of
from tests.server.tiny_server import SHORT, post, running
from tests.server.tool_models import FAMILIES, seeded_model

CITY = {"type": "string", "enum": ["Rome", "Oslo"]}
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": CITY, "days": {"type": "integer", "minimum": 1, "maximum": 3}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "strict": True,
}
TIME: dict[str, Any] = {
    "type": "function",
    "name": "time",
    "parameters": {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False},
}
TOOLS = [WEATHER, TIME]
NAMED = {"type": "function", "name": "weather"}
FORCED = {"tools": TOOLS, "tool_choice": NAMED, "max_output_tokens": 400}


@pytest.fixture(scope="module", params=["hermes", "mistral", "harmony"])
def family(request: pytest.FixtureRequest) -> Iterator[TestClient]:
    tokenizer = FAMILIES[request.param].tokenizer
    model = seeded_model(tokenizer, 4096)
    with running(model, tokenizer=tokenizer, prefixes=PrefixStore(model, SHORT)) as client:
        yield client


@pytest.fixture(scope="module")
def hermes() -> Iterator[TestClient]:
    tokenizer = FAMILIES["hermes"].tokenizer
    with running(seeded_model(tokenizer, 4096), tokenizer=tokenizer) as client:
        yield client


def calls_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [item for item in document["output"] if item["type"] == "function_call"]


def result_of(call: dict[str, Any], output: Any = "sunny") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call["call_id"], "output": output}


def test_a_named_tool_is_called_with_arguments_of_its_schema(family):
    document = respond(family, **FORCED)
    (call,) = calls_of(document)
    assert document["status"] == call["status"] == "completed" and call["name"] == "weather"
    jsonschema.validate(json.loads(call["arguments"]), WEATHER["parameters"])
    assert document["tools"] == [WEATHER, {**TIME, "description": None, "strict": None}] and document["tool_choice"] == NAMED


def test_a_streamed_call_is_the_whole_one(family):
    events = streamed(family, **FORCED)
    (call,) = calls_of(events[-1]["response"])
    deltas = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call["arguments"] == calls_of(respond(family, **FORCED))[0]["arguments"] and len(deltas) > 3
    (done,) = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert done["name"] == "weather" and done["item_id"] == call["id"]


def test_the_result_of_a_call_goes_on_as_in_a_chat(family):
    first = respond(family, **FORCED)
    (call,) = calls_of(first)
    second = respond(family, [result_of(call)], previous_response_id=first["id"], tools=TOOLS, tool_choice="none")
    tools = [{"type": "function", "function": {name: one for name, one in tool.items() if name != "type"}} for tool in TOOLS]
    function = {"name": call["name"], "arguments": call["arguments"]}
    answer: dict[str, Any] = {"role": "assistant", "content": text_of(first)}
    answer["tool_calls"] = [{"id": call["call_id"], "type": "function", "function": function}]
    reasoning = [item["content"][0]["text"] for item in first["output"] if item["type"] == "reasoning"]
    if reasoning:
        answer["reasoning_content"] = reasoning[0]
    messages = [{"role": "user", "content": "Hello"}, answer, {"role": "tool", "tool_call_id": call["call_id"], "content": "sunny"}]
    asked = {"messages": messages, "tools": tools, "tool_choice": "none", "max_tokens": 8, "temperature": 0}
    chat = post(family, "/v1/chat/completions", asked)
    assert second["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert second["usage"]["input_tokens_details"]["cached_tokens"] >= first["usage"]["input_tokens"]
    assert text_of(second) == (chat["choices"][0]["message"]["content"] or "")
    sent = [{"role": "user", "content": "Hello"}, *first["output"], result_of(call)]
    assert text_of(respond(family, sent, tools=TOOLS, tool_choice="none", store=False)) == text_of(second)
    listed = family.get(f"{PATH}/{second['id']}/input_items", params={"order": "asc"}).json()["data"]
    kinds = [checked_item(item)["type"] for item in listed]
    assert kinds == ["message", *(item["type"] for item in first["output"]), "function_call_output"]


def test_text_and_reasoning_behind_a_call_are_of_its_message(hermes):
    """A model may write on behind its calls, before their results come."""

    def call(call_id: str) -> dict[str, Any]:
        return {"type": "function_call", "call_id": call_id, "name": "weather", "arguments": "{}"}

    reasons = [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]} for text in ("why", "still")]
    says = [{"type": "message", "role": "assistant", "content": text} for text in ("First. ", "Then.")]
    results = [result_of(call(call_id)) for call_id in ("a", "b")]
    items = [{"role": "user", "content": "Hello"}, reasons[0], says[0], call("a"), reasons[1], call("b"), says[1], *results]
    function = {"name": "weather", "arguments": "{}"}
    answer = {"role": "assistant", "content": "First. Then.", "reasoning_content": "why\nstill"}
    answer["tool_calls"] = [{"id": call_id, "type": "function", "function": function} for call_id in ("a", "b")]
    messages = [items[0], answer, *({"role": "tool", "tool_call_id": call_id, "content": "sunny"} for call_id in ("a", "b"))]
    chat = post(hermes, "/v1/chat/completions", {"messages": messages, "max_tokens": 8, "temperature": 0})
    response = respond(hermes, items, store=False)
    assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert text_of(response) == chat["choices"][0]["message"]["content"]


def test_the_parts_of_a_result_are_one_text(hermes):
    first = respond(hermes, **FORCED)
    (call,) = calls_of(first)
    given = {"previous_response_id": first["id"], "tools": TOOLS, "tool_choice": "none"}
    parts = [{"type": "input_text", "text": "sunny"}, {"type": "input_text", "text": "warm"}]
    assert text_of(respond(hermes, [result_of(call, parts)], **given)) == text_of(
        respond(hermes, [result_of(call, "sunny\nwarm")], **given)
    )


def test_a_required_call_is_one_of_the_allowed_tools(hermes):
    for choice, names in (
        ("required", {"weather", "time"}),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "time"}]}, {"time"}),
    ):
        document = respond(hermes, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_output_tokens=800)
        (call,) = calls_of(document)
        assert call["name"] in names and document["parallel_tool_calls"] is False and document["tool_choice"] == choice


def test_without_a_choice_the_model_is_free(hermes):
    document = respond(hermes, tools=TOOLS)
    assert document["tool_choice"] == "auto" and document["output"]
    assert not calls_of(respond(hermes, tools=TOOLS, tool_choice="none", max_output_tokens=100))


def test_a_client_may_send_a_call_that_it_made_up(hermes):
    call = {"type": "function_call", "call_id": "call_x", "name": "weather", "arguments": '{"city": "Rome", "days": 1}'}
    items = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Let me see."}, call, result_of(call)]
    assert respond(hermes, items, tools=TOOLS, tool_choice="none")["status"]
    error = respond(hermes, items[-1:], 400, tools=TOOLS)
    assert "call_x" in error["message"]


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


def test_an_answer_of_a_schema_is_valid(hermes):
    text = {"format": {"type": "json_schema", "name": "thing", "schema": SCHEMA, "strict": True}}
    document = respond(hermes, text=text, max_output_tokens=600)
    assert document["status"] == "completed" and document["text"]["format"] == text["format"]
    jsonschema.validate(json.loads(text_of(document)), SCHEMA)
    assert text_of(streamed(hermes, text=text, max_output_tokens=600)[-1]["response"]) == text_of(document)


def test_an_answer_of_any_json_is_an_object(hermes):
    document = respond(hermes, text={"format": {"type": "json_object"}}, max_output_tokens=60)
    assert text_of(document).lstrip().startswith("{") or document["output"][0]["type"] == "reasoning"


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"type": "string", "pattern": "(?=a)b"}, "regular expression"),
        ({"not": {"type": "string"}}, "not"),
        ({"type": "object", "properties": {str(number): {} for number in range(5000)}}, "schema"),
    ],
)
def test_a_schema_that_cannot_be_held_is_refused_in_the_names_of_this_api(hermes, schema, word):
    error = respond(hermes, "Hello", 400, text={"format": {"type": "json_schema", "name": "a", "schema": schema}})
    assert error["param"] == "text.format.schema" and word in error["message"]
    assert "response_format" not in error["message"]


def test_a_tool_that_cannot_be_held_is_refused_in_the_names_of_this_api(hermes):
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        deep = {"type": "object", "properties": {"a": deep}}
    error = respond(hermes, "Hello", 400, tools=[{**WEATHER, "parameters": deep}])
    assert error["param"] == "tools[0].parameters"
