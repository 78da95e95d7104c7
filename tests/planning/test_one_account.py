"""One account of bytes: what is planned, what the budget counts, what statistics report, and the
tensors themselves agree, for every tier, policy, code and number of bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import specache
from specache.cache.compressed_layer import CompressedLayer
from specache.cache.sizes import ORDINARY_ITEMSIZE, FastBytes, ordinary_bytes
from specache.config import Code, Policy
from specache.engine import model_passes
from specache.engine.room import Room
from specache.planning.footprint import CacheFootprint, PlannedSequence
from specache.planning.plan import plan
from tests.engine.test_model_families import FAMILIES, build
from tests.tiny import llama, prompt

TIERS = ("ram-inplace", "ram", "disk")
GROUP = RESIDUAL = 16
EVERY = [(tier, policy, code, bits) for tier in TIERS for policy in Policy for code in Code for bits in (1, 2, 4)]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {"llama": llama(num_hidden_layers=2), "gemma3": build(*FAMILIES["gemma3"])}


def tensors(cache: specache.SpeCache) -> int:
    """Return the bytes of the tensors that a cache's layers hold, without rows in flight."""
    held = 0
    for layer in cache.sequences[0].layers.values():
        held += layer._kv_rows.nbytes
        if isinstance(layer, CompressedLayer):
            held += sum(field.nbytes for run in layer.low_bit_kv.runs for field in run.fields.values())
            held += sum(one.nbytes for one in (layer.key_scales.value, layer.key_scales.observed) if one is not None)
            if layer.row_fetcher.slots:
                hot = layer.row_fetcher.hot
                held += hot.kv_rows.nbytes + 2 * (hot.position.nbytes + hot.stamp.nbytes)  # and as much for sorting
    return held


def check(cache: specache.SpeCache, footprint: CacheFootprint, moment: Callable[[CacheFootprint], FastBytes]) -> None:
    """Compare all figures of a cache's only sequence with those planned for a moment."""
    sequence, layers, model = cache.sequences[0], cache.sequences[0].compressed.values(), footprint.model
    planned, memory, one = moment(footprint), cache.memory(), model.full_layers[0]
    staged = sum(layer.row_fetcher.staged_rows for layer in layers) * 2 * one.head_dim * model.itemsize
    # room for key scales is claimed from the start; they exist once the first group is quantised
    unfixed = sum(layer.key_scales.value is None for layer in layers) * 4 * one.kv_heads * one.head_dim
    assert planned.total == cache.resources.budget.used == cache.held_bytes()
    assert planned.total - planned.read_buffers - unfixed == memory.fast + memory.hot - staged + memory.windows == tensors(cache)
    assert memory.windows == planned.windows and memory.hot - staged == planned.hot_set
    assert memory.full + memory.ordinary_windows == ordinary_bytes(model, sequence.length)
    narrow = moment(replace(footprint, model=replace(model, itemsize=ORDINARY_ITEMSIZE)))
    at_16_bits = narrow.low_bit + narrow.residual + narrow.key_weights + narrow.full_cache - unfixed
    assert sequence.memory(ORDINARY_ITEMSIZE).fast == at_16_bits


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["llama", "gemma3"]),
    case=st.sampled_from(EVERY),
    # while a prompt shorter than R + g is decoded, the plan counts all queries it may come to keep
    prompt_and_new=st.one_of(
        st.tuples(st.integers(1, 150), st.just(0)), st.tuples(st.integers(RESIDUAL + GROUP, 150), st.integers(2, 20))
    ),
    hot_set=st.sampled_from([0.0, 0.3, 20_000]),
    long=st.sampled_from([{}, {"long_top_k": 24, "long_from": 64}, {"long_top_k": 40, "long_from": 128}]),
)
@example(name="gemma3", case=("disk", Policy.VERIFIED, Code.ROTATED, 2), prompt_and_new=(150, 20), hot_set=0.3, long={})
@example(name="llama", case=("ram", Policy.PREVIOUS, Code.KIVI, 1), prompt_and_new=(7, 0), hot_set=0.0, long={})
@example(name="gemma3", case=("ram-inplace", Policy.FULL, Code.KIVI, 4), prompt_and_new=(90, 20), hot_set=0.0, long={})
def test_planned_claimed_and_measured_bytes_are_equal(models, tmp_path_factory, name, case, prompt_and_new, hot_set, long):
    (tier, policy, code, bits), (length, new) = case, prompt_and_new
    config = specache.SpeCacheConfig(
        **{"group_size": GROUP, "residual": RESIDUAL, "top_k": 8, "prefill_chunk": 1024, "hot_set": hot_set, **long},
        **{"slow_tier": f"disk:{tmp_path_factory.mktemp('rows')}" if tier == "disk" else tier, "policy": policy},
        **{"code": code, "bits": bits},
    )
    sequence = PlannedSequence(length, max(0, new - 1))  # the last token is not stored
    with specache.SpeCache(models[name], config) as cache:
        if new:
            specache.generate(models[name], prompt(length), past_key_values=cache, max_new_tokens=new, do_sample=False)
        else:
            specache.prefill(models[name], prompt(length), cache=cache)
        # the last step's token selected before it was stored, unless it selected for a next one
        behind = 0 if cache.config.policy.prefetches or not new else 1
        pairs = cache.config.selection.of(cache.config.low_bit_length(sequence.total - behind))
        footprint = CacheFootprint(cache.resources.dimensions, cache.config, 1, pairs)
        check(cache, footprint, lambda one: one.last_step(sequence) if new else one.prefilled(sequence))


