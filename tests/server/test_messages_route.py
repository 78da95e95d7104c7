"""`/v1/messages`: its streams event by event, its counts, and its errors wherever they arise."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.types import Message, MessageTokensCount, ModelInfo, RawMessageStreamEvent
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from specache.engine.events import Facts, Finished, NewToken
from specache.engine.prefix_store import PrefixStore
from specache.server.app import ServerApp
from specache.server.chat_fields import ChatBody
from specache.server.choices import Choices
from specache.server.dialects import Dialect, dialect_of
from specache.server.generation import JobMaker
from specache.server.settings import ServerSettings
from tests.server.live_server import live, received, received_until, request, wait_until
from tests.server.tiny_server import (
    ADDRESS,
    SHORT,
    anthropic_error_of,
    chat,
    error_of,
    held_model,
    post,
    printable_model,
    prompt_of,
    running,
    served_model,
    token_of,
)

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
USER = {"role": "user", "content": "Hello"}
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "messages": [USER], "temperature": 0}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
VERSION = {"anthropic-version": "2023-06-01"}


def ask(client: Any, **fields: Any) -> Message:
    response = client.post(MESSAGES, json={**BODY, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["request-id"].startswith("req_")
    return Message.model_validate_json(response.text, strict=True)


def events_of(lines: list[str]) -> list[Any]:
    """Return the events of a stream, each named after its type, without comments and pings."""
    events = []
    for block in "\n".join(lines).split("\n\n"):
        parts = [line for line in block.splitlines() if line and not line.startswith(":")]
        if not parts:
            continue
        (name, data) = parts
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        if value["type"] != "ping":
            events.append(EVENT.validate_python(value, strict=True))
    return events


def streamed(client: Any, **fields: Any) -> list[Any]:
    with client.stream("POST", MESSAGES, json={**BODY, **fields, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["request-id"].startswith("req_")
        return events_of(list(response.iter_lines()))


def test_an_answer_is_that_of_a_chat(client):
    message = ask(client)
    expected = chat(client)
    assert message.content[0].text == expected["choices"][0]["message"]["content"]
    assert (message.role, message.model, message.stop_reason, message.stop_sequence) == ("assistant", "tiny", "max_tokens", None)
    assert message.id.startswith("msg_") and len(message.content) == 1
    assert message.usage.input_tokens == expected["usage"]["prompt_tokens"] and message.usage.output_tokens == 8


def test_a_stream_begins_grows_and_ends_as_its_client_needs():
    with running() as client:
        whole = ask(client)
        start, begin, *deltas, stop, delta, last = streamed(client)
    assert start.type == "message_start" and start.message.content == [] and start.message.stop_reason is None
    assert start.message.usage.input_tokens == whole.usage.input_tokens and start.message.usage.output_tokens == 0
    assert begin.type == "content_block_start" and begin.index == 0 and begin.content_block.text == ""
    assert {one.type for one in deltas} == {"content_block_delta"} and len(deltas) > 3
    assert "".join(one.delta.text for one in deltas) == whole.content[0].text
    assert stop.type == "content_block_stop" and stop.index == 0
    assert delta.delta.stop_reason == "max_tokens" and delta.usage.output_tokens == 8
    assert last.type == "message_stop"


def test_a_stop_sequence_ends_the_answer_and_is_named(client):
    text = ask(client).content[0].text
    message = ask(client, stop_sequences=["never this", text[3:5]])
    assert (message.stop_reason, message.stop_sequence, message.content[0].text) == ("stop_sequence", text[3:5], text[:3])
    delta = streamed(client, stop_sequences=[text[3:5]])[-2]
    assert (delta.delta.stop_reason, delta.delta.stop_sequence) == ("stop_sequence", text[3:5])
    at_once = ask(client, stop_sequences=[text[0]])
    assert at_once.content == [] and at_once.stop_sequence == text[0]


def test_a_special_token_is_a_stop_sequence_too():
    body = ChatBody.model_validate({"messages": [USER], "stop": ["<user>", "x"], "max_tokens": 5})
    made = JobMaker(served_model(printable_model()), ServerSettings(), "").chat(body)
    for token, expected in ((token_of("<user>"), "<user>"), (token_of("<end>"), None)):
        choices = Choices(made, 1)
        choices.all[0].push(NewToken(0, token))
        choices.finish(0, Finished(("stop",), Facts()))
        assert choices.all[0].stop == expected


def test_a_stop_string_of_the_models_files_ends_the_turn(client):
    text = ask(client).content[0].text
    model = printable_model()
    model.generation_config.stop_strings = [text[3:5]]
    with running(model) as tuned:
        message = ask(tuned)
    assert (message.stop_reason, message.stop_sequence, message.content[0].text) == ("end_turn", None, text[:3])


def test_an_answer_that_fills_the_model_says_so(client):
    message = ask(client, messages=[{"role": "user", "content": "x" * 480}], max_tokens=1000)
    assert message.stop_reason == "model_context_window_exceeded" and 0 < message.usage.output_tokens < 40


def test_no_tokens_read_the_prompt_alone():
    with running() as client:
        text = "Remember this. " * 20
        prepared = ask(client, messages=[{"role": "user", "content": text}], max_tokens=0)
        assert (prepared.content, prepared.stop_reason, prepared.usage.output_tokens) == ([], "max_tokens", 0)
        events = streamed(client, messages=[{"role": "user", "content": text}], max_tokens=0)
        assert [one.type for one in events] == ["message_start", "message_delta", "message_stop"]


def test_what_was_stored_of_a_prompt_is_read_from_the_cache():
    model = printable_model()
    with running(model, prefixes=PrefixStore(model, SHORT)) as client:
        long = {"role": "user", "content": "A long story. " * 25}
        first = ask(client, messages=[long]).usage
        again = ask(client, messages=[long]).usage
        start, *_, delta, _ = streamed(client, messages=[long])
    total = first.input_tokens
    assert first.cache_read_input_tokens == 0 and again.cache_read_input_tokens > 100
    assert again.input_tokens + again.cache_read_input_tokens == total
    for usage in (start.message.usage, delta.usage):
        assert usage.cache_read_input_tokens > 100 and usage.input_tokens + usage.cache_read_input_tokens == total


def test_tokens_are_counted_without_an_answer(client):
    def count(**fields: Any) -> int:
        response = client.post(COUNT, json={"model": "tiny", "messages": [USER], **fields})
        assert response.status_code == 200, response.text
        return MessageTokensCount.model_validate_json(response.text, strict=True).input_tokens

    assert count() == len(prompt_of("Hello")) == ask(client).usage.input_tokens
    assert count(system="Be brief.") == ask(client, system="Be brief.").usage.input_tokens > count()
    assert count(messages=[{"role": "user", "content": "x" * 2000}]) > 2000  # more than the model reads
    assert client.app.state.service.status().running == 0


def test_a_request_without_headers_or_with_all_of_claude_codes_is_the_same(client):
    headers = {
        **VERSION,
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,unknown-2030-01-01",
        "x-app": "cli",
    }
    response = client.post(f"{MESSAGES}?beta=true", json=BODY, headers=headers)
    assert response.status_code == 200 and response.json()["content"] == ask(client).model_dump(exclude_none=True)["content"]


def test_the_model_list_has_the_form_of_who_asks(client):
    listed = client.get("/v1/models", headers=VERSION).json()
    (card,) = [ModelInfo.model_validate_json(json.dumps(one), strict=True) for one in listed["data"]]
    assert card.id == listed["first_id"] == listed["last_id"] == "tiny" and not listed["has_more"]
    assert client.get("/v1/models/tiny", headers=VERSION).json() == listed["data"][0]
    error = client.get("/v1/models/other", headers=VERSION)
    assert error.status_code == 404 and error_of(error)["type"] == "not_found_error"
    assert client.get("/v1/models").json()["object"] == "list"


@pytest.mark.parametrize("path", [MESSAGES, COUNT, f"{MESSAGES}/nothing", "/v1/nothing"])
@pytest.mark.parametrize(
    ("change", "status", "kind"),
    [
        ({"method": "GET"}, (404, 405), ("not_found_error", "invalid_request_error")),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, (415,), ("invalid_request_error",)),
        ({"headers": {"host": "evil.example"}}, (403,), ("permission_error",)),
        ({"headers": {"origin": "http://evil.example"}}, (403,), ("permission_error",)),
        ({"headers": {"x": "y" * 40_000}}, (431,), ("invalid_request_error",)),
        ({"content": b"x" * 3000, "headers": {"content-type": "application/json"}}, (413,), ("request_too_large",)),
    ],
)
def test_errors_before_a_route_have_its_shape(path, change, status, kind):
    with running(settings=ServerSettings(most_body_bytes=2000)) as client:
        headers = {**change.get("headers", {}), **({} if path.startswith(MESSAGES) else VERSION)}
        given = {"content": b"{}", "method": "POST", **change, "headers": {"content-type": "application/json", **headers}}
        if given["method"] == "GET":
            given.pop("content")
        response = client.request(given.pop("method"), path, **given)
    assert response.status_code in status, response.text
    assert error_of(response)["type"] in kind


def test_a_key_is_asked_for_in_its_shape():
    with running(keys={"alice": "a" * 24}) as client:
        for headers in ({}, {"x-api-key": "b" * 24}, {"authorization": "Bearer x"}):
            response = client.post(MESSAGES, json=BODY, headers=headers)
            assert response.status_code == 401 and error_of(response)["type"] == "authentication_error"
        for headers in ({"x-api-key": "a" * 24}, {"authorization": f"Bearer {'a' * 24}"}):
            assert client.post(MESSAGES, json=BODY, headers=headers).status_code == 200


def test_a_full_server_says_when_to_come_back():
    with running(settings=ServerSettings(most_streams=1)) as client:
        client.app.state.open_streams = 1
        response = client.post(MESSAGES, json=BODY)
        client.app.state.open_streams = 0
    assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
    assert error_of(response)["type"] == "rate_limit_error"


def test_a_server_without_its_model_says_so():
    with TestClient(ServerApp(ServerSettings()), base_url=ADDRESS) as client:
        response = client.post(MESSAGES, json=BODY)
    assert response.status_code == 503 and error_of(response)["type"] == "overloaded_error"


def test_a_prompt_that_is_too_long_says_the_words_that_agents_look_for(client):
    for text in ("x" * 600, "x" * 100_000):
        error = error_of(client.post(MESSAGES, json={**BODY, "messages": [{"role": "user", "content": text}]}))
        assert error["type"] == "invalid_request_error" and "prompt is too long" in error["message"].lower()


def test_another_model_is_not_found(client):
    assert post(client, MESSAGES, {**BODY, "model": "claude-sonnet-5"}, 404)["type"] == "not_found_error"


def test_the_shape_goes_by_the_path_behind_a_proxy_too():
    def dialect(path: str, root: str = "", **headers: str) -> Dialect:
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        return dialect_of({"path": path, "headers": raw}, root)

    assert dialect(MESSAGES) is dialect(COUNT) is dialect("/llm/v1/messages", "/llm") is Dialect.ANTHROPIC
    assert dialect("/v1/models", anthropic_version="2023-06-01") is Dialect.ANTHROPIC
    for path in ("/v1/messagesx", "/v1/models", "/v1/chat/completions", "/llm/v1/messages", "/v1/message"):
        assert dialect(path) is Dialect.OPENAI


LONG = {**BODY, "max_tokens": 4000, "stream": True}


def test_a_stream_that_cannot_go_on_ends_with_an_event_that_says_why():
    with live(model=printable_model(4096), grace_seconds=0.0) as server, server.connect() as connection:
        connection.sendall(request(MESSAGES, json.dumps(LONG).encode()))
        wait_until(lambda: server.service.status().running)
        server.server.stop()
        lines = received(connection).decode().splitlines()
    assert "event: error" in lines
    last = [line for line in lines if line.startswith("data: ")][-1]
    identifier = next(line for line in lines if line.lower().startswith("request-id: ")).split(": ")[1]
    assert anthropic_error_of(json.loads(last.removeprefix("data: ")), identifier)["type"] == "overloaded_error"


def test_a_stream_has_pings_that_clients_know():
    model, going_on = held_model()
    with live(model=model, ping_seconds=0.05) as server, server.connect() as connection:
        going_on.clear()
        body = json.dumps({**LONG, "max_tokens": 20}).encode()
        connection.sendall(request(MESSAGES, body, "Connection: close\r\n"))
        begun = received_until(connection, b"event: ping")
        going_on.set()
        lines = (begun + received(connection)).decode().splitlines()
    pings = [index for index, line in enumerate(lines) if line == "event: ping"]
    assert pings and all(lines[index + 1] == 'data: {"type":"ping"}' for index in pings)
    assert "event: message_stop" in lines


def test_a_body_that_stops_arriving_is_told_in_its_shape():
    with live(body_seconds=0.2) as server, server.connect() as connection:
        connection.sendall(request(MESSAGES, b"{", length=50))
        status, document = split_document(received(connection))
    assert status == 408 and document["type"] == "error" and document["error"]["type"] == "invalid_request_error"


def test_the_end_of_the_server_is_told_in_its_shape():
    with live() as server, server.connect() as connection:
        connection.sendall(request(MESSAGES, b"{", length=50))
        wait_until(lambda: any(one.cycle is not None for one in list(server.server.server_state.connections)))
        server.server.stop()
        status, document = split_document(received(connection))
    assert status == 503 and document["error"]["type"] == "overloaded_error"


def split_document(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)
