"""Read the rows of a saved state from their files, block by block, even if some are damaged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specache.sessions.files import plain_file
from specache.sessions.manifest import LayerShape, Manifest
from specache.sessions.snapshot import DTYPE_NAMES
from specache.tiers.disk.aligned_io import AlignedBuffer
from specache.tiers.disk.checksum import checksums, head_salts, row_salts
from specache.tiers.disk.extents import Extent
from specache.tiers.disk.row_file import RowFile
from specache.tiers.disk.row_layout import BLOCK_TOKENS, file_name

READ_BYTES = 4 << 20  # bytes read at a time; at least one block


class RowBlocks:
    """The full blocks of a saved state's rows.

    Attributes:
        mended: rows [Hkv, 64, 2 D] that replace damaged blocks, by (layer, block).
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._shapes = manifest.full_layers
        self._places = {layer: _places(extents) for layer, extents in manifest.rows.items()}
        self.mended: dict[tuple[int, int], Tensor] = {}

    def blocks(self, layer: int) -> int:
        return len(self._places[layer])

    def damaged(self, layer: int) -> list[int]:
        """Return the blocks of a layer that are missing or have a row whose checksum differs."""
        found = []
        for first, _, good in self._pieces(layer, 0, self.blocks(layer)):
            found += [first + int(index) for index in np.flatnonzero(~good)]
        return found

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [Hkv, stop - start, D] of a range of tokens.

        Damaged blocks must be in `mended`.
        """
        first, last = start // BLOCK_TOKENS, -(-stop // BLOCK_TOKENS)
        pieces = []
        for block, rows, good in self._pieces(layer, first, last):
            for index in np.flatnonzero(~good):
                rows[:, index] = self.mended[layer, block + int(index)]
            pieces.append(rows.flatten(1, 2))
        rows = torch.cat(pieces, dim=1)[:, start - first * BLOCK_TOKENS : stop - first * BLOCK_TOKENS]
        keys, values = rows.split(self._shapes[layer].dim, dim=-1)
        return keys, values

    def _pieces(self, layer: int, first: int, last: int) -> Iterator[tuple[int, Tensor, NDArray[np.bool_]]]:
        """Yield (first block, rows [Hkv, n, 64, 2 D], intact [n]) of runs of blocks."""
        shape = self._shapes[layer]
        step = max(1, READ_BYTES // shape.rows.block_bytes)
        for block in range(first, last, step):
            places = self._places[layer][block : min(block + step, last)]
            start = 0
            while start < len(places):
                stop = start + 1
                while stop < len(places) and places[stop] == (places[start][0], places[start][1] + stop - start):
                    stop += 1
                yield block + start, *self._read_run(layer, shape, *places[start], block + start, stop - start)
                start = stop

    def _read_run(
        self, layer: int, shape: LayerShape, segment: str, place: int, block: int, count: int
    ) -> tuple[Tensor, NDArray[np.bool_]]:
        """Return rows and intact flags of `count` adjacent blocks of a file, from `place` on."""
        layout = shape.rows
        data, there = self._bytes(file_name(segment, layer), place * layout.block_bytes, count * layout.block_bytes)
        view = layout.block_view(np.frombuffer(data, np.uint64), count)  # [n, Hkv, 64, words + 1]
        positions = (block * BLOCK_TOKENS + np.arange(count * BLOCK_TOKENS)).reshape(count, 1, BLOCK_TOKENS)
        places = np.arange(place, place + count)[:, None, None]
        salts = row_salts(head_salts(segment, layer, shape.heads)[None, :, None], positions, places)
        good = (checksums(view[..., :-1], salts) == view[..., -1]).all(axis=(1, 2))
        good &= np.arange(1, count + 1) * layout.block_bytes <= there
        words = np.ascontiguousarray(view[..., :-1].transpose(1, 0, 2, 3))
        return torch.from_numpy(words.view(np.int64)).view(DTYPE_NAMES[shape.dtype]), good

    def _bytes(self, name: str, offset: int, size: int) -> tuple[bytearray, int]:
        """Return a part of a file, padded with zeros, and the number of bytes that exist."""
        data = bytearray(size)
        there = 0
        try:
            with plain_file(self._folder / name) as fd:
                while there < size and (read := os.preadv(fd, [memoryview(data)[there:]], offset + there)):
                    there += read
        except OSError:
            pass
        return data, there


def write_mended(
    folder: Path, manifest: Manifest, segment: str, mended: Mapping[tuple[int, int], Tensor]
) -> dict[int, tuple[Extent, ...]]:
    """Write recomputed blocks into files of a new segment and sync them.

    Returns:
        the extents of every layer.

    Raises:
        SlowTierError, OSError: the files cannot be written.
    """
    places = {layer: _places(extents) for layer, extents in manifest.rows.items()}
    for layer in sorted({layer for layer, _ in mended}):
        layout = manifest.layers[layer].rows
        file = RowFile(folder, segment, layer, layout, direct=False, create=True)
        try:
            buffer = AlignedBuffer(layout.block_bytes)
            for place, block in enumerate(sorted(block for index, block in mended if index == layer)):
                file.write(place, file.pack(buffer, place, block * BLOCK_TOKENS, mended[layer, block].contiguous()))
                file.blocks = place + 1
                places[layer][block] = (segment, place)
            os.fsync(file.fd)
        finally:
            file.release()
    return {layer: _extents(each) for layer, each in places.items()}


def _places(extents: tuple[Extent, ...]) -> list[tuple[str, int]]:
    """Return (segment, block of its file) of each block of the sequence."""
    return [(extent.segment, extent.first_block + i) for extent in extents for i in range(extent.count)]


def _extents(places: list[tuple[str, int]]) -> tuple[Extent, ...]:
    runs: list[Extent] = []
    for segment, place in places:
        last = runs[-1] if runs else None
        if last is not None and (segment, place) == (last.segment, last.first_block + last.count):
            runs[-1] = Extent(last.segment, last.first_block, last.count + 1)
        else:
            runs.append(Extent(segment, place, 1))
    return tuple(runs)
