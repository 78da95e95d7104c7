"""A real model: how far each policy's logits are from the full cache's."""

from __future__ import annotations

import pydoc_data.topics

import pytest

import specache
from benchmarks.policies import compare, full_answer, prompt_ids

TOKENS, NEW = 600, 24


@pytest.mark.slow
def test_verified_stays_close_to_the_full_cache_and_low_bit_alone_does_not(demo_model):
    model, tokenizer = demo_model.model, demo_model.tokenizer
    topics = pydoc_data.topics.topics
    ids = prompt_ids(tokenizer, "\n".join(topics[name] for name in sorted(topics)), TOKENS)
    answer, logits = full_answer(model, ids, NEW)
    divergence = {}
    with specache.SpeCache(model, specache.SpeCacheConfig(slow_tier="ram", policy="verified")) as prefilled:
        specache.prefill(model, ids, cache=prefilled)
        for policy in ("none", "on-demand", "verified"):
            with prefilled.fork(policy=policy) as cache:
                divergence[policy] = compare(model, ids, answer, logits, cache)["kl"]
    assert divergence["verified"] <= 0.02
    assert divergence["verified"] == pytest.approx(divergence["on-demand"], rel=0.2)
    assert divergence["none"] > 3 * divergence["verified"]
