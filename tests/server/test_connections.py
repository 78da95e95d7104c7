"""A server behind sockets: nobody makes it wait forever, read without end, or work for none."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from contextlib import suppress

import pytest

from specache.errors import QueueFullError
from specache.server.launch import listen
from specache.server.settings import ServerSettings
from tests.server import live_server
from tests.server.live_server import live, received, received_until, request, wait_until
from tests.server.tiny_server import held_model, printable_model

CHAT = "/v1/chat/completions"
POSITIONS = 4096
LONG = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4000, "temperature": 0}  # runs whenever a test looks


@pytest.fixture(scope="module")
def server():
    with live(model=printable_model(POSITIONS)) as server:
        yield server


def split(answer: bytes) -> tuple[int, dict]:
    """Return status and error of an answer."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def aborted_requests(server) -> float:
    """Return the counter of `/metrics`."""
    found = re.search(rb"^specache_aborted_requests_total (.*)$", server.app.state.metrics.text(), re.MULTILINE)
    return float(found[1])


@pytest.mark.parametrize("start", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "])
def test_headers_that_do_not_come_are_not_waited_for(start):
    with live(header_seconds=0.4) as server, server.connect() as connection:
        connection.sendall(start)
        status, error = split(received(connection))
        assert status == 408 and error["code"] == "header_timeout"


def test_headers_that_drip_are_not_waited_for():
    with live(header_seconds=0.4) as server, server.connect() as connection, pytest.raises(OSError):
        connection.sendall(b"GET /")
        for _ in range(2000):  # each byte comes within the deadline, all of them do not
            connection.sendall(b"a")
            time.sleep(0.01)


def test_a_second_request_has_the_deadline_too():
    with live(header_seconds=2.0) as server, server.connect() as connection:  # enough for the first one to come in time
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        received_until(connection, b'"ok"')
        connection.sendall(b"GET /hea")
        assert split(received(connection))[0] == 408


def test_a_body_that_does_not_come_is_not_waited_for():
    with live(body_seconds=0.4) as server, server.connect() as connection:
        connection.sendall(request(CHAT, b'{"messages":', length=500))
        status, error = split(received(connection))
        assert status == 408 and error["code"] == "body_timeout"


def test_a_body_that_is_announced_too_long_is_refused_at_once(server):
    with server.connect() as connection:
        connection.sendall(request(CHAT, b"{", length=10**9))
        status, error = split(received(connection))
        assert status == 413 and error["code"] == "body_too_large"


def test_a_body_without_end_is_refused_and_not_kept(server):
    block = b"%x\r\n" % 2**20 + b"x" * 2**20 + b"\r\n"
    with server.connect() as connection, pytest.raises(OSError):
        connection.sendall(request(CHAT).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
        while True:
            connection.sendall(block)
    with server.connect() as connection:  # and the server goes on
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        assert b"200 OK" in received(connection)


def test_a_connection_goes_on_after_the_rest_of_a_refused_body():
    """The time for the rest of a body must not end a later request of the connection."""
    model, going_on = held_model()
    with live(model=model, drain_seconds=2.0) as server, server.connect() as connection:
        connection.sendall(request("/v1/models", length=2))  # 405 before the body is there
        received_until(connection, b'"method_not_allowed"}}')
        going_on.clear()
        long = json.dumps({**LONG, "max_tokens": 100}).encode()
        connection.sendall(b"{}" + request(CHAT, long, "Connection: close\r\n"))
        time.sleep(2.1)  # the answer is under way when that time is over
        going_on.set()
        answer = received(connection)
    assert answer.startswith(b"HTTP/1.1 200") and json.loads(answer.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 100


def test_a_length_beside_chunks_is_refused(server):
    with server.connect() as connection:
        connection.sendall(request(CHAT, b"{}", "Transfer-Encoding: chunked\r\n"))
        status, error = split(received(connection))
        assert status == 400 and error["code"] == "bad_request"


def test_an_answer_to_a_refused_body_arrives_although_the_client_still_sends(server):
    with server.connect() as connection:
        connection.sendall(request("/nothing", b"x" * 100_000, length=200_000))
        status, _ = split(received(connection))
        assert status in (404, 400)


@pytest.mark.parametrize("first", [100_000, 36_000])
def test_headers_that_are_too_long_are_refused_in_the_apis_shape(server, first):
    """Whether they arrive at once or not."""
    sent = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nX: " + b"a" * 40_000 + b"\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(sent[:first])
        time.sleep(0.1)
        if len(sent) > first:
            with suppress(OSError):  # it may have been closed already
                connection.sendall(sent[first:])
        status, error = split(received(connection))
        assert status == 431 and error["code"] == "headers_too_large"


def test_headers_without_end_are_refused(server):
    with server.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
        time.sleep(0.1)
        connection.sendall(b"a" * 50_000)
        status, error = split(received(connection))
        assert status == 431 and error["code"] == "headers_too_large"


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"GET / HTTP/x\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n"]
)
def test_what_is_not_http_is_refused_in_the_apis_shape(server, data):
    with server.connect() as connection:
        connection.sendall(data)
        assert split(received(connection))[0] == 400


def test_a_broken_chunk_ends_the_connection_and_nothing_else(server):
    with server.connect() as connection:
        connection.sendall(request(CHAT).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"zz\r\n")
        assert split(received(connection))[0] == 400
    wait_until(lambda: not server.app.state.open_streams)


def test_a_broken_chunk_of_a_message_is_answered_with_its_request_id(server):
    with server.connect() as connection:
        connection.sendall(request("/v1/messages").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"zz\r\n")
        head, _, body = received(connection).partition(b"\r\n\r\n")
        assert f"request-id: {json.loads(body)['request_id']}" in head.decode().lower()


def test_connections_beyond_the_limit_are_refused_and_told_when_to_come_back():
    with live(most_connections=3) as server:
        kept = [server.connect() for _ in range(3)]
        try:
            for connection in kept:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                received_until(connection, b'"ok"')
            with server.connect() as one_more:
                answer = received(one_more)
                status, error = split(answer)
                assert status == 503 and error["code"] == "busy"
                assert b"\r\nretry-after: 2\r\n" in answer.lower()
        finally:
            for connection in kept:
                connection.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer(server, stream):
    body = json.dumps({**LONG, "stream": stream}).encode()
    before, counted = server.service.status().aborted, aborted_requests(server)
    connection = server.connect()
    connection.sendall(request(CHAT, body))
    wait_until(lambda: server.service.status().running)
    if stream:
        received_until(connection, b"data: ")
    connection.close()
    wait_until(lambda: not server.service.status().running and not server.app.state.open_streams)
    wait_until(lambda: server.service.status().aborted == before + 1)
    wait_until(lambda: aborted_requests(server) == counted + 1)


def test_a_client_that_leaves_while_one_of_its_answers_is_submitted_is_counted_for_it(server, monkeypatch):
    submit, calls, at_it, left = server.service.submit, [], threading.Event(), threading.Event()

    def late(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise QueueFullError("full", 1.0)  # so that the second answer is asked for when the first has ended
        if len(calls) == 3:
            at_it.set()
            assert left.wait(100)
        return submit(*arguments)

    monkeypatch.setattr(server.service, "submit", late)
    before, counted = server.service.status().aborted, aborted_requests(server)
    prompts = {"prompt": ["Hello", "Good day"], "max_tokens": 20, "temperature": 0, "stream": True, "ignore_eos": True}
    with server.connect() as connection:
        connection.sendall(request("/v1/completions", json.dumps(prompts).encode()))
        assert at_it.wait(100)
    wait_until(lambda: not server.app.state.open_streams)
    left.set()
    wait_until(lambda: server.service.status().aborted == before + 1)
    wait_until(lambda: aborted_requests(server) == counted + 1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_the_queue_leaves_nothing_behind(server, stream):
    with server.connect() as running:
        running.sendall(request(CHAT, json.dumps({**LONG, "stream": True}).encode()))
        wait_until(lambda: server.service.status().running == 1)
        waiting = [server.connect() for _ in range(3)]
        for connection in waiting:
            connection.sendall(request(CHAT, json.dumps({**LONG, "stream": stream}).encode()))
        wait_until(lambda: server.app.state.open_streams == 4)
        for connection in waiting:
            connection.close()
        wait_until(lambda: server.app.state.open_streams <= 1)
        wait_until(lambda: server.service.status().waiting + server.service.status().running <= 1)
    wait_until(lambda: not server.service.status().running and not server.app.state.open_streams)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_its_prompt_is_prepared_leaves_nothing_behind(server, stream):
    before, prepared = server.service.status(), threading.Event()
    for _ in range(2):  # as many as there are workers
        server.app.state.workers.submit(prepared.wait)
    connection = server.connect()
    connection.sendall(request(CHAT, json.dumps({**LONG, "stream": stream}).encode()))
    wait_until(lambda: server.app.state.open_streams == 1)
    connection.close()
    prepared.set()
    wait_until(lambda: not server.app.state.open_streams)
    wait_until(lambda: not server.service.status().running and not server.service.status().waiting)
    assert server.service.status().finished == before.finished


def test_clients_that_leave_before_their_turn_leave_nothing_behind(server):
    body = json.dumps({**LONG, "stream": True}).encode()
    connections = [server.connect() for _ in range(12)]
    for connection in connections:
        connection.sendall(request(CHAT, body))
    wait_until(lambda: server.service.status().running)
    for connection in connections:
        connection.close()
    wait_until(lambda: not server.app.state.open_streams and not server.service.status().waiting)
    wait_until(lambda: not server.service.status().running)


def test_a_stream_that_nobody_reads_is_ended(monkeypatch):
    def listen_with_little_memory(settings: ServerSettings) -> socket.socket:
        listener = listen(settings)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)  # or megabytes of events come before the limit
        return listener

    monkeypatch.setattr(live_server, "listen", listen_with_little_memory)
    with live(model=printable_model(POSITIONS), send_seconds=0.3) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = {**LONG, "stream": True, "n": 8, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}
        connection.sendall(request(CHAT, json.dumps(body).encode()))
        wait_until(lambda: server.app.state.open_streams)
        wait_until(lambda: not server.app.state.open_streams)
        wait_until(lambda: server.service.status().aborted == 1)
        assert not server.server.server_state.connections


def test_an_upgrade_is_not_taken(server):
    with server.connect() as connection:
        connection.sendall(
            b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        assert received(connection).startswith(b"HTTP/1.1 200")


def test_the_end_of_the_server_is_the_last_event_of_a_stream():
    with live(model=printable_model(POSITIONS), grace_seconds=0.0) as server, server.connect() as connection:
        connection.sendall(request(CHAT, json.dumps({**LONG, "stream": True}).encode()))
        wait_until(lambda: server.service.status().running)
        server.server.stop()
        lines = [line for line in received(connection).decode().splitlines() if line.startswith("data: ")]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_the_end_of_the_server_is_told_to_who_waits_for_a_whole_answer():
    with live(model=printable_model(POSITIONS), grace_seconds=0.0) as server, server.connect() as connection:
        connection.sendall(request(CHAT, json.dumps(LONG).encode()))
        wait_until(lambda: server.service.status().running)
        server.server.stop()
        status, error = split(received(connection))
    assert status == 503 and error["code"] == "shutting_down"


def test_a_body_that_is_half_there_does_not_hold_up_the_end_of_the_server():
    with live() as server, server.connect() as connection:
        connection.sendall(request(CHAT, b"{", length=50))
        wait_until(lambda: any(one.cycle is not None for one in list(server.server.server_state.connections)))
        server.server.stop()
        status, error = split(received(connection))
    assert status == 503 and error["code"] == "shutting_down"


def test_a_short_answer_may_end_within_the_grace():
    model, going_on = held_model()
    with live(model=model, grace_seconds=20.0) as server, server.connect() as connection:
        going_on.clear()
        connection.sendall(request(CHAT, json.dumps({**LONG, "max_tokens": 40}).encode()))
        wait_until(lambda: server.service.status().running)
        server.server.stop()
        wait_until(lambda: server.app.state.closing)
        going_on.set()
        head, _, body = received(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and json.loads(body)["usage"]["completion_tokens"] == 40
