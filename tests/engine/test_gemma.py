"""Gemma 3 270M: a hybrid with 15 sliding-window layers and 3 full-attention layers."""

from __future__ import annotations

import pydoc_data.topics
from typing import Any

import pytest
import torch

import specache
from benchmarks.policies import compare, full_answer
from tests.gemma import gemma_model

pytestmark = [pytest.mark.gemma, pytest.mark.slow]

TOKENS, NEW = 1500, 24
EVERYTHING = 10**6


@pytest.fixture(scope="module")
def gemma() -> Any:
    return gemma_model()


@pytest.fixture(scope="module")
def ids(gemma) -> torch.Tensor:
    """Return raw text: this model is not trained for chat."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))[: 10 * TOKENS]
    return torch.tensor([gemma.tokenizer(text)["input_ids"][:TOKENS]])


def stock(model: Any, ids: torch.Tensor) -> list[int]:
    """Return the stock cache's greedy answer to one prompt."""
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return tokens[0, ids.shape[1] :].tolist()


def test_fifteen_of_eighteen_layers_have_sliding_windows(gemma):
    with specache.SpeCache(gemma.model) as cache:
        assert [layer for layer, window in enumerate(cache.info.windows) if window is None] == [5, 11, 17]
        assert set(cache.info.windows) == {None, 512}


@pytest.mark.parametrize("policy", ["on-demand", "verified"])
def test_fetching_every_pair_gives_the_tokens_of_stock(gemma, ids, policy):
    config = specache.SpeCacheConfig(policy=policy, slow_tier="ram", top_k=EVERYTHING)
    tokens = specache.generate(gemma.model, ids, config=config, max_new_tokens=NEW, do_sample=False)
    assert tokens[0, TOKENS:].tolist() == stock(gemma.model, ids)


def test_a_left_padded_batch_gives_the_tokens_of_each_prompt_alone(gemma, ids):
    short = ids[:, -700:]  # longer than a window too
    batch = torch.cat([ids, torch.nn.functional.pad(short, (TOKENS - 700, 0))])
    mask = torch.ones_like(batch)
    mask[1, : TOKENS - 700] = 0
    config = specache.SpeCacheConfig(policy="verified", slow_tier="ram", top_k=EVERYTHING)
    together = specache.generate(gemma.model, batch, attention_mask=mask, config=config, max_new_tokens=NEW, do_sample=False)
    for row, alone in enumerate((ids, short)):
        assert together[row, TOKENS:].tolist() == stock(gemma.model, alone)


def test_verified_stays_close_to_the_full_cache_in_a_fraction_of_its_memory(gemma, ids):
    answer, logits = full_answer(gemma.model, ids, NEW)
    divergence = {}
    with specache.SpeCache(gemma.model, specache.SpeCacheConfig(policy="verified", slow_tier="ram")) as prefilled:
        specache.prefill(gemma.model, ids, cache=prefilled)
        stats = prefilled.stats()
        for policy in ("none", "verified"):
            with prefilled.fork(policy=policy) as cache:
                divergence[policy] = compare(gemma.model, ids, answer, logits, cache)["kl"]
    print(f"\nGemma 3 270M, {TOKENS} tokens: KL {divergence}, ", {name: stats[name] for name in ("fast_ratio", "model_ratio")})
    assert divergence["verified"] <= 0.01
    assert divergence["none"] > 3 * divergence["verified"]
    assert stats["fast_ratio"] < stats["model_ratio"] / 2 < 1  # in float32 the windows take twice what a 16-bit cache would
