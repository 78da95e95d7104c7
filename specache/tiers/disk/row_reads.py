"""Reading rows of one layer from its files: scattered rows of a decode step, and ranges for prefill. Every row is checked.

A read is widened to the device's alignment, and rows that lie near each other share one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specache.errors import SlowTierError
from specache.tiers.disk.aligned_io import AlignedBuffer, BufferPool
from specache.tiers.disk.checksum import Words
from specache.tiers.disk.extents import BlockTable, Run
from specache.tiers.disk.native_reads import NativeFlight
from specache.tiers.disk.readers import ReadBatch, Reader, ReadFailedError
from specache.tiers.disk.row_file import DAMAGED, RowFile
from specache.tiers.disk.row_layout import BLOCK_TOKENS, Index, RowLayout
from specache.tiers.disk.system_errors import reason

READ_BYTES = 2 << 20  # of a buffer: a larger read comes in pieces, of a block at least
GAP_BYTES = 16 << 10  # nearer rows share a read: it takes no longer than two (measured: 25 us a read, 1.5 GB/s)
SPLIT_BYTES = 128 << 10  # a longer read is split among the reader's threads
CHECK_BYTES = 1 << 20  # checked at a time, so that it stays in the processor's cache
_FILE_BITS = 44  # an offset in a file is smaller than 2^44


def gather(table: BlockTable, layout: RowLayout, dtype: torch.dtype, reader: Reader, heads: Index, positions: Index) -> Tensor:
    """Rows [M, 2 D] of M (KV head, position) pairs, in their order.

    Raises:
        SlowTierError: they cannot be read; `CorruptRowError` if one is not what was written.
    """
    rows = _native_gather(table, layout, reader, heads, positions)
    if rows is None:
        scattered = _Scattered(table, layout, heads, positions)
        rows = np.empty((len(positions), layout.words), np.uint64)
        for part in scattered.parts(reader.alignment):
            scattered.read(part, reader, rows)
    return torch.from_numpy(rows.view(np.int64)).view(dtype)


def read(table: BlockTable, layout: RowLayout, reader: Reader, start: int, stop: int, into: Tensor) -> None:
    """Rows of tokens `[start, stop)` into a contiguous-by-row tensor [Hkv, stop - start, 2 D].

    Raises:
        SlowTierError: they cannot be read; `CorruptRowError` if one is not what was written.
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


class BegunRows:
    """M rows that the kernel reads meanwhile (`base.RowsInFlight`). `again` reads them in a way that says what is wrong."""

    def __init__(
        self, flight: NativeFlight, layout: RowLayout, dtype: torch.dtype, count: int, again: Callable[[], Tensor]
    ) -> None:
        self._flight = flight
        self._shape = (count, 2 * layout.head_dim)
        self._dtype = dtype
        self._again = again

    @property
    def arrived(self) -> bool:
        return self._flight.arrived

    def take(self) -> Tensor:
        rows = torch.empty(self._shape, dtype=self._dtype)
        return rows if self._flight.take(rows.data_ptr()) else self._again()

    def cancel(self) -> None:
        self._flight.cancel()


def begin(table: BlockTable, layout: RowLayout, reader: Reader, heads: Index, positions: Index) -> NativeFlight | None:
    """Begin to gather rows, if the reader can without a thread."""
    if reader.native is None:
        return None
    return reader.native.begin(table, layout, *_native_request(layout, reader, heads, positions))


def _native_gather(table: BlockTable, layout: RowLayout, reader: Reader, heads: Index, positions: Index) -> Words | None:
    """The rows, if the reader can do all of it at once and nothing is wrong with any."""
    if reader.native is None:
        return None
    return reader.native.gather(table, layout, *_native_request(layout, reader, heads, positions))


def _native_request(
    layout: RowLayout, reader: Reader, heads: Index, positions: Index
) -> tuple[list[int], Index, Index, BufferPool, int]:
    """What `NativeRows` wants to know of a read beside the table and the layout."""
    widened = layout.stride + 2 * reader.alignment
    size = max(widened, min(READ_BYTES, len(positions) * (widened + GAP_BYTES)))
    return [reader.alignment, GAP_BYTES, SPLIT_BYTES], heads, positions, reader.buffers, size


class _Scattered:
    """Rows of a layer anywhere in its files, in the order they lie there."""

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
        """The rows, by index and in file order, in parts that each fit a buffer."""
        low, high, far = self._widened(self.order, alignment)
        size = high - low
        size[1:] = np.where(far, size[1:], high[1:] - high[:-1])  # what a row adds to the read it joins
        total = np.cumsum(size)
        return np.split(self.order, np.flatnonzero(np.diff(total // READ_BYTES)) + 1)

    def read(self, part: Index, reader: Reader, into: Words) -> None:
        """Read and check the rows of a part, into their places in [M, words]."""
        low, high, far = self._widened(part, reader.alignment)
        first = np.append(0, np.flatnonzero(far) + 1)  # row of every read
        last = np.append(first[1:], len(part)) - 1
        starts = np.append(0, np.cumsum(high[last] - low[first]))  # of every read in the buffer
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
        """Check rows that begin at these words of the buffer, and put them into their places."""
        width = self.layout.words + 1
        windows = np.ndarray((len(buffer.words) - width + 1, width), np.uint64, buffer=buffer.words, strides=(8, 8))
        rows = windows[starts]  # [m, words + 1]
        run = self.run[part]
        for r in range(run[0], run[-1] + 1):
            mine = slice(*np.searchsorted(run, (r, r + 1)))
            index = part[mine]
            self.files[r].verify(rows[mine], self.heads[index], self.positions[index], self.blocks[index])
        into[part] = rows[:, :-1]

    def _widened(self, part: Index, alignment: int) -> tuple[Index, Index, NDArray[np.bool_]]:
        """Where rows begin and end in their file when widened to `alignment`, and which lie far from the one before (of all but the
        first)."""
        offsets, run = self.offsets[part], self.run[part]
        low = offsets // alignment * alignment
        high = -(-(offsets + self.layout.stride) // alignment) * alignment
        return low, high, (low[1:] > high[:-1] + GAP_BYTES) | (run[1:] != run[:-1])

    def _failed(self, error: ReadFailedError) -> SlowTierError:
        """Names the first wanted row that is missing, or the last one where only what its read was widened by is."""
        mine = np.flatnonzero(self.fds[self.run] == error.fd)
        mine = mine[np.argsort(self.offsets[mine], kind="stable")]
        first = int(np.searchsorted(self.offsets[mine] + self.layout.stride, error.reached, side="right"))
        index = mine[min(first, len(mine) - 1)]
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
    """Check a run's rows of tokens `[start, stop)` in the buffer, and put them into [Hkv, stop - start, words]."""
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
