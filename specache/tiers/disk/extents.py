"""The block table of a layer: which block of which file holds which tokens. Tables are immutable.

Block `i` of the sequence holds tokens `[64 i, 64 i + 64)`. Files are append-only, so truncating a
sequence drops table entries and touches no file, and a table that was saved earlier stays valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from specache.tiers.disk.row_file import RowFile


@dataclass(frozen=True)
class Extent:
    """`count` blocks of a segment's file from `first_block` on, as a saved state refers to them."""

    segment: str
    first_block: int
    count: int


class Run(NamedTuple):
    """Contiguous blocks: the sequence's from `logical` on are the blocks of `file` from `first`
    on.
    """

    file: RowFile
    first: int
    blocks: int
    logical: int


class BlockTable:
    """The runs of one layer, in token order."""

    def __init__(self, runs: tuple[Run, ...] = ()) -> None:
        self.runs = runs
        self.blocks = runs[-1].logical + runs[-1].blocks if runs else 0
        self.native: Any = None  # C++ table of `native_reads`, made on first use
        self._starts = np.array([run.logical for run in runs], dtype=np.int64)
        self._shift = np.array([run.first - run.logical for run in runs], dtype=np.int64)

    def appended(self, file: RowFile, first: int, count: int) -> BlockTable:
        """Return this table with `count` more blocks."""
        if count == 0:
            return self
        last = self.runs[-1] if self.runs else None
        if last is not None and last.file is file and last.first + last.blocks == first:
            return BlockTable((*self.runs[:-1], last._replace(blocks=last.blocks + count)))
        return BlockTable((*self.runs, Run(file, first, count, self.blocks)))

    def truncated(self, blocks: int) -> BlockTable:
        """Return a table of the first `blocks` blocks."""
        return BlockTable(tuple(self.between(0, blocks)))

    def between(self, start: int, stop: int) -> Iterator[Run]:
        """Yield the runs of blocks `[start, stop)`."""
        for run in self.runs:
            first, last = max(start, run.logical), min(stop, run.logical + run.blocks)
            if first < last:
                yield Run(run.file, run.first + first - run.logical, last - first, first)

    def locate(self, blocks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (index of the run, block within its file) of blocks of the sequence."""
        if len(self.runs) == 1:
            return np.zeros_like(blocks), blocks + self._shift[0]
        index = np.searchsorted(self._starts, blocks, side="right") - 1
        return index, blocks + self._shift[index]

    def extents(self) -> tuple[Extent, ...]:
        return tuple(Extent(run.file.segment, run.first, run.blocks) for run in self.runs)
