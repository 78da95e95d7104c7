"""The 16-bit rows of one layer in main memory: in blocks that forks share, or in one that grows.

Rows [Hkv, n, 2 D] lie in blocks of 2**shift tokens: token p is token p % 2**shift of block
p >> shift. One block that grows is the same with a shift of 63. Attention over rows in blocks reads
them by the blocks' addresses (`kernels.types.StoredRows`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specache.platform.extension import native
from specache.tiers.row_memory import RowBlock, RowMemory

GROWTH = 1.25  # factor by which a full block that grows is replaced
MIN_CAPACITY = 64  # tokens of a block that grows
ONE_BLOCK = 63  # `shift` where all tokens lie in the first block


def planned_capacity(block_tokens: int | None, expected: int, tokens: int) -> int:
    """Return the tokens for which a layer's rows have memory after they grew to `tokens`.

    Args:
        block_tokens: those of the `RowMemory`.
        expected: tokens that memory was reserved for. One block that grows has all of them from the
            start, and then grows token by token.
    """
    if block_tokens is not None:
        return -(-tokens // block_tokens) * block_tokens
    capacity = max(expected, MIN_CAPACITY)
    while capacity < tokens:
        capacity = max(capacity + 1, int(capacity * GROWTH))
    return capacity


class _Blocks(NamedTuple):
    """The blocks of a layer in token order, and their addresses, int64 [N].

    They are replaced together, so that a reader on another thread keeps what it reads.
    """

    blocks: tuple[RowBlock, ...] = ()
    addresses: np.ndarray = np.empty(0, dtype=np.int64)

    @classmethod
    def of(cls, blocks: Iterable[RowBlock]) -> _Blocks:
        blocks = tuple(blocks)
        return cls(blocks, np.array([block.address for block in blocks], dtype=np.int64))

    @property
    def tokens(self) -> int:
        """Tokens of a block."""
        return self.blocks[0].rows.shape[1] if self.blocks else 0

    @property
    def capacity(self) -> int:
        """Tokens for which there is memory."""
        return len(self.blocks) * self.tokens


class LayerRows(ABC):
    """The rows of one layer of one sequence. One thread changes them; others may read meanwhile.

    Args:
        memory: source of blocks.
        shape: KV heads and elements of a row.

    Attributes:
        version: changes with the blocks' addresses.
        shift: tokens of a block, as a power of two.
        capacity: tokens for which there is memory.
        own_from: tokens from here on are in no other tier, and may be written.
        strides: bytes from head to head of a block, and from token to token.
    """

    shift: int

    def __init__(self, memory: RowMemory, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.memory = memory
        self.shape, self.dtype = shape, dtype
        self.version = self.capacity = self.own_from = 0
        self.strides = (0, shape[1] * dtype.itemsize)
        self._held = _Blocks()
        self._reads = 0  # on any thread, guarded by the memory's lock
        self._left: list[RowBlock] = []  # blocks that it dropped while they were read

    @abstractmethod
    def make_room(self, start: int, stop: int, expected: int = 0) -> None:
        """Make tokens `[start, stop)` writable, with those before them kept. Forget later ones.

        Args:
            expected: tokens for which a block that must grow gets memory at least.

        Raises:
            SlowTierError: there is no memory; nothing changed.
        """

    @abstractmethod
    def fork(self) -> LayerRows:
        """Return the same rows, independent of these."""

    def truncate(self, length: int) -> None:  # noqa: B027 -- one block stays as it is
        """Free memory that only tokens from `length` on need."""

    def parts(self, start: int, stop: int) -> Iterator[Tensor]:
        """Yield the rows of tokens `[start, stop)`, views [Hkv, n, 2 D] of one block each."""
        blocks, size = self.blocks, 1 << self.shift
        for i in range(start >> self.shift, ((stop - 1) >> self.shift) + 1):
            first = i << self.shift
            yield blocks[i].rows[:, max(start - first, 0) : min(stop - first, size)]

    def read(self, start: int, stop: int) -> Tensor:
        """Return the rows [Hkv, stop - start, 2 D] of a range of tokens.

        It is a view where they lie in one block.
        """
        parts = list(self.parts(start, stop))
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim=1) if parts else torch.empty(self.shape[0], 0, self.shape[1], dtype=self.dtype)

    def gather(self, heads: Tensor, positions: Tensor) -> Tensor:
        """Return rows [M, 2 D] of M (KV head, position) pairs, int64, in their order."""
        with self._reading() as held:
            return self._gather(held, heads, positions)

    def _gather(self, held: _Blocks, heads: Tensor, positions: Tensor) -> Tensor:
        rows = torch.empty(len(positions), self.shape[1], dtype=self.dtype)
        if native is not None:
            row = self.shape[1] * self.dtype.itemsize
            sizes = [self.shape[0], held.capacity, row, held.tokens * row, row]  # not `strides`: they may be newer
            where = heads.contiguous().numpy(), positions.contiguous().numpy()
            native.gather_rows(held.addresses, self.shift, sizes, *where, rows.data_ptr())
            return rows
        of_block = positions >> self.shift
        for i in of_block.unique().tolist():
            here = (of_block == i).nonzero().squeeze(1)
            rows[here] = held.blocks[i].rows[heads[here], positions[here] - (i << self.shift)]
        return rows

    @property
    def blocks(self) -> tuple[RowBlock, ...]:
        return self._held.blocks

    @property
    def addresses(self) -> np.ndarray:
        """The address of each block, int64 [N]."""
        return self._held.addresses

    @property
    def nbytes(self) -> int:
        """The bytes of all blocks. Shared ones count in full."""
        return sum(block.nbytes for block in self.blocks)

    def close(self) -> None:
        """Free everything."""
        blocks = self.blocks
        self._hold((), 0)
        self._release(blocks)

    @contextmanager
    def _reading(self) -> Iterator[_Blocks]:
        """Lend the blocks to a reader, on any thread.

        A block that this layer drops meanwhile stays in use, so that no other tier writes to it.
        """
        with self.memory.lock:
            self._reads += 1
            held = self._held
        try:
            yield held
        finally:
            with self.memory.lock:
                self._reads -= 1
                if not self._reads:
                    left, self._left = self._left, []
                    self.memory.release(left)

    def _release(self, blocks: Sequence[RowBlock]) -> None:
        """Drop blocks that it does not hold any more: at once, or when none is read."""
        with self.memory.lock:
            if self._reads:
                self._left += blocks
            else:
                self.memory.release(blocks)

    def _hold(self, blocks: Iterable[RowBlock], own_from: int) -> None:
        """Hold these blocks from now on."""
        self._held = _Blocks.of(blocks)
        self.strides = (self._held.tokens * self.strides[1], self.strides[1])
        self.capacity, self.own_from = self._held.capacity, own_from
        self.version += 1


class SharedRows(LayerRows):
    """Rows in blocks of one size. A fork shares them; the first of both to write copies a block.

    No row moves when the sequence grows.
    """

    def __init__(self, memory: RowMemory, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(memory, shape, dtype)
        assert memory.block_tokens is not None, "else `GrowingRows`"
        self.shift = memory.block_tokens.bit_length() - 1

    def make_room(self, start: int, stop: int, expected: int = 0) -> None:
        first, count = start >> self.shift, ((stop - 1) >> self.shift) + 1
        if start >= stop or (self.capacity == count << self.shift and start >= self.own_from):
            return
        blocks, dropped = list(self.blocks[:count]), list(self.blocks[count:])
        for i in range(min(first, len(blocks)), count):
            if i < len(blocks) and blocks[i].users == 1:
                continue
            block = self.memory.take((self.shape[0], 1 << self.shift, self.shape[1]), self.dtype)
            if i == len(blocks):
                blocks.append(block)
                continue
            kept = max(start - (i << self.shift), 0)
            block.rows[:, :kept] = blocks[i].rows[:, :kept]
            dropped.append(blocks[i])
            blocks[i] = block
        self._hold(blocks, min(self.own_from, first << self.shift))
        self._release(dropped)  # now its other user may write to it

    def truncate(self, length: int) -> None:
        count = ((length - 1) >> self.shift) + 1
        dropped = self.blocks[count:]
        if dropped:
            self._hold(self.blocks[:count], self.own_from)
            self._release(dropped)

    def fork(self) -> SharedRows:
        other = SharedRows(self.memory, self.shape, self.dtype)
        self.memory.share(self.blocks)
        self.own_from = self.capacity  # from now on both may only read what there is
        other._hold(self.blocks, self.capacity)
        return other


class GrowingRows(LayerRows):
    """Rows in one block that is replaced by a larger one when it is full. A fork copies it."""

    shift = ONE_BLOCK

    def make_room(self, start: int, stop: int, expected: int = 0) -> None:
        if self.capacity >= stop:
            return
        grown = self.memory.take((self.shape[0], max(stop, expected), self.shape[1]), self.dtype)
        for block in self.blocks:
            grown.rows[:, :start] = block.rows[:, :start]
        self._hold([grown], 0)

    def fork(self) -> GrowingRows:
        other = GrowingRows(self.memory, self.shape, self.dtype)
        for block in self.blocks:
            copied = self.memory.take(block.rows.shape, self.dtype)
            copied.rows.copy_(block.rows)
            other._hold([copied], 0)
        return other


def new_rows(memory: RowMemory, shape: tuple[int, int], dtype: torch.dtype) -> LayerRows:
    """Return the empty rows of a layer, in the kind of blocks that the memory has."""
    return (SharedRows if memory.block_tokens is not None else GrowingRows)(memory, shape, dtype)


def unique_bytes(rows: Iterable[LayerRows]) -> int:
    """Return the bytes of all blocks of several layers. Shared ones count once."""
    return sum({id(block): block.nbytes for layer in rows for block in layer.blocks}.values())
