"""Read rows of one layer from its files: scattered rows for a decode step, and ranges for prefill.

Every row is verified. A read is widened to the device's alignment; rows close to each other share a
read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specache.errors import SlowTierError
from specache.tiers.base import Fetch
from specache.tiers.disk.aligned_io import AlignedBuffer, BufferPool
from specache.tiers.disk.checksum import Words
from specache.tiers.disk.extents import BlockTable, Run
from specache.tiers.disk.native_reads import StepReads
from specache.tiers.disk.readers import ReadBatch, Reader, ReadFailedError
from specache.tiers.disk.row_file import DAMAGED, RowFile
from specache.tiers.disk.row_layout import BLOCK_TOKENS, Index, RowLayout
from specache.tiers.disk.system_errors import reason

READ_BYTES = 2 << 20  # bytes of a buffer: a larger read is split into pieces, of at least one block
GAP_BYTES = 16 << 10  # bytes; rows closer than this share a read, which takes no longer than two (measured: 25 us a read, 1.5 GB/s)
SPLIT_BYTES = 128 << 10  # bytes; a longer read is split among the reader's threads
CHECK_BYTES = 1 << 20  # bytes verified at a time, so that they stay in the processor's cache
_FILE_BITS = 44  # bits of a file offset


def gather(table: BlockTable, layout: RowLayout, dtype: torch.dtype, reader: Reader, heads: Index, positions: Index) -> Tensor:
    """Return rows [M, 2 D] of M (KV head, position) pairs, in their order.

    Raises:
        SlowTierError: a row cannot be read; `CorruptRowError` if a checksum differs.
    """
    rows = _native_gather(table, layout, reader, heads, positions)
    if rows is None:
        scattered = _Scattered(table, layout, heads, positions)
        rows = np.empty((len(positions), layout.words), np.uint64)
        for part in scattered.parts(reader.alignment):
            scattered.read(part, reader, rows)
    return torch.from_numpy(rows.view(np.int64)).view(dtype)


def read(table: BlockTable, layout: RowLayout, reader: Reader, start: int, stop: int, into: Tensor) -> None:
    """Read the rows of tokens `[start, stop)` into a tensor [Hkv, stop - start, 2 D].

    The rows of `into` must be contiguous.

    Raises:
        SlowTierError: a row cannot be read; `CorruptRowError` if a checksum differs.
    """
    if start >= stop:
        return
    words = into.view(torch.int64).numpy().view(np.uint64)  # [Hkv, stop - start, words]
    step = max(1, READ_BYTES // layout.block_bytes)
    first, last = start // BLOCK_TOKENS, -(-stop // BLOCK_TOKENS)
    with reader.buffers.borrow(min(step, last - first) * layout.block_bytes) as buffer:
        for block in range(first, last, step):
            for run in table.between(block, min(block + step, last)):
                _read_blocks(run, layout, reader, buffer)
                _take_blocks(run, layout, buffer, start, stop, words)


def begin(
    table: BlockTable,
    layout: RowLayout,
    dtype: torch.dtype,
    reader: Reader,
    heads: Index,
    positions: Index,
    again: Callable[[], Tensor],
) -> Fetch | None:
    """Start to gather rows; None if the reader would need a thread.

    `again` gathers them plainly, which reports the error of a failed read.
    """
    if reader.native is None:
        return None
    rows = partial(torch.empty, len(positions), 2 * layout.head_dim, dtype=dtype)
    return reader.native.begin(table, layout, *_native_request(layout, reader, heads, positions), rows, again)


def update(reads: StepReads, table: BlockTable, layout: RowLayout, tail: Tensor, reader: Reader) -> None:
    """Tell a decode step's reads where rows are: in files, and in `tail` [Hkv, 64, 2 D]."""
    widened = layout.stride + 2 * reader.alignment
    reads.update(table, layout, tail, [reader.alignment, GAP_BYTES, SPLIT_BYTES], max(widened, READ_BYTES))


def _native_gather(table: BlockTable, layout: RowLayout, reader: Reader, heads: Index, positions: Index) -> Words | None:
    """Return the rows; None if the reader has no native path, or it failed."""
    if reader.native is None:
        return None
    return reader.native.gather(table, layout, *_native_request(layout, reader, heads, positions))


def _native_request(
    layout: RowLayout, reader: Reader, heads: Index, positions: Index
) -> tuple[list[int], Index, Index, BufferPool, int]:
    """Return the arguments of `NativeRows` beside the table and the layout."""
    widened = layout.stride + 2 * reader.alignment
    size = max(widened, min(READ_BYTES, len(positions) * (widened + GAP_BYTES)))
    return [reader.alignment, GAP_BYTES, SPLIT_BYTES], heads, positions, reader.buffers, size


