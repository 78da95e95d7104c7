"""Restarts and kill -9 in the middle of answers: what was read is there again, and nothing else.

SPECACHE_KILLS=20 kills as often; the default is twice.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.server import references
from tests.server.real_server import SERVED_NAME, RealServer, idle

KILLS = int(os.environ.get("SPECACHE_KILLS", "2"))
NEW = 24


def text_of(number: int) -> str:
    return "".join(f"Year {year} of tree {number} was {'wet' if year * number % 3 else 'dry'}. " for year in range(150))


def client_of(server: RealServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def ask(client: OpenAI, text: str, **changes: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=SERVED_NAME, messages=messages, temperature=0, **{"max_tokens": NEW, **changes})


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prefixes").mkdir()
    return tmp_path / "prefixes"


def begin_answer(server: RealServer, client: OpenAI, text: str, folder: Path, before: set[str]) -> Any:
    """Ask for a long answer and return its stream after some tokens, once the prompt is on disk."""
    stream = ask(client, text, stream=True, max_tokens=5000)
    for _, _chunk in zip(range(8), stream, strict=False):
        pass
    server.wait_until(lambda status: files(folder) > before, "the prompt on disk", 30)
    return stream


def test_what_was_read_survives_kill_9_in_the_middle_of_answers(long_folder, folder):
    for kill in range(KILLS):
        text, before = text_of(kill), files(folder)
        with RealServer(long_folder, "--prefix-cache", folder, "--prefix-bytes", "200MB") as server, client_of(server) as client:
            stream = begin_answer(server, client, text, folder, before)
            server.status()
            server.signal(signal.SIGKILL)
            with pytest.raises(Exception):  # noqa: B017 - whatever the client makes of a torn connection
                list(stream)
        with RealServer(long_folder, "--prefix-cache", folder, "--prefix-bytes", "200MB") as server, client_of(server) as client:
            answers = [ask(client, text_of(number)) for number in range(max(0, kill - 1), kill + 1)]
            for number, answer in zip(range(max(0, kill - 1), kill + 1), answers, strict=True):
                usage = answer.usage
                assert usage.prompt_tokens_details.cached_tokens > 0.9 * usage.prompt_tokens
                assert answer.choices[0].message.content == references.answer(long_folder, text_of(number), NEW)
            status = server.wait_until(idle, "idle")
            assert status["prompt_tokens_read"] < 0.1 * sum(answer.usage.prompt_tokens for answer in answers)


def test_a_restart_ends_answers_with_a_last_event_and_finds_the_prefix(long_folder, folder):
    text = text_of(7)
    with RealServer(long_folder, "--prefix-cache", folder, "--prefix-bytes", "200MB") as server, client_of(server) as client:
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
            server.process.send_signal(signal.SIGINT)
            seen += list(lines)
        data = [line for line in seen if line.startswith("data:")]
        assert data[-1] == "data: [DONE]" or '"error"' in data[-1], data[-2:]
        server.process.wait(60) if server._process.processes else None
    with RealServer(long_folder, "--prefix-cache", folder, "--prefix-bytes", "200MB") as server, client_of(server) as client:
        answer = ask(client, text)
        assert answer.usage.prompt_tokens_details.cached_tokens > 0.9 * answer.usage.prompt_tokens
        assert answer.choices[0].message.content == references.answer(long_folder, text, NEW)


def test_nothing_is_left_behind_by_a_kill_while_prompts_are_read_and_written(long_folder, folder):
    """Kills while prompts are read and written: what is left is whole or is removed."""
    for kill in range(KILLS):
        with RealServer(long_folder, "--prefix-cache", folder, "--prefix-bytes", "200MB") as server, client_of(server) as client:
            streams = [ask(client, text_of(10 * kill + number), stream=True, max_tokens=100) for number in range(1)]
            next(iter(streams[0]))
            server.signal(signal.SIGKILL)  # the prompt may be half written
    with RealServer(long_folder, "--prefix-cache", folder, "--prefix-bytes", "200MB") as server, client_of(server) as client:
        for kill in range(KILLS):
            text = text_of(10 * kill)
            assert ask(client, text).choices[0].message.content == references.answer(long_folder, text, NEW)
        server.wait_until(idle, "idle")
    left = [path for path in folder.rglob("*") if "tmp" in path.name or path.name.startswith(".specache-")]
    assert not [path for path in left if path.is_dir()], left
