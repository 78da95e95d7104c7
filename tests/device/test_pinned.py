"""Page-locked memory: few blocks, within a budget, used again, and named where the system refuses
it.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import specache
from specache.cache.cache_context import CacheContext
from specache.errors import SlowTierError
from specache.tiers.pinned import ALIGNMENT, PinnedPool, pageable
from specache.tiers.ram import RamTier
from specache.tiers.row_memory import RowMemory
from specache.tiers.streams import InlineStreams
from tests.tiers.tier_rows import random_rows
from tests.tiny import llama

BLOCK = 16 * ALIGNMENT


class Allocator:
    """Ordinary memory in place of locked; refuses beyond `limit` bytes, as a system would."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.sizes: list[int] = []

    def __call__(self, size: int) -> Tensor:
        if self.limit is not None and sum(self.sizes) + size > self.limit:
            raise RuntimeError("CUDA error: out of memory")
        self.sizes.append(size)
        return pageable(size)


def test_buffers_are_cut_from_one_block():
    allocate = Allocator()
    pool = PinnedPool(block_bytes=BLOCK, allocate=allocate)
    buffers = [pool.take((2, 7, 8), torch.bfloat16) for _ in range(5)]
    assert allocate.sizes == [BLOCK]
    assert all(buffer.shape == (2, 7, 8) and buffer.is_contiguous() for buffer in buffers)
    assert len({buffer.untyped_storage().data_ptr() for buffer in buffers}) == 1


def test_a_buffer_that_is_larger_than_a_block_has_a_larger_one():
    allocate = Allocator()
    pool = PinnedPool(block_bytes=BLOCK, allocate=allocate)
    pool.take((3 * BLOCK,), torch.uint8)
    pool.take((BLOCK,), torch.uint8)
    pool.take((1,), torch.uint8)
    assert allocate.sizes == [4 * BLOCK, BLOCK]


def test_blocks_grow_with_what_is_held_so_that_there_are_few():
    allocate = Allocator()
    pool = PinnedPool(block_bytes=BLOCK, allocate=allocate)
    for _ in range(200):
        pool.take((BLOCK,), torch.uint8)
    assert len(allocate.sizes) < 30
    assert pool.nbytes <= 1.25 * 200 * BLOCK
    assert all(size & (size - 1) == 0 for size in allocate.sizes)


