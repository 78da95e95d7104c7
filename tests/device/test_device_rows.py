"""What a step gets from `DeviceRowFetcher`, and that neither the host nor a capture stands in its
way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specache.config import ReadPath
from specache.device.device_hot_set import DeviceHotSet
from specache.device.device_rows import DeviceRowFetcher, RowCounters, StepBuffers
from specache.device.sources import StoredRows, row_source
from specache.errors import SlowTierError
from specache.rows.hot_set import HotSet
from specache.tiers.streams import InlineStreams, Queue, Streams, Work
from tests.device.decoding_by_hand import Decode, Program
from tests.device.simulated import CapturedStreams, Order, SimulatedStreams

BATCH, HEADS, TOKENS, WIDTH, TOP_K, SLOTS = 2, 2, 20, 4, 4, 6
CPU = torch.device("cpu")
READS = pytest.mark.parametrize("read", list(ReadPath))


def fetcher_over(stored: Tensor, read: ReadPath = ReadPath.MAPPED, streams: Streams | None = None) -> DeviceRowFetcher:
    """A layer with rows [B, Hkv, T, 2 D]."""
    hot = DeviceHotSet(BATCH, HEADS, SLOTS, TOKENS, WIDTH, torch.float32, CPU)
    buffers = StepBuffers(BATCH, HEADS, TOP_K, WIDTH, torch.float32, CPU)
    return DeviceRowFetcher(StoredRows(list(stored)), hot, buffers, streams or InlineStreams(), RowCounters(CPU, 4 * WIDTH), read)


@pytest.fixture
def stored() -> Tensor:
    return torch.randn(BATCH, HEADS, TOKENS, WIDTH)


def wanted(*positions: int) -> Tensor:
    """The same positions of every head."""
    return torch.tensor([*positions, *[-1] * (TOP_K - len(positions))]).expand(BATCH, HEADS, -1).contiguous()


def rows_at(stored: Tensor, positions: Tensor) -> Tensor:
    rows = stored.gather(2, positions.clamp(min=0).unsqueeze(-1).expand(-1, -1, -1, WIDTH))
    return rows.masked_fill((positions < 0).unsqueeze(-1), 0.0)


@READS
def test_the_real_query_gets_all_its_rows(read, stored):
    fetcher = fetcher_over(stored, read)
    for positions in (wanted(0, 3, 19), wanted(3, 4), wanted(), wanted(4, 5, 6, 7)):
        fetcher.begin_step()
        assert torch.equal(fetcher.fetch(positions), rows_at(stored, positions))


@READS
def test_the_draft_query_gets_only_cached_rows(read, stored):
    fetcher = fetcher_over(stored, read)
    fetcher.begin_step()
    fetcher.fetch(wanted(2, 5))
    found, positions = fetcher.available(wanted(1, 2, 5, 8))
    expected = torch.tensor([-1, 2, 5, -1]).expand(BATCH, HEADS, -1)
    assert torch.equal(positions, expected)
    assert torch.equal(found, rows_at(stored, expected))


@READS
def test_prefetched_rows_are_available_in_the_next_step(read, stored):
    fetcher = fetcher_over(stored, read)
    fetcher.begin_step()
    fetcher.submit(wanted(1, 2, 3))
    fetcher.begin_step()
    _, positions = fetcher.available(wanted(0, 1, 2, 3))
    assert torch.equal(positions, torch.tensor([-1, 1, 2, 3]).expand(BATCH, HEADS, -1))


def test_cancelling_drops_prefetched_rows_and_keeps_fetched_ones(stored):
    fetcher = fetcher_over(stored)
    fetcher.begin_step()
    fetcher.fetch(wanted(0, 1))
    fetcher.submit(wanted(1, 2, 3))
    fetcher.cancel()
    fetcher.begin_step()
    _, positions = fetcher.available(wanted(0, 1, 2, 3))
    assert torch.equal(positions, torch.tensor([0, 1, -1, -1]).expand(BATCH, HEADS, -1))


def test_cancelling_leaves_a_slot_alone_that_has_another_owner_by_now(stored):
    fetcher = fetcher_over(stored)
    fetcher.begin_step()
    fetcher.submit(wanted(0, 1, 2, 3))
    for positions in (wanted(4, 5, 6, 7), wanted(8, 9, 10, 11)):  # 6 slots: the submitted ones are out
        fetcher.begin_step()
        fetcher.fetch(positions)
    fetcher.cancel()
    _, positions = fetcher.available(wanted(8, 9, 10, 11))
    assert torch.equal(positions, wanted(8, 9, 10, 11))


def test_dropped_rows_are_not_found(stored):
    fetcher = fetcher_over(stored)
    fetcher.begin_step()
    fetcher.fetch(wanted(0, 1))
    fetcher.submit(wanted(2))
    fetcher.drop()
    fetcher.begin_step()
    assert torch.equal(fetcher.available(wanted(0, 1, 2))[1], wanted())


@READS
def test_rows_that_changed_are_read_anew_after_a_cut(read, stored):
    fetcher = fetcher_over(stored, read)
    fetcher.begin_step()
    fetcher.fetch(wanted(0, 1))
    fetcher.drop()
    stored += 1.0
    fetcher.begin_step()
    assert torch.equal(fetcher.fetch(wanted(0, 1)), rows_at(stored, wanted(0, 1)))


def test_rows_are_read_from_replaced_buffers(stored):
    fetcher = fetcher_over(stored)
    fetcher.begin_step()
    fetcher.fetch(wanted(0))
    moved = torch.randn_like(stored)
    fetcher.source.replace(list(moved))
    fetcher.drop()
    assert torch.equal(fetcher.fetch(wanted(0)), rows_at(moved, wanted(0)))


def test_hits_of_the_real_query_and_bytes_of_all_reads_are_counted(stored):
    """The same selections over a CPU's hot set with as many slots."""
    fetcher = fetcher_over(stored)
    hosts = [HotSet(HEADS, SLOTS, WIDTH, torch.float32, CPU) for _ in range(BATCH)]
    generator = torch.Generator().manual_seed(0)
    selected = missed = ahead = 0
    for _ in range(8):
        real, draft, following = (select(generator) for _ in range(3))
        fetcher.begin_step()
        fetcher.fetch(real)
        fetcher.available(draft)
        fetcher.submit(following)
        for b, host in enumerate(hosts):
            host.step += 1
            selected += int((real[b] >= 0).sum())
            missed += add_missing(host, real[b])
            host.find(draft[b])
            host.step += 1
            ahead += add_missing(host, following[b])
    assert 0 < missed < selected
    assert fetcher._counters.read(InlineStreams()) == (selected, selected - missed, (missed + ahead) * 4 * WIDTH)


