"""One file of rows (`row_layout`): packing, writing, locking and verifying."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specache.errors import CorruptRowError, SlowTierError
from specache.platform import forks
from specache.tiers.disk import aligned_io
from specache.tiers.disk.aligned_io import AlignedBuffer
from specache.tiers.disk.checksum import Words, checksums, head_salts, row_salts
from specache.tiers.disk.row_layout import BLOCK_TOKENS, Index, RowLayout, file_name
from specache.tiers.disk.scratch import ScratchFolder
from specache.tiers.disk.system_errors import reason

SEGMENT_DIGITS = 16
DAMAGED = (
    "It was damaged or replaced since; check the disk if nobody touched the file. A session is mended by 'specache session repair "
    "NAME -m MODEL'; without one, start again from the prompt."
)


def new_segment() -> str:
    """Return a random name for the files of one writer."""
    return secrets.token_hex(SEGMENT_DIGITS // 2)


class RowFile:
    """One layer's rows of one segment.

    A sequence's tier and its forks share it; the last user closes it.

    Args:
        folder: folder of the file; `create` creates it there.
        scratch: the folder, if it is temporary; the file is removed with it.

    Raises:
        SlowTierError: the file cannot be created or opened.
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
        self.blocks = 0  # blocks in use; data behind them does not count
        self._scratch = scratch
        self.salts = head_salts(segment, layer, layout.num_kv_heads)
        self._users = 1
        self._lock = forks.reentrant_lock()  # a finalizer may release in the middle of a release
        try:
            self.fd = aligned_io.open_file(str(self.path), create=create, direct=direct)
        except OSError as error:
            raise SlowTierError(f"{self.path} cannot be {'made' if create else 'opened'}: {reason(error)}") from error
        if scratch is not None:
            scratch.acquire()
        else:
            self._lock_file(exclusive=False)

    def acquire(self) -> None:
        """Add a user."""
        with self._lock:
            assert self._users, "a closed file"
            self._users += 1

    def release(self) -> None:
        """Remove a user; the last one closes the file."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        with contextlib.suppress(OSError):  # data that must survive was synced when it was saved
            os.close(self.fd)
        if self._scratch is not None:
            self._scratch.remove(self.path)
            self._scratch.release()

    @property
    def is_open(self) -> bool:
        return self._users > 0

    @property
    def is_shared(self) -> bool:
        """Return True if the data behind the blocks in use may be needed elsewhere.

        That is so if the file has a second name, or is open once more in any process.
        """
        if os.fstat(self.fd).st_nlink > 1:
            return True
        alone = self._lock_file(exclusive=True)
        self._lock_file(exclusive=False)
        return not alone

    def check_size(self, blocks: int) -> None:
        """Check that the file has at least `blocks` blocks.

        Raises:
            SlowTierError: the file is shorter.
        """
        size, needed = os.fstat(self.fd).st_size, blocks * self.layout.block_bytes
        if size < needed:
            raise SlowTierError(f"{self.path} has {size:,} bytes, but {needed:,} are in use: it was cut short. {DAMAGED}")

    def pack(self, buffer: AlignedBuffer, block: int, position: int, rows: Tensor) -> memoryview:
        """Pack rows [Hkv, 64 n, 2 D] of tokens from `position` on as blocks from `block` on.

        Return a part of `buffer`.
        """
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
        """Write packed blocks from number `block` on. They count when `blocks` includes them.

        Raises:
            SlowTierError: the write failed. The file is truncated to `blocks` blocks.
        """
        try:
            aligned_io.write_all(self.fd, data, block * self.layout.block_bytes)
            if not self.direct:  # else the page cache keeps what the tier freed from memory
                os.fdatasync(self.fd)
                aligned_io.drop_cached(self.fd)
        except OSError as error:
            self.discard_tail()
            raise SlowTierError(f"{self.path} cannot be written: {reason(error)} Nothing of this step was kept.") from error

    def discard_tail(self) -> None:
        """Truncate what a failed write left behind the blocks in use."""
        with contextlib.suppress(OSError):  # the next write overwrites it
            os.ftruncate(self.fd, self.blocks * self.layout.block_bytes)

    def verify(self, rows: Words, heads: Index, positions: Index, blocks: Index) -> None:
        """Verify rows [..., words + 1] of (head, token position, block); the indices broadcast.

        Raises:
            CorruptRowError: a checksum differs; the message names the first such row.
        """
        expected = checksums(rows[..., :-1], row_salts(self.salts[heads], positions, blocks))
        wrong = expected != rows[..., -1]
        if wrong.any():
            head, position = (np.broadcast_to(index, wrong.shape)[wrong][0] for index in (heads, positions))
            raise CorruptRowError(
                f"{self.path}: the row of layer {self.layer}, KV head {head}, token {position} is not what was written there "
                f"(its checksum differs). {DAMAGED}"
            )

    def _lock_file(self, *, exclusive: bool) -> bool:
        """Take a lock on the file and return True on success.

        Every process that has a session's file open shares one.
        """
        import fcntl

        try:
            fcntl.flock(self.fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _block_salts(self, block: int, position: int, count: int) -> Words:
        """Return the salts [count, Hkv, 64] of blocks from `block` on; tokens begin at
        `position`.
        """
        blocks = np.arange(block, block + count)[:, None, None]
        positions = position + np.arange(count * BLOCK_TOKENS).reshape(count, 1, BLOCK_TOKENS)
        return row_salts(self.salts[None, :, None], positions, blocks)
