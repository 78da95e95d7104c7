"""The demo model fills in random schemas: every answer parses and validates.

Two schemas by default, as many as SPECACHE_SCHEMAS says otherwise.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor

from specache import SpeCacheConfig
from specache.cli.models import LoadedModel
from tests.server.random_schemas import check_answer, random_schema
from tests.server.tiny_server import chat, running

COUNT = int(os.environ.get("SPECACHE_SCHEMAS", "2"))
SCHEMAS = [random_schema(random.Random(seed), depth=min(2, COUNT // 4)) for seed in range(1000, 1000 + COUNT)]


def test_the_answers_to_random_schemas(demo_model: LoadedModel) -> None:
    """Half of them under a policy that decodes draft tokens, half of those sampled."""
    config = SpeCacheConfig(slow_tier="ram")
    with running(demo_model.model, tokenizer=demo_model.tokenizer, config=config) as client, ThreadPoolExecutor(10) as threads:

        def ask(index: int) -> dict[str, str]:
            answer_format = {"type": "json_schema", "json_schema": {"name": "things", "schema": SCHEMAS[index]}}
            fields = {"max_tokens": 700, "temperature": index // 2 % 2, "seed": index, "response_format": answer_format}
            policy = ("on-demand", "verified")[index % 2]
            (choice,) = chat(client, "Describe a thing as JSON.", policy=policy, **fields)["choices"]
            return {"text": choice["message"]["content"], "reason": choice["finish_reason"]}

        for answer, schema in zip(threads.map(ask, range(COUNT)), SCHEMAS, strict=True):
            assert answer["reason"] == "stop"
            check_answer(answer["text"], schema)