def add_missing(hot: HotSet, positions: Tensor) -> int:
    """Insert those that are not there -> how many they were."""
    missing = positions.where(hot.find(positions) < 0, -1)
    count = int((missing >= 0).sum())
    hot.insert(missing, torch.zeros(count, WIDTH))
    return count


def select(generator: torch.Generator) -> Tensor:
    """Ascending positions, few enough to come again."""
    positions = torch.rand(BATCH, HEADS, TOKENS // 2, generator=generator).argsort(-1)[..., :TOP_K].sort(-1).values
    holes = torch.rand(BATCH, HEADS, 1, generator=generator) < 0.3
    return torch.cat([positions[..., 1:], positions[..., :1].masked_fill(holes, -1)], -1)


def test_kernels_get_rows_and_positions_of_all_queries_in_one_view(stored):
    fetcher = fetcher_over(stored)
    fetcher.begin_step()
    fetcher.fetch(wanted(1, 2))
    fetcher.available(wanted(2, 3))
    by_pass, positions = fetcher._buffers.kv_rows_by_query, fetcher._buffers.positions_by_query
    assert by_pass.shape == (BATCH, HEADS, 2, TOP_K, WIDTH)
    assert positions[0, 0].tolist() == [[1, 2, -1, -1], [2, -1, -1, -1]]
    assert torch.equal(by_pass[:, :, 1, 0], stored[:, :, 2])


class Operations(TorchDispatchMode):
    """Looks at every operation inside the block."""

    def __init__(self, look: Callable[[Any, list[Tensor]], None]) -> None:
        super().__init__()
        self._look = look

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._look(func, [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)])
        return result


