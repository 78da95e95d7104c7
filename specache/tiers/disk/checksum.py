"""A 64-bit checksum per row, vectorised over rows.

    checksum(row) = salt + sum_i (w_i ^ (w_i >> 32)) * m_i   (mod 2^64)

`w_i` are the row's 64-bit words, `m_i` fixed odd multipliers. Both steps are one to one in a word, so a row in which one word
changed never keeps its checksum, whatever the change. Folding a word's upper half into its lower half makes the same hold for any
two flipped bits; other damage passes with a chance of about 2^-64. The salt says which row it is (segment, layer, KV head, token,
block), so that an intact row in the wrong place is found too. All this is against faults, not against forged rows.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
POSITION_SALT = np.uint64(0xD6E8FEB86659FD93)  # odd, as is the next: what a token and a block add to a salt
BLOCK_SALT = np.uint64(0xA0761D6478BD642F)
_HALF = np.uint64(32)


def checksums(words: Words, salts: Words) -> Words:
    """Rows of 64-bit words [..., W] and their salts [...] -> checksums [...]."""
    mixed = words >> _HALF
    mixed ^= words
    return np.asarray(mixed @ multipliers(words.shape[-1]) + salts, dtype=np.uint64)


def row_salts(base: Words, positions: NDArray[np.int64], blocks: NDArray[np.int64]) -> Words:
    """Salts of rows from their heads' `base` (see `head_salts`), token positions and blocks of the file; the shapes broadcast."""
    return np.asarray(base + positions.astype(np.uint64) * POSITION_SALT + blocks.astype(np.uint64) * BLOCK_SALT, dtype=np.uint64)


def head_salts(segment: str, layer: int, num_kv_heads: int) -> Words:
    """What tells the rows of one file apart by KV head, and from those of every other file -> [Hkv]."""
    seed = _mix(int(segment, 16) + _mix(layer + 1))
    return np.array([_mix(seed + _mix(head + 1)) for head in range(num_kv_heads)], dtype=np.uint64)


@lru_cache
def multipliers(count: int) -> Words:
    """The first `count` of the fixed odd multipliers."""
    return np.array([_mix(_GOLDEN * (i + 1)) | 1 for i in range(count)], dtype=np.uint64)


def _mix(value: int) -> int:
    """splitmix64's output function of a 64-bit number."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
