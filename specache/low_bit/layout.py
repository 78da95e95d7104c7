"""The byte layout of one page of the low-bit copy.

A page holds 64 tokens of one layer, all KV heads. Its fields lie one after the other, each starting
at a multiple of 16 bytes. KIVI's code:

    field        dtype    shape                meaning
    key_codes    uint8    [Hkv, 64 C]          C = ceil(D b / 8); the packed matrix [64, D]
    key_scale    float16  [Hkv, 64 / g, D]     one per channel and group of g tokens
    key_zero     float16  [Hkv, 64 / g, D]
    value_codes  uint8    [Hkv, D 8 b]         the matrix [D, 64] packed: channels are rows
    value_scale  float16  [Hkv, 64, Gv]        one per token and group of channels
    value_zero   float16  [Hkv, 64, Gv]

`Gv = ceil(D / min(g, D))`: keys are quantised per channel, values per token. A decoded element is
`zero + scale * code` (paper section 3.1; KIVI). Scales and zero points are
float16 for every model dtype: it has three more significant bits than bfloat16, and codes are
computed from the rounded values. `kernels/packing.py` declares how a matrix is packed.

The rotated code (**ours**) has one scale per token and the mean of every key channel and group
instead:

    field        dtype    shape                meaning
    key_codes    uint8    [Hkv, 64 C]          codes of the centred, scaled, rotated key
    key_scale    float16  [Hkv, 64, 1]         one per token
    key_mean     float16  [Hkv, 64 / g, D]     one per channel and group of g tokens
    value_codes  uint8    [Hkv, D 8 b]         codes of the rotated value
    value_scale  float16  [Hkv, 64, 1]         one per token

A decoded key is `mean + W^-1 R^T (scale * level[code])`, a value `R^T (scale * level[code])`. The
rotation `R` and the levels are constants (`kernels/torch/rotated.py`); the key scales `W` belong to
a layer of a sequence (`low_bit/key_scales.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from specache.config import PAGE_TOKENS, Code
from specache.kernels.packing import row_bytes
from specache.kernels.types import LowBitKV, PageRun

FIELD_ALIGNMENT = 16  # bytes


@dataclass(frozen=True)
class Field:
    """One array of a page: its offset in the page (bytes), dtype and shape."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, slab: Tensor) -> Tensor:
        """Return a view [N, *shape] of the field in every page of `slab` uint8 [N, page bytes]."""
        return slab[:, self.offset : self.offset + self.nbytes].view(self.dtype).unflatten(1, self.shape)


@dataclass(frozen=True)
class PageLayout:
    """The page layout of layers of one kind. Layers with equal layouts share a pool.

    Attributes:
        code, bits, group_size: as in `SpeCacheConfig`.
        num_kv_heads: KV heads of this process (a part of all, under tensor parallelism).
        head_dim: elements per head of keys and of values.
    """

    code: Code
    bits: int
    group_size: int
    num_kv_heads: int
    head_dim: int

    @cached_property
    def fields(self) -> Mapping[str, Field]:
        heads, dim, g = self.num_kv_heads, self.head_dim, self.group_size
        key_codes = (heads, PAGE_TOKENS * row_bytes(dim, self.bits))
        value_codes = (heads, dim * row_bytes(PAGE_TOKENS, self.bits))
        per_channel = (heads, PAGE_TOKENS // g, dim)
        if self.code is Code.ROTATED:
            return _place(
                key_codes=(torch.uint8, key_codes),
                key_scale=(torch.float16, (heads, PAGE_TOKENS, 1)),
                key_mean=(torch.float16, per_channel),
                value_codes=(torch.uint8, value_codes),
                value_scale=(torch.float16, (heads, PAGE_TOKENS, 1)),
            )
        per_token = (heads, PAGE_TOKENS, math.ceil(dim / min(g, dim)))
        return _place(
            key_codes=(torch.uint8, key_codes),
            key_scale=(torch.float16, per_channel),
            key_zero=(torch.float16, per_channel),
            value_codes=(torch.uint8, value_codes),
            value_scale=(torch.float16, per_token),
            value_zero=(torch.float16, per_token),
        )

    @cached_property
    def page_bytes(self) -> int:
        last = list(self.fields.values())[-1]
        return _aligned(last.offset + last.nbytes)

    def run(self, slab: Tensor, first: int, count: int) -> PageRun:
        """Return pages `[first, first + count)` of a slab for kernels."""
        pages = slab[first : first + count]
        return PageRun({name: field.view(pages) for name, field in self.fields.items()}, count)

    def low_bit_kv(self, runs: tuple[PageRun, ...], length: int, channel_scales: Tensor | None = None) -> LowBitKV:
        """Return the low-bit copy of one layer of a sequence for kernels."""
        return LowBitKV(self.code, self.bits, self.group_size, self.num_kv_heads, self.head_dim, length, runs, channel_scales)


def _place(**fields: tuple[torch.dtype, tuple[int, ...]]) -> dict[str, Field]:
    placed, offset = {}, 0
    for name, (dtype, shape) in fields.items():
        placed[name] = Field(offset, dtype, shape)
        offset = _aligned(offset + placed[name].nbytes)
    return placed


def _aligned(offset: int) -> int:
    return math.ceil(offset / FIELD_ALIGNMENT) * FIELD_ALIGNMENT
