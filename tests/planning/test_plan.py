"""The plan's arithmetic: published model sizes, real allocations, and advice that fits."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MixtralConfig

from specache.bench.shapes import shape_named
from specache.cache.sizes import ordinary_bytes
from specache.config import SpeCacheConfig
from specache.errors import UnsupportedModelError
from specache.linear.weight_quant import WeightFormat, quantise_weights
from specache.model.dimensions import ModelDimensions, dimensions_of, without_weights
from specache.planning import advice
from specache.planning.footprint import PlannedSequence
from specache.planning.plan import plan, uniform_batch
from specache.planning.traffic import step_traffic
from specache.tiers.layer_rows import planned_capacity
from specache.tiers.ram import RamTier
from specache.tiers.row_memory import BLOCK_TOKENS, RowMemory
from tests.tiny import llama


def shape(name: str) -> ModelDimensions:
    return dimensions_of(without_weights(shape_named(name).config(), torch.bfloat16), device="cpu")


@pytest.fixture(scope="module")
def llama_3b() -> ModelDimensions:
    """Return a model on a processor with 16-bit products, whatever this one has."""
    return replace(shape("llama-3.2-3b"), widens=False)


def resolved(**changes: Any) -> SpeCacheConfig:
    return SpeCacheConfig(**changes).resolved("cpu")


def test_a_3b_models_long_context_has_the_published_sizes(llama_3b):
    """15 GB at 16 bits; 2-bit copy: 2.5 bits per element with KIVI's code, 2.25 + 16 / 128 with
    ours; 3.21 billion parameters.
    """
    config = resolved(code="kivi")
    planned = plan(llama_3b, config, uniform_batch(131_072, 1))
    assert planned.full_cache == 2 * 2 * 28 * 8 * 128 * 131_072 == 15_032_385_536
    low_bit_tokens = config.low_bit_length(131_072)
    assert planned.decode.low_bit == low_bit_tokens * 2 * 28 * 8 * 128 * 2.5 / 8
    assert round(planned.decode.low_bit / 1e9, 1) == 2.3
    assert planned.weights == pytest.approx(2 * 3.2127e9, rel=1e-3)
    ours = plan(llama_3b, resolved(), uniform_batch(131_072, 1))
    assert ours.decode.low_bit == low_bit_tokens * 2 * 28 * 8 * 128 * 2.25 / 8


def test_equal_sequences_are_worked_out_once(llama_3b, monkeypatch):
    """Searches for the largest batch plan batches of hundreds of thousands."""
    worked_out, real = [], SpeCacheConfig.low_bit_length

    def noted(config: SpeCacheConfig, length: int) -> int:
        worked_out.append(length)
        return real(config, length)

    monkeypatch.setattr(SpeCacheConfig, "low_bit_length", noted)
    few, many = (plan(llama_3b, resolved(), uniform_batch(3000, batch)) for batch in (2, 10_000))
    assert len(worked_out) < 1000
    assert (many.slow, many.decode.low_bit) == (5000 * few.slow, 5000 * few.decode.low_bit)


def test_the_planned_residual_has_the_allocated_size():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, vocab_size=97)
    model = dimensions_of(without_weights(config, torch.float32), device="cpu")
    held = plan(model, resolved(residual=32, group_size=16), uniform_batch(100, 2)).decode
    assert held.residual == 2 * 3 * 2 * 2 * (32 + 16) * 16 * 4  # sequences, layers, K and V, heads, rows, channels, bytes
    assert held.windows == held.full_cache == held.hot_set == 0


def test_dimensions_are_those_of_the_model_with_weights():
    model = llama(num_key_value_heads=1, head_dim=24)
    known = dimensions_of(model)
    assert known == dimensions_of(without_weights(model.config, torch.float32), device="cpu")
    assert known.layers[0].kv_heads == 1 and known.layers[0].head_dim == 24 and known.layers[0].query_heads == 4
    assert known.weight_bytes >= sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("weights", [WeightFormat.INT8, WeightFormat.INT4])
def test_quantised_weights_are_planned_with_their_size_after_quantising(weights):
    model = llama(hidden_size=128, intermediate_size=256, vocab_size=96).to(torch.bfloat16)
    expected = dimensions_of(without_weights(model.config, torch.bfloat16), device="cpu", weights=weights)
    quantise_weights(model, weights)
    found = dimensions_of(model)
    assert found.weight_bytes == pytest.approx(expected.weight_bytes, abs=128)  # RoPE's frequencies became bfloat16 here
    assert found.read_bytes == pytest.approx(expected.read_bytes, abs=128)
    assert found.matrix_elements == expected.matrix_elements == 128 * 256


def test_a_mixture_of_experts_reads_only_the_active_experts():
    config = MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2, sliding_window=None
    )
    model = dimensions_of(without_weights(config, torch.bfloat16))
    experts = 2 * 8 * 3 * 64 * 128 * 2  # layers, experts, matrices, sizes, bytes
    embedding = config.vocab_size * 64 * 2
    assert model.weight_bytes - model.read_bytes == experts * 6 // 8 + embedding
    assert model.mlp == 2 * 128


def test_a_model_that_specache_cannot_run_is_not_planned():
    config = MixtralConfig(hidden_size=64, num_hidden_layers=2, sliding_window=16, max_position_embeddings=1024)
    with pytest.raises(UnsupportedModelError, match="nothing to compress"):
        dimensions_of(without_weights(config, torch.bfloat16))


@pytest.mark.parametrize("block", [None, BLOCK_TOKENS])
@given(expected=st.integers(1, 3000), more=st.integers(0, 3000))
@settings(max_examples=25, deadline=None)
def test_the_ram_tier_grows_as_planned(block, expected, more):
    tier = RamTier(False, RowMemory(block_tokens=block))
    tier.reserve(expected)
    tier.write(0, 0, torch.zeros(1, expected, 2), torch.zeros(1, expected, 2))
    for i in range(expected, expected + more):
        tier.write(0, i, torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
    assert tier.nbytes == 4 * 4 * planned_capacity(block, expected, expected + more)


def test_a_longer_context_or_larger_batch_never_needs_less_memory(llama_3b):
    """Advice bisects over context and batch, so needs must grow with them."""
    config = resolved(slow_tier="ram")
    contexts = [plan(llama_3b, config, uniform_batch(tokens, 1)).fast for tokens in range(1, 9000, 37)]
    batches = [plan(llama_3b, config, uniform_batch(3000, batch)).fast for batch in range(1, 20)]
    assert contexts == sorted(contexts) and batches == sorted(batches)


@pytest.mark.parametrize("policy", ["on-demand", "verified", "speculative", "previous"])
@pytest.mark.parametrize("tier", ["ram-inplace", "ram", "disk:/tmp"])
def test_a_step_over_fewer_pairs_than_it_may_fetch_holds_those(llama_3b, tier, policy):
    sequences = uniform_batch(2000, 2)
    plans = [plan(llama_3b, resolved(slow_tier=tier, policy=policy, top_k=pairs), sequences) for pairs in (2000, 10**9)]
    assert plans[0].decode.working_set == plans[1].decode.working_set
    assert tier != "ram-inplace" or plans[0].fast == plans[1].fast


@pytest.mark.parametrize("tier", ["ram", "disk:/nowhere", "ram-inplace"])
@pytest.mark.parametrize("limit", [1_000_000_000, 2_000_000_000, 3_000_000_000])
def test_every_suggestion_fits_and_the_longest_context_is_the_longest(llama_3b, tier, limit):
    config = resolved(slow_tier=tier)
    sequences = uniform_batch(131_072, 1)
    for one in advice.suggestions(llama_3b, config, sequences, limit):
        settings = {name: value for name, value in one.changes.items() if name not in ("context", "batch")}
        tokens = one.changes.get("context", 131_072)
        tried = SpeCacheConfig(**{"slow_tier": tier, **settings}).resolved("cpu")  # as the user does
        assert plan(llama_3b, tried, uniform_batch(tokens, 1)).fast == one.fast_bytes <= limit
    longest = advice.longest_context(llama_3b, config, 1, limit)
    assert (
        plan(llama_3b, config, uniform_batch(longest, 1)).fast <= limit < plan(llama_3b, config, uniform_batch(longest + 1, 1)).fast
    )


def test_the_most_pairs_that_fit_are_suggested(llama_3b):
    """Half of them may be enough where the cache is nearly small enough."""
    config, sequences = resolved(slow_tier="ram", hot_set=0.0), uniform_batch(8192, 8)
    needs = {pairs: plan(llama_3b, replace(config, top_k=pairs), sequences).fast for pairs in (64, 32, 16)}
    assert needs[64] > needs[32] > needs[16]
    for limit, expected in ((needs[64], [64]), (needs[64] - 1, [32]), (needs[16], [16]), (needs[16] - 1, [])):
        found = [one.changes for one in advice.suggestions(llama_3b, config, sequences, limit)]
        assert [changes["top_k"] for changes in found if [*changes] == ["top_k"]] == expected


@pytest.mark.parametrize("changes", [{}, {"top_k": 512}, {"top_k": 128, "long_top_k": 512}])
def test_fewer_pairs_are_suggested_for_long_sequences_too(llama_3b, changes):
    config, sequences = resolved(slow_tier="ram", hot_set=0.0, **changes), uniform_batch(32_768, 4)
    limit = plan(llama_3b, resolved(slow_tier="ram", hot_set=0.0, top_k=64), sequences).fast
    assert plan(llama_3b, config, sequences).fast > limit
    [one] = [one.changes for one in advice.suggestions(llama_3b, config, sequences, limit) if "top_k" in one.changes]
    assert plan(llama_3b, config.with_changes(**one), sequences).fast == limit


@pytest.mark.parametrize("changes", [{}, {"residual": 100}, {"top_k": 100}])
def test_fewer_bits_are_planned_with_their_own_defaults(llama_3b, changes):
    """1 bit keeps and fetches more pairs at 16 bits where nothing else is asked for."""
    sequences = uniform_batch(8192, 1)
    [one] = [
        one
        for one in advice.suggestions(llama_3b, resolved(slow_tier="ram", **changes), sequences, 240_000_000)
        if one.changes == {"bits": 1}
    ]
    assert one.fast_bytes == plan(llama_3b, resolved(slow_tier="ram", bits=1, **changes), sequences).fast


def test_the_largest_batch_is_the_largest(llama_3b):
    config = resolved()
    batch = advice.largest_batch(llama_3b, config, 8192, 8 * 10**9)
    assert plan(llama_3b, config, uniform_batch(8192, batch)).fast <= 8 * 10**9
    assert plan(llama_3b, config, uniform_batch(8192, batch + 1)).fast > 8 * 10**9


@pytest.mark.parametrize("policy", ["verified", "none", "full"])
def test_no_setting_fits_below_the_least_bytes(llama_3b, policy):
    config, sequences = resolved(slow_tier="ram", policy=policy), uniform_batch(8192, 1)
    least = advice.least_bytes(llama_3b, config, sequences)
    assert all("context" in one.changes for one in advice.suggestions(llama_3b, config, sequences, least - 1))
    assert any("context" not in one.changes for one in advice.suggestions(llama_3b, config, sequences, 2 * least))


def test_the_least_bytes_are_the_same_for_full_and_on_demand(llama_3b):
    """The full cache is reduced to `on-demand` with the smallest hot set and the fewest pairs."""
    sequences = uniform_batch(8192, 1)
    full, on_demand = (resolved(slow_tier="ram", policy=policy) for policy in ("full", "on-demand"))
    assert advice.least_bytes(llama_3b, full, sequences) == advice.least_bytes(llama_3b, on_demand, sequences)


@pytest.mark.parametrize(
    ("threshold", "low", "high", "expected"), [(7, 1, 100, 7), (1000, 1, 100, 100), (0, 1, 100, 0), (5, 6, 5, 0), (64, 1, 64, 64)]
)
def test_largest_returns_the_last_number_that_fits(threshold, low, high, expected):
    assert advice.largest(lambda n: n <= threshold, low, high) == expected


def test_step_traffic_matches_the_plan_and_the_policy(llama_3b):
    traffic = step_traffic(llama_3b, resolved(), 131_072, 2)
    planned = plan(llama_3b, resolved(), uniform_batch(131_072, 2))
    assert traffic.scan == planned.decode.low_bit
    assert traffic.weights == llama_3b.read_bytes
    assert traffic.rows == 2 * 28 * 256 * 8 * 2 * 128 * 2 and traffic.assumed_misses == 1.0  # in place: every wanted row
    fetched = step_traffic(llama_3b, resolved(slow_tier="ram"), 131_072, 2)
    assert 0 < fetched.rows < traffic.rows / 4
    full = step_traffic(llama_3b, resolved(policy="full"), 131_072, 2)
    assert full.scan == 2 * ordinary_bytes(llama_3b, 131_072) and full.rows == full.written == 0


def test_a_plan_can_be_written_as_json(llama_3b):
    document = plan(llama_3b, resolved(), [PlannedSequence(100, 10), PlannedSequence(2000, 10)]).to_dict()
    assert json.loads(json.dumps(document)) == document
    assert document["fast_bytes"] == max(document["prefill"]["total"], document["decode"]["total"])
