"""A step that reads its rows from a disk in one call equals one over rows in memory, to the bit."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specache.attention.decode import StepKind
from specache.cache.compressed_layer import CompressedLayer
from specache.config import Policy, TopK
from specache.errors import CorruptRowError, SlowTierError
from specache.kernels.cpu import native
from specache.rows.hot_set import HotSet
from specache.rows.native_hot_set import NativeHotSet
from specache.tiers.disk import native_reads, row_reads, tier_files
from specache.tiers.disk.disk_tier import DiskTier
from specache.tiers.disk.native_reads import NativeRows
from specache.tiers.disk.probe import ReaderReport
from specache.tiers.ram import RamTier
from specache.tiers.worker import PrefetchWorker
from tests.attention.fetched_layers import KINDS, check_same_state, layer_of, step
from tests.tiers.tier_rows import nothing_left, row_file

pytestmark = pytest.mark.skipif(native.IMPORT_ERROR is not None, reason="the C++ extension is not built")


@pytest.fixture(autouse=True)
def through_io_uring(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        NativeRows(8)
    except OSError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(tier_files, "report_for", lambda folder: ReaderReport("io_uring", False, 4096))


@pytest.fixture(scope="module")
def worker() -> Iterator[PrefetchWorker]:
    made = PrefetchWorker()
    yield made
    made.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def both(
    tokens: int, folder: Path, worker: PrefetchWorker, dtype: torch.dtype = torch.float32, residual: int = 16
) -> tuple[CompressedLayer, CompressedLayer]:
    """Return a layer with its rows on a disk, and one with the same rows in memory.

    The latter's steps take several calls.
    """
    on_disk = layer_of(tokens, NativeHotSet, worker, dtype, residual, DiskTier(folder))
    return on_disk, layer_of(tokens, HotSet, worker, dtype, residual, RamTier(in_place=False))


def in_flight(layer: CompressedLayer) -> bool:
    """Whether reads ahead of the next step have begun."""
    return bool(layer.row_fetcher._reads.native.reading_ahead)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), policy=st.sampled_from(list(KINDS)), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_one_call_equals_several(folder, worker, data, policy, dtype):
    """Also where a step fills a block of the file, and where rows are in no file yet."""
    lengths = data.draw(st.lists(st.one_of(st.integers(0, 300), st.integers(60, 66)), min_size=1, max_size=2))
    residual = data.draw(st.sampled_from([0, 16, 64]))
    layers = [both(length, folder, worker, dtype, residual) for length in lengths]
    ours, theirs = ([pair[i] for pair in layers] for i in range(2))
    pairs, slots = data.draw(st.sampled_from([(3, 0), (4, 5), (16, 0), (20, 20), (20, 64)]))
    top_k = data.draw(st.sampled_from([TopK.always(pairs), TopK(pairs // 2, pairs, 100)]))
    for layer in ours + theirs:
        layer.row_fetcher.resize(slots)
    for seed in range(data.draw(st.integers(1, 8))):
        kind = data.draw(st.sampled_from(KINDS[policy]))
        (out, counted), (expected, wanted) = (step(layers, kind, policy, top_k, seed) for layers in (ours, theirs))
        assert torch.equal(out, expected)
        assert (counted.rows_selected, counted.rows_ready) == (wanted.rows_selected, wanted.rows_ready)
    for layer, other in layers:
        assert layer.length == other.length
        check_same_state(layer, other)
        assert torch.equal(*(torch.cat(one.tier.read(0, 0, layer.length), dim=-1) for one in (layer, other)))
        layer.release()
        layer.tier.close()


def test_reads_ahead_take_no_thread(folder, worker):
    layer, _ = both(320, folder, worker)
    before = set(threading.enumerate())  # of which one of an earlier test may end meanwhile
    reading = 0
    for seed in range(8):
        step([layer], StepKind.PAIR, Policy.VERIFIED, TopK.always(20), seed)
        reading += in_flight(layer)
        assert set(threading.enumerate()) <= before
    assert reading
    layer.release()
    layer.tier.close()


@pytest.mark.parametrize("patch", [{"RING_ENTRIES": 2}, {"READ_BYTES": 16 << 10}, {"READ_BYTES": 1}])
def test_few_requests_and_little_memory_change_no_result(folder, worker, monkeypatch, patch):
    """Reads that exceed the ring are submitted in turns, and others take several calls."""
    for name, value in patch.items():
        monkeypatch.setattr(native_reads if name == "RING_ENTRIES" else row_reads, name, value)
    layer, other = both(320, folder, worker)
    for seed in range(12):
        results = [step([one], StepKind.PAIR, Policy.VERIFIED, TopK.always(40), seed)[0] for one in (layer, other)]
        assert torch.equal(*(out[:, :, 0] for out in results))  # the draft token's depends on what was read ahead
    layer.release()
    layer.tier.close()


@pytest.mark.parametrize("kind", [StepKind.PAIR, StepKind.SINGLE])
def test_a_damaged_row_is_named_and_the_step_can_be_repeated(folder, worker, kind):
    policy = Policy.VERIFIED if kind is StepKind.PAIR else Policy.ON_DEMAND
    layer, other = both(320, folder, worker, residual=64)
    path = row_file(layer.tier)
    good = np.fromfile(path, np.uint8)
    failed = 0
    for seed in range(12):
        expected = step([other], kind, policy, TopK.always(20), seed)[0]
        damaged = good.copy()
        if seed > 2:
            damaged[: len(good) : 8] ^= 1
        damaged.tofile(path)
        length, wanted = layer.length, layer.next_positions
        try:
            out = step([layer], kind, policy, TopK.always(20), seed)[0]
        except SlowTierError as error:
            assert isinstance(error, CorruptRowError) and "its checksum differs" in str(error) and "token" in str(error)
            assert not in_flight(layer)
            failed += 1
            layer.undo(length, wanted)
            good.tofile(path)
            out = step([layer], kind, policy, TopK.always(20), seed)[0]
        good.tofile(path)
        if in_flight(layer):
            layer.row_fetcher._reads.native.finish_ahead()  # before the file is damaged again
        assert torch.equal(out, expected)
    assert failed
    layer.release()
    layer.tier.close()


def test_damage_found_while_reading_ahead_is_raised_once_in_the_next_step(folder, worker):
    layer, other = both(320, folder, worker, residual=64)
    path = row_file(layer.tier)
    good = np.fromfile(path, np.uint8)
    damaged = good.copy()
    damaged[::8] ^= 1
    raised = 0
    for seed in range(0, 12, 2):
        damaged.tofile(path)
        for one in (layer, other):  # the draft token alone reads nothing but ahead
            step([one], StepKind.DRAFT, Policy.VERIFIED, TopK.always(20), seed)
        expected = step([other], StepKind.PAIR, Policy.VERIFIED, TopK.always(20), seed + 1)[0]
        length, wanted = layer.length, layer.next_positions
        if in_flight(layer):
            with pytest.raises(CorruptRowError, match=r"Reading ahead in layer 0 failed. .*KV head .*its checksum differs"):
                step([layer], StepKind.PAIR, Policy.VERIFIED, TopK.always(20), seed + 1)
            assert layer.length == length
            layer.undo(length, wanted)
            raised += 1
        good.tofile(path)
        assert torch.equal(step([layer], StepKind.PAIR, Policy.VERIFIED, TopK.always(20), seed + 1)[0], expected)
    assert raised
    layer.release()
    layer.tier.close()


def test_a_read_ahead_that_failed_only_once_is_repeated(folder, worker):
    layer, other = both(320, folder, worker, residual=64)
    path = row_file(layer.tier)
    good = np.fromfile(path, np.uint8)
    for seed in range(0, 12, 2):
        np.zeros_like(good).tofile(path)
        for one in (layer, other):
            step([one], StepKind.DRAFT, Policy.VERIFIED, TopK.always(20), seed)
        good.tofile(path)
        results = [step([one], StepKind.PAIR, Policy.VERIFIED, TopK.always(20), seed + 1)[0] for one in (layer, other)]
        assert torch.equal(*results)
    layer.release()
    layer.tier.close()


def test_reads_under_way_end_before_their_memory_is_freed(folder, worker):
    """Cancelled, dropped with the layer, and while files are closed."""
    layer, _ = both(320, folder, worker)
    step([layer], StepKind.PAIR, Policy.VERIFIED, TopK.always(20), 0)
    layer.row_fetcher.free()
    with nothing_left(folder):
        for seed in range(1, 9):
            step([layer], StepKind.PAIR, Policy.VERIFIED, TopK.always(20), seed)
            fork = layer.fork(layer.tier.fork(), layer.row_fetcher, layer.config)
            fork.tier.close()
            if seed % 2:
                layer.row_fetcher.cancel()
            else:
                layer.row_fetcher.drop()
        layer.row_fetcher.free()
    step([layer], StepKind.PAIR, Policy.VERIFIED, TopK.always(20), 9)
    layer.tier.close()  # reads of closed files complete
    layer.row_fetcher.begin_step()
    del layer


def test_a_forked_process_leaves_the_reads_of_its_parent_alone(folder, worker):
    layer, other = both(320, folder, worker)
    for seed in range(6):
        results = [step([one], StepKind.PAIR, Policy.VERIFIED, TopK.always(20), seed)[0] for one in (layer, other)]
        assert torch.equal(*results)
        child = os.fork()
        if child == 0:
            try:
                layer.row_fetcher._reads.native.finish_ahead()  # neither waits nor takes results
                layer.row_fetcher._reads.native.cancel()
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    layer.release()
    layer.tier.close()