class _Scattered:
    """Scattered rows of a layer, sorted by their place in the files."""

    def __init__(self, table: BlockTable, layout: RowLayout, heads: Index, positions: Index) -> None:
        self.layout = layout
        self.heads = heads
        self.positions = positions
        self.files = [run.file for run in table.runs]
        self.fds = np.array([file.fd for file in self.files])
        self.run, self.blocks = table.locate(positions // BLOCK_TOKENS)
        self.offsets = layout.offsets(self.blocks, heads, positions % BLOCK_TOKENS)
        self.order = np.argsort(self.offsets + (self.run << _FILE_BITS), kind="stable")

    def parts(self, alignment: int) -> list[Index]:
        """Split the row indices, in file order, into parts that each fit a buffer."""
        low, high, far = self._widened(self.order, alignment)
        size = high - low
        size[1:] = np.where(far, size[1:], high[1:] - high[:-1])  # bytes that a row adds to the read it joins
        total = np.cumsum(size)
        return np.split(self.order, np.flatnonzero(np.diff(total // READ_BYTES)) + 1)

    def read(self, part: Index, reader: Reader, into: Words) -> None:
        """Read and verify the rows of a part, into their places in [M, words]."""
        low, high, far = self._widened(part, reader.alignment)
        first = np.append(0, np.flatnonzero(far) + 1)  # first row of every read
        last = np.append(first[1:], len(part)) - 1
        starts = np.append(0, np.cumsum(high[last] - low[first]))  # start of every read in the buffer
        shift = starts[:-1] - low[first]  # from the file to the buffer
        within = self.offsets[part] + np.repeat(shift, last - first + 1)
        with reader.buffers.borrow(int(starts[-1])) as buffer:
            batch = ReadBatch(buffer, self.fds[self.run[part[first]]], low[first], starts[:-1], np.diff(starts))
            try:
                reader.read(batch.split(SPLIT_BYTES))
            except ReadFailedError as error:
                raise self._failed(error) from error.cause
            self._take(part, buffer, within // 8, into)

    def _take(self, part: Index, buffer: AlignedBuffer, starts: Index, into: Words) -> None:
        """Verify rows that begin at these words of the buffer, and copy them to their places."""
        width = self.layout.words + 1
        windows = np.ndarray((len(buffer.words) - width + 1, width), np.uint64, buffer=buffer.words, strides=(8, 8))
        rows = windows[starts]  # [m, words + 1]
        run = self.run[part]
        for r in range(run[0], run[-1] + 1):
            of_run = slice(*np.searchsorted(run, (r, r + 1)))
            index = part[of_run]
            self.files[r].verify(rows[of_run], self.heads[index], self.positions[index], self.blocks[index])
        into[part] = rows[:, :-1]

    def _widened(self, part: Index, alignment: int) -> tuple[Index, Index, NDArray[np.bool_]]:
        """Return the rows' begin and end, widened to `alignment`, and which rows start a read.

        The last array has no entry for the first row.
        """
        offsets, run = self.offsets[part], self.run[part]
        low = offsets // alignment * alignment
        high = -(-(offsets + self.layout.stride) // alignment) * alignment
        return low, high, (low[1:] > high[:-1] + GAP_BYTES) | (run[1:] != run[:-1])

    def _failed(self, error: ReadFailedError) -> SlowTierError:
        """Return an error that names the first row that was not read.

        If only the widened part of its read is missing, it names the last row.
        """
        in_file = np.flatnonzero(self.fds[self.run] == error.fd)
        in_file = in_file[np.argsort(self.offsets[in_file], kind="stable")]
        first = int(np.searchsorted(self.offsets[in_file] + self.layout.stride, error.reached, side="right"))
        index = in_file[min(first, len(in_file) - 1)]
        return _unreadable(self.files[self.run[index]], int(self.heads[index]), int(self.positions[index]), error)


def _read_blocks(run: Run, layout: RowLayout, reader: Reader, buffer: AlignedBuffer) -> None:
    size = run.blocks * layout.block_bytes
    whole = (np.array([value]) for value in (run.file.fd, run.first * layout.block_bytes, 0, size))
    try:
        reader.read(ReadBatch(buffer, *whole).split(SPLIT_BYTES))
    except ReadFailedError as error:
        block, head, slot = layout.place(error.reached)
        token = (run.logical + block - run.first) * BLOCK_TOKENS + slot
        raise _unreadable(run.file, head, token, error) from error.cause


def _take_blocks(run: Run, layout: RowLayout, buffer: AlignedBuffer, start: int, stop: int, into: Words) -> None:
    """Verify a run's rows of tokens `[start, stop)` and copy them to [Hkv, stop - start, words]."""
    heads = np.arange(layout.num_kv_heads)[:, None]
    view = layout.block_view(buffer.words, run.blocks)  # [blocks, Hkv, 64, words + 1]
    step = max(1, CHECK_BYTES // layout.block_bytes)
    for i in range(0, run.blocks, step):
        blocks = view[i : i + step]
        origin = (run.logical + i) * BLOCK_TOKENS
        rows = blocks.transpose(1, 0, 2, 3).reshape(layout.num_kv_heads, -1, layout.words + 1)
        first, last = max(start, origin), min(stop, origin + rows.shape[1])
        rows = rows[:, first - origin : last - origin]
        positions = np.arange(first, last)
        run.file.verify(rows, heads, positions, run.first + positions // BLOCK_TOKENS - run.logical)
        into[:, first - start : last - start] = rows[..., :-1]


def _unreadable(file: RowFile, head: int, token: int, error: ReadFailedError) -> SlowTierError:
    what = f"{file.path}: the row of layer {file.layer}, KV head {head}, token {token} cannot be read: "
    if error.cause is None:
        return SlowTierError(f"{what}the file ends too early. {DAMAGED}")
    return SlowTierError(f"{what}{reason(error.cause)}")
