"""Bodies that are wrong are refused by the name of the field, always in OpenAI's shape."""

from __future__ import annotations

import json

import pytest

from specache.server.settings import ServerSettings
from tests.server.tiny_server import POSITIONS, chat, complete, error_of, post, running

CHAT = "/v1/chat/completions"
HUGE = 10**30


def refused(client, path: str, fields: dict, *, without: tuple[str, ...] = ()):
    body = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    return post(client, path, {name: one for name, one in {**body, **fields}.items() if name not in without}, 400)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in (-1, 101, "1", True, [], HUGE)],
        *[("top_p", value) for value in (-0.1, 1.1, "a", {})],
        *[("top_k", value) for value in (-2, 1.5, HUGE, "3")],
        *[("min_p", value) for value in (-1, 2)],
        *[("n", value) for value in (0, -1, 17, 1.5, "1", HUGE, True)],
        *[("seed", value) for value in (HUGE, "x", 1.5)],
        *[("presence_penalty", value) for value in (-3, 3, "x")],
        *[("frequency_penalty", value) for value in (2.1, None.__class__.__name__)],
        *[("repetition_penalty", value) for value in (0, -1, 1000)],
        *[("logit_bias", value) for value in ({"x": 1}, {"1": 101}, {"-1": 1}, {"1": "a"}, [], {"99999": 1}, {"²": 1})],
        *[("logit_bias", value) for value in ({"05": 1}, {"5": 1, "05": -1}, {"00": 1})],
        *[("stop", value) for value in ("", ["a", ""], [1], "a" * 257, ["a"] * 17, {}, 5)],
        *[("stream", value) for value in ("yes", 1)],
        *[("stream_options", value) for value in ({"include_usage": True}, {"other": 1}, [])],
        *[("policy", value) for value in ("fast", 1, {})],
        *[("top_k_pairs", value) for value in (0, -1, "a", HUGE)],
        *[("session", value) for value in ("", "../x", "a/b", "a" * 65, 1, "a\n")],
        *[("model", value) for value in (1, "a" * 513)],
        *[("min_tokens", value) for value in (-1, "a", 5000)],
        *[("metadata", value) for value in ("a", [])],
        *[("no_such_field", value) for value in (1, None)],
        *[("user", value) for value in (1,)],
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_wrong_value_is_refused_by_its_name(client, path, name, value):
    error = refused(client, path, {name: value})
    assert error["param"].startswith(name) and name in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_tokens", value) for value in (0, -1, 1.5, "x", HUGE)],
        *[("max_completion_tokens", value) for value in (0, HUGE)],
        *[("logprobs", value) for value in (1, "true")],
        *[("top_logprobs", value) for value in (-1, 21, 1)],  # 1 needs logprobs
        *[("response_format", value) for value in ({"type": "xml"}, {"type": "json_schema", "json_schema": {}}, "text", {})],
        *[("tools", value) for value in ([{"type": "function"}], {}, "a")],
        *[("tool_choice", value) for value in ("required", {"type": "function"})],
        *[("modalities", value) for value in (["audio"], "text")],
        *[("audio", value) for value in ({"voice": "a"},)],
        *[("chat_template_kwargs", value) for value in ([], {"tools": []}, {"chat_template": "x"}, {"a b": 1}, {"tokenize": True})],
        *[("messages", value) for value in ([], {}, "a", None, [1], [[]], 5)],
    ],
)
def test_a_wrong_value_of_a_chat_is_refused_by_its_name(client, name, value):
    error = refused(client, CHAT, {name: value})
    assert error["param"].startswith(name) and name in error["message"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "robot", "content": "a"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"content": "a"}, "messages[0].role"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content"),
        ({"role": "user", "content": ["a"]}, "messages[0].content"),
        ({"role": "user", "content": "a", "extra": 1}, "messages[0].extra"),
        ({"role": "tool", "content": "a", "tool_call_id": "x"}, "messages[0].tool_call_id"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"id": "x"}]}, "messages[0].tool_calls[0].function"),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(client, message, param):
    error = refused(client, CHAT, {"messages": [message]})
    assert error["param"] == param and param in error["message"]


