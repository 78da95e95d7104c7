"""The layout of rows on disk.

    file      <segment>-L<layer>.rows: the blocks of one layer that one writer appended
    block     [Hkv, 64, row | checksum], padded to 4,096 bytes, the unit of direct I/O
    row       [K | V] of one token and one KV head, 2 D elements of the model's dtype, native endian
    checksum  8 bytes, see `checksum`

A segment is 16 random hexadecimal digits; it holds what one writer wrote between two forks. Blocks
are full and written once. The table that maps tokens to blocks is kept outside the file
(`extents`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from specache.errors import SlowTierError
from specache.tiers.disk.checksum import Words

LAYOUT_VERSION = 1  # version of the layout above and of `checksum`
BLOCK_TOKENS = 64
BLOCK_ALIGNMENT = 4096  # bytes
CHECKSUM_BYTES = 8

Index = NDArray[np.int64]

assert np.dtype(np.uint64).itemsize == CHECKSUM_BYTES
assert BLOCK_ALIGNMENT % CHECKSUM_BYTES == 0


def file_name(segment: str, layer: int) -> str:
    """Return the name of the file that holds a layer's rows of a segment."""
    return f"{segment}-L{layer:03d}.rows"


@dataclass(frozen=True)
class RowLayout:
    """Sizes of one layer's blocks, in bytes.

    Args:
        itemsize: bytes per element of a row.

    Raises:
        SlowTierError: a row is not a whole number of 64-bit words (an odd head dimension at 16
            bits).
    """

    num_kv_heads: int
    head_dim: int
    itemsize: int

    def __post_init__(self) -> None:
        if self.row_bytes % CHECKSUM_BYTES:
            raise SlowTierError(
                f"The disk tier needs an even head dimension, and this layer has {self.head_dim} of {self.itemsize} bytes. "
                "Use slow_tier='ram'."
            )

    @cached_property
    def row_bytes(self) -> int:
        return 2 * self.head_dim * self.itemsize

    @cached_property
    def words(self) -> int:
        """Return the 64-bit words of a row without its checksum."""
        return self.row_bytes // CHECKSUM_BYTES

    @cached_property
    def stride(self) -> int:
        """Return the distance from one row to the next."""
        return self.row_bytes + CHECKSUM_BYTES

    @cached_property
    def block_bytes(self) -> int:
        used = self.num_kv_heads * BLOCK_TOKENS * self.stride
        return -(-used // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT

    def offsets(self, blocks: Index, heads: Index, slots: Index) -> Index:
        """Return the rows' byte offsets in a file. `slots` are token indices within a block."""
        return np.asarray(blocks * self.block_bytes + (heads * BLOCK_TOKENS + slots) * self.stride)

    def place(self, offset: int) -> tuple[int, int, int]:
        """Return (block, head, slot) of the row that holds a byte of a file.

        Padding counts to the last row.
        """
        block, rest = divmod(offset, self.block_bytes)
        head, slot = divmod(min(rest // self.stride, self.num_kv_heads * BLOCK_TOKENS - 1), BLOCK_TOKENS)
        return block, head, slot

    def block_view(self, words: Words, count: int) -> Words:
        """View `count` blocks in memory as [count, Hkv, 64, words + 1], the checksum last."""
        strides = (self.block_bytes, BLOCK_TOKENS * self.stride, self.stride, CHECKSUM_BYTES)
        shape = (count, self.num_kv_heads, BLOCK_TOKENS, self.words + 1)
        return np.ndarray(shape, np.uint64, buffer=words, strides=strides)
