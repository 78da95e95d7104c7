"""Filled caches hold what a prefill would store, and all implementations decode the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Cache

import specache
from specache.bench import contenders
from specache.bench.breakdown import PHASES
from specache.bench.contenders import BareModel, DynamicContender, QuantizedContender, SpeCacheContender, quantized_backend
from specache.bench.synthetic import add_sequence
from specache.bench.workload import Workload, layer_shapes
from specache.cache.window_layer import WindowLayer
from specache.config import Code, Policy, SpeCacheConfig
from specache.engine.attention_hook import attached
from specache.engine.decoder import Decoder
from specache.engine.model_passes import MOST_CHANGES
from specache.errors import ConfigError
from specache.kernels import dispatch
from specache.platform import extension
from tests.bench.tiny_shape import TINY, tiny_model, tiny_workload
from tests.engine.test_model_families import FAMILIES, build
from tests.model.test_quantized_cache import WholeBytes
from tests.tiny import llama, prompt

LENGTH = 203


def rows_of(sequence: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [Hkv, S, D] of a prefilled sequence.

    A sliding layer has zeros before its window.
    """
    layer = sequence.layers[index]
    if not isinstance(layer, WindowLayer):
        return sequence.tier.read(index, 0, layer.length)
    kept = torch.arange(max(0, layer.length - layer.window), layer.length)
    rows = torch.zeros(2, layer.ring.shape[1], layer.length, layer.ring.shape[3])
    rows[:, :, kept] = layer.ring[:, :, kept % layer.window]
    return rows[0], rows[1]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_filled_sequence_decodes_as_a_prefilled_one(family):
    model = llama() if family == "llama" else build(*FAMILIES["gemma3"])
    config = SpeCacheConfig(code=Code.KIVI, top_k=8)  # the rotated code takes its weights from a prompt's queries
    with specache.SpeCache(model, config) as prefilled, specache.SpeCache(model, config) as filled:
        ids = prompt(LENGTH)
        specache.prefill(model, ids, cache=prefilled)
        sequence = prefilled.sequences[0]
        add_sequence(filled, {index: rows_of(sequence, index) for index in sequence.layers})
        filled.sequences[0].prepare_decode()
        assert filled.sequences[0].length == LENGTH and filled.memory().full == prefilled.memory().full
        with torch.no_grad(), attached(model):
            for token in (5, 6, 7):
                expected, actual = (
                    Decoder(model, cache).step(cache.sequences, [token], None).real for cache in (prefilled, filled)
                )
                assert torch.allclose(actual, expected, atol=1e-5)


def test_sequences_of_a_batch_share_no_memory():
    work = tiny_workload(batch=2)
    ours = SpeCacheContender(work, SpeCacheConfig())
    ours.prepare()
    first, second = (sequence.layers[0].table.pages for sequence in ours.held.sequences)
    assert first and not set(first) & set(second)
    ours.close()


def test_policy_full_and_the_stock_cache_decode_the_same_tokens():
    work = Workload(llama(), batch=2, context=200)
    ours, stock = SpeCacheContender(work, SpeCacheConfig(policy=Policy.FULL)), DynamicContender(work)
    ours.prepare()
    stock.prepare()
    tokens: list[list[int]] = []
    for _ in range(4):
        with ours.ready():
            ours.step()
        stock.step()
        assert ours.tokens == stock.tokens[:, 0].tolist()
        tokens.append(ours.tokens)
    assert len({token for step in tokens for token in step}) > 1
    ours.close()


@pytest.mark.parametrize("policy", [Policy.ON_DEMAND, Policy.VERIFIED, Policy.SPECULATIVE, Policy.PREVIOUS, Policy.NONE])
def test_every_policy_decodes_and_reports_its_phases(policy):
    work = tiny_workload()
    ours = SpeCacheContender(work, SpeCacheConfig(policy=policy, top_k=8))
    assert str(policy) in ours.cache
    ours.prepare()
    before = [dispatch.layer_step, dispatch.decode_in_place]
    phases = ours.phases(2)
    assert [dispatch.layer_step, dispatch.decode_in_place] == before
    assert set(phases) <= set(PHASES)
    assert phases.get("in_place") or (phases["attend"] and (phases.get("score") or phases.get("select")))
    ours.close()