def test_images_are_refused_by_name(client):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
    error = refused(client, CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]})
    assert "image_url" in error["message"] and "part 1" in error["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("prompt", value) for value in ([], {}, 5, None, [1.5], [True], [[1], "a", 3], [[]], ["a", []], [-1], [10**9], [HUGE])],
        *[("suffix", value) for value in ("end", 5)],
        *[("best_of", value) for value in (2, 0)],
        *[("max_tokens", value) for value in (0, -1)],  # 0 needs echo
        *[("logprobs", value) for value in (-1, 21, True, "1")],
        *[("echo", value) for value in ("x", 1)],
    ],
)
def test_a_wrong_value_of_a_completion_is_refused_by_its_name(client, name, value):
    error = refused(client, "/v1/completions", {name: value})
    assert error["param"].startswith(name) and name in error["message"]


def test_an_empty_prompt_is_refused(client):
    assert complete(client, "", code=400)["param"] == "prompt"
    assert complete(client, ["a", ""], code=400)["param"] == "prompt[1]"


def test_another_model_is_not_found(client):
    error = chat(client, model="gpt-4", code=404)
    assert error["code"] == "model_not_found" and error["param"] == "model" and "'tiny'" in error["message"]


def test_a_prompt_that_fills_the_model_is_refused_with_the_numbers(client):
    error = complete(client, [5] * POSITIONS, code=400)
    assert error["code"] == "context_length_exceeded" and f"{POSITIONS:,}" in error["message"]
    assert complete(client, [5] * (POSITIONS - 1), max_tokens=100)["usage"]["completion_tokens"] == 1
    error = chat(client, "a" * 100_000, code=400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"


def test_limits_of_the_server_are_named():
    with running(settings=ServerSettings(most_prompt_tokens=20, most_messages=2, most_prompts=2, most_answers=1)) as client:
        assert "20" in complete(client, "a" * 21, code=400)["message"]
        assert complete(client, ["a"] * 3, code=400)["param"] == "prompt"
        assert complete(client, n=2, code=400)["param"] == "n"
        messages = [{"role": "user", "content": "a"}] * 3
        assert post(client, CHAT, {"messages": messages}, 400)["param"] == "messages"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"a"',
        b"\xff\xfe",
        b'{"messages": "\xff"}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"temperature": NaN, "messages": []}',
        b'{"temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}',
        b'{"seed": ' + b"9" * 5000 + b', "messages": []}',
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"metadata": {"a": 1e999}, "messages": [{"role": "user", "content": "a"}]}',
        json.dumps(
            {"metadata": {"a": [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]}, "messages": [{"role": "user", "content": "a"}]}
        ).encode(),
        json.dumps({"metadata": {str(n): n for n in range(5000)}, "messages": [{"role": "user", "content": "a"}]}).encode(),
        b'{"messages": []} trailing',
        b"\xef\xbb\xbf{}",
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize", "/detokenize"])
def test_what_is_not_plain_json_is_refused(client, path, body):
    response = client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    error_of(response)


def test_a_duplicate_name_counts_once(client):
    body = b'{"prompt": "a", "max_tokens": 3, "max_tokens": 2, "temperature": 0}'
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] == 2


def test_text_of_any_character_is_answered(client):
    for text in ("\0", "\u202e\ufeff", "é" * 50, "😀" * 20, "\x7f\x1b[0m", "a\r\nb"):
        chat(client, text, max_tokens=2)
        complete(client, text, max_tokens=2)


def test_a_message_about_a_name_from_the_body_is_short_and_printable(client):
    error = refused(client, CHAT, {"x\n\x1b" + "y" * 10_000: 1})
    assert len(error["message"]) < 300 and error["message"].isprintable()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/x/../y", 404),
    ],
)
def test_other_addresses_and_methods_have_the_same_shape(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status
    error = error_of(response)
    assert error["code"] in ("not_found", "method_not_allowed", "model_not_found")
    if status == 405:
        assert response.headers["allow"]


def test_there_are_no_pages_of_the_framework(client):
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert client.get(path).status_code == 404
