"""The official clients ask the demo model, whose answers are those of `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from anthropic import Anthropic
from openai import OpenAI

from specache import SpeCacheConfig
from specache.cli.models import DEMO_MODEL, Dtype, LoadedModel
from tests.server import references
from tests.server.live_server import live
from tests.server.real_server import RealServer, idle
from tests.server.test_anthropic_client import WEATHER


@pytest.fixture(scope="module")
def server(demo_model: LoadedModel) -> Iterator[RealServer]:
    with RealServer(DEMO_MODEL, name=DEMO_MODEL) as started:
        yield started


def ask(client: OpenAI, text: str, **fields: Any) -> Any:
    return client.chat.completions.create(model=DEMO_MODEL, messages=[{"role": "user", "content": text}], temperature=0, **fields)


def test_the_openai_client_gets_what_generate_answers(server):
    text = "Name three colours of the rainbow. Answer briefly."
    expected = references.answer(DEMO_MODEL, text, 16)
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300) as client:
        whole = ask(client, text, max_tokens=16).choices[0].message.content
        chunks = ask(client, text, max_tokens=16, stream=True)
        pieces = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        document = "The old tree had forty rings. " * 40
        shared = [ask(client, f"{document}{question}", max_tokens=12) for question in ("How old?", "Which tree?")]
        expected_late = references.answer(DEMO_MODEL, f"{document}Which tree?", 12)
    assert whole == pieces == expected and len(whole) > 10
    assert shared[1].choices[0].message.content == expected_late
    assert shared[1].usage.prompt_tokens_details.cached_tokens > 230


def test_the_anthropic_client_gets_what_generate_answers(server):
    text = "Name three colours of the rainbow."
    expected = references.answer(DEMO_MODEL, text, 12)
    messages: Any = [{"role": "user", "content": text}]
    fields: Any = {"model": DEMO_MODEL, "messages": messages, "max_tokens": 12, "extra_body": {"temperature": 0}}
    forced_fields: Any = {**fields, "max_tokens": 60, "tools": [WEATHER], "tool_choice": {"type": "any"}}
    with Anthropic(base_url=server.url, api_key="none", timeout=300) as client:
        whole = client.messages.create(**fields)
        with client.messages.stream(**fields) as stream:
            pieces = stream.get_final_message()
        counted = client.messages.count_tokens(model=DEMO_MODEL, messages=messages)
        forced = client.messages.create(**forced_fields)
        server.wait_until(idle, "idle")
    assert whole.content[0].text == pieces.content[0].text == expected and len(expected) > 10
    assert counted.input_tokens == whole.usage.input_tokens == len(references.chat_ids(DEMO_MODEL, text))
    assert forced.content[-1].type == "tool_use" and set(forced.content[-1].input) == {"city"}


def test_in_bfloat16_the_first_difference_is_a_near_tie(demo_model):
    """Products of more rows round differently, which decides only between tokens as likely."""
    document = "The old tree had forty rings, and the young one had three. " * 8
    config = SpeCacheConfig(residual=32, group_size=32)  # so that a short document has low-bit pages
    texts = [f"{document}{question}" for question in ("How old is the old tree?", "Which tree is young?", "Name both trees.")]
    rounded = references.loaded(DEMO_MODEL, Dtype.BFLOAT16)
    serving = live(model=rounded.model, tokenizer=rounded.tokenizer, config=config, names=(DEMO_MODEL,))
    with serving as server, OpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=300) as client:
        choices = [ask(client, text, max_tokens=12, logprobs=True).choices[0] for text in texts]
    for text, choice in zip(texts, choices, strict=True):
        prompt = references.chat_ids(DEMO_MODEL, text)
        expected = references.answer_ids(DEMO_MODEL, prompt, 12, Dtype.BFLOAT16, do_sample=False, config=config)
        pieces = [rounded.tokenizer.decode([token]) for token in expected]
        said = [entry.token for entry in choice.logprobs.content]
        differs = next((index for index, pair in enumerate(zip(said, pieces, strict=False)) if pair[0] != pair[1]), None)
        if differs is not None:
            top = references.log_probabilities(DEMO_MODEL, prompt + expected[:differs], Dtype.BFLOAT16)[-1].topk(2).values
            assert top[0] - top[1] < 0.3, (said, pieces)
