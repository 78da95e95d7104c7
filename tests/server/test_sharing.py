"""Many clients with one document: it is read once, and everybody gets what they would get alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.server import references
from tests.server.real_server import SERVED_NAME, RealServer, idle

CLIENTS, NEW = 16, 16
DOCUMENT = "".join(f"Ring {number} of the tree tells of year {number * 7 % 1000}. " for number in range(60))  # 2,100 tokens
QUESTIONS = [f"{DOCUMENT} Question {index}: which ring was wet, and why {'so ' * index}?" for index in range(CLIENTS)]
KEYS = ("first-key-of-the-tests", "second-key-of-the-tests")


@pytest.fixture(scope="module")
def server(long_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """A server with two keys."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("\n".join(KEYS) + "\n")
    keys.chmod(0o600)
    with RealServer(long_folder, "--api-key-file", keys) as started:
        yield started


def ask_together(server: RealServer, texts: list[str], key: str) -> list[Any]:
    """Send all at once and return the completions."""

    async def send() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=300) as client:
            asked: Any = client.chat.completions.create
            settings = {"model": SERVED_NAME, "max_tokens": NEW, "temperature": 0}
            return await asyncio.gather(*(asked(messages=[{"role": "user", "content": text}], **settings) for text in texts))

    return asyncio.run(send())


def counted(server: RealServer, key: str) -> tuple[int, int]:
    """Return the prompt tokens that were read, and those that were there already."""
    status = server.status(key)
    assert idle(status)
    return status["prompt_tokens_read"], status["prompt_tokens_cached"]


def test_a_document_is_read_once_for_all_clients_and_changes_no_answer(server, long_folder):
    read, cached = counted(server, KEYS[0])
    answers = ask_together(server, QUESTIONS, KEYS[0])
    prompts = [answer.usage.prompt_tokens for answer in answers]
    hits = [answer.usage.prompt_tokens_details.cached_tokens for answer in answers]
    assert sorted(hits)[0] == 0 and sorted(hits)[1] >= len(DOCUMENT) - 200  # one reads it, also while others wait for it
    now_read, now_cached = counted(server, KEYS[0])
    assert now_cached - cached == sum(hits) and now_read - read == sum(prompts) - sum(hits)
    assert now_read - read < 1.5 * max(prompts) + CLIENTS * 200
    for index in (0, 7, CLIENTS - 1):
        assert answers[index].choices[0].message.content == references.answer(long_folder, QUESTIONS[index], NEW)


def test_the_same_question_again_is_a_hit_with_the_same_answer(server):
    first, second = (ask_together(server, [QUESTIONS[3]], KEYS[0])[0] for _ in range(2))
    assert second.choices[0].message.content == first.choices[0].message.content
    assert second.usage.prompt_tokens_details.cached_tokens >= len(DOCUMENT)


def test_another_key_finds_nothing_of_it(server):
    ask_together(server, [QUESTIONS[0]], KEYS[0])
    (answer,) = ask_together(server, [QUESTIONS[0]], KEYS[1])
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    (again,) = ask_together(server, [QUESTIONS[1]], KEYS[1])
    assert again.usage.prompt_tokens_details.cached_tokens >= len(DOCUMENT) - 200
