"""Offloading a prompt's rows to main memory: only readers wait for it, and none reads too early."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from specache.tiers.main_memory import MainMemory
from specache.tiers.offload import StreamedOffload
from specache.tiers.pinned import PinnedPool, pageable
from specache.tiers.ram import RamTier
from specache.tiers.row_memory import RowMemory
from specache.tiers.streams import InlineStreams, Queue
from tests.device.simulated import Order, SimulatedStreams, orders
from tests.device.test_planted_mistakes import DroppedWait
from tests.tiers.tier_rows import random_rows

HEADS, DIM, LAYERS, CHUNK, CHUNKS = 2, 4, 3, 5, 3
ORDERS = pytest.mark.parametrize(("order", "seed"), orders(seeds=10))


def unset(size: int) -> Tensor:
    """Memory that shows where nothing was written: NaN in bfloat16."""
    return torch.full((size,), 0xFF, dtype=torch.uint8)


def tier_on(streams: SimulatedStreams, reserve: int = CHUNKS * CHUNK) -> RamTier:
    tier = MainMemory(streams, PinnedPool(block_bytes=4096, allocate=unset)).new_tier()
    tier.reserve(reserve)
    return tier


def prompt(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer [Hkv, n, D]."""
    return [random_rows(HEADS, CHUNKS * CHUNK, DIM, torch.bfloat16, seed + layer) for layer in range(LAYERS)]


def prefill(tier: RamTier, streams: SimulatedStreams, rows: list[tuple[Tensor, Tensor]], seen: Callable[[int, int], None]) -> None:
    """Chunk by chunk and layer by layer, over keys and values that the model computes into the same
    memory again and again.
    """
    keys, values = (torch.zeros(HEADS, CHUNK, DIM, dtype=torch.bfloat16) for _ in range(2))

    def compute(new_keys: Tensor, new_values: Tensor) -> None:
        keys.copy_(new_keys)
        values.copy_(new_values)

    for start in range(0, CHUNKS * CHUNK, CHUNK):
        for layer, (layer_keys, layer_values) in enumerate(rows):
            seen(layer, start)
            new = layer_keys[:, start : start + CHUNK], layer_values[:, start : start + CHUNK]
            streams.run(Queue.COMPUTE, lambda new=new: compute(*new))
            tier.write(layer, start, keys, values)


def nothing(layer: int, start: int) -> None:
    pass


def is_stored(tier: RamTier, rows: list[tuple[Tensor, Tensor]], length: int = CHUNKS * CHUNK) -> bool:
    read = [tier.read(layer, 0, length) for layer in range(LAYERS)]
    return all(torch.equal(k, keys) and torch.equal(v, values) for (k, v), (keys, values) in zip(read, rows, strict=True))


@ORDERS
@pytest.mark.parametrize("reserve", [CHUNKS * CHUNK, 1], ids=["room", "growing"])
def test_rows_that_are_read_are_those_that_were_written(order, seed, reserve, monkeypatch):
    monkeypatch.setattr("specache.tiers.ram.MIN_CAPACITY", 1)
    streams, rows = SimulatedStreams(order, seed), prompt()
    tier = tier_on(streams, reserve)

    def read_back(layer: int, start: int) -> None:
        """A later chunk attends to the layer's earlier rows."""
        if start:
            keys, values = tier.read(layer, 0, start)
            assert torch.equal(keys, rows[layer][0][:, :start])
            assert torch.equal(values, rows[layer][1][:, :start])

    prefill(tier, streams, rows, read_back)
    heads, positions = torch.tensor([0, 1, 1]), torch.tensor([3, 0, 14])
    expected = torch.cat([rows[1][0][heads, positions], rows[1][1][heads, positions]], -1)
    assert torch.equal(tier.gather(1, heads, positions), expected)
    assert is_stored(tier, rows)


def test_writing_waits_for_nothing():
    streams = SimulatedStreams(Order.COPY_LATE)
    tier = tier_on(streams)
    prefill(tier, streams, prompt(), nothing)
    assert all(tier.buffer(layer).isnan().all() for layer in range(LAYERS))


def test_reading_a_layer_waits_for_that_layer_alone():
    streams, rows = SimulatedStreams(Order.COPY_LATE), prompt()
    tier = tier_on(streams)
    prefill(tier, streams, rows, nothing)
    tier.read(0, 0, CHUNK)
    assert not tier.buffer(0)[:, : CHUNKS * CHUNK].isnan().any()
    assert tier.buffer(LAYERS - 1)[:, -CHUNK:].isnan().all()


