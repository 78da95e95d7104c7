"""Hostile clients: broken bodies, slow ones, huge ones, and too many: refused, bounded, survived.

SPECACHE_FUZZ=10000 sends as many broken bodies; the default is 1,000.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.live_server import Live, live, received_until
from tests.server.real_server import SERVED_NAME, RealServer, idle

BODIES = int(os.environ.get("SPECACHE_FUZZ", "1000"))
ANSWER_S = 60.0  # an answer that takes longer hangs
HEADER_S, BODY_S = 2.0, 2.0
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
LAST_EVENTS = ("response.completed", "response.incomplete", "response.failed")
PATHS = (CHAT, CHAT, CHAT, RESPONSES, RESPONSES, "/v1/completions", "/v1/completions", "/tokenize", "/detokenize")
VALID: dict[str, dict[str, Any]] = {
    CHAT: {"model": SERVED_NAME, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "temperature": 0},
    "/v1/completions": {"model": SERVED_NAME, "prompt": "Hello", "max_tokens": 2, "temperature": 0},
    RESPONSES: {"model": SERVED_NAME, "input": "Hello", "max_output_tokens": 2, "temperature": 0},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [10, 11, 12]},
}
FIELDS = (
    *(
        "model",
        "messages",
        "prompt",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "seed",
        "stop",
    ),
    *(
        "stream",
        "stream_options",
        "logprobs",
        "top_logprobs",
        "echo",
        "logit_bias",
        "presence_penalty",
        "frequency_penalty",
        "suffix",
    ),
    *(
        "response_format",
        "tools",
        "tool_choice",
        "user",
        "metadata",
        "store",
        "chat_template_kwargs",
        "chat_template",
        "policy",
        "session",
    ),
    *(
        "input",
        "instructions",
        "previous_response_id",
        "max_output_tokens",
        "include",
        "text",
        "reasoning",
        "truncation",
    ),
    *(
        "top_k_pairs",
        "best_of",
        "tokens",
        "add_special_tokens",
        "ignore_eos",
        "min_tokens",
        "repetition_penalty",
        "regex",
        "grammar",
        "json_schema",
        "guided_json",
        "guided_choice",
        "structured_outputs",
        "../../etc/passwd",
    ),
)
NASTY: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        2**31,
        2**63,
        2**64,
        -(2**70),
        10**400,
        0.5,
        -0.0,
        1e308,
        5e-324,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        " ",
        "x",
        "\0",
        "\ud800",
        "ä" * 50,
        "<end>",
        "<user>",
        "\N{REPLACEMENT CHARACTER}",
        "../../../etc/passwd",
        "a" * 5000,
        "{{ 7 * 7 }}",
    ),
    *("(a{2,9}|[b-", "start: a\na: start", '{"$ref": "#"}', {"type": "object", "properties": {"a": {"$ref": "#"}}}, {"regex": "["}),
    *([], [[]], [None], [0], [-1], [10**9], ["x"], [["x"]], [{}], [1.5], list(range(300)), {}, {"type": "json_object"}, {"0": 100}),
    *(
        {"-1": 0},
        {"x": "y"},
        [{"role": "user"}],
        [{"role": "root", "content": "x"}],
        [{"role": "user", "content": [{"type": "text"}]}],
    ),
    *(
        [{"type": "function_call", "call_id": "x", "name": "x", "arguments": "{"}],
        [{"type": "reasoning"}, {"type": "item_reference", "id": "msg_" + "0" * 36}],
        {"format": {"type": "json_schema", "name": "x", "schema": {"type": "x"}}},
        {"format": {"type": "json_object"}},
    ),
    *(
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        [{"role": "user", "content": None}],
        [{"role": "tool", "content": "x"}],
    ),
    *(
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}],
        [{"type": "function", "function": {"name": "<end>"}}],
        {"type": "function", "function": {"name": "f"}},
        "required",
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{<end>"}}]}],
    ),
)


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[RealServer]:
    """A server of a model with 512 positions, which bounds every answer."""
    with RealServer(tiny_folder) as started:
        yield started


@pytest.fixture(scope="module")
def hasty() -> Iterator[Live]:
    """A server in this process that does not wait long."""
    with live(header_seconds=HEADER_S, body_seconds=BODY_S) as started:
        yield started


def broken_body(chance: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """Return path, body and headers of a request, which may be valid by chance."""
    path = chance.choice(PATHS)
    body = dict(VALID[path])
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        body[chance.choice(FIELDS)] = chance.choice(NASTY)
    if chance.random() < 0.1:
        body.pop(chance.choice(list(body)))
    document: Any = body if chance.random() < 0.95 else chance.choice(NASTY)
    data = json.dumps(document).encode()
    kind = chance.random()
    if kind < 0.05:
        data = data[: chance.randrange(len(data) + 1)]
    elif kind < 0.1:
        data = bytes(chance.randrange(256) if chance.random() < 0.1 else byte for byte in data)
    elif kind < 0.12:
        data = b"[" * chance.choice((10, 1000, 100_000))
    elif kind < 0.13:
        data = b'{"a":' * 5000 + b"1" + b"}" * 5000
    elif kind < 0.14:
        data = data[:-1] + b', "temperature": 1, "temperature": 9e999}'
    content_type = (
        "application/json"
        if chance.random() < 0.95
        else chance.choice(("text/plain", "", "application/x-www-form-urlencoded", "\\"))
    )
    return path, data, {"content-type": content_type}


def check(response: httpx.Response, what: str) -> None:
    """Check that a response is an answer, or a refusal in the API's own shape."""
    if response.status_code == 200:
        if response.headers["content-type"].startswith("text/event-stream"):
            last = [line for line in response.text.splitlines() if line.startswith("data:")][-1]
            ended = last == "data: [DONE]" or json.loads(last.removeprefix("data:"))
            assert ended is True or "error" in ended or ended.get("type") in LAST_EVENTS, what
        return
    assert 400 <= response.status_code < 500, (response.status_code, response.text[:500], what)
    error = response.json()["error"]
    assert error.keys() >= {"message", "type", "param", "code"} and error["message"] and error["type"], (response.text, what)


