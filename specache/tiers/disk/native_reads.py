"""Read through io_uring with the C++ extension: without the GIL, blocking or in the background."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from specache.tiers.base import Fetch
from specache.tiers.disk.aligned_io import BufferPool
from specache.tiers.disk.checksum import BLOCK_SALT, POSITION_SALT, Words, multipliers
from specache.tiers.disk.extents import BlockTable
from specache.tiers.disk.row_layout import BLOCK_TOKENS, Index, RowLayout

try:
    _native: Any = importlib.import_module("specache._native")
except ImportError:
    _native = None


RING_ENTRIES = 128  # reads of a batch submitted to the kernel at once
FLIGHTS = 3  # reads in flight, beside those of the prefetch threads; each holds a buffer and a ring


class NativeRows:
    """Reads rows through io_uring. A result of None means that a plain reader must read them.

    The plain reader then reports the error.

    Args:
        entries: reads submitted to the kernel at once.

    Raises:
        OSError: the extension or io_uring is not available.
    """

    def __init__(self, entries: int) -> None:
        if _native is None:
            raise OSError("no C++ extension")
        try:
            self._reader = _native.RowReader(entries)
        except RuntimeError as error:
            raise OSError(str(error)) from None

    def gather(
        self, table: BlockTable, layout: RowLayout, rules: list[int], heads: Index, positions: Index, buffers: BufferPool, size: int
    ) -> Words | None:
        """Return verified rows [M, words] of M (KV head, position) pairs, in their order.

        Return None if a read failed.

        Args:
            rules: alignment of reads, gap up to which rows share a read, longest read, all in
                bytes.
            size: size of the read buffer, in bytes.
        """
        if table.native is None:
            table.native = _native_table(table, layout)
        rows = np.empty((len(positions), layout.words), np.uint64)
        with buffers.borrow(size) as buffer:
            heads, positions = np.ascontiguousarray(heads), np.ascontiguousarray(positions)
            good = self._reader.gather(table.native, rules, heads, positions, buffer.address, buffer.size, rows.ctypes.data)
        return rows if good else None

    def read(self, fds: Index, offsets: Index, addresses: Index, lengths: Index) -> bool:
        """Read `lengths` bytes at `offsets` of files to memory; int64 [n] each.

        Return False where a read failed or was short, or where there is no ring for another
        thread: a plain reader then repeats all of them. No read is running afterwards.
        """
        contiguous = (np.ascontiguousarray(values) for values in (fds, offsets, addresses, lengths))
        good: bool = self._reader.read(*contiguous)
        return good

    def begin(
        self,
        table: BlockTable,
        layout: RowLayout,
        rules: list[int],
        heads: Index,
        positions: Index,
        buffers: BufferPool,
        size: int,
        into: Callable[[], Tensor],
        again: Callable[[], Tensor],
    ) -> Fetch | None:
        """Start a gather without waiting.

        Return None if the kernel or the buffer cannot take all reads at once, or if enough reads
        are in flight. The files may be closed meanwhile.

        Args:
            into: returns memory for the rows, [M, words] in any dtype.
            again: gathers the rows instead where `gather` would return None.
        """
        if table.native is None:
            table.native = _native_table(table, layout)
        buffer, started = buffers.take(size), time.perf_counter()
        heads, positions = np.ascontiguousarray(heads), np.ascontiguousarray(positions)
        where = (table.native, rules, heads, positions, buffer.address, buffer.size)
        flights = [self._reader.begin(*where, FLIGHTS, (table.native, buffer))]  # the only reference
        if flights[0] is None:
            buffers.give(buffer)
            return None

        def read() -> Tensor:
            rows = into()
            good = flights[0].take(rows.data_ptr())
            end()
            return rows if good else again()

        def end() -> None:
            if flights:
                flights.clear()  # waits for the reads, which write into memory that is about to be reused
                buffers.give(buffer)

        fetch = Fetch(read, lambda: not flights or flights[0].arrived(), end)
        if fetch.done:
            fetch.wait_s = time.perf_counter() - started  # submitting the reads completed them
        return fetch

    def new_reads(self) -> Any | None:
        """Return reads for a sequence's decode steps (`StepReads`), or None without a ring."""
        try:
            return _native.DiskReads(RING_ENTRIES)
        except RuntimeError:
            return None


class StepReads:
    """The rows of one layer on their way into a hot set, in C++ (csrc/disk_rows.hpp).

    Args:
        reads: what `NativeRows.new_reads` returned, one for all layers of a sequence.
        hot: the hot set's C++ object.

    Attributes:
        native: the C++ object.
    """

    def __init__(self, reads: Any, hot: Any) -> None:
        self.native = _native.DiskRows(reads, hot)
        self.reads = reads
        self._table: BlockTable | None = None
        self._tail: Tensor | None = None

    def update(self, table: BlockTable, layout: RowLayout, tail: Tensor, rules: list[int], most_bytes: int) -> None:
        """Note where the layer's rows are: in the files of `table`, and behind them in `tail`.

        Args:
            tail: [Hkv, 64, 2 D].
            rules: see `NativeRows.gather`.
            most_bytes: size of the buffer of one step's reads, in bytes.
        """
        if table is self._table and tail is self._tail:
            return
        if table.native is None and table.blocks:
            table.native = _native_table(table, layout)
        head, token, _ = (stride * tail.itemsize for stride in tail.stride())
        self.native.use(table.native, rules, most_bytes, tail.data_ptr(), head, token, table.blocks * BLOCK_TOKENS)
        self._table, self._tail = table, tail


def _native_table(table: BlockTable, layout: RowLayout) -> Any:
    """Return the C++ table."""
    salts = np.ascontiguousarray(np.stack([run.file.salts for run in table.runs]))  # [runs, Hkv]
    factors = multipliers(layout.words)
    starts, shifts, fds = (
        np.array(values, np.int64)
        for values in zip(*((run.logical, run.first - run.logical, run.file.fd) for run in table.runs), strict=True)
    )
    sizes = (layout.num_kv_heads, layout.block_bytes, layout.stride, layout.words)
    pointers = (salts.ctypes.data, factors.ctypes.data)
    return _native.RowTable(starts, shifts, fds, pointers[0], *sizes, pointers[1], int(POSITION_SALT), int(BLOCK_SALT))
