"""The layout of rows on disk, and one file of them.

    file    <segment>-L<layer>.rows: the blocks of one layer that one writer appended, one after the other
    block   [Hkv, 64, row | checksum], padded to 4,096 bytes, so that it is written and read alone by direct I/O
    row     [K | V] of one token and one KV head, 2 D elements in the model's dtype, in the machine's byte order
    checksum  8 bytes, see `checksum`

A segment is 16 hexadecimal digits drawn at random: what one writer wrote between two forks. Blocks are whole and written once;
which block of which file holds which tokens is not in the file but in a table (`extents`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specache.errors import CorruptRowError, SlowTierError
from specache.tiers import aligned_io
from specache.tiers.aligned_io import AlignedBuffer
from specache.tiers.checksum import Words, checksums, head_salts, row_salts
from specache.tiers.scratch import ScratchFolder

LAYOUT_VERSION = 1  # of everything above and of `checksum`
BLOCK_TOKENS = 64
BLOCK_ALIGNMENT = 4096  # bytes
CHECKSUM_BYTES = 8
SEGMENT_DIGITS = 16
DAMAGED = "It was damaged or replaced since; start again from the prompt, and check the disk if nobody touched the file."
_ADVICE = {
    errno.ENOSPC: "Free some space, choose a folder on another disk, or shorten the context.",
    errno.EDQUOT: "Free some of your quota, choose a folder on another disk, or shorten the context.",
    errno.EMFILE: "Allow this process more open files (ulimit -n), or use fewer sequences at a time.",
    errno.ENFILE: "The machine has too many open files; close some programs.",
    errno.EACCES: "Choose a folder that you may write.",
    errno.EROFS: "Choose a folder that can be written.",
    errno.ENOENT: "The file or its folder was removed; start again from the prompt.",
    errno.ELOOP: "A symbolic link lies in the file's place; remove it or choose another folder.",
}

Index = NDArray[np.int64]

assert np.dtype(np.uint64).itemsize == CHECKSUM_BYTES
assert BLOCK_ALIGNMENT % CHECKSUM_BYTES == 0


def new_segment() -> str:
    """A name for what one writer appends."""
    return secrets.token_hex(SEGMENT_DIGITS // 2)


def file_name(segment: str, layer: int) -> str:
    """Of the file that holds a layer's rows of a segment."""
    return f"{segment}-L{layer:03d}.rows"


