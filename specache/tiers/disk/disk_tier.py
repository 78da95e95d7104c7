"""The slow tier on disk: full blocks of rows in files, the last, partial block in memory.

Files (`row_file`) are append-only, so a table of blocks (`extents`) taken at any time stays valid.
The tier holds in memory: the partial block (room for 64 tokens per layer) and the buffers of reads
in progress.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specache.errors import SlowTierError
from specache.tiers import base
from specache.tiers.base import Fetch
from specache.tiers.disk import readers, row_reads
from specache.tiers.disk.extents import BlockTable, Extent
from specache.tiers.disk.native_reads import StepReads
from specache.tiers.disk.readers import Reader
from specache.tiers.disk.row_file import RowFile
from specache.tiers.disk.row_layout import BLOCK_TOKENS, RowLayout
from specache.tiers.disk.scratch import prepare_folder
from specache.tiers.disk.stored_layer import StoredLayer
from specache.tiers.disk.tier_files import TierFiles
from specache.tiers.layer_rows import LayerRows

WRITE_BYTES = 1 << 20  # bytes packed and written at a time; at least one block


class DiskTier:
    """The 16-bit rows of one sequence on disk.

    One thread writes; `gather` and `read` may be called from any thread meanwhile. After `close`
    the tier is empty and can be filled again.

    Args:
        folder: folder of the files; created if it does not exist.
        temporary: True: files lie in a private subfolder, removed when the tier is closed or
            garbage-collected. False: files lie in `folder` itself and stay; they belong to a
            session, which also keeps `extents` and `tails`.

    Raises:
        SlowTierError: the folder cannot be written.
    """

    in_place = in_memory = False
    version = 0

    def __init__(self, folder: str | os.PathLike[str], *, temporary: bool = True) -> None:
        self._layers: dict[int, StoredLayer] = {}
        self._files = TierFiles(prepare_folder(folder), temporary)
        self._finalizer = weakref.finalize(self, self._files.give_back)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], tables: Mapping[int, Sequence[Extent]], tails: Mapping[int, Tensor]) -> DiskTier:
        """Open a session's tier as it was saved.

        Existing blocks are only read. New blocks go behind them, or into new files if another state
        refers to the existing ones.

        Args:
            tables: per layer, what `extents` returned.
            tails: per layer, what `tails` returned, [Hkv, t, 2 D]. They also give the heads, head
                dimension and dtype.

        Raises:
            SlowTierError: a file is missing or too short.
        """
        tier = cls(folder, temporary=False)
        try:
            for layer, tail in tails.items():
                layout = RowLayout(tail.shape[0], tail.shape[2] // 2, tail.itemsize)
                table = tier._files.table(layer, layout, tables.get(layer, ()))
                tier._files.adopt(layer, table)
                tier._layers[layer] = StoredLayer.of(layout, tail.dtype, table, tail)
        except BaseException:
            tier.close()
            raise
        return tier

    @property
    def folder(self) -> Path:
        return self._files.folder

    @property
    def temporary(self) -> bool:
        return self._files.temporary

    # The interface of a cache

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [Hkv, n, D] of tokens `[start, start + n)`; forget later tokens.

        Raises:
            SlowTierError: the disk is full or failed. The tier is unchanged.
        """
        state = self._layers.get(layer)
        if state is None:
            state = StoredLayer.of(RowLayout(keys.shape[0], keys.shape[2], keys.itemsize), keys.dtype)
        state = self._cut(layer, state, start)
        whole = (state.held + keys.shape[1]) // BLOCK_TOKENS * BLOCK_TOKENS
        table = self._append(layer, state, keys, values, whole) if whole else state.table
        state = state.grown(table, keys, values)
        with self._files.lock:
            self._layers[layer] = state

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [Hkv, stop - start, D] of a range of tokens.

        Raises:
            SlowTierError: the rows cannot be read; `CorruptRowError` if a checksum differs.
        """
        with self._reading(layer) as (state, reader):
            _check(state, start, stop)
            keys, values = _read(state, reader, start, stop).split(state.layout.head_dim, dim=-1)
            return keys, values

    def rows(self, layer: int, used: int = 0, needed: int = 0) -> LayerRows:
        raise TypeError("rows on disk do not lie in memory")

    def gather(self, layer: int, heads: Tensor, positions: Tensor) -> Tensor:
        """Return rows [M, 2 D] of M (KV head, position) pairs, in their order.

        Raises:
            SlowTierError: the rows cannot be read; `CorruptRowError` if a checksum differs.
        """
        with self._reading(layer) as (state, reader):
            dtype, layout = state.tail.dtype, state.layout
            if len(positions) == 0:
                return torch.empty(0, 2 * layout.head_dim, dtype=dtype)
            last = int(positions.max())
            _check(state, int(positions.min()), last + 1)
            if last < state.on_disk:
                return row_reads.gather(state.table, layout, dtype, reader, heads.numpy(), positions.numpy())
            rows = torch.empty(len(positions), 2 * layout.head_dim, dtype=dtype)
            in_tail = positions >= state.on_disk
            rows[in_tail] = state.tail[heads[in_tail], positions[in_tail] - state.on_disk]
            in_file = ~in_tail
            if in_file.any():
                file_heads, file_positions = heads[in_file].numpy(), positions[in_file].numpy()
                rows[in_file] = row_reads.gather(state.table, layout, dtype, reader, file_heads, file_positions)
            return rows

    def begin(self, layer: int, heads: Tensor, positions: Tensor) -> Fetch | None:
        """Start to gather rows from files.

        Return None if the reader would need a thread, or if some of the rows are not in a file yet.

        Raises:
            SlowTierError: the tier was closed.
        """
        with self._reading(layer) as (state, reader):
            tokens = positions.numpy()  # NumPy's operations on few numbers take less time
            last = int(tokens.max())
            _check(state, int(tokens.min()), last + 1)
            if last >= state.on_disk:
                return None
            again = partial(self.gather, layer, heads, positions)
            return row_reads.begin(state.table, state.layout, state.tail.dtype, reader, heads.numpy(), tokens, again)

    def has_room(self, layer: int, length: int) -> bool:
        state = self._layers.get(layer)
        return state is not None and state.length == length and state.held + 1 < BLOCK_TOKENS

    def count_appended(self, layer: int) -> None:
        with self._files.lock:
            state = self._layers[layer]
            self._layers[layer] = replace(state, held=state.held + 1)

    def step_reads(self, layer: int, hot: Any, before: base.StepReads | None) -> StepReads | None:
        state = self._layers.get(layer)
        if state is None:
            return None
        reads = self._files.step_reads()
        if reads is None:
            return None
        if not isinstance(before, StepReads) or before.reads is not reads:
            before = StepReads(reads, hot)
        row_reads.update(before, state.table, state.layout, state.tail, self._files.reader())
        return before

    def truncate(self, layer: int, length: int) -> None:
        """Forget a layer's tokens from `length` on.

        Files keep them; the rest of a cut block is read back to memory.

        Raises:
            SlowTierError: the cut block cannot be read. The tier is unchanged.
        """
        state = self._layers.get(layer)
        if state is not None and length < state.length:
            state = self._cut(layer, state, length)
            with self._files.lock:
                self._layers[layer] = state

    def reserve(self, tokens: int) -> None:
        pass  # files grow as they are written

    def truncate_memory(self, layer: int, length: int) -> None:
        pass  # the next `write` cuts the tail

    def fork(self, folder: str | os.PathLike[str] | None = None) -> DiskTier:
        """Return an independent, temporary copy that shares the existing files.

        Both append to new files; the copy in `folder`, which is on the same file system, if it is
        given.
        """
        other = DiskTier(self.folder if folder is None else folder)
        with self._files.lock:
            self._files.share_with(other._files)
            other._layers = {layer: state.with_own_tail() for layer, state in self._layers.items()}
        return other

    def close(self) -> None:
        """Forget everything and release files and threads. A temporary tier's files are removed."""
        with self._files.lock:
            self._layers.clear()
            self._files.give_back(wait=True)

    @property
    def nbytes(self) -> int:
        """Return the bytes of file blocks in use and of the tails."""
        states = list(self._layers.values())
        return self.tail_bytes + sum(state.table.blocks * state.layout.block_bytes for state in states)

    @property
    def tail_bytes(self) -> int:
        """Return the part of `nbytes` that is in memory."""
        return sum(state.tail.nbytes for state in list(self._layers.values()))

    # The interface of a session

    def extents(self) -> dict[int, tuple[Extent, ...]]:
        """Return per layer where the full blocks of its tokens lie.

        `open` needs this and `tails`.
        """
        return {layer: state.table.extents() for layer, state in self._layers.items()}

    def tails(self) -> dict[int, Tensor]:
        """Return per layer the rows [Hkv, t < 64, 2 D] that are not in a file yet."""
        return {layer: state.tail_rows.clone() for layer, state in self._layers.items()}

    def file_names(self) -> set[str]:
        """Return the names of all open files: those of `extents`, new and unused ones."""
        return self._files.names()

    def files(self) -> set[RowFile]:
        """Return the open files that hold rows of the tier."""
        return {run.file for state in self._layers.values() for run in state.table.runs}

    def stop_appending(self) -> None:
        """Write to new files from now on: the existing files were hard-linked."""
        self._files.stop_appending()

    def merge(self, most: int) -> None:
        """Merge a layer's files into one, except the first, if there are more than `most`.

        Every file that a state refers to stays open as long as its session is.

        Raises:
            SlowTierError: a file cannot be read or written. Every row keeps a valid place.
        """
        crowded = [layer for layer, state in self._layers.items() if len({run.file for run in state.table.runs}) > most]
        if crowded:
            self._files.stop_appending()
        try:
            for layer in crowded:
                merged = self._merged(layer)
                with self._files.lock:
                    self._layers[layer] = merged
        except BaseException:
            self._files.stop_appending()  # drop the incomplete copy
            raise
        finally:
            self._files.release_all_but(self.files())

    def sync(self) -> None:
        """Return when all written rows survive a power failure.

        Raises:
            SlowTierError: the system could not confirm it.
        """
        self._files.sync()

    # Implementation

    def _cut(self, layer: int, state: StoredLayer, length: int) -> StoredLayer:
        """Return a layer's first `length` tokens. The tier itself does not change."""
        if length == state.length:
            return state
        if length > state.length:
            raise ValueError(f"layer {layer} has {state.length} tokens; {length} would leave a hole")
        if length >= state.on_disk:
            return replace(state.with_own_tail(), held=length - state.on_disk)
        blocks = length // BLOCK_TOKENS
        with self._reading(layer) as (_, reader):
            rows = _read(state, reader, blocks * BLOCK_TOKENS, length)
        return StoredLayer.of(state.layout, state.tail.dtype, state.table.truncated(blocks), rows)

    def _append(self, layer: int, state: StoredLayer, keys: Tensor, values: Tensor, whole: int) -> BlockTable:
        """Write the first `whole` tokens of tail and new tokens; return the extended table."""
        file = self._files.own_file(layer, state.layout)
        first, size = file.blocks, state.layout.block_bytes
        step = max(1, WRITE_BYTES // size) * BLOCK_TOKENS
        with self._files.reader().buffers.borrow(min(step, whole) // BLOCK_TOKENS * size) as buffer:
            for start in range(0, whole, step):
                block, stop = first + start // BLOCK_TOKENS, min(start + step, whole)
                file.write(block, file.pack(buffer, block, state.on_disk + start, state.joined(keys, values, start, stop)))
        file.blocks += whole // BLOCK_TOKENS
        return state.table.appended(file, first, whole // BLOCK_TOKENS)

    def _merged(self, layer: int) -> StoredLayer:
        """Return a layer with the blocks behind its first file copied into the tier's own file."""
        state = self._layers[layer]
        runs, table = state.table.runs, state.table
        first = next(run.logical for run in runs if run.file is not runs[0].file)
        copied = StoredLayer.of(state.layout, state.tail.dtype, table.truncated(first))
        step = max(1, WRITE_BYTES // state.layout.block_bytes) * BLOCK_TOKENS
        for start in range(first * BLOCK_TOKENS, state.on_disk, step):
            stop = min(start + step, state.on_disk)
            keys, values = self.read(layer, start, stop)
            copied = replace(copied, table=self._append(layer, copied, keys, values, stop - start))
        return replace(state, table=copied.table)

    @contextlib.contextmanager
    def _reading(self, layer: int) -> Iterator[tuple[StoredLayer, Reader]]:
        """Lend a layer's state and a reader.

        Both stay valid inside the block, whatever other threads do to the tier.
        """
        with self._files.lock:
            state = self._layers.get(layer)
            if state is None:
                raise SlowTierError(f"Nothing is stored of layer {layer}: the tier was closed or cleared.")
            files = {run.file for run in state.table.runs}
            for file in files:
                file.acquire()
            try:
                reader = readers.share(self._files.reader())
            except BaseException:
                for file in files:
                    file.release()
                raise
        try:
            yield state, reader
        finally:
            for file in files:
                file.release()
            readers.release(reader)


def _read(state: StoredLayer, reader: Reader, start: int, stop: int) -> Tensor:
    """Return rows [Hkv, stop - start, 2 D]."""
    layout, on_disk = state.layout, state.on_disk
    rows = torch.empty(layout.num_kv_heads, stop - start, 2 * layout.head_dim, dtype=state.tail.dtype)
    split = min(max(on_disk, start), stop)
    row_reads.read(state.table, layout, reader, start, split, rows[:, : split - start])
    rows[:, split - start :] = state.tail_rows[:, max(split - on_disk, 0) : max(stop - on_disk, 0)]
    return rows


def _check(state: StoredLayer, start: int, stop: int) -> None:
    if start < 0 or stop > state.length:
        raise IndexError(f"tokens {start} to {stop} of {state.length}")
