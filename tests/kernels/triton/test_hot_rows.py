"""The kernels of a decode step's rows do what PyTorch's operations do, number for number."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specache.config import ReadPath
from specache.device.device_hot_set import OLDEST, DeviceHotSet
from specache.device.device_rows import DeviceRowFetcher, RowCounters, StepBuffers
from specache.device.fused_rows import FusedRowFetcher, device_row_fetcher
from specache.device.sources import MappedRows, StoredRows
from specache.kernels.triton.hot_rows_backend import HotRowKernels
from specache.tiers.streams import InlineStreams
from tests.device import decoding_by_hand as decode
from tests.device.decoding_by_hand import Decode, Program
from tests.device.simulated import SimulatedStreams, orders

BATCH, HEADS, TOKENS, WIDTH = 2, 2, 40, 6
CPU = torch.device("cpu")


@dataclass
class Pair:
    """The same rows twice: in PyTorch, and in kernels whose blocks are so small that a few slots
    take several.
    """

    plain: DeviceRowFetcher
    fused: FusedRowFetcher

    @classmethod
    def of(cls, k: int, slots: int, read: ReadPath, dtype: torch.dtype) -> Pair:
        stored = [torch.randn(HEADS, TOKENS, WIDTH).to(dtype) for _ in range(BATCH)]
        made = []
        for source in (StoredRows(stored), MappedRows(stored, CPU)):
            hot = DeviceHotSet(BATCH, HEADS, slots, TOKENS, WIDTH, dtype, CPU)
            buffers = StepBuffers(BATCH, HEADS, k, WIDTH, dtype, CPU)
            made.append(device_row_fetcher(source, hot, buffers, InlineStreams(), RowCounters(CPU, WIDTH), read))
        plain, fused = made
        assert isinstance(fused, FusedRowFetcher) and not isinstance(plain, FusedRowFetcher)
        fused._kernels = HotRowKernels(block=8)
        return cls(plain, fused)

    def do(self, name: str, *arguments: Tensor) -> None:
        for rows in (self.plain, self.fused):
            getattr(rows, name)(*arguments)
        self.agree()

    def agree(self) -> None:
        plain, fused = self.plain, self.fused
        slots, tokens = plain.hot.capacity, plain.hot.tokens
        for name, kept in (("kv_rows", slots), ("owner", slots), ("table", tokens)):  # what is behind is never read
            ours, theirs = (getattr(rows.hot, name)[:, :, :kept] for rows in (fused, plain))
            assert torch.equal(ours, theirs), name
        ages = [(rows.hot.tick - rows.hot.used[..., :slots]).clamp(max=OLDEST) for rows in (fused, plain)]
        assert torch.equal(*ages)
        assert torch.equal(fused._counters.totals, plain._counters.totals)
        assert (fused.hot.kv_rows[:, :, slots] == 0).all()
        for name in ("kv_rows", "positions", "missing"):
            assert torch.equal(getattr(fused._buffers, name), getattr(plain._buffers, name)), name
        assert torch.equal(fused._ahead, plain._ahead)


def selection(draw, k: int) -> Tensor:
    """A row of a selection [B, Hkv, 2, k], as it lies in it: ascending, -1 behind."""
    heads = [sorted(draw(st.sets(st.integers(0, TOKENS - 1), max_size=k))) for _ in range(BATCH * HEADS)]
    wanted = torch.tensor([one + [-1] * (k - len(one)) for one in heads]).view(BATCH, HEADS, 1, k)
    return wanted.expand(-1, -1, 2, -1).contiguous()[:, :, draw(st.integers(0, 1))]


@settings(deadline=None, max_examples=10)
@given(
    data=st.data(),
    k=st.sampled_from([1, 4, 7]),
    extra=st.integers(0, 25),
    read=st.sampled_from(list(ReadPath)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_fused_steps_equal_pytorchs_operations(data, k, extra, read, dtype):
    """Hits, victims, rows and counters, over steps of which some are taken back, and a hot set that
    is emptied.
    """
    pair = Pair.of(k, k + extra, read, dtype)
    for _ in range(data.draw(st.integers(1, 6))):
        pair.do("begin_step")
        pair.do("fetch", selection(data.draw, k))
        pair.do("available", selection(data.draw, k))
        pair.do("submit", selection(data.draw, k))
        after = data.draw(st.sampled_from(["nothing", "nothing", "cancel", "drop"]))
        if after != "nothing":
            pair.do(after)


@pytest.mark.parametrize("apart", [1, 300, OLDEST - 1, OLDEST, 3 * OLDEST])
def test_victims_of_any_age_are_those_of_pytorch(apart):
    """Ages are found in two digits; what is older than both can say is equally old."""
    k, slots = 3, 11
    pair = Pair.of(k, slots, ReadPath.MAPPED, torch.float32)
    for step in range(5):
        positions = torch.arange(k) + k * step
        pair.do("begin_step")
        pair.do("fetch", positions.expand(BATCH, HEADS, k).contiguous())
        for rows in (pair.plain, pair.fused):
            rows.hot.tick.add_(apart)
    for step in range(4):
        pair.do("begin_step")
        pair.do("fetch", (torch.arange(k) + 20 + k * step).expand(BATCH, HEADS, k).contiguous())


def test_more_positions_than_a_program_takes_at_once_equal_pytorchs():
    k, tokens = 1100, 3000
    generator = torch.Generator().manual_seed(0)
    stored = [torch.randn(1, tokens, 4, generator=generator)]
    given_rows = []
    for source in (StoredRows(stored), MappedRows(stored, CPU)):
        hot = DeviceHotSet(1, 1, k + 50, tokens, 4, torch.float32, CPU)
        rows = device_row_fetcher(
            source, hot, StepBuffers(1, 1, k, 4, torch.float32, CPU), InlineStreams(), RowCounters(CPU, 1), ReadPath.MAPPED
        )
        for seed in range(3):
            wanted = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:k].sort().values.view(1, 1, k)
            rows.begin_step()
            given_rows.append(rows.fetch(wanted).clone())
        given_rows.append(hot.table[:, :, :tokens].clone())
    for plain, fused in zip(given_rows[:4], given_rows[4:], strict=True):
        assert torch.equal(plain, fused)


PROGRAMS = [Program(), Program(ReadPath.COPY, host_waits=False), Program(joined=True, undone=True)]


@pytest.mark.parametrize(
    ("order", "seed", "program"),
    [
        pytest.param(*order, program, marks=[] if i == j else pytest.mark.thorough)
        for i, order in enumerate(orders(seeds=1))
        for j, program in enumerate(PROGRAMS)
    ],
)
def test_the_queues_may_run_in_any_order_that_events_allow(monkeypatch, order, seed, program):
    monkeypatch.setattr(decode, "DeviceRowFetcher", device_row_fetcher)
    monkeypatch.setattr(decode, "StoredRows", lambda stored: MappedRows(stored, CPU))
    run = Decode(SimulatedStreams(order, seed), program)
    assert all(isinstance(rows, FusedRowFetcher) for rows in run.layers)
    assert not run.run().wrong
