"""A prefill in any chunks leaves the low-bit copy and the residual of one in single tokens."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from specache.cache.compressed_layer import CompressedLayer
from specache.cache.sizes import page_layout
from specache.config import Code, SpeCacheConfig
from specache.kernels.types import AttentionParams
from specache.low_bit.pool import PagePool, PageTable
from specache.platform.budget import ByteBudget
from specache.rows.fetch import InPlaceRowFetcher
from specache.tiers.ram import RamTier

HEADS, DIM, TOKENS = 2, 16, 330
PARAMS = AttentionParams(scaling=DIM**-0.5)


def new_layer(config: SpeCacheConfig, keys: Tensor) -> CompressedLayer:
    tier = RamTier(in_place=True)
    table = PageTable(PagePool(page_layout(config, HEADS, DIM), keys.device, ByteBudget()))
    return CompressedLayer(0, config, table, tier, InPlaceRowFetcher(tier, 0), keys)


def state(layer: CompressedLayer) -> dict[str, Tensor]:
    """Return residual, key scales, and every field of the pages."""
    low_bit = layer.low_bit_kv
    fields = {name: torch.cat([run.fields[name] for run in low_bit.runs]) for name in low_bit.runs[0].fields}
    scales = layer.key_scales.value
    return {
        **fields,
        "keys": layer.residual_keys,
        "values": layer.residual_values,
        "scales": torch.zeros(0) if scales is None else scales,
    }


@pytest.mark.parametrize("code", list(Code))
@pytest.mark.parametrize(("residual", "group"), [(64, 64), (128, 64), (40, 8), (0, 16)])
@pytest.mark.parametrize("seed", range(3))
def test_any_chunks_leave_the_state_of_single_tokens(code, residual, group, seed):
    config = SpeCacheConfig(code=code, bits=2, residual=residual, group_size=group, top_k=8)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2 * HEADS, TOKENS, DIM, generator=generator)
    keys, values = (torch.randn(HEADS, TOKENS, DIM, generator=generator) for _ in range(2))
    chunks, left = [], TOKENS
    while left:
        chunks.append(min(left, random.Random(seed + left).choice([1, 7, group, 90, 200])))
        left -= chunks[-1]
    layers = []
    for sizes in (chunks, [TOKENS], [1] * TOKENS):
        layer = new_layer(config, keys)
        start, outs = 0, []
        for size in sizes:
            part = slice(start, start + size)
            outs.append(layer.prefill(query[:, part], keys[:, part], values[:, part], PARAMS))
            start += size
        layers.append((layer, torch.cat(outs, dim=1)))
    (first, out), *others = layers
    for layer, other in others:
        assert layer.length == first.length == TOKENS
        assert (out - other).abs().max() < 1e-5
        for name, expected in state(layer).items():
            assert torch.equal(state(first)[name], expected), name
    assert torch.equal(first.residual_keys, keys[:, first.table.length :])
    assert torch.equal(first.residual_values, values[:, first.table.length :])
