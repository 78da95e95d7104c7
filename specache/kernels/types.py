"""What a kernel sees of the low-bit copy. The byte layout behind it is declared in `specache.quant.layout`.

Symbols: `B` sequences, `Hq` query heads, `Hkv` key-value heads, `G = Hq / Hkv`, `n` rows, `S` tokens of the copy, `D` head
dimension, `b` bits, `g` group size, `C = ceil(D b / 8)` bytes of codes per token, `Gv = ceil(D / min(g, D))` value groups.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PageRun:
    """`N` pages of one layer that lie next to each other in the pool; views, never copies.

    Attributes:
        key_codes, value_codes: uint8 [N, Hkv, 64, C]; code `i` of a byte sits at bits `i b` and up.
        key_scale, key_zero: float16 [N, Hkv, 64 / g, D], one per channel and group of `g` tokens.
        value_scale, value_zero: float16 [N, Hkv, 64, Gv], one per token and group of `min(g, D)` channels.
    """

    key_codes: Tensor
    key_scale: Tensor
    key_zero: Tensor
    value_codes: Tensor
    value_scale: Tensor
    value_zero: Tensor

    @property
    def pages(self) -> int:
        return self.key_codes.shape[0]

    def pages_from(self, start: int, stop: int) -> PageRun:
        """The run's pages `[start, stop)`."""
        return PageRun(
            self.key_codes[start:stop],
            self.key_scale[start:stop],
            self.key_zero[start:stop],
            self.value_codes[start:stop],
            self.value_scale[start:stop],
            self.value_zero[start:stop],
        )


@dataclass(frozen=True)
class LowBitCopy:
    """One layer's low-bit copy of one sequence: `length` tokens in page runs, in token order."""

    bits: int
    group_size: int
    num_kv_heads: int
    head_dim: int
    length: int
    runs: tuple[PageRun, ...]

    @property
    def value_group_size(self) -> int:
        return min(self.group_size, self.head_dim)
