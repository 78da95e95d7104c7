"""The demo model fills in random schemas: every answer parses and validates."""

from __future__ import annotations

import random

import pytest

from specache import SpeCacheConfig
from specache.cli.models import LoadedModel
from tests.server.random_schemas import check_answer, random_schema
from tests.server.tiny_server import chat, running

SCHEMAS = [random_schema(random.Random(seed), depth=2) for seed in range(1000, 1020)]


@pytest.mark.parametrize("policy", ["on-demand", "verified"])
def test_twenty_schemas(demo_model: LoadedModel, policy: str) -> None:
    config = SpeCacheConfig(policy=policy, slow_tier="ram")
    share = SCHEMAS[::2] if policy == "verified" else SCHEMAS[1::2]
    with running(demo_model.model, tokenizer=demo_model.tokenizer, config=config) as client:
        for index, schema in enumerate(share):
            answer_format = {"type": "json_schema", "json_schema": {"name": "things", "schema": schema}}
            fields = {"max_tokens": 700, "temperature": index % 2, "seed": index, "response_format": answer_format}
            (choice,) = chat(client, "Describe a thing as JSON.", **fields)["choices"]
            assert choice["finish_reason"] == "stop"
            check_answer(choice["message"]["content"], schema)
