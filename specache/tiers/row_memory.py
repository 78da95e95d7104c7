"""Blocks of memory for 16-bit rows, which the tiers of a cache and of its forks share.

Nothing refers back to a block, so reference counts alone free it with the last tier that holds it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from specache.platform import forks
from specache.tiers.transfer import HostMemory

BLOCK_TOKENS = 256  # tokens of a block that forks share; a power of two


class RowMemory:
    """Source of row blocks, and the account of their bytes. Any thread may call it.

    Args:
        source: source of buffers; None is the system's allocator.
        block_tokens: tokens of a block. None: each layer has one block that grows, which forks
            copy. Kernels of a GPU read such rows.

    Attributes:
        lock: held while the users of blocks change.
        used, peak: bytes of the blocks that exist, and the most so far. One that several tiers
            share counts once.
    """

    def __init__(self, source: HostMemory | None = None, block_tokens: int | None = BLOCK_TOKENS) -> None:
        self.block_tokens = block_tokens
        self.used = self.peak = 0
        self._source: HostMemory = source or SystemMemory()
        self.lock = forks.reentrant_lock()  # a block may be freed on any thread, also inside

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> RowBlock:
        """Return a block of rows [Hkv, tokens, 2 D] with undefined content, for one user.

        Raises:
            SlowTierError: the source has no room.
        """
        return RowBlock(self, self._source.take(shape, dtype))

    def share(self, blocks: Iterable[RowBlock]) -> None:
        """Count one more user of each block."""
        with self.lock:
            for block in blocks:
                block.users += 1

    def release(self, blocks: Iterable[RowBlock]) -> None:
        """Count one user less of each block, before a tier drops them."""
        with self.lock:
            for block in blocks:
                block.users -= 1

    def _count(self, nbytes: int) -> None:
        with self.lock:
            self.used += nbytes
            self.peak = max(self.peak, self.used)

    def _give_back(self, rows: Tensor) -> None:
        self._count(-rows.nbytes)
        self._source.give_back(rows)


class RowBlock:
    """Rows [Hkv, tokens, 2 D] that one tier owns or several share, freed with the last reference.

    Attributes:
        address: that of the first row.
        users: tiers that hold it. A tier writes only to a block of which it is the one user.
    """

    __slots__ = ("_memory", "address", "nbytes", "rows", "users")

    def __init__(self, memory: RowMemory, rows: Tensor) -> None:
        self.rows = rows
        self.nbytes: int = rows.nbytes
        self.address: int = rows.data_ptr()
        self.users = 1
        memory._count(rows.nbytes)
        self._memory = memory

    def __del__(self) -> None:
        if hasattr(self, "_memory") and not sys.is_finalizing():
            self._memory._give_back(self.rows)


class SystemMemory:
    """Buffers from PyTorch's allocator, freed by reference counting."""

    def __init__(self, pinned: bool = False) -> None:
        self._pinned = pinned

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, pin_memory=self._pinned)

    def give_back(self, buffer: Tensor) -> None:
        pass
