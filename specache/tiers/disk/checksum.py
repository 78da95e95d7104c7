"""Compute a 64-bit checksum per row, vectorised over rows.

    checksum(row) = salt + sum_i (w_i ^ (w_i >> 32)) * m_i   (mod 2^64)

`w_i` are the row's 64-bit words, `m_i` fixed odd multipliers. Both steps are injective in a word,
so a change of one word always changes the checksum. Folding a word's upper half into its lower half
ensures the same for any two flipped bits. Other damage goes undetected with a probability of about
2^-64. The salt identifies the row (segment, layer, KV head, token, block), so an intact row in the
wrong place is detected too. The checksum guards against faults, not against forged rows.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
POSITION_SALT = np.uint64(0xD6E8FEB86659FD93)  # odd, as is the next one: factors of a token's and a block's share of a salt
BLOCK_SALT = np.uint64(0xA0761D6478BD642F)
_HALF = np.uint64(32)


def checksums(words: Words, salts: Words) -> Words:
    """Return the checksums [...] of rows of 64-bit words [..., W] with salts [...]."""
    mixed = words >> _HALF
    mixed ^= words
    return np.asarray(mixed @ multipliers(words.shape[-1]) + salts, dtype=np.uint64)


def row_salts(base: Words, positions: NDArray[np.int64], blocks: NDArray[np.int64]) -> Words:
    """Return the salts of rows, from `head_salts`, token positions and file blocks.

    Shapes broadcast.
    """
    return np.asarray(base + positions.astype(np.uint64) * POSITION_SALT + blocks.astype(np.uint64) * BLOCK_SALT, dtype=np.uint64)


def head_salts(segment: str, layer: int, num_kv_heads: int) -> Words:
    """Return the salts [Hkv] that distinguish the KV heads of a file, and files from each other."""
    seed = _mix(int(segment, 16) + _mix(layer + 1))
    return np.array([_mix(seed + _mix(head + 1)) for head in range(num_kv_heads)], dtype=np.uint64)


@lru_cache
def multipliers(count: int) -> Words:
    """Return the first `count` of the fixed odd multipliers."""
    return np.array([_mix(_GOLDEN * (i + 1)) | 1 for i in range(count)], dtype=np.uint64)


def _mix(value: int) -> int:
    """Return splitmix64's output function of a 64-bit number."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