def seen_by_device(streams: SimulatedStreams, settles: bool) -> tuple[Tensor, Tensor]:
    """What a kernel reads where it lies after a prefill, and what it should."""
    rows = prompt()
    tier = tier_on(streams)
    prefill(tier, streams, rows, nothing)
    if settles:
        tier.wait_for_offload()
    found = torch.empty(LAYERS, HEADS, CHUNKS * CHUNK, 2 * DIM, dtype=torch.bfloat16)
    for layer in range(LAYERS):
        streams.run(Queue.COMPUTE, lambda layer=layer: found[layer].copy_(tier.buffer(layer)[:, : CHUNKS * CHUNK]))
    streams.finish(Queue.COMPUTE)
    return found, torch.stack([torch.cat(pair, -1) for pair in rows])


@ORDERS
def test_kernels_see_what_has_settled(order, seed):
    assert torch.equal(*seen_by_device(SimulatedStreams(order, seed), settles=True))


def test_a_read_that_does_not_settle_is_found():
    assert any(not torch.equal(*seen_by_device(SimulatedStreams(*order), settles=False)) for order in orders(seeds=10))


def test_a_copy_that_does_not_wait_for_the_keys_is_found():
    def is_right(streams: SimulatedStreams) -> bool:
        rows = prompt()
        tier = tier_on(streams)
        offload = tier._offload
        offload._streams = DroppedWait(streams, offload._computed)
        prefill(tier, streams, rows, nothing)
        return is_stored(tier, rows)

    assert any(not is_right(SimulatedStreams(*order)) for order in orders(seeds=10))


@ORDERS
def test_a_fork_has_the_rows_and_its_own_memory(order, seed):
    streams, rows = SimulatedStreams(order, seed), prompt()
    tier = tier_on(streams)
    prefill(tier, streams, rows, nothing)
    fork = tier.fork()
    other = prompt(seed=7)
    prefill(tier, streams, other, nothing)
    assert is_stored(fork, rows)
    assert is_stored(tier, other)


@ORDERS
def test_memory_is_given_back_when_nobody_uses_it(order, seed):
    """The next sequence has the closed one's memory, and none of its rows arrives there."""
    streams, rows, other = SimulatedStreams(order, seed), prompt(), prompt(seed=7)
    tier = tier_on(streams)
    prefill(tier, streams, rows, nothing)
    before = [tier.buffer(layer).data_ptr() for layer in range(LAYERS)]
    tier.close()
    prefill(tier, streams, other, nothing)
    assert sorted(tier.buffer(layer).data_ptr() for layer in range(LAYERS)) == sorted(before)
    assert is_stored(tier, other)


def test_memory_that_is_given_back_too_soon_is_found():
    """The same, but closing does not wait."""

    class Impatient(StreamedOffload):
        def finish(self) -> None:
            pass

    def is_right(streams: SimulatedStreams) -> bool:
        memory = RowMemory(PinnedPool(block_bytes=4096, allocate=unset), block_tokens=None)
        first = RamTier(in_place=False, memory=memory, offload=Impatient(streams))
        second = RamTier(in_place=False, memory=memory)
        rows, other = prompt(), prompt(seed=7)
        prefill(first, streams, rows, nothing)
        first.close()
        for layer, pair in enumerate(other):
            second.write(layer, 0, *pair)
        streams.drain()
        return is_stored(second, other)

    assert any(not is_right(SimulatedStreams(*order)) for order in orders(seeds=5))


def test_what_the_copy_queue_reads_is_not_the_callers():
    """Keys and values are joined where they were computed; the copy's source is known to both
    queues.
    """
    streams = SimulatedStreams(Order.COPY_LATE)
    tier = tier_on(streams)
    prefill(tier, streams, prompt(), nothing)
    assert len(streams.shared) == LAYERS * CHUNKS
    assert all(joined.shape == (HEADS, CHUNK, 2 * DIM) and joined.is_contiguous() for joined in streams.shared)


@ORDERS
def test_two_sequences_of_a_cache_do_not_disturb_each_other(order, seed):
    streams, rows, other = SimulatedStreams(order, seed), prompt(), prompt(seed=7)
    memory = MainMemory(streams, PinnedPool(block_bytes=4096, allocate=unset))
    first, second = memory.new_tier(), memory.new_tier()
    prefill(first, streams, rows, nothing)
    prefill(second, streams, other, nothing)
    assert is_stored(first, rows)
    first.close()
    assert is_stored(second, other)


def test_without_a_device_it_is_a_plain_copy():
    rows = prompt()
    plain, offloaded = (
        RamTier(in_place=False),
        RamTier(False, RowMemory(PinnedPool(allocate=pageable), block_tokens=None), StreamedOffload(InlineStreams())),
    )
    for layer, pair in enumerate(rows):
        plain.write(layer, 0, *pair)
        offloaded.write(layer, 0, *pair)
        for a, b in zip(plain.read(layer, 2, 9), offloaded.read(layer, 2, 9), strict=True):
            assert torch.equal(a, b)
