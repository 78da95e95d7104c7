"""Fast memory measured from allocated tensors; no step holds a dense copy of the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import specache
from specache.config import DEFAULTS_OF_BITS
from specache.engine.attention_hook import attached
from specache.engine.decoder import Decoder
from specache.kernels.blocks import BLOCK_BYTES
from tests.peak import PeakMemory
from tests.tiny import llama, prompt

LONG = {
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 40_000,
    "dtype": torch.bfloat16,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return llama(**LONG).to(torch.bfloat16)


@pytest.fixture(scope="module")
def prefilled() -> dict[tuple[int, int], dict[str, Any]]:
    """Statistics by (bits, length). Each length continues the prefill of the shorter one.

    A second query head would share the only key-value head, and take as long again.
    """
    model, stats = llama(**{**LONG, "hidden_size": 64, "num_attention_heads": 1}).to(torch.bfloat16), {}
    ids = prompt(32_000)
    for bits in (1, 2, 4):
        with specache.SpeCache(model, specache.SpeCacheConfig(bits=bits, slow_tier="ram")) as cache:
            for length in (2_000, 8_000, 32_000):
                specache.prefill(model, ids[:, :length], cache=cache)
                stats[bits, length] = cache.stats()
    return stats


@pytest.mark.parametrize("length", [2_000, 8_000, 32_000])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_fast_memory_stays_within_the_documented_bound(prefilled, bits, length):
    stats = prefilled[bits, length]
    group_size, defaults = 64, DEFAULTS_OF_BITS[bits]
    assert stats["full_bytes"] == 2 * 2 * 64 * length  # K and V, bytes, head dimension
    assert 0 < stats["fast_ratio"] <= (bits + 32 / group_size) / 16 + (defaults["residual"] + group_size) / length
    assert stats["slow_bytes"] >= stats["full_bytes"]
    assert stats["hot_ratio"] <= 0.08 or length * 0.08 < 2 * defaults["top_k"]


def decode_peak(model: Any, cache: specache.SpeCache) -> int:
    """Return the peak of three decode steps: the first fetches its pairs, the next ones use
    prefetched pairs.
    """
    decoder = Decoder(model, cache)
    drafts = [7] if cache.config.policy.drafts else None
    with torch.no_grad(), attached(model), PeakMemory() as memory:
        for token in (5, 6, 7):
            decoder.step(cache.sequences, [token], drafts)
    return memory.peak


@pytest.mark.parametrize("policy", ["verified", "speculative", "on-demand", "none"])
def test_a_decode_step_holds_the_scores_and_one_block_of_pages(model, policy):
    """Memory grows by a few temporaries of the scores' size [Hq, n, S]; unpacked pages take one
    block.
    """
    peaks = []
    for length in (4_000, 12_000):
        ids = prompt(length)
        with specache.SpeCache(model, specache.SpeCacheConfig(slow_tier="ram", policy=policy, hot_set=0.0)) as cache:
            specache.prefill(model, ids[:, :1], cache=cache)
            cache.sequences[0].tier.reserve(length + 8)  # the slow tier's growth is not measured here
            specache.prefill(model, ids, cache=cache)
            peaks.append(decode_peak(model, cache))
            dense = cache.stats()["full_bytes"]
    rows = 2 if policy in ("verified", "speculative") else 1
    scores = 2 * rows * 12_000 * 4  # bytes, float32
    assert peaks[1] - peaks[0] <= 3 * scores
    assert peaks[1] <= 3 * scores + 5 * BLOCK_BYTES
    assert 3 * scores < dense


def test_peak_memory_of_a_prefill_chunk_does_not_grow_with_the_stored_tokens(model):
    """The peak of a chunk beyond what it stores is one block of the layer's pairs and the chunk's
    activations.
    """
    ids = prompt(20_000)
    extra = []
    with specache.SpeCache(model, specache.SpeCacheConfig(slow_tier="ram", prefill_chunk=512)) as cache:
        specache.prefill(model, ids[:, :5_000], cache=cache)
        cache.sequences[0].tier.reserve(20_000)
        for length in (6_000, 19_000, 20_000):
            before = cache.stats()["fast_bytes"] + cache.stats()["slow_bytes"]
            with PeakMemory() as memory:
                specache.prefill(model, ids[:, :length], cache=cache)
            kept = cache.stats()["fast_bytes"] + cache.stats()["slow_bytes"] - before
            extra.append(memory.peak - kept)
    assert extra[2] <= 1.2 * max(extra[0], 0) + 2**20


def test_a_prompt_beyond_the_budget_is_refused_and_leaves_nothing_stored(model):
    config = specache.SpeCacheConfig(fast_memory=50_000)
    with specache.SpeCache(model, config) as cache:
        with pytest.raises(specache.FastMemoryError, match="fast_memory allows 50,000"):
            specache.prefill(model, prompt(4_000), cache=cache)
        assert cache.sequences == []
        assert cache.stats()["total_bytes"] == 0