@pytest.mark.parametrize("tier", ["ram", "disk"])
@pytest.mark.parametrize("policy", [policy for policy in Policy if policy.fetches])
def test_a_sequence_that_becomes_long_stays_within_its_plan(models, tmp_path, tier, policy):
    """Its hot set and its buffers grow in the middle of the answer, with nothing to spare."""
    tier = f"disk:{tmp_path}" if tier == "disk" else tier
    shared = {"group_size": GROUP, "residual": RESIDUAL, "top_k": 4, "long_top_k": 48, "long_from": 96, "hot_set": 0.0}
    config = specache.SpeCacheConfig(**shared, slow_tier=tier, policy=policy)
    with specache.SpeCache(models["llama"], config) as cache:
        dimensions, resolved = cache.resources.dimensions, cache.config
    needed = plan(dimensions, resolved, [PlannedSequence(110, 40)]).fast
    with specache.SpeCache(models["llama"], config.with_changes(fast_memory=needed)) as cache:
        specache.generate(models["llama"], prompt(110), past_key_values=cache, max_new_tokens=40, do_sample=False)
        assert cache.resources.budget.peak <= needed


def test_a_decode_step_computes_no_plan(models, monkeypatch):
    """The working set is computed when a group is quantised, and admission when a request ends."""
    computed, asked = [], []
    decode_bytes, fits = model_passes.decode_bytes, Room.fits
    monkeypatch.setattr(model_passes, "decode_bytes", lambda *args: computed.append(args) or decode_bytes(*args))
    monkeypatch.setattr(Room, "fits", lambda *args: asked.append(args) or fits(*args))
    config = specache.SpeCacheConfig(group_size=GROUP, residual=RESIDUAL, slow_tier="ram-inplace")
    with specache.SpeCache(models["llama"], config) as cache:
        one = plan(cache.resources.dimensions, cache.config, [PlannedSequence(200, 64)]).fast
    config = replace(config, fast_memory=one * 21 // 20)
    with specache.Engine(models["llama"], config) as running:
        handles = [
            running.add(specache.make_request(models["llama"], prompt(200, seed), max_new_tokens=64, do_sample=False))
            for seed in range(2)
        ]
        while running.step():
            pass
    assert all(len(handle.new_token_ids[0]) == 64 for handle in handles)
    assert len(asked) == 3  # once each, and the second again when the first has ended
    assert len(computed) <= 2 * (64 // GROUP + 2)
