"""A step that copies its rows in one call equals the one that does it in several, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specache.attention.at_once import decode_at_once
from specache.attention.decode import StepKind, StepSpec, mixed_attention
from specache.cache.layers import CompressedLayer
from specache.cache.sizes import page_layout
from specache.config import Policy, SpeCacheConfig
from specache.kernels import dispatch
from specache.kernels.cpu import native
from specache.kernels.types import AttentionParams
from specache.low_bit.pool import PagePool, PageTable
from specache.platform.budget import ByteBudget
from specache.rows.fetch import HotSetRowFetcher
from specache.rows.hot_set import HotSet
from specache.rows.native_hot_set import NativeHotSet
from specache.stats import Counters
from specache.tiers.ram import RamTier
from specache.tiers.transfer import Transfer
from specache.tiers.worker import PrefetchWorker
from tests.tiers.tier_rows import random_rows

pytestmark = pytest.mark.skipif(native.IMPORT_ERROR is not None, reason="the C++ extension is not built")

HEADS, GROUPS, DIM = 2, 3, 16
CPU = torch.device("cpu")
PARAMS = AttentionParams(scaling=DIM**-0.5)
KINDS = {Policy.VERIFIED: tuple(StepKind), Policy.ON_DEMAND: (StepKind.SINGLE,)}


@pytest.fixture(scope="module")
def worker() -> Iterator[PrefetchWorker]:
    made = PrefetchWorker()
    yield made
    made.close()


def layer_of(tokens: int, hot: type[HotSet], worker: PrefetchWorker, dtype: torch.dtype, residual: int = 16) -> CompressedLayer:
    """Return a layer of `tokens` random tokens whose rows are copied through a hot set."""
    config = SpeCacheConfig(group_size=16, residual=residual, top_k=4)
    tier, counters = RamTier(in_place=False), Counters()
    fetcher = HotSetRowFetcher(tier, 0, hot(HEADS, 0, 2 * DIM, dtype, CPU), worker, Transfer(CPU), counters)
    table = PageTable(PagePool(page_layout(config, HEADS, DIM), CPU, ByteBudget()))
    keys, values = random_rows(HEADS, tokens, DIM, dtype, seed=tokens)
    layer = CompressedLayer(0, config, table, tier, fetcher, keys)
    tier.write(0, 0, keys, values)
    layer.rebuild(tokens)
    return layer


def step(layers: list[CompressedLayer], kind: StepKind, policy: Policy, top_k: int, seed: int) -> tuple[Tensor, Counters]:
    """Decode random tokens -> [B, Hq, n, D], and what was counted."""
    generator = torch.Generator().manual_seed(seed)
    dtype, counters = layers[0].dtype, Counters()
    query = torch.randn(len(layers), HEADS * GROUPS, kind.queries, DIM, generator=generator).to(dtype)
    keys, values = (torch.randn(len(layers), HEADS, kind.queries, DIM, generator=generator).to(dtype) for _ in range(2))
    spec = StepSpec(kind, policy, top_k, counters)
    at_once = decode_at_once(query, keys, values, layers, PARAMS, spec)
    assert (at_once is not None) == isinstance(layers[0].row_fetcher.hot, NativeHotSet)
    if at_once is not None:
        out = at_once.transpose(1, 2)
    else:
        if kind.commits:
            for b, layer in enumerate(layers):
                layer.append(query[b, :, :1], keys[b, :, :1], values[b, :, :1])
        out = mixed_attention(query, keys, values, layers, PARAMS, spec).to(dtype)
    if kind.commits:
        for layer in layers:
            layer.quantise_oldest()
    return out, counters


@settings(deadline=None, max_examples=40)
@given(data=st.data(), policy=st.sampled_from(list(KINDS)), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_one_call_equals_several(worker, data, policy, dtype):
    lengths = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=2))
    ours, theirs = ([layer_of(length, hot, worker, dtype) for length in lengths] for hot in (NativeHotSet, HotSet))
    top_k, slots = data.draw(st.sampled_from([(3, 0), (4, 5), (16, 0), (20, 20), (20, 64)]))
    for layer in ours + theirs:
        layer.row_fetcher.resize(slots)  # where it grows between two steps, hits may differ
    for seed in range(data.draw(st.integers(1, 8))):
        kind = data.draw(st.sampled_from(KINDS[policy]))
        (out, counted), (expected, wanted) = (step(layers, kind, policy, top_k, seed) for layers in (ours, theirs))
        assert torch.equal(out, expected)
        assert (counted.rows_selected, counted.rows_ready) == (wanted.rows_selected, wanted.rows_ready)
    for layer, other in zip(ours, theirs, strict=True):
        assert (layer.next_positions is None) == (other.next_positions is None)
        assert layer.next_positions is None or torch.equal(layer.next_positions, other.next_positions)
        fetchers = layer.row_fetcher, other.row_fetcher
        for fetcher in fetchers:
            fetcher.begin_step()
        for name in ("position", "stamp", "kv_rows"):
            assert torch.equal(*(getattr(fetcher.hot, name) for fetcher in fetchers)), name
        a, b = (fetcher._counters for fetcher in fetchers)
        assert a.bytes_fetched == b.bytes_fetched
        assert (a.read_s > 0) == (b.read_s > 0) == (a.bytes_fetched > 0)
        assert a.wait_s <= a.read_s and (a.waits > 0) == (a.bytes_fetched > 0)


@pytest.mark.parametrize("isa", native.instruction_sets())
def test_rows_in_slots_equal_rows_in_place(worker, isa):
    with dispatch.using(isa):
        copied, gathered = (layer_of(400, hot, worker, torch.bfloat16) for hot in (NativeHotSet, HotSet))
        for seed in range(4):
            results = [step([layer], StepKind.SINGLE, Policy.ON_DEMAND, 16, seed)[0] for layer in (copied, gathered)]
            assert torch.equal(*results)


def test_rows_of_a_step_that_is_undone_are_not_used(worker):
    """What it copied ahead may be a token that is never stored: with `residual` 0, its own."""
    layer = layer_of(63, NativeHotSet, worker, torch.float32, residual=0)
    step([layer], StepKind.PRE_DECODE, Policy.VERIFIED, 4, seed=0)
    out, _ = step([layer], StepKind.PAIR, Policy.VERIFIED, 10**6, seed=1)
    assert out.isfinite().all() and (layer.row_fetcher.hot.position == 63).any()
    layer.undo(63, None)
    assert not (layer.row_fetcher.hot.position == 63).any()
    fresh = layer_of(63, NativeHotSet, worker, torch.float32, residual=0)
    for seed in (2, 3):  # other tokens
        results = [step([one], StepKind.PAIR, Policy.VERIFIED, 10**6, seed)[0] for one in (layer, fresh)]
        assert torch.equal(*results)


def test_an_error_in_the_call_leaves_no_row_that_was_not_copied(worker, monkeypatch):
    layer, fresh = (layer_of(200, NativeHotSet, worker, torch.float32) for _ in range(2))
    step([layer], StepKind.SINGLE, Policy.ON_DEMAND, 8, seed=0)
    step([fresh], StepKind.SINGLE, Policy.ON_DEMAND, 8, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(HotSet, "grow", lambda self, capacity: None)
        patch.setattr(NativeHotSet, "grow", lambda self, capacity: None)
        with pytest.raises(ValueError, match="room"):
            step([layer], StepKind.SINGLE, Policy.ON_DEMAND, 40, seed=1)
    layer.undo(201, None)
    assert (layer.row_fetcher.hot.position < 0).sum() == 0
    results = [step([one], StepKind.SINGLE, Policy.ON_DEMAND, 40, seed=1)[0] for one in (layer, fresh)]
    assert torch.equal(*results)
