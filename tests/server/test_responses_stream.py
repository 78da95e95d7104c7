"""Streams of responses: their events, errors in the middle, clients that leave."""

from __future__ import annotations

import dataclasses
import json
import socket
from typing import Any

import pytest
from starlette.testclient import TestClient

from specache.engine.events import Failed, NewToken
from specache.engine.service import EngineService
from specache.server.app import ServerApp
from specache.server.settings import ServerSettings
from tests.server.live_server import live, received, received_until, request, wait_until
from tests.server.response_events import PATH, SETTINGS, checked_events, parsed, respond, streamed, text_of
from tests.server.tiny_server import ADDRESS, END, SHORT, error_of, held_model, printable_model, prompt_of, running, served_model

POSITIONS = 4096
ENDLESS = {"input": "Hello", "max_output_tokens": 4000, "temperature": 0, "ignore_eos": True}


def test_a_stream_carries_the_same_response(client):
    events = streamed(client)
    whole = respond(client)
    final = events[-1]["response"]
    changing = {"id", "created_at", "completed_at", "output", "usage"}
    assert {name: final[name] for name in final if name not in changing} == {
        name: whole[name] for name in whole if name not in changing
    }
    assert text_of(final) == text_of(whole) and final["usage"]["output_tokens"] == 8


def test_the_events_come_in_the_order_of_openai(client):
    kinds = [event["type"] for event in streamed(client, max_output_tokens=2)]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]


def test_an_empty_answer_has_a_message_and_is_complete(client):
    events = streamed(client, logit_bias={str(END): 100})
    assert events[-1]["type"] == "response.completed" and text_of(events[-1]["response"]) == ""


def test_the_first_events_say_that_it_is_under_way(client):
    created, begun, *_ = streamed(client, instructions="Be brief.")
    for event in (created, begun):
        response = event["response"]
        assert response["status"] == "in_progress" and response["output"] == [] and response["usage"] is None
        assert response["instructions"] == "Be brief."


def test_a_stream_says_how_far_a_long_prompt_is_read():
    with running(chunk_ms=None, config=dataclasses.replace(SHORT, prefill_chunk=64)) as client:
        body = {"input": "word " * 60, **SETTINGS, "stream": True}
        with client.stream("POST", PATH, json=body) as response:
            lines = list(response.iter_lines())
        total = len(prompt_of("word " * 60))
        comments = [line for line in lines if line.startswith(":")]
        assert comments == [f": reading the prompt: {64 * done} of {total} tokens" for done in range(1, 5)]
        checked_events(parsed(lines))


class FailsInTheMiddle(EngineService):
    """A service whose answers end with an error after three tokens."""

    def submit(self, job: Any, report: Any) -> Any:
        tokens = 0

        def failing(event: Any) -> None:
            nonlocal tokens
            tokens += isinstance(event, NewToken)
            if tokens <= 3:
                report(event)
            if tokens == 3 and isinstance(event, NewToken):
                report(Failed(RuntimeError("a secret")))

        return super().submit(job, failing)


def test_an_error_in_the_middle_is_told_by_the_last_events(caplog):
    model, app = printable_model(), ServerApp(ServerSettings())
    with FailsInTheMiddle(model, SHORT) as service, TestClient(app, base_url=ADDRESS) as client:
        assert service.wait_until_ready(60)
        app.begin_serving(served_model(model), service)
        *events, told, failed = streamed(client)
        assert told["type"] == "error" and told["code"] == "internal_error" and "Its log says why" in told["message"]
        response = failed["response"]
        assert failed["type"] == "response.failed" and response["status"] == "failed" and response["store"] is False
        assert response["error"] == {"code": "server_error", "message": told["message"]}
        deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
        assert "secret" not in json.dumps([told, failed]) and len(deltas) == 3
        assert response["output"][0]["status"] == "incomplete" and text_of(response) == "".join(deltas)
        assert client.get(f"{PATH}/{response['id']}").status_code == 404
        assert "a secret" in caplog.text


@pytest.mark.parametrize(("path", "given"), [(PATH, "input"), ("/v1/completions", "prompt")])
def test_an_unknown_error_before_the_first_byte_has_the_shape_of_others(path, given):
    model, app = printable_model(), ServerApp(ServerSettings())
    with FailsInTheMiddle(model, SHORT) as service, TestClient(app, base_url=ADDRESS) as client:
        assert service.wait_until_ready(60)
        app.begin_serving(served_model(model), service)
        response = client.post(path, json={given: "Hello", "ignore_eos": True})
        assert response.status_code == 500
        error = error_of(response)
        assert error["code"] == "internal_error" and "secret" not in error["message"]


def test_a_server_that_ends_tells_so_in_the_last_events():
    with live(model=printable_model(POSITIONS), grace_seconds=0.0) as server, server.connect() as connection:
        connection.sendall(request(PATH, json.dumps({**ENDLESS, "stream": True}).encode(), "Connection: close\r\n"))
        wait_until(lambda: server.service.status().running)
        server.server.stop()
        events = checked_events(parsed(received(connection).decode().splitlines()))
    assert events[-2]["code"] == "shutting_down" and events[-1]["response"]["error"]["code"] == "server_error"


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_ends_its_response_and_nothing_is_stored(is_streamed):
    with live(model=printable_model(POSITIONS)) as server:
        for _ in range(2):
            connection = server.connect()
            connection.sendall(request(PATH, json.dumps({**ENDLESS, "stream": is_streamed}).encode()))
            wait_until(lambda: server.service.status().running)
            if is_streamed:
                received_until(connection, b"response.created")
            connection.close()
            wait_until(lambda: not server.service.status().running)
        wait_until(lambda: not server.app.state.open_streams)
        assert server.app.state.responses.used_bytes == 0


def test_a_client_that_leaves_gives_back_what_it_went_on_from():
    with live(model=printable_model(POSITIONS)) as server:
        store = server.app.state.responses
        with server.connect() as connection:
            body = {"input": "Hello", **SETTINGS}
            connection.sendall(request(PATH, json.dumps(body).encode(), "Connection: close\r\n"))
            first = json.loads(received(connection).decode().partition("\r\n\r\n")[2])
        size = store.used_bytes
        connection = server.connect()
        body = {**ENDLESS, "previous_response_id": first["id"], "stream": True}
        connection.sendall(request(PATH, json.dumps(body).encode()))
        wait_until(lambda: server.service.status().running)
        store.delete("", first["id"])
        assert store.used_bytes == size  # still held
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
        wait_until(lambda: not store.used_bytes)


def test_a_silent_stream_is_kept_alive():
    model, going_on = held_model()
    with live(model=model, ping_seconds=0.05) as server, server.connect() as connection:
        going_on.clear()
        body = {**ENDLESS, "max_output_tokens": 20, "stream": True}
        connection.sendall(request(PATH, json.dumps(body).encode(), "Connection: close\r\n"))
        received_until(connection, b": ping")
        going_on.set()
        assert b"response.incomplete" in received(connection)
