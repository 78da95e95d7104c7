"""Single layers whose rows are fetched through a hot set, decoded step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from specache.attention.at_once import decode_at_once
from specache.attention.decode import StepKind, StepSpec, mixed_attention
from specache.cache.compressed_layer import CompressedLayer
from specache.cache.sizes import page_layout
from specache.config import Policy, SpeCacheConfig, TopK
from specache.kernels.types import AttentionParams
from specache.low_bit.pool import PagePool, PageTable
from specache.platform.budget import ByteBudget
from specache.rows.fetch import HotSetRowFetcher
from specache.rows.hot_set import HotSet
from specache.rows.native_hot_set import NativeHotSet
from specache.stats import Counters
from specache.tiers.base import SlowTier
from specache.tiers.ram import RamTier
from specache.tiers.transfer import Transfer
from specache.tiers.worker import PrefetchWorker
from tests.tiers.tier_rows import random_rows

HEADS, GROUPS, DIM = 2, 3, 16
CPU = torch.device("cpu")
PARAMS = AttentionParams(scaling=DIM**-0.5)
KINDS = {Policy.VERIFIED: tuple(StepKind), Policy.ON_DEMAND: (StepKind.SINGLE,)}


def layer_of(
    tokens: int,
    hot: type[HotSet],
    worker: PrefetchWorker,
    dtype: torch.dtype,
    residual: int = 16,
    tier: SlowTier | None = None,
) -> CompressedLayer:
    """Return a layer of `tokens` random tokens whose rows are fetched through a hot set.

    Args:
        tier: empty; None is main memory.
    """
    config = SpeCacheConfig(group_size=16, residual=residual, top_k=4)
    tier = tier or RamTier(in_place=False)
    table = PageTable(PagePool(page_layout(config, HEADS, DIM), CPU, ByteBudget()))
    keys, values = random_rows(HEADS, tokens, DIM, dtype, seed=tokens)
    layer = CompressedLayer(0, config, table, tier, fetcher_of(tier, hot, worker, dtype), keys)
    tier.write(0, 0, keys, values)
    layer.rebuild(tokens)
    return layer


def fork_of(layer: CompressedLayer, worker: PrefetchWorker) -> CompressedLayer:
    """Return a fork of a layer, with an empty hot set."""
    tier = layer.tier.fork()
    return layer.fork(tier, fetcher_of(tier, type(layer.row_fetcher.hot), worker, layer.dtype), layer.config)


def fetcher_of(tier: SlowTier, hot: type[HotSet], worker: PrefetchWorker, dtype: torch.dtype) -> HotSetRowFetcher:
    return HotSetRowFetcher(tier, 0, hot(HEADS, 0, 2 * DIM, dtype, CPU), worker, Transfer(CPU), Counters())


def step(layers: list[CompressedLayer], kind: StepKind, policy: Policy, top_k: TopK, seed: int) -> tuple[Tensor, Counters]:
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


def check_same_state(layer: CompressedLayer, other: CompressedLayer) -> None:
    """Check that two layers have fetched the same rows, and count them alike."""
    assert (layer.next_positions is None) == (other.next_positions is None)
    assert layer.next_positions is None or torch.equal(layer.next_positions, other.next_positions)
    fetchers = layer.row_fetcher, other.row_fetcher
    for fetcher in fetchers:
        fetcher.begin_step()
        fetcher.count_fetched(0, 0.0)
    for name in ("position", "kv_rows"):
        assert torch.equal(*(getattr(fetcher.hot, name) for fetcher in fetchers)), name
    assert torch.equal(*(torch.where(hot.stamp < 0, -1, hot.step - hot.stamp) for hot in (fetcher.hot for fetcher in fetchers)))
    a, b = (fetcher._counters for fetcher in fetchers)
    assert a.bytes_fetched == b.bytes_fetched
    assert a.wait_s <= a.read_s
    assert (a.read_s > 0) <= (a.bytes_fetched > 0) and (a.waits > 0) <= (a.bytes_fetched > 0)
