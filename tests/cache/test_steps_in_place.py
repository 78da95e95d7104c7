"""What C++ keeps of a layer from step to step follows every change of pages, residual and rows."""

from __future__ import annotations

import pytest
import torch

from specache.attention.at_once import decode_at_once
from specache.attention.decode import StepKind, StepSpec
from specache.cache.layers import CompressedLayer
from specache.cache.sizes import page_layout
from specache.config import Policy, SpeCacheConfig
from specache.errors import NonFiniteError
from specache.kernels import dispatch
from specache.kernels.types import AttentionParams
from specache.low_bit.pool import PagePool, PageTable
from specache.platform.budget import ByteBudget
from specache.rows.fetch import InPlaceRowFetcher
from specache.stats import Counters
from specache.tiers.ram import RamTier

pytestmark = pytest.mark.skipif(dispatch.available() == ["torch"], reason="PyTorch's kernels have no step in place")
HEADS, GROUPS, DIM = 2, 2, 32
CONFIG = SpeCacheConfig(residual=16, group_size=16, top_k=8, slow_tier="ram-inplace", policy="on-demand")
PARAMS = AttentionParams(DIM**-0.5)


def drawn(heads: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(heads, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def filled(tokens: int) -> CompressedLayer:
    """A layer of `tokens` tokens, whose rows lie in a buffer that is full."""
    keys = drawn(HEADS, tokens, 1)
    table = PageTable(PagePool(page_layout(CONFIG, HEADS, DIM), torch.device("cpu"), ByteBudget()))
    tier = RamTier(in_place=True)
    layer = CompressedLayer(0, CONFIG, table, tier, InPlaceRowFetcher(tier, 0), keys)
    layer.prefill(drawn(HEADS * GROUPS, tokens, 2), keys, drawn(HEADS, tokens, 3), PARAMS)
    return layer


def stepped(layer: CompressedLayer, seed: int, kind: StepKind = StepKind.PAIR) -> torch.Tensor:
    """Decode a token, and a draft token beside it, as a pass does."""
    spec = StepSpec(kind, Policy.VERIFIED, CONFIG.top_k, Counters())
    n = kind.queries
    query, keys, values = (drawn(heads, n, seed + i)[None] for i, heads in enumerate((HEADS * GROUPS, HEADS, HEADS)))
    out = decode_at_once(query, keys, values, [layer], PARAMS, spec)
    assert out is not None
    layer.quantise_oldest()
    return out


def check_next_step(layer: CompressedLayer) -> None:
    """The next step gives the same bits as one that looks every address up again."""
    fresh = layer.fork(layer.tier.fork(), layer.row_fetcher, CONFIG)
    fresh.row_fetcher = InPlaceRowFetcher(fresh.tier, 0)
    assert layer.kept is not None and fresh.kept is None
    assert torch.equal(stepped(layer, 50), stepped(fresh, 50))


def test_rows_that_move():
    layer = filled(100)
    old = layer.tier.rows(0)
    assert old.shape[1] == 100
    stepped(layer, 10)
    assert layer.tier.rows(0) is not old
    old.fill_(float("nan"))
    check_next_step(layer)


def test_pages_that_are_added_and_dropped():
    layer = filled(100)
    for step in range(70):
        stepped(layer, step)
    assert len(layer.table.pages) == 3
    check_next_step(layer)
    layer.truncate(20, layer.residual_at(20))
    stepped(layer, 40)
    for step in range(70):
        stepped(layer, step)
    check_next_step(layer)


def test_a_shared_page_that_is_copied():
    layer = filled(100)
    stepped(layer, 10)
    other = layer.fork(layer.tier.fork(), layer.row_fetcher, CONFIG)
    for step in range(20):
        stepped(layer, step)
    assert layer.table.pages[-1] != other.table.pages[-1]
    check_next_step(layer)


def test_another_tier_with_as_many_changes():
    layer = filled(100)
    stepped(layer, 10)
    old, tier = layer.tier, RamTier(in_place=True)
    tier.write(0, 0, *old.read(0, 0, 50))
    tier.write(0, 50, *old.read(0, 50, layer.length))
    tier.version = old.version
    old.rows(0).fill_(float("nan"))
    layer.use_tier(tier, InPlaceRowFetcher(tier, 0), CONFIG)
    assert torch.isfinite(stepped(layer, 20)).all()
    check_next_step(layer)


def test_a_residual_that_moves():
    layer = filled(100)
    stepped(layer, 10)
    old = layer.residual_buffer
    layer.move_residual(torch.empty_like(old))
    old.fill_(float("nan"))
    assert torch.isfinite(stepped(layer, 20)).all()
    check_next_step(layer)


def test_a_step_that_fails_counts_nothing():
    layer = filled(100)
    stepped(layer, 10)
    before, written = layer.length, layer.tier.rows(0)[:, :101].clone()
    query, keys, values = (drawn(heads, 1, 30)[None] for heads in (HEADS * GROUPS, HEADS, HEADS))
    values[0, 1, 0, 3] = float("nan")
    spec = StepSpec(StepKind.SINGLE, Policy.ON_DEMAND, CONFIG.top_k, Counters())
    with pytest.raises(NonFiniteError, match="values of layer 0"):
        decode_at_once(query, keys, values, [layer], PARAMS, spec)
    assert layer.length == before and torch.equal(layer.tier.rows(0)[:, :101], written)
    assert spec.counters.rows_selected == 0
    check_next_step(layer)


@pytest.mark.parametrize("kind", [StepKind.PRE_DECODE, StepKind.DRAFT])
def test_a_step_that_commits_nothing_leaves_the_layer_as_it_was(kind):
    layer = filled(100)
    stepped(layer, 10)
    rows, residual = layer.tier.rows(0)[:, :101].clone(), layer.residual_buffer.clone()
    stepped(layer, 20, kind)
    assert layer.length == 101
    assert torch.equal(layer.tier.rows(0)[:, :101], rows) and torch.equal(layer.residual_buffer, residual)


def test_the_key_scales_observe_the_queries_of_a_short_sequence():
    layer = filled(10)
    for step in range(21):
        assert layer.key_scales.observed_tokens == 10 + step
        stepped(layer, step)
    assert layer.key_scales.observed_tokens == 31 and layer.table.length == 0
    stepped(layer, 21)
    assert layer.key_scales.value is not None and layer.table.length == 16
    check_next_step(layer)


def test_a_layer_of_another_shape_is_refused():
    layer = filled(100)
    query, keys, values = (drawn(heads, 1, 30)[None] for heads in (HEADS * GROUPS, 1, 1))
    with pytest.raises(ValueError, match="stores"):
        dispatch.decode_in_place(query, keys, values, [layer], True, 8, PARAMS)