@pytest.mark.skipif(not extension.instruction_sets(), reason=f"no C++ kernels: {extension.IMPORT_ERROR}")
def test_steps_between_those_of_other_caches_run_as_in_an_answer():
    """Not layer by layer, as where a model keeps changing: the others have the user's attention."""
    work = Workload(llama(), batch=1, context=200)
    ours, stock = SpeCacheContender(work, SpeCacheConfig()), DynamicContender(work)
    for one in (ours, stock):
        one.prepare()
    steps = 2 * MOST_CHANGES
    for _ in range(steps):
        for one in (ours, stock):
            with one.ready():
                one.step()
    ours.phases(2)
    assert ours.held.stats()["traced_steps"] == ours.held.stats()["decode_steps"] == steps + 2
    ours.close()


def test_layer_shapes_come_from_the_tensors():
    assert layer_shapes(tiny_model().load()) == [(TINY.kv_heads, TINY.head_dim)] * TINY.layers


def test_estimated_memory_is_the_memory_used():
    work = tiny_workload(batch=2, context=640)
    config = SpeCacheConfig(residual=0)
    ours = SpeCacheContender(work, config)
    assert DynamicContender(work).needed_bytes == int(2 * 2 * 640 * 2 * 2 * 16 * 4 * 1.5)  # one layer of two is copied
    ours.prepare()
    layers = [layer for sequence in ours.held.sequences for layer in sequence.layers.values()]
    assert work.copy_bytes(config) == sum(layer.table.nbytes for layer in layers)
    ours.close()


@pytest.fixture
def stand_in_for_hqq(monkeypatch) -> None:
    """Make a library known that packs whole bytes only and keeps the numbers as they are."""
    monkeypatch.setattr(contenders, "quantized_backend", lambda: "hqq")
    monkeypatch.setattr(contenders, "new_quantized_cache", lambda model, *_, **__: Cache(layers=[WholeBytes() for _ in range(2)]))


@pytest.mark.usefixtures("stand_in_for_hqq")
@pytest.mark.parametrize("context", [200, 201])
def test_transformers_quantised_cache_decodes(context):
    work = tiny_workload(context=context)
    quantized, stock = QuantizedContender(work, bits=2), DynamicContender(work)
    assert quantized.cache == "2-bit hqq"
    for contender in (quantized, stock):
        contender.prepare()
        contender.step()
    assert quantized.held.get_seq_length() == stock.held.get_seq_length() == work.context + 1
    assert torch.equal(quantized.tokens, stock.tokens)


@pytest.mark.usefixtures("stand_in_for_hqq")
def test_a_shape_that_the_quantised_cache_cannot_hold_is_refused_first():
    with pytest.raises(ConfigError, match="has to divide the 32 elements"):
        QuantizedContender(tiny_workload(batch=1), bits=2)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(contenders, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install hqq"):
        quantized_backend()


def test_a_bare_model_needs_no_cache():
    bare = BareModel(Workload(tiny_model().load(), 2, 64), rows=2)
    bare.prepare()
    bare.step()
    assert bare.needed_bytes == 0


@pytest.mark.parametrize("code", list(Code))
@pytest.mark.parametrize("shares_rows", [False, True])
def test_a_sequence_that_is_copied_decodes_as_one_that_is_quantised(code, shares_rows):
    work = tiny_workload(batch=3)
    config = SpeCacheConfig(code=code, top_k=8, slow_tier="ram", policy="verified")
    copied = SpeCacheContender(work, config, shares_rows)
    copied.prepare()
    with specache.SpeCache(work.model, config) as quantised:
        for _ in range(3):
            add_sequence(quantised, {i: work.rows(i) for i in range(len(work.layer_shapes))})
        for ours, theirs in zip(copied.held.sequences, quantised.sequences, strict=True):
            for index, layer in ours.compressed.items():
                other = theirs.compressed[index]
                assert torch.equal(layer.table.raw(0, 2), other.table.raw(0, 2))
                assert torch.equal(layer.residual_keys, other.residual_keys)
                assert layer.length == other.length == work.context
        pages = [layer.table.pages for sequence in copied.held.sequences for layer in sequence.compressed.values()]
        assert len({id(one) for one in pages}) == len(pages)  # every sequence has pages of its own
    bytes_of_one = work.exact_bytes // work.batch
    with copied.ready():
        copied.step()
    slow = copied.held.stats()["slow_bytes"]
    assert slow < 2 * bytes_of_one * (1 + 1024 / work.context) if shares_rows else slow >= 3 * bytes_of_one
    copied.close()
