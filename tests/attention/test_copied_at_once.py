"""A step that copies its rows in one call equals the one that does it in several, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specache.attention.decode import StepKind
from specache.config import Policy, TopK
from specache.kernels import dispatch
from specache.kernels.cpu import native
from specache.rows.hot_set import HotSet
from specache.rows.native_hot_set import NativeHotSet
from specache.tiers.ram import RamTier
from specache.tiers.row_memory import RowMemory
from specache.tiers.worker import PrefetchWorker
from tests.attention.fetched_layers import KINDS, check_same_state, fork_of, layer_of, step

pytestmark = pytest.mark.skipif(native.IMPORT_ERROR is not None, reason="the C++ extension is not built")


@pytest.fixture(scope="module")
def worker() -> Iterator[PrefetchWorker]:
    made = PrefetchWorker()
    yield made
    made.close()


@settings(deadline=None, max_examples=40)
@given(data=st.data(), policy=st.sampled_from(list(KINDS)), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_one_call_equals_several(worker, data, policy, dtype):
    lengths = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=2))
    ours, theirs = ([layer_of(length, hot, worker, dtype) for length in lengths] for hot in (NativeHotSet, HotSet))
    pairs, slots = data.draw(st.sampled_from([(3, 0), (4, 5), (16, 0), (20, 20), (20, 64)]))
    top_k = data.draw(st.sampled_from([TopK.always(pairs), TopK(pairs // 2, pairs, 100)]))
    for layer in ours + theirs:
        layer.row_fetcher.resize(slots)  # where it grows between two steps, hits may differ
    for seed in range(data.draw(st.integers(1, 8))):
        kind = data.draw(st.sampled_from(KINDS[policy]))
        (out, counted), (expected, wanted) = (step(layers, kind, policy, top_k, seed) for layers in (ours, theirs))
        assert torch.equal(out, expected)
        assert (counted.rows_selected, counted.rows_ready) == (wanted.rows_selected, wanted.rows_ready)
    for layer, other in zip(ours, theirs, strict=True):
        check_same_state(layer, other)
        a, b = (one.row_fetcher._counters for one in (layer, other))
        assert (a.read_s > 0) == (a.waits > 0) == (b.read_s > 0) == (a.bytes_fetched > 0)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_forks_answer_as_if_they_shared_no_rows(worker, data):
    """Also cut forks, and those that were forked from a fork. Blocks are small here, so that steps
    fill them; others write to memory of their own.
    """
    shared = [layer_of(data.draw(st.integers(20, 100)), NativeHotSet, worker, torch.float32, tier=small_blocks(32))]
    apart = [layer_of(shared[0].length, HotSet, worker, torch.float32, tier=small_blocks(None))]
    for seed in range(data.draw(st.integers(1, 40))):
        which = data.draw(st.integers(0, len(shared) - 1))
        pair = shared[which], apart[which]
        action = data.draw(st.sampled_from(["step", "step", "step", "fork", "cut"]))
        if action == "fork" and len(shared) < 4:
            for layers, layer in zip((shared, apart), pair, strict=True):
                layers.append(fork_of(layer, worker))
        elif action == "cut":
            length = data.draw(st.integers(1, pair[0].length))
            if pair[0].can_truncate(length):
                for layer in pair:
                    layer.truncate(length, layer.residual_at(length))
        else:
            outs = [step([layer], StepKind.SINGLE, Policy.ON_DEMAND, TopK.always(20), seed)[0] for layer in pair]
            assert torch.equal(*outs)
    for layer, other in zip(shared, apart, strict=True):
        assert layer.length == other.length
        assert all(torch.equal(*rows) for rows in zip(*(one.tier.read(0, 0, one.length) for one in (layer, other)), strict=True))


def small_blocks(tokens: int | None) -> RamTier:
    """An empty tier with its rows in blocks of so many tokens, or in one that forks copy."""
    return RamTier(False, RowMemory(block_tokens=tokens))


@pytest.mark.parametrize("isa", native.instruction_sets())
def test_rows_in_slots_equal_rows_in_place(worker, isa):
    with dispatch.using(isa):
        copied, gathered = (layer_of(400, hot, worker, torch.bfloat16) for hot in (NativeHotSet, HotSet))
        for seed in range(4):
            results = [step([layer], StepKind.SINGLE, Policy.ON_DEMAND, TopK.always(16), seed)[0] for layer in (copied, gathered)]
            assert torch.equal(*results)


def test_rows_of_a_step_that_is_undone_are_not_used(worker):
    """What it copied ahead may be a token that is never stored: with `residual` 0, its own."""
    layer = layer_of(63, NativeHotSet, worker, torch.float32, residual=0)
    step([layer], StepKind.PRE_DECODE, Policy.VERIFIED, TopK.always(4), seed=0)
    out, _ = step([layer], StepKind.PAIR, Policy.VERIFIED, TopK.always(10**6), seed=1)
    assert out.isfinite().all() and (layer.row_fetcher.hot.position == 63).any()
    layer.undo(63, None)
    assert not (layer.row_fetcher.hot.position == 63).any()
    fresh = layer_of(63, NativeHotSet, worker, torch.float32, residual=0)
    for seed in (2, 3):  # other tokens
        results = [step([one], StepKind.PAIR, Policy.VERIFIED, TopK.always(10**6), seed)[0] for one in (layer, fresh)]
        assert torch.equal(*results)


def test_an_error_in_the_call_leaves_no_row_that_was_not_copied(worker, monkeypatch):
    layer, fresh = (layer_of(200, NativeHotSet, worker, torch.float32) for _ in range(2))
    step([layer], StepKind.SINGLE, Policy.ON_DEMAND, TopK.always(8), seed=0)
    step([fresh], StepKind.SINGLE, Policy.ON_DEMAND, TopK.always(8), seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(HotSet, "grow", lambda self, capacity: None)
        patch.setattr(NativeHotSet, "grow", lambda self, capacity: None)
        with pytest.raises(ValueError, match="room"):
            step([layer], StepKind.SINGLE, Policy.ON_DEMAND, TopK.always(40), seed=1)
    layer.undo(201, None)
    assert (layer.row_fetcher.hot.position < 0).sum() == 0
    results = [step([one], StepKind.SINGLE, Policy.ON_DEMAND, TopK.always(40), seed=1)[0] for one in (layer, fresh)]
    assert torch.equal(*results)
