"""What C++ keeps of a layer from step to step follows every change of pages, residual and rows."""

from __future__ import annotations

import pytest
import torch

from specache.attention.at_once import decode_at_once
from specache.attention.decode import StepKind, StepSpec
from specache.cache.compressed_layer import CompressedLayer
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
from specache.tiers.row_memory import RowMemory

pytestmark = pytest.mark.skipif(dispatch.available() == ["torch"], reason="PyTorch's kernels have no step in place")
HEADS, GROUPS, DIM = 2, 2, 32
CONFIG = SpeCacheConfig(residual=16, group_size=16, top_k=8, slow_tier="ram-inplace", policy="on-demand")
PARAMS = AttentionParams(DIM**-0.5)


def drawn(heads: int, tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(heads, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def filled(tokens: int, block: int | None = 32) -> CompressedLayer:
    """A layer of `tokens` tokens, whose rows lie in blocks of so many, or in one that is full."""
    keys = drawn(HEADS, tokens, 1)
    table = PageTable(PagePool(page_layout(CONFIG, HEADS, DIM), torch.device("cpu"), ByteBudget()))
    tier = RamTier(True, RowMemory(block_tokens=block))
    layer = CompressedLayer(0, CONFIG, table, tier, InPlaceRowFetcher(tier, 0), keys)
    layer.prefill(drawn(HEADS * GROUPS, tokens, 2), keys, drawn(HEADS, tokens, 3), PARAMS)
    return layer


def stepped(layer: CompressedLayer, seed: int, kind: StepKind = StepKind.PAIR) -> torch.Tensor:
    """Decode a token, and a draft token beside it, as a pass does."""
    spec = StepSpec(kind, Policy.VERIFIED, CONFIG.selection, Counters())
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


def rows_of(layer: CompressedLayer) -> torch.Tensor:
    """The rows [Hkv, S, 2 D] of all tokens."""
    return layer.tier.rows(0).read(0, layer.length).clone()


def test_rows_that_move():
    layer = filled(100, block=None)
    [old] = layer.tier.rows(0).blocks
    assert old.rows.shape[1] == 100
    stepped(layer, 10)
    assert layer.tier.rows(0).blocks[0] is not old
    old.rows.fill_(float("nan"))
    check_next_step(layer)


def test_rows_in_blocks_give_the_bits_of_rows_in_one():
    layers = [filled(100, block) for block in (None, 32, 256)]
    for seed in range(70):  # the last block is filled, and others are added
        one, *others = (stepped(layer, seed) for layer in layers)
        assert all(torch.equal(one, other) for other in others)
    assert [len(layer.tier.rows(0).blocks) for layer in layers] == [1, 6, 1]


def test_a_fork_and_its_origin_write_to_blocks_of_their_own():
    layer = filled(100)
    stepped(layer, 10)
    before = rows_of(layer)
    fork = layer.fork(layer.tier.fork(), layer.row_fetcher, CONFIG)
    fork.row_fetcher = InPlaceRowFetcher(fork.tier, 0)
    stepped(layer, 11)
    stepped(fork, 12)
    assert torch.equal(rows_of(layer)[:, :101], before) and torch.equal(rows_of(fork)[:, :101], before)
    assert not torch.equal(rows_of(layer)[:, 101:], rows_of(fork)[:, 101:])
    shared = [a is b for a, b in zip(layer.tier.rows(0).blocks, fork.tier.rows(0).blocks, strict=True)]
    assert shared == [True, True, True, False]
    for one in (layer, fork):
        check_next_step(one)


def test_a_fork_that_was_cut_into_a_shared_block_leaves_the_other_as_it_was():
    layer = filled(100)
    stepped(layer, 10)
    before = rows_of(layer)
    fork = layer.fork(layer.tier.fork(), layer.row_fetcher, CONFIG)
    fork.row_fetcher = InPlaceRowFetcher(fork.tier, 0)
    fork.truncate(40, fork.residual_at(40))
    for seed in range(30):
        stepped(fork, seed)
    assert torch.equal(rows_of(layer), before)
    for one in (layer, fork):
        check_next_step(one)


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
    tier.write(0, 0, *old.read(0, 0, layer.length))
    tier.rows(0).version = old.rows(0).version
    for part in old.rows(0).parts(0, layer.length):
        part.fill_(float("nan"))
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
    before, written = layer.length, rows_of(layer)
    query, keys, values = (drawn(heads, 1, 30)[None] for heads in (HEADS * GROUPS, HEADS, HEADS))
    values[0, 1, 0, 3] = float("nan")
    spec = StepSpec(StepKind.SINGLE, Policy.ON_DEMAND, CONFIG.selection, Counters())
    with pytest.raises(NonFiniteError, match="values of layer 0"):
        decode_at_once(query, keys, values, [layer], PARAMS, spec)
    assert layer.length == before and torch.equal(rows_of(layer), written)
    assert spec.counters.rows_selected == 0
    check_next_step(layer)


@pytest.mark.parametrize("kind", [StepKind.PRE_DECODE, StepKind.DRAFT])
def test_a_step_that_commits_nothing_leaves_the_layer_as_it_was(kind):
    layer = filled(100)
    stepped(layer, 10)
    rows, residual = rows_of(layer), layer.residual_buffer.clone()
    stepped(layer, 20, kind)
    assert layer.length == 101
    assert torch.equal(rows_of(layer), rows) and torch.equal(layer.residual_buffer, residual)


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
        dispatch.decode_in_place(query, keys, values, [layer], True, CONFIG.selection, PARAMS)
