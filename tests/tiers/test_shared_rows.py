"""Forks share the blocks of their rows: equal contents, copies where they part, exact bytes."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specache.errors import SlowTierError
from specache.tiers import layer_rows
from specache.tiers.layer_rows import planned_capacity
from specache.tiers.ram import RamTier, held_bytes
from specache.tiers.row_memory import RowMemory, SystemMemory
from tests.tiers.tier_rows import everything, pairs, random_rows

HEADS, DIM, LAYERS, BLOCK = 2, 4, (0, 3), 8
ROW_BYTES = HEADS * 2 * DIM * 4
BLOCKS = pytest.mark.parametrize("block", [BLOCK, 32, None])


def new_rows(tokens: int, seed: int) -> Tensor:
    """Rows [Hkv, n, 2 D]."""
    return torch.cat(random_rows(HEADS, tokens, DIM, torch.float32, seed), dim=-1)


class PlainTier:
    """A tier as lists: per layer its rows, and which blocks hold them. Forks copy everything."""

    made = 0

    def __init__(self, block: int) -> None:
        self.block = block
        self.rows = {layer: torch.zeros(HEADS, 0, 2 * DIM) for layer in LAYERS}
        self.blocks: dict[int, list[int]] = {layer: [] for layer in LAYERS}

    def write(self, layer: int, start: int, rows: Tensor, others: list[PlainTier]) -> None:
        self.rows[layer] = torch.cat([self.rows[layer][:, :start], rows], dim=1)
        blocks, count = self.blocks[layer], -(-self.rows[layer].shape[1] // self.block)
        del blocks[count:]
        for i in range(start // self.block, count):
            if i == len(blocks) or any(blocks[i] in other.blocks[layer] for other in others):
                PlainTier.made += 1
                blocks[i : i + 1] = [PlainTier.made]

    def truncate(self, layer: int, length: int) -> None:
        self.rows[layer] = self.rows[layer][:, :length]
        del self.blocks[layer][-(-length // self.block) :]

    def fork(self) -> PlainTier:
        other = PlainTier(self.block)
        other.rows = dict(self.rows)
        other.blocks = {layer: list(blocks) for layer, blocks in self.blocks.items()}
        return other


def check(memory: RowMemory, tiers: list[RamTier], plain: list[PlainTier], seed: int) -> None:
    """Every tier has its rows, and the bytes of all blocks are counted once."""
    for tier, expected in zip(tiers, plain, strict=True):
        for layer, rows in expected.rows.items():
            if not rows.shape[1]:
                continue
            assert torch.equal(everything(tier, layer, HEADS, rows.shape[1]), rows)
            positions = torch.tensor(random.Random(seed).choices(range(rows.shape[1]), k=5))
            heads, tokens = pairs(HEADS, positions)
            assert torch.equal(tier.gather(layer, heads, tokens), rows[heads, tokens])
    assert memory.used == held_bytes(tiers)
    if memory.block_tokens is not None:
        kept = {(layer, block) for one in plain for layer in LAYERS for block in one.blocks[layer]}
        assert memory.used == len(kept) * memory.block_tokens * ROW_BYTES
        assert [tier.nbytes for tier in tiers] == [
            sum(map(len, one.blocks.values())) * memory.block_tokens * ROW_BYTES for one in plain
        ]


@contextmanager
def no_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@BLOCKS
@pytest.mark.parametrize("cpp", [True, False])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_forks_never_see_each_others_writes_and_bytes_are_exact(block, cpp, data):
    with pytest.MonkeyPatch.context() as patch, no_collector():
        if not cpp:
            patch.setattr(layer_rows, "native", None)  # a machine without the extension
        memory = RowMemory(block_tokens=block)
        tiers, plain = [RamTier(True, memory)], [PlainTier(block or 1)]
        for seed in range(data.draw(st.integers(1, 14))):
            i = data.draw(st.integers(0, len(tiers) - 1))
            act = data.draw(st.sampled_from(["append", "append", "overwrite", "write in place", "cut", "fork", "drop", "close"]))
            others = plain[:i] + plain[i + 1 :]
            for layer in LAYERS:
                length = plain[i].rows[layer].shape[1]
                if act in ("append", "overwrite"):
                    start = length if act == "append" else data.draw(st.integers(0, length))
                    rows = new_rows(data.draw(st.integers(1, 20)), seed)
                    tiers[i].write(layer, start, *rows.chunk(2, dim=-1))
                    plain[i].write(layer, start, rows, others)
                elif act == "write in place" and length:
                    rows, stored = new_rows(1, seed), tiers[i].rows(layer, length, length + 1)
                    assert stored.own_from <= length < stored.capacity
                    for part in stored.parts(length, length + 1):
                        part.copy_(rows)
                    plain[i].write(layer, length, rows, others)
                elif act == "cut":
                    length = data.draw(st.integers(0, length))
                    tiers[i].truncate_memory(layer, length)
                    plain[i].truncate(layer, length)
            if act == "fork":
                tiers.append(tiers[i].fork())
                plain.append(plain[i].fork())
            elif act == "close":
                tiers[i].close()
                plain[i] = PlainTier(block or 1)
            elif act == "drop" and len(tiers) > 1:
                del tiers[i], plain[i]
            check(memory, tiers, plain, seed)
        while tiers:
            del tiers[data.draw(st.integers(0, len(tiers) - 1))]
            assert memory.used == held_bytes(tiers)


def test_a_fork_copies_nothing_and_the_first_to_write_copies_one_block():
    memory = RowMemory(block_tokens=BLOCK)
    tier = RamTier(True, memory)
    tier.write(0, 0, *new_rows(20, 0).chunk(2, dim=-1))
    block, before = BLOCK * ROW_BYTES, [one.address for one in tier.rows(0).blocks]
    fork = tier.fork()
    assert memory.used == 3 * block and tier.nbytes == fork.nbytes == 3 * block
    fork.write(0, 20, *new_rows(1, 1).chunk(2, dim=-1))
    assert memory.used == 4 * block
    tier.write(0, 20, *new_rows(1, 2).chunk(2, dim=-1))  # by now nobody else has its last block
    assert memory.used == 4 * block and [one.address for one in tier.rows(0).blocks] == before
    assert [one.address for one in fork.rows(0).blocks[:2]] == before[:2]


def test_no_row_moves_when_a_sequence_grows():
    tier = RamTier(True, RowMemory(block_tokens=BLOCK))
    tier.write(0, 0, *new_rows(3, 0).chunk(2, dim=-1))
    first = tier.rows(0).addresses[0]
    for position in range(3, 50):
        tier.write(0, position, *new_rows(1, position).chunk(2, dim=-1))
    assert tier.rows(0).addresses[0] == first and len(tier.rows(0).addresses) == 7


def test_a_block_that_others_dropped_is_written_where_it_lies():
    memory = RowMemory(block_tokens=BLOCK)
    tier = RamTier(True, memory)
    tier.write(0, 0, *new_rows(5, 0).chunk(2, dim=-1))
    with no_collector():
        fork = tier.fork()
        del fork
        tier.write(0, 5, *new_rows(1, 1).chunk(2, dim=-1))
    assert memory.used == BLOCK * ROW_BYTES


@pytest.mark.parametrize("room", range(6))
def test_a_write_without_memory_changes_nothing(room):
    class Full(SystemMemory):
        left = 1000

        def take(self, *arguments: object) -> Tensor:
            if not self.left:
                raise SlowTierError("no memory")
            self.left -= 1
            return super().take(*arguments)  # type: ignore[arg-type]

    source = Full()
    memory = RowMemory(source, BLOCK)
    tier, rows = RamTier(True, memory), new_rows(20, 0)
    tier.write(0, 0, *rows.chunk(2, dim=-1))
    fork, held = tier.fork(), memory.used
    source.left = room
    new = new_rows(40, 1)  # a shared block, and five more
    with pytest.raises(SlowTierError, match="no memory"), no_collector():
        fork.write(0, 20, *new.chunk(2, dim=-1))
    assert memory.used == held
    source.left = 6
    for one, expected in ((tier, rows), (fork, torch.cat([rows, new], dim=1))):
        if one is fork:
            fork.write(0, 20, *new.chunk(2, dim=-1))
        assert torch.equal(everything(one, 0, HEADS, expected.shape[1]), expected)


def test_a_row_that_is_not_stored_is_refused():
    tier = RamTier(True, RowMemory(block_tokens=BLOCK))
    tier.write(0, 0, *new_rows(5, 0).chunk(2, dim=-1))
    for head, position in ((0, BLOCK), (0, -1), (HEADS, 0), (-1, 0)):
        with pytest.raises(IndexError):
            tier.gather(0, torch.tensor([0, head]), torch.tensor([1, position]))


def test_threads_read_one_fork_while_others_append_to_theirs():
    memory = RowMemory(block_tokens=BLOCK)
    tier, rows = RamTier(True, memory), new_rows(100, 0)
    tier.write(0, 0, *rows.chunk(2, dim=-1))
    heads, tokens = pairs(HEADS, torch.arange(100))
    forks, wrong, ended = [tier.fork() for _ in range(3)], [], threading.Event()

    def read() -> None:
        while not ended.is_set():
            if not torch.equal(tier.gather(0, heads, tokens), rows[heads, tokens]):
                wrong.append("gather")
            with_fork = forks[0].fork()  # of a tier that nobody changes
            if not torch.equal(everything(with_fork, 0, HEADS, 100), rows):
                wrong.append("read")

    def append(one: RamTier, seed: int) -> None:
        for round_ in range(30):
            own = one.fork()
            start = random.Random(seed + round_).randint(0, 100)
            own.write(0, start, *new_rows(30, seed).chunk(2, dim=-1))
            if not torch.equal(everything(own, 0, HEADS, start), rows[:, :start]):
                wrong.append("append")

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=append, args=(one, seed)) for seed, one in enumerate(forks[1:])]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    ended.set()
    for thread in readers:
        thread.join()
    assert not wrong
    assert memory.used == planned_capacity(BLOCK, 0, 100) * ROW_BYTES
    forks.clear()
    tier.close()
    assert memory.used == 0
