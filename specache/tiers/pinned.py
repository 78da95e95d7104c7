"""Page-locked main memory for the 16-bit rows, which a GPU reads and writes asynchronously.

Locking is slow, so memory is locked in a few large blocks that buffers are cut from and returned
to. Block sizes are powers of two where the budget allows, because PyTorch rounds up to one.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specache.errors import SlowTierError
from specache.platform import forks

BLOCK_BYTES = 1 << 28  # bytes locked at a time, and more when much is held
GROWTH = 4  # a block is about 1 / GROWTH of what is held
ALIGNMENT = 4096  # bytes; alignment of every buffer's start

Allocate = Callable[[int], Tensor]


def pageable(size: int) -> Tensor:
    """Return ordinary memory, uint8 [size]."""
    return torch.empty(size, dtype=torch.uint8)


def locked(size: int) -> Tensor:
    """Return page-locked memory, uint8 [size].

    Raises:
        RuntimeError: the system refuses to lock as much.
    """
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


@dataclass
class _Block:
    """Memory that buffers are cut from.

    `free` has its free pieces (start, stop) in order; no two are adjacent.
    """

    memory: Tensor
    free: list[tuple[int, int]] = field(default_factory=list)

    def cut(self, size: int) -> int | None:
        """Cut `size` bytes from the smallest free piece that fits; return their start or None."""
        fitting = [piece for piece in self.free if piece[1] - piece[0] >= size]
        if not fitting:
            return None
        start, stop = min(fitting, key=lambda piece: piece[1] - piece[0])
        i = self.free.index((start, stop))
        self.free[i : i + 1] = [(start + size, stop)] if start + size < stop else []
        return start

    def put_back(self, start: int, size: int) -> None:
        """Return a piece and merge it with its free neighbours."""
        pieces: list[tuple[int, int]] = []
        for piece in sorted([*self.free, (start, start + size)]):
            if pieces and pieces[-1][1] == piece[0]:
                pieces[-1] = (pieces[-1][0], piece[1])
            else:
                pieces.append(piece)
        self.free = pieces


class PinnedPool:
    """Buffers in page-locked memory (`tiers.transfer.HostMemory`), within a budget.

    If the system refuses to lock more, the rest is ordinary memory, and one `RuntimeWarning`
    explains the effect.

    Args:
        limit: bytes that may be held; None is unlimited.
        block_bytes: size of the first blocks, unless a buffer is larger.
        allocate: allocates a locked block; raises `RuntimeError` if the system refuses.

    Attributes:
        is_locked: True if all memory is page-locked. Kernels can read only such memory.
    """

    def __init__(self, limit: int | None = None, block_bytes: int = BLOCK_BYTES, allocate: Allocate = locked) -> None:
        self.limit = limit
        self.is_locked = True
        self._block_bytes = block_bytes
        self._allocate = allocate
        self._blocks: list[_Block] = []
        self._taken: dict[int, tuple[_Block, int, int]] = {}  # address -> block, start, size
        self._lock = forks.lock()
        self._returned: deque[int] = deque()  # addresses of returned buffers that are not free yet

    @property
    def nbytes(self) -> int:
        """Return the bytes held from the system, in use or not."""
        return sum(block.memory.nbytes for block in self._blocks)

    @property
    def used(self) -> int:
        """Return the bytes of buffers in use."""
        return sum(size for _, _, size in self._taken.values())

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        size = max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT
        try:
            with self._lock:
                self._put_back()
                block, start = self._find(size) or self._new_block(size)
                buffer = block.memory[start : start + nbytes].view(dtype).view(*shape)
                self._taken[block.memory.data_ptr() + start] = (block, start, size)
            return buffer
        finally:
            self._put_back_if_idle()

    def give_back(self, buffer: Tensor) -> None:
        """See `HostMemory`.

        It never blocks, since a tier's finalizer may call it in the middle of `take`.
        """
        self._returned.append(buffer.data_ptr())
        self._put_back_if_idle()

    def _put_back_if_idle(self) -> None:
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._put_back()
            finally:
                self._lock.release()

    def _put_back(self) -> None:
        while self._returned:
            block, start, size = self._taken.pop(self._returned.popleft())
            block.put_back(start, size)

    def _find(self, size: int) -> tuple[_Block, int] | None:
        for block in self._blocks:
            start = block.cut(size)
            if start is not None:
                return block, start
        return None

    def _new_block(self, size: int) -> tuple[_Block, int]:
        left = None if self.limit is None else self.limit - self.nbytes
        if left is not None and size > left:
            raise SlowTierError(
                f"The 16-bit rows need {size:,} bytes more of page-locked memory; {self.used:,} are in use and {self.limit:,} are "
                "allowed. Allow more (pinned_memory), use a shorter context or fewer sequences at a time, or keep the rows on a "
                "disk (slow_tier='disk:FOLDER')."
            )
        wanted = max(_power_of_two(2 * size - 1), self._block_bytes, _power_of_two(self.nbytes // GROWTH))
        if left is not None and wanted > left:
            wanted = max(size, _power_of_two(left))
        memory = self._lock_or_fall_back(wanted)
        block = _Block(memory, [(0, memory.nbytes)])
        self._blocks.append(block)
        start = block.cut(size)
        assert start is not None
        return block, start

    def _lock_or_fall_back(self, size: int) -> Tensor:
        if self.is_locked:
            try:
                return self._allocate(size)
            except RuntimeError as error:
                self.is_locked = False
                warnings.warn(
                    f"The system does not lock {size:,} bytes more of memory ({error}). These 16-bit rows are in ordinary memory: "
                    "copies to and from the GPU wait for the host, which is slower. Free main memory (a container has a limit of "
                    "its own), or use a shorter context or fewer sequences at a time.",
                    RuntimeWarning,
                    stacklevel=4,
                )
        return pageable(size)


def _power_of_two(size: int) -> int:
    """Return the largest power of two that is not above `size`."""
    return 1 << (size.bit_length() - 1) if size else 0
