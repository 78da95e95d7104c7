"""Restarts and kill -9 in the middle of answers: what was read is there again, and nothing else.

SPECACHE_KILLS=20 kills as often; the default is twice.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
from openai import OpenAI, OpenAIError

from specache.sessions.prefix_files import is_prefix_name
from tests.server import references
from tests.server.real_server import SERVED_NAME, RealServer, idle

KILLS = int(os.environ.get("SPECACHE_KILLS", "2"))
NEW, PREFIX_BYTES = 24, 200_000_000


def text_of(number: int) -> str:
    return "".join(f"Year {year} of tree {number} was {'wet' if year * number % 3 else 'dry'}. " for year in range(100))


def client_of(server: RealServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def ask(client: OpenAI, text: str, **changes: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=SERVED_NAME, messages=messages, temperature=0, **{"max_tokens": NEW, **changes})


def started(model: Path, folder: Path) -> RealServer:
    return RealServer(model, "--prefix-cache", folder, "--prefix-bytes", str(PREFIX_BYTES))


def check_folder(server: RealServer, folder: Path) -> None:
    """Check that the folder holds whole prefixes that this server uses, and nothing else."""
    server.wait_until(lambda status: idle(status) and not status["prefixes"]["waiting_writes"], "idle")
    status = server.status()  # that one may have counted the prefixes before the last write ended
    inside = [path for path in folder.iterdir() if path.name != "lock"]
    assert len(inside) == status["prefixes"]["saved"] and status["prefixes"]["disk_bytes"] <= PREFIX_BYTES
    assert all((path / "session.json").is_file() and len(list(path.glob("*.rows"))) == 3 for path in inside), inside
    assert not [path for path in folder.rglob("*") if path.name.startswith(".") or path.name.endswith(".tmp")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prefixes").mkdir()
    return tmp_path / "prefixes"


def test_what_was_read_survives_kills_and_a_restart_in_the_middle_of_answers_and_nothing_else_is_left(long_folder, folder):
    """Every second kill comes before the prompt is known to be on the disk."""
    for kill in range(KILLS + 1):
        with started(long_folder, folder) as server, client_of(server) as client:
            read = 0
            for number in range(max(0, kill - 2), kill):
                answer = ask(client, text_of(number))
                kept = number % 2 == 0
                assert not kept or answer.usage.prompt_tokens_details.cached_tokens > 0.95 * answer.usage.prompt_tokens
                assert answer.choices[0].message.content == references.answer(long_folder, text_of(number), NEW)
                read += (0.05 if kept else 1) * answer.usage.prompt_tokens
            assert server.status()["prompt_tokens_read"] <= read
            check_folder(server, folder)
            if kill == KILLS:
                restart_in_the_middle(server, text_of(kill))
            elif kill % 2 == 0:
                kill_in_the_middle(server, client, text_of(kill))
            else:
                kill_while_reading_or_writing(server, client, text_of(kill), read=kill % 4 == 1)
    with started(long_folder, folder) as server, client_of(server) as client:
        answer = ask(client, text_of(KILLS))
        assert answer.usage.prompt_tokens_details.cached_tokens > 0.9 * answer.usage.prompt_tokens
        assert answer.choices[0].message.content == references.answer(long_folder, text_of(KILLS), NEW)
        check_folder(server, folder)
    assert all(is_prefix_name(path.name) or path.name == "lock" for path in folder.iterdir())


def kill_in_the_middle(server: RealServer, client: OpenAI, text: str) -> None:
    """Kill the server while it answers, as soon as the prompt is on the disk."""
    before = server.status()["prefixes"]["saved"]
    stream = ask(client, text, stream=True, max_tokens=8000)
    next(iter(stream))
    status = server.wait_until(lambda status: status["prefixes"]["saved"] == before + 1, "the prompt on disk")
    assert status["running"] == 1
    server.signal(signal.SIGKILL)
    with pytest.raises((httpx2.HTTPError, OpenAIError)):
        list(stream)


def kill_while_reading_or_writing(server: RealServer, client: OpenAI, text: str, *, read: bool) -> None:
    """Kill the server at once, or when the prompt is read, and perhaps half written."""
    stream = ask(client, text, stream=True, max_tokens=100)
    if read:
        next(iter(stream))
    server.signal(signal.SIGKILL)


def restart_in_the_middle(server: RealServer, text: str) -> None:
    """End the server as Ctrl-C does while it answers: the answer has a last event."""
    body = {
        "model": SERVED_NAME,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 5000,
        "stream": True,
    }
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120, trust_env=False) as response:
        lines = response.iter_lines()
        seen = [next(lines) for _ in range(30)]
        process = server.process
        process.send_signal(signal.SIGINT)
        seen += list(lines)
    process.wait(60)  # the end of the block would give it ten seconds
    data = [line for line in seen if line.startswith("data:")]
    assert data[-1] == "data: [DONE]" or '"error"' in data[-1], data[-2:]