@dataclass(frozen=True)
class RowLayout:
    """Sizes of one layer's blocks, in bytes.

    Raises:
        SlowTierError: a row is no whole number of 64-bit words (an odd head dimension at 16 bits).
    """

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.row_bytes % CHECKSUM_BYTES:
            raise SlowTierError(
                f"The disk tier needs an even head dimension, and this layer has {self.head_dim} in {self.dtype}. "
                "Use slow_tier='ram'."
            )

    @cached_property
    def row_bytes(self) -> int:
        return 2 * self.head_dim * self.dtype.itemsize

    @cached_property
    def words(self) -> int:
        """64-bit words of a row, its checksum not counted."""
        return self.row_bytes // CHECKSUM_BYTES

    @cached_property
    def stride(self) -> int:
        """From one row to the next."""
        return self.row_bytes + CHECKSUM_BYTES

    @cached_property
    def block_bytes(self) -> int:
        used = self.num_kv_heads * BLOCK_TOKENS * self.stride
        return -(-used // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT

    def offsets(self, blocks: Index, heads: Index, slots: Index) -> Index:
        """Where rows lie in a file. `slots` are tokens within their block."""
        return np.asarray(blocks * self.block_bytes + (heads * BLOCK_TOKENS + slots) * self.stride)

    def place(self, offset: int) -> tuple[int, int, int]:
        """(block, head, slot) of the row that holds a byte of a file; the padding counts to the last row."""
        block, rest = divmod(offset, self.block_bytes)
        head, slot = divmod(min(rest // self.stride, self.num_kv_heads * BLOCK_TOKENS - 1), BLOCK_TOKENS)
        return block, head, slot

    def block_view(self, words: Words, count: int) -> Words:
        """`count` blocks in memory as [count, Hkv, 64, words + 1]; the last word is the checksum."""
        strides = (self.block_bytes, BLOCK_TOKENS * self.stride, self.stride, CHECKSUM_BYTES)
        shape = (count, self.num_kv_heads, BLOCK_TOKENS, self.words + 1)
        return np.ndarray(shape, np.uint64, buffer=words, strides=strides)


class RowFile:
    """One layer's rows of one segment. Shared by the tiers of a sequence and its forks, and closed when the last lets go.

    Args:
        folder: where it is; `create` makes it there.
        scratch: the folder, if it is a temporary one; the file is removed with it.

    Raises:
        SlowTierError: it cannot be made or opened.
    """

    def __init__(
        self,
        folder: Path,
        segment: str,
        layer: int,
        layout: RowLayout,
        *,
        direct: bool,
        create: bool,
        scratch: ScratchFolder | None = None,
    ) -> None:
        self.path = folder / file_name(segment, layer)
        self.segment = segment
        self.layer = layer
        self.layout = layout
        self.direct = direct
        self.blocks = 0  # appended; what lies behind them in the file does not count
        self._scratch = scratch
        self._salts = head_salts(segment, layer, layout.num_kv_heads)
        self._users = 1
        self._lock = threading.RLock()  # a finalizer may release in the middle of a release
        try:
            self.fd = aligned_io.open_file(str(self.path), create=create, direct=direct)
        except OSError as error:
            raise SlowTierError(f"{self.path} cannot be {'made' if create else 'opened'}: {reason(error)}") from error
        if scratch is not None:
            scratch.acquire()
        else:
            self._lock_file(exclusive=False)

    def acquire(self) -> None:
        """One more user."""
        with self._lock:
            assert self._users, "a closed file"
            self._users += 1

    def release(self) -> None:
        """One user less; the last one closes the file."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        os.close(self.fd)
        if self._scratch is not None:
            self._scratch.remove(self.path)
            self._scratch.release()

    @property
    def is_shared(self) -> bool:
        """Whether somebody else may need what lies behind the blocks that count here: by another name, or because it is open once
        more, in whatever process."""
        if os.fstat(self.fd).st_nlink > 1:
            return True
        alone = self._lock_file(exclusive=True)
        self._lock_file(exclusive=False)
        return not alone

    def check_size(self, blocks: int) -> None:
        """Refuse a file that is shorter than `blocks` blocks.

        Raises:
            SlowTierError: it is.
        """
        size, needed = os.fstat(self.fd).st_size, blocks * self.layout.block_bytes
        if size < needed:
            raise SlowTierError(f"{self.path} has {size:,} bytes, but {needed:,} are in use: it was cut short. {DAMAGED}")

    def pack(self, buffer: AlignedBuffer, block: int, position: int, rows: Tensor) -> memoryview:
        """Rows [Hkv, 64 n, 2 D] of tokens from `position` on, as they lie in the file from `block` on -> a part of `buffer`."""
        layout, count = self.layout, rows.shape[1] // BLOCK_TOKENS
        view = layout.block_view(buffer.words, count)
        words = rows.view(torch.int64).numpy().view(np.uint64).reshape(-1, count, BLOCK_TOKENS, layout.words)
        view[..., :-1] = words.transpose(1, 0, 2, 3)
        view[..., -1] = checksums(view[..., :-1], self._block_salts(block, position, count))
        used = layout.num_kv_heads * BLOCK_TOKENS * layout.stride
        blocks = np.frombuffer(buffer.bytes, np.uint8, count * layout.block_bytes).reshape(count, layout.block_bytes)
        blocks[:, used:] = 0
        return buffer.bytes[: count * layout.block_bytes]

    def write(self, block: int, data: memoryview) -> None:
        """Write packed blocks from number `block` on. They count once `blocks` says so.

        Raises:
            SlowTierError: the system could not write them. The file is as long as `blocks` says.
        """
        try:
            aligned_io.write_all(self.fd, data, block * self.layout.block_bytes)
            if not self.direct:  # or the page cache holds what the tier took out of memory
                os.fdatasync(self.fd)
                aligned_io.drop_cached(self.fd)
        except OSError as error:
            self.discard_tail()
            raise SlowTierError(f"{self.path} cannot be written: {reason(error)} Nothing of this step was kept.") from error

    def discard_tail(self) -> None:
        """Cut off what a failed write left behind the blocks that count."""
        with contextlib.suppress(OSError):  # it is overwritten by the next write
            os.ftruncate(self.fd, self.blocks * self.layout.block_bytes)

    def verify(self, rows: Words, heads: Index, positions: Index, blocks: Index) -> None:
        """Check rows [..., words + 1] of (head, token position, block); the index shapes broadcast to `...`.

        Raises:
            CorruptRowError: naming the first that is not what was written.
        """
        expected = checksums(rows[..., :-1], row_salts(self._salts[heads], positions, blocks))
        wrong = expected != rows[..., -1]
        if wrong.any():
            head, position = (np.broadcast_to(index, wrong.shape)[wrong][0] for index in (heads, positions))
            raise CorruptRowError(
                f"{self.path}: the row of layer {self.layer}, KV head {head}, token {position} is not what was written there "
                f"(its checksum differs). {DAMAGED}"
            )

    def _lock_file(self, *, exclusive: bool) -> bool:
        """Whoever has a session's file open holds a shared lock on it -> whether the lock was to be had."""
        import fcntl

        try:
            fcntl.flock(self.fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _block_salts(self, block: int, position: int, count: int) -> Words:
        """Salts [count, Hkv, 64] of blocks from `block` on, which hold tokens from `position` on."""
        blocks = np.arange(block, block + count)[:, None, None]
        positions = position + np.arange(count * BLOCK_TOKENS).reshape(count, 1, BLOCK_TOKENS)
        return row_salts(self._salts[None, :, None], positions, blocks)


def reason(error: OSError) -> str:
    """What the system said and what to do about it."""
    return f"{error.strerror or error}. {_ADVICE.get(error.errno or 0, 'Check the disk, or choose another folder.')}"
