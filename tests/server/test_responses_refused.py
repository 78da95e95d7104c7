"""Requests for responses that are wrong are refused by the name of the field."""

from __future__ import annotations

import json

import pytest

from specache.server.settings import ServerSettings
from tests.server.response_events import PATH, respond
from tests.server.tiny_server import error_of, running

HUGE = 10**30
USER = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"}


def refused(client, **fields):
    body = {"input": "Hello", **fields}
    response = client.post(PATH, json={name: value for name, value in body.items() if value is not ...})
    assert response.status_code == 400, response.text
    return error_of(response)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("input", value) for value in (..., None, 5, {}, [], [[]], [5], ["a"])],
        *[("instructions", value) for value in (5, [USER])],
        *[("previous_response_id", value) for value in (5, "", "a" * 513)],
        *[("max_output_tokens", value) for value in (0, -1, 1.5, "x", HUGE)],
        *[("temperature", value) for value in (-1, 101, "1", True)],
        *[("top_p", value) for value in (-0.1, 1.1)],
        *[("n", value) for value in (0, 2, "1")],
        *[("top_logprobs", value) for value in (-1, 21, "1")],
        *[("include", value) for value in ("a", ["no.such.thing"], [5])],
        *[("text", value) for value in ("text", {"format": "text"}, {"verbosity": "loud"}, {"other": 1})],
        *[("text.format", value) for value in ({"type": "xml"}, {"type": "json_schema"}, {"type": "text", "schema": {}})],
        *[("tools", value) for value in ({}, "a", [5], [{}], [{"type": "function"}], [{**TOOL, "name": "a b"}], [TOOL] * 257)],
        *[("tools", value) for value in ([{"type": "web_search"}], [{"type": "mcp", "server_label": "x"}], [{"type": "custom"}])],
        *[("tools", [TOOL, TOOL])],
        *[("tool_choice", value) for value in ("required", "all", 5, {"type": "function", "name": "other"}, {"type": "mcp"}, {})],
        *[("tool_choice", value) for value in ({"type": "allowed_tools", "mode": "auto", "tools": []}, {"type": "function"})],
        *[("reasoning", value) for value in ("high", {"effort": 5}, {"summary": "long"}, {"other": 1})],
        *[("truncation", value) for value in ("end", 5)],
        *[("background", value) for value in (True, "no")],
        *[("conversation", value) for value in ("conv_1", {"id": "conv_1"})],
        *[("prompt", {"id": "pmpt_1"}), ("moderation", {"model": "x"})],
        *[("context_management", [{"type": "compaction"}])],
        *[("metadata", value) for value in ("a", {"a": 1}, {"a": "x" * 513}, {"x" * 65: "a"}, {str(i): "a" for i in range(17)})],
        *[("stream_options", value) for value in ({"include_obfuscation": True}, {"other": 1})],  # they need stream
        *[("store", value) for value in ("yes", 1)],
        *[("chat_template_kwargs", value) for value in ([], {"tools": []})],
        *[(name, "x" * 513) for name in ("user", "safety_identifier", "prompt_cache_key")],
        *[("client_metadata", [0] * 3000), ("prompt_cache_options", {"a": HUGE})],
        *[("messages", [USER]), ("max_tokens", 5), ("response_format", {"type": "text"}), ("no_such_field", None)],
    ],
)
def test_a_wrong_value_is_refused_by_its_name(client, name, value):
    fields = {"text": {"format": value}} if name == "text.format" else {name: value}
    error = refused(client, **fields)
    assert error["param"].startswith(name) and name in error["message"] and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("item", "field"),
    [
        ({"role": "robot", "content": "a"}, ".role"),
        ({"role": "tool", "content": "a"}, ".role"),
        ({"role": "user"}, ".content"),
        ({"role": "user", "content": 5}, ".content"),
        ({"role": "user", "content": []}, ".content"),
        ({"role": "user", "content": ["a"]}, ".content"),
        ({"role": "user", "content": [{"type": "input_text"}]}, ".content"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc/passwd"}]}, ".content"),
        ({"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}, ".content"),
        ({"role": "user", "content": [{"type": "input_text", "text": "a"}] * 4097}, ".content"),
        ({"role": "user", "content": "a", "extra": 1}, ".extra"),
        ({"role": "user", "content": "a", "id": "x" * 257}, ".id"),
        ({"content": "a"}, ".role"),
        ({"type": "message"}, ".role"),
        ({"type": 5}, ".type"),
        ({"type": "web_search_call", "id": "ws_1"}, ".type"),
        ({"type": "computer_call_output", "call_id": "x"}, ".type"),
        ({"type": "compaction", "encrypted_content": "x"}, ".type"),
        ({**CALL, "name": "a\nb"}, ".name"),
        ({**CALL, "call_id": ""}, ".call_id"),
        ({**CALL, "arguments": {}}, ".arguments"),
        ({"type": "function_call_output", "call_id": "x"}, ".output"),
        ({"type": "function_call_output", "call_id": "x", "output": 5}, ".output"),
        ({"type": "function_call_output", "call_id": "x", "output": [{"type": "input_image"}]}, ".output"),
        ({"type": "reasoning", "content": [{"type": "input_text", "text": "a"}]}, ".content"),
        ({"type": "item_reference"}, ".id"),
        ("text", ""),
    ],
)
def test_a_wrong_item_is_refused_by_its_place(client, item, field):
    error = refused(client, input=[USER, item])
    assert error["param"] == f"input[1]{field}" and error["param"] in error["message"]


def test_a_result_without_its_call_is_refused(client):
    error = refused(client, input=[USER, {"type": "function_call_output", "call_id": "call_9", "output": "a"}])
    assert error["param"] == "input" and "call_9" in error["message"]


@pytest.mark.parametrize("identifier", ["msg_1", "resp_" + "0" * 32, "msg_" + "0" * 36, "\0", "a" * 256])
def test_a_reference_to_nothing_is_not_found(client, identifier):
    error = respond(client, [{"type": "item_reference", "id": identifier}, USER], 404)
    assert error["code"] == "item_not_found" and error["param"] == "input[0].id"


@pytest.mark.parametrize("identifier", ["resp_none", "a" * 5000, "%00", "..%2f..%2fetc", "%F0%9F%98%80"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_response_that_is_not_there_is_not_found(client, method, identifier):
    response = client.request(method, f"{PATH}/{identifier}")
    assert response.status_code == 404 and len(error_of(response)["message"]) < 500


def test_a_conversation_of_too_many_messages_is_refused_also_over_several_responses():
    with running(settings=ServerSettings(most_messages=4)) as client:
        assert refused(client, input=[USER] * 5)["param"] == "input"
        first = respond(client, [USER] * 3)
        error = refused(client, previous_response_id=first["id"])
        assert error["param"] == "input" and "4 messages" in error["message"]


def test_bodies_of_many_small_items_are_refused_before_they_take_memory(client):
    for item in (USER, CALL, {"type": "reasoning"}, {"type": "item_reference", "id": "a"}):
        error = refused(client, input=[item] * 100_000)
        assert error["param"] == "input" and "8192" in error["message"]


def test_a_schema_or_tool_that_is_no_json_to_send_back_is_refused(client):
    for name, fields in (
        ("tools", {"tools": [{**TOOL, "parameters": {"maximum": "BIG"}}]}),
        ("text", {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"maximum": "BIG"}}}}),
    ):
        body = json.dumps({"input": "a", **fields}).replace('"BIG"', "1e999")
        response = client.post(PATH, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400 and error_of(response)["param"].startswith(name)