def test_broken_bodies_are_refused_in_the_shape_of_the_api(server):
    chance = random.Random(20)
    requests = iter([broken_body(chance) for _ in range(BODIES)])
    statuses: Counter[int] = Counter()

    async def send(client: httpx.AsyncClient) -> None:
        for path, data, headers in requests:
            response = await client.post(path, content=data, headers=headers)
            statuses[response.status_code] += 1
            check(response, f"{path} {headers} {data[:1000]!r}")

    async def send_all() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=ANSWER_S, trust_env=False) as client:
            await asyncio.gather(*(send(client) for _ in range(8)))

    asyncio.run(send_all())
    assert statuses.total() == BODIES and statuses[200] > BODIES // 100 and statuses[400] > BODIES // 10, statuses
    server.wait_until(idle, "idle")


def still_serves(server: RealServer | Live) -> None:
    response = httpx.post(f"http://127.0.0.1:{server.port}{CHAT}", json=VALID[CHAT], timeout=ANSWER_S, trust_env=False)
    assert response.status_code == 200, response.text


def connected(server: RealServer | Live, data: bytes = b"") -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=ANSWER_S)
    sock.sendall(data)
    return sock


def head(**headers: object) -> bytes:
    lines = {"Host": "127.0.0.1", "Content-Type": "application/json", **headers}
    return (
        f"POST {CHAT} HTTP/1.1\r\n".encode()
        + "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items()).encode()
    )


def closed_within(sockets: list[socket.socket], drip: bytes, seconds: float) -> bool:
    """Send a byte to each from time to time and return whether all are closed in time."""
    deadline, left = time.monotonic() + seconds, list(sockets)
    while left and time.monotonic() < deadline:
        for sock in list(left):
            sock.settimeout(0.001)
            try:
                sock.sendall(drip)
                ended = sock.recv(65536) == b""
            except TimeoutError:
                ended = False
            except OSError:
                ended = True
            if ended:
                left.remove(sock)
        time.sleep(0.2)
    return not left


@pytest.mark.parametrize("part", ["headers", "body", "nothing"])
def test_a_hundred_slow_clients_are_cut_off_and_others_served_meanwhile(hasty, part):
    begun = {"headers": head()[:-2] + b"\r\nX-Slow: ", "body": head(Content_Length=5000) + b"\r\n{", "nothing": b""}[part]
    with ExitStack() as stack:
        slow = [stack.enter_context(connected(hasty, begun)) for _ in range(100)]
        still_serves(hasty)
        assert closed_within(slow, b"" if part == "nothing" else b"x", ANSWER_S)
    still_serves(hasty)


def test_a_body_of_a_gigabyte_is_refused_before_it_is_read(server):
    before = server.process.memory_info().rss
    with connected(server, head(Content_Length=10**9) + b"\r\n") as sock:
        answer = received_until(sock, b"}}")
    assert answer.startswith(b"HTTP/1.1 413 ") and b'"error"' in answer
    chunk, deadline = b"100000\r\n" + b" " * 0x100000 + b"\r\n", time.monotonic() + ANSWER_S
    with connected(server, head(Transfer_Encoding="chunked") + b"\r\n") as sock, pytest.raises(OSError):
        while time.monotonic() < deadline:  # without end, and without reading the answer
            sock.sendall(chunk)
    still_serves(server)
    assert server.process.memory_info().rss < before + 100_000_000


def test_a_thousand_open_streams_are_bounded(server):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard) if hard != resource.RLIM_INFINITY else 4096, hard))
    body = json.dumps({**VALID[CHAT], "max_tokens": 400, "stream": True}).encode()
    request = head(Content_Length=len(body)) + b"\r\n" + body
    before = server.process.memory_info().rss
    answers: Counter[bytes] = Counter()
    try:
        with ExitStack() as stack:
            sockets = []
            for _ in range(1000):
                with suppress(OSError):  # refused at the door
                    sockets.append(stack.enter_context(connected(server, request)))
            deadline = time.monotonic() + ANSWER_S
            for sock in sockets:
                sock.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    answers[sock.recv(4096)[9:12]] += 1
                except ConnectionError:
                    answers[b"closed"] += 1
            assert set(answers) <= {b"200", b"429", b"503", b"", b"closed"} and answers[b"200"] < 400, answers
            assert server.process.memory_info().rss < before + 300_000_000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    server.wait_until(idle, "the end of every stream", 60)
    still_serves(server)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200, b"400"),
        (b"GET / HTTP/9.9\r\n\r\n", b"400"),
        (b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", b"4"),
        (b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"4"),
        (b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: https://evil.example\r\n\r\n", b"403"),
        (b"GET /v1/models/../../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"404"),
        (b"GET /v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"404"),
        (b"DELETE /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"405"),
        (head(Content_Length=-5) + b"\r\n", b"400"),
        (head(Transfer_Encoding="chunked") + b"\r\nzz\r\n", b"4"),
        (head(Content_Length=2, Transfer_Encoding="chunked") + b"\r\n{}", b"4"),
    ],
)
def test_broken_requests_are_refused(hasty, data, status):
    with connected(hasty, data) as sock:
        answer = received_until(sock, b"}}")  # where every error ends
    assert answer.startswith(b"HTTP/1.1 " + status) and b"passwd:" not in answer and b"Traceback" not in answer, answer
    still_serves(hasty)