def test_what_is_given_back_is_used_again():
    allocate = Allocator()
    pool = PinnedPool(block_bytes=BLOCK, allocate=allocate)
    for _ in range(10):
        buffers = [pool.take((BLOCK // 4,), torch.uint8) for _ in range(4)]
        for buffer in buffers[::2] + buffers[1::2]:
            pool.give_back(buffer)
    pool.take((BLOCK,), torch.uint8)  # the pieces are one again
    assert allocate.sizes == [BLOCK]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_buffers_never_overlap_and_nothing_is_lost(data):
    pool = PinnedPool(block_bytes=BLOCK, allocate=Allocator())
    taken: list[tuple[Tensor, int]] = []
    for tag in range(data.draw(st.integers(1, 30))):
        if taken and data.draw(st.booleans()):
            buffer, mark = taken.pop(data.draw(st.integers(0, len(taken) - 1)))
            assert bool((buffer == mark).all())  # nobody else wrote there
            pool.give_back(buffer)
        else:
            buffer = pool.take((data.draw(st.integers(1, 9 * ALIGNMENT)),), torch.uint8)
            assert buffer.storage_offset() % ALIGNMENT == 0
            taken.append((buffer.fill_(tag), tag))
    for buffer, mark in taken:
        assert bool((buffer == mark).all())
        pool.give_back(buffer)
    assert pool.used == 0
    held = pool.nbytes
    for block in list(pool._blocks):
        pool.take((block.memory.nbytes,), torch.uint8)
    assert pool.nbytes == held


def test_a_budget_that_is_too_small_says_what_to_do():
    pool = PinnedPool(limit=2 * BLOCK, block_bytes=BLOCK, allocate=Allocator())
    pool.take((BLOCK,), torch.uint8)
    with pytest.raises(SlowTierError, match=r"slow_tier='disk:FOLDER'") as refused:
        pool.take((BLOCK + 1,), torch.uint8)
    assert f"{2 * BLOCK:,} are allowed" in str(refused.value)
    pool.take((BLOCK,), torch.uint8)  # this still fits
    assert pool.nbytes == 2 * BLOCK


def test_the_last_block_is_no_larger_than_the_budget():
    allocate = Allocator()
    pool = PinnedPool(limit=BLOCK + BLOCK // 2, block_bytes=BLOCK, allocate=allocate)
    pool.take((BLOCK,), torch.uint8)
    pool.take((8,), torch.uint8)
    assert allocate.sizes == [BLOCK, BLOCK // 2]


def test_where_the_system_locks_no_more_it_says_so_once_and_goes_on():
    pool = PinnedPool(block_bytes=BLOCK, allocate=Allocator(limit=BLOCK))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool.take((BLOCK,), torch.uint8)
    assert pool.is_locked
    with pytest.warns(RuntimeWarning, match="wait for the host, which is slower") as said:
        buffers = [pool.take((BLOCK,), torch.uint8) for _ in range(3)]
    assert len(said) == 1
    assert not pool.is_locked
    assert [len(buffer) for buffer in buffers] == [BLOCK] * 3


def test_this_machine_has_page_locked_memory_or_the_fallback():
    """The real allocator: without a GPU it is refused, which must not end a run."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pool = PinnedPool(block_bytes=BLOCK)
        buffer = pool.take((4, 4), torch.float32)
    assert buffer.fill_(1.0).sum() == 16
    assert pool.is_locked == torch.cuda.is_available()
    assert len(said) == (not pool.is_locked)


def test_a_tier_takes_its_rows_from_the_pool_and_gives_them_back():
    pool = PinnedPool(block_bytes=BLOCK, allocate=Allocator())
    tier = RamTier(in_place=False, memory=RowMemory(pool, block_tokens=None))
    keys, values = random_rows(2, 100, 8, torch.float32)
    for start in range(0, 100, 10):  # the buffer grows
        tier.write(0, start, keys[:, start : start + 10], values[:, start : start + 10])
    fork = tier.fork()
    for one in (tier, fork):
        assert torch.equal(one.read(0, 0, 100)[0], keys)
    assert pool.used >= tier.nbytes + fork.nbytes
    tier.close()
    fork.close()
    assert pool.used == 0


def test_a_fork_without_room_leaves_nothing_behind():
    pool = PinnedPool(limit=BLOCK, block_bytes=BLOCK, allocate=Allocator())
    tier = RamTier(in_place=False, memory=RowMemory(pool, block_tokens=None))
    for layer in range(2):
        tier.write(layer, 0, *random_rows(2, 5 * ALIGNMENT // 64, 4, torch.float32))
    used = pool.used
    with pytest.raises(SlowTierError):
        tier.fork()
    assert pool.used == used


def test_a_tier_that_is_forgotten_while_a_buffer_is_taken_gives_back_and_waits_for_nobody():
    tiers: list[RamTier] = []

    def allocate(size: int) -> Tensor:
        tiers.clear()  # as the garbage collector may at any time: the tier's finalizer gives back
        return pageable(size)

    pool = PinnedPool(block_bytes=BLOCK, allocate=allocate)
    tier = RamTier(in_place=False, memory=RowMemory(pool, block_tokens=None))
    tier.write(0, 0, *random_rows(2, 100, 64, torch.float32))
    tiers.append(tier)
    del tier
    thread = threading.Thread(target=lambda: pool.take([BLOCK], torch.uint8), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and not tiers
    assert pool.used == BLOCK


def test_the_limit_is_the_configurations(monkeypatch):
    monkeypatch.setattr("specache.cache.cache_context.streams_for", lambda device: InlineStreams())
    with specache.SpeCache(llama(), specache.SpeCacheConfig(slow_tier="ram", pinned_memory=5000)) as cache:
        assert cache.context.main_memory is None
        info = replace(cache.info, device=torch.device("cuda"))
        tier = CacheContext(info, cache.config, cache.resources).new_tier()
        rows = torch.zeros(2, 64, 16)
        with pytest.raises(SlowTierError, match=r"5,000 are allowed. Allow more \(pinned_memory\)"):
            tier.write(0, 0, rows, rows)


@pytest.mark.parametrize("limit", [0, -1, 2.5, "1GB", True])
def test_a_limit_that_is_no_number_of_bytes_is_refused(limit):
    with pytest.raises(specache.ConfigError, match="pinned_memory must be a positive number of bytes"):
        specache.SpeCacheConfig(pinned_memory=limit)