@READS
def test_no_shape_depends_on_what_was_computed(read):
    """What would have the host wait for a GPU: reading a number, and indexing by truth values."""
    waiting = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique"}

    def check(operation: Any, tensors: list[Tensor]) -> None:
        name = operation.overloadpacket.__name__
        assert name not in waiting
        assert not (name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:])), name

    decode = Decode(InlineStreams(), Program(read))
    with Operations(check):
        for layer in decode.layers:
            layer.begin_step()
            layer.fetch(wanted(1, 2))
            layer.available(wanted(2, 3))
            layer.submit(wanted(3, 4))
            layer.cancel()
            layer.drop()


@READS
def test_memory_that_both_queues_use_is_known_to_both(read):
    """Otherwise PyTorch may reuse it while the copy queue still uses it."""
    used: dict[Queue, dict[int, Tensor]] = {queue: {} for queue in Queue}

    def watch(queue: Queue, work: Work) -> None:
        with Operations(lambda _, tensors: used[queue].update({x.untyped_storage().data_ptr(): x for x in tensors})):
            work()

    streams = SimulatedStreams(Order.COPY_LATE, watch=watch)
    stored = Decode(streams, Program(read)).run().stored  # the host's
    both = used[Queue.COPY].keys() & used[Queue.COMPUTE].keys()
    assert both
    assert both <= {x.untyped_storage().data_ptr() for x in [*streams.shared, stored]}


@READS
@pytest.mark.parametrize("begin_together", [False, True])
def test_a_step_that_ends_joined_can_be_captured(read, begin_together):
    streams = CapturedStreams()
    decode = Decode(streams, Program(read, begin_together, host_waits=False, joined=True))
    for _ in range(3):
        decode._step()
        streams.end()
    assert not decode.wrong


@READS
def test_a_step_that_leaves_a_copy_behind_cannot_be_captured(read):
    streams = CapturedStreams()
    decode = Decode(streams, Program(read, host_waits=False))
    decode._step()
    with pytest.raises(AssertionError, match="not joined"):
        streams.end()


def after_a_capture_that_failed() -> Decode:
    """A decode whose capture ended before its copies were joined."""
    streams = CapturedStreams()
    decode = Decode(streams, Program(host_waits=False))
    decode._step()
    streams.fail()
    return decode


def test_a_copy_of_an_earlier_capture_cannot_be_waited_for():
    with pytest.raises(AssertionError, match="not recorded in this capture"):
        after_a_capture_that_failed()._step()


def test_after_a_capture_that_failed_nothing_is_waited_for():
    decode = after_a_capture_that_failed()
    for layer in decode.layers:
        layer.abandon()
    decode._step()
    assert not decode.wrong


def test_rows_in_pageable_memory_are_refused_on_a_gpu(stored):
    with pytest.raises(SlowTierError, match="pageable memory"):
        row_source(list(stored), torch.device("cuda"))


def test_buffers_of_a_batch_that_differ_are_refused(stored):
    with pytest.raises(ValueError, match="same strides"):
        row_source([stored[0], torch.randn(HEADS, TOKENS + 1, WIDTH)], CPU)
    with pytest.raises(ValueError, match="replace"):
        StoredRows(list(stored)).replace([stored[0]])


def test_a_hot_set_without_room_for_a_step_is_refused(stored):
    hot = DeviceHotSet(BATCH, HEADS, TOP_K - 1, TOKENS, WIDTH, torch.float32, CPU)
    buffers = StepBuffers(BATCH, HEADS, TOP_K, WIDTH, torch.float32, CPU)
    with pytest.raises(ValueError, match="3 slots"):
        DeviceRowFetcher(StoredRows(list(stored)), hot, buffers, InlineStreams(), RowCounters(CPU, 1))
