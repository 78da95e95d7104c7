"""The hot set in device memory keeps what a plain list of recently used rows would keep."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specache.device.device_hot_set import DeviceHotSet, hot_set_bytes
from specache.errors import FastMemoryError
from specache.platform.budget import ByteBudget
from specache.rows.hot_set import HotSet

BATCH, HEADS, TOKENS, WIDTH, TOP_K = 2, 2, 12, 3, 4
CPU = torch.device("cpu")
NOBODY = -1


@dataclass
class ListedHotSet:
    """The rows of one head: (position, when it was last wanted) by slot."""

    capacity: int
    tick: int = 0
    slots: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.slots = [(NOBODY, NOBODY)] * self.capacity

    def look_up(self, positions: list[int]) -> list[int]:
        """Slots, -1 where there is none."""
        kept = [position for position, _ in self.slots]
        found = [kept.index(position) if position >= 0 and position in kept else -1 for position in positions]
        for slot in found:
            if slot >= 0:
                self.slots[slot] = (kept[slot], self.tick)
        return found

    def claim(self, positions: list[int], missing: list[bool]) -> list[int]:
        oldest_first = sorted(range(self.capacity), key=lambda slot: self.slots[slot][1])
        victims = sorted([slot for slot in oldest_first if self.slots[slot][1] < self.tick][: sum(missing)])
        claimed = []
        for position, wanted in zip(positions, missing, strict=True):
            slot = victims.pop(0) if wanted and victims else -1
            if slot >= 0:
                self.slots[slot] = (position, self.tick)
            claimed.append(slot)
        return claimed

    def forget(self, positions: list[int]) -> None:
        self.slots = [
            (NOBODY, NOBODY) if position in positions and position >= 0 else (position, when) for position, when in self.slots
        ]


@st.composite
def selections(draw) -> Tensor:
    """Ascending positions [B, Hkv, k], -1 behind them where there are fewer."""
    heads = [sorted(draw(st.sets(st.integers(0, TOKENS - 1), max_size=TOP_K))) for _ in range(BATCH * HEADS)]
    return torch.tensor([one + [-1] * (TOP_K - len(one)) for one in heads]).view(BATCH, HEADS, TOP_K)


def each_head(hot: list[ListedHotSet], operation: str, *arguments: Tensor) -> Tensor:
    """An operation on the lists of all heads, as one tensor."""
    flat = [argument.flatten(0, 1).tolist() for argument in arguments]
    answers = [getattr(head, operation)(*one) for head, *one in zip(hot, *flat, strict=True)]
    return torch.tensor(answers).view(BATCH, HEADS, TOP_K)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), capacity=st.integers(TOP_K, 9))
def test_hits_and_victims_are_those_of_a_plain_lru_list(data, capacity):
    hot = DeviceHotSet(BATCH, HEADS, capacity, TOKENS, WIDTH, torch.float32, CPU)
    listed = [ListedHotSet(capacity) for _ in range(BATCH * HEADS)]
    claimed: tuple[Tensor, Tensor] | None = None
    for operation in data.draw(st.lists(st.sampled_from(["step", "look", "fill", "fill", "fill", "forget", "clear"]), max_size=14)):
        if operation == "step":
            hot.advance()
            for head in listed:
                head.tick += 1
        elif operation == "clear":
            hot.clear()
            for head in listed:
                head.clear()
        elif operation == "forget" and claimed is not None:
            positions, slots = claimed
            hot.forget(positions, slots)
            for head, gone, places in zip(listed, positions.flatten(0, 1).tolist(), slots.flatten(0, 1).tolist(), strict=True):
                head.forget([p for p, slot in zip(gone, places, strict=True) if slot < capacity and head.slots[slot][0] == p])
        elif operation in ("look", "fill"):
            positions = data.draw(selections())
            slots = hot.look_up(positions)
            absent = slots == hot.absent
            assert torch.equal(slots.masked_fill(absent, -1), each_head(listed, "look_up", positions))
            if operation == "fill":
                missing = absent & (positions >= 0)
                given_slots = hot.claim(positions, missing)
                refused = given_slots == hot.refused
                assert torch.equal(given_slots.masked_fill(refused, -1), each_head(listed, "claim", positions, missing))
                claimed = positions, given_slots
    owner = hot.owner[..., :capacity].masked_fill(hot.owner[..., :capacity] > TOKENS, NOBODY)
    assert owner.flatten(0, 1).tolist() == [[position for position, _ in head.slots] for head in listed]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), capacity=st.integers(TOP_K, 9))
def test_hits_equal_those_of_the_cpus_hot_set(data, capacity):
    """Over decode steps: fetch for the real token, look up for the draft token, prefetch."""
    device = DeviceHotSet(BATCH, HEADS, capacity, TOKENS, WIDTH, torch.float32, CPU)
    hosts = [HotSet(HEADS, capacity, WIDTH, torch.float32, CPU) for _ in range(BATCH)]

    def find(positions: Tensor) -> Tensor:
        here = device.look_up(positions) != device.absent
        assert torch.equal(here, torch.stack([host.find(one) for host, one in zip(hosts, positions, strict=True)]) >= 0)
        return ~here & (positions >= 0)

    def add(positions: Tensor, missing: Tensor) -> None:
        device.claim(positions, missing)
        for host, wanted, new in zip(hosts, positions, missing, strict=True):
            host.insert(wanted.where(new, -1), torch.zeros(int(new.sum()), WIDTH))

    def advance() -> None:
        device.advance()
        for host in hosts:
            host.step += 1

    for _ in range(data.draw(st.integers(1, 6))):
        advance()
        real, draft, ahead = (data.draw(selections()) for _ in range(3))
        add(real, find(real))
        find(draft)
        advance()
        add(ahead, find(ahead))


def test_rows_come_back_from_the_slots_they_were_put_into():
    hot = DeviceHotSet(BATCH, HEADS, 6, TOKENS, WIDTH, torch.float32, CPU)
    rows = torch.randn(BATCH, HEADS, TOP_K, WIDTH)
    slots = torch.tensor([[[5, -1, 0, 2], [-1, -1, -1, -1]], [[0, 1, 2, 3], [3, 2, -1, 1]]])
    nowhere = slots < 0
    hot.put(slots.masked_fill(nowhere, hot.refused), rows)
    out = torch.full_like(rows, torch.nan)
    hot.get(slots.masked_fill(nowhere, hot.absent), out)
    assert torch.equal(out, rows.masked_fill(nowhere.unsqueeze(-1), 0.0))


def test_buffers_keep_their_addresses():
    hot = DeviceHotSet(BATCH, HEADS, 5, TOKENS, WIDTH, torch.float32, CPU)
    buffers = (hot.kv_rows, hot.table, hot.owner, hot.used, hot.tick)
    before = [buffer.data_ptr() for buffer in buffers]
    positions = torch.tensor([1, 4, 7, -1]).expand(BATCH, HEADS, -1)
    hot.advance()
    slots = hot.claim(positions, (hot.look_up(positions) == hot.absent) & (positions >= 0))
    hot.put(slots, torch.ones(BATCH, HEADS, TOP_K, WIDTH))
    hot.forget(positions, slots)
    hot.clear()
    now = (hot.kv_rows, hot.table, hot.owner, hot.used, hot.tick)
    assert [buffer.data_ptr() for buffer in now] == before
    assert all(a is b for a, b in zip(now, buffers, strict=True))


def test_bytes_are_counted_and_claimed_from_fast_memory():
    budget = ByteBudget(100_000)
    hot = DeviceHotSet(BATCH, HEADS, 6, TOKENS, WIDTH, torch.bfloat16, CPU, budget)
    assert hot.nbytes == budget.used == hot_set_bytes(BATCH, HEADS, 6, TOKENS, 2 * WIDTH)
    assert hot.nbytes == sum(buffer.nbytes for buffer in (hot.kv_rows, hot.table, hot.owner, hot.used, hot.tick))
    with pytest.raises(FastMemoryError, match="hot sets"):
        DeviceHotSet(BATCH, HEADS, 6, 100_000, WIDTH, torch.bfloat16, CPU, budget)
