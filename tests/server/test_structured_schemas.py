"""Answers of random schemas parse and validate, alone, beside others, and under every policy."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.testclient import TestClient

from specache.config import Policy
from tests.server.random_schemas import check_answer, random_schema
from tests.server.tiny_server import chat, printable_model, running

SCHEMAS = [random_schema(random.Random(seed)) for seed in range(200)]


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with running(printable_model(4096)) as client:
        yield client


def ask(client: TestClient, index: int, **fields: Any) -> str:
    """Return a complete answer to schema `index`; every second one is sampled."""
    answer_format = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMAS[index], "strict": bool(index % 3)}}
    settings = {"max_tokens": 2000, "temperature": 1.3 * (index % 2), "seed": index, "response_format": answer_format}
    choice = chat(client, f"Question {index}", **{**settings, **fields})["choices"][0]
    assert choice["finish_reason"] == "stop"
    text: str = choice["message"]["content"]
    return text


def test_every_answer_validates_and_is_the_same_alone_and_beside_others(client):
    alone = {index: ask(client, index) for index in range(0, len(SCHEMAS), 20)}
    with ThreadPoolExecutor(24) as threads:
        answers = list(threads.map(lambda index: ask(client, index), range(len(SCHEMAS))))
    for answer, schema in zip(answers, SCHEMAS, strict=True):
        check_answer(answer, schema)
    assert len(set(answers)) > 150
    assert {index: answers[index] for index in alone} == alone


@pytest.mark.parametrize("index", [1, 4, 10])
def test_every_policy_gives_the_answer_of_the_full_cache_where_it_fetches_every_pair(client, index):
    long = "Tell me about this. " * 30  # longer than the 16-bit residual
    schema = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMAS[index]}}
    fields = {"max_tokens": 1000, "temperature": 0, "response_format": schema, "top_k_pairs": 4096}
    texts = {policy: chat(client, long, **fields, policy=policy)["choices"][0] for policy in Policy if policy.fetches}
    full = chat(client, long, **fields, policy="full")["choices"][0]
    check_answer(full["message"]["content"], SCHEMAS[index])
    assert texts == dict.fromkeys(texts, full)
