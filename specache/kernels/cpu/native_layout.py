"""What the C++ kernels take of a low-bit copy: page addresses, layouts, code numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from specache.config import PAGE_TOKENS, Code
from specache.kernels.torch.rotated import rotation
from specache.kernels.types import LowBitKV, PageRun
from specache.platform.extension import native

_FIELDS = {
    Code.KIVI: ("key_codes", "key_scale", "key_zero", "value_codes", "value_scale", "value_zero"),
    Code.ROTATED: ("key_codes", "key_scale", "key_mean", "value_codes", "value_scale", "value_scale"),
}
CODES = {Code.KIVI: 0, Code.ROTATED: 1}


def page_addresses(low_bit_kv: LowBitKV) -> np.ndarray:
    """Return the address of each page, int64 [N]."""
    parts = [run.addresses for run in low_bit_kv.runs]
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def scale_address(low_bit_kv: LowBitKV) -> int:
    """Return the address of the channel scales, 0 if there are none."""
    return 0 if low_bit_kv.channel_scales is None else low_bit_kv.channel_scales.data_ptr()


def layout_of(low_bit_kvs: Sequence[LowBitKV]) -> Any:
    """Return the layout of the first copy with pages: that of another has no offsets."""
    return layout(next((low_bit_kv for low_bit_kv in low_bit_kvs if low_bit_kv.runs), low_bit_kvs[0]))


def layout(low_bit_kv: LowBitKV) -> Any:
    """Return the extension's `Layout` of a low-bit copy."""
    offsets = _offsets(low_bit_kv.runs[0], low_bit_kv.code) if low_bit_kv.runs else (0,) * 6
    return _native_layout(
        low_bit_kv.code, low_bit_kv.bits, low_bit_kv.group_size, low_bit_kv.num_kv_heads, low_bit_kv.head_dim, offsets
    )


def _offsets(run: PageRun, code: Code) -> tuple[int, ...]:
    """Return the byte offset of each field in a page."""
    start = int(run.fields["key_codes"].storage_offset())
    return tuple(int(run.fields[name].storage_offset()) * run.fields[name].itemsize - start for name in _FIELDS[code])


@lru_cache(maxsize=64)
def _native_layout(code: Code, bits: int, group_size: int, heads: int, dim: int, offsets: tuple[int, ...]) -> Any:
    assert PAGE_TOKENS == 64, "csrc/layout.hpp"
    return native.Layout(CODES[code], bits, group_size, heads, dim, min(group_size, dim), list(offsets), _signs(dim))


def _signs(dim: int) -> list[float]:
    """Return the rotation's random signs: each column is one of a Hadamard matrix times a sign.

    The first row of a Hadamard matrix is positive.
    """
    matrix = rotation(dim, torch.device("cpu"))
    first = (matrix != 0).int().argmax(0)  # the first row of each column's block
    return matrix[first, torch.arange(dim, device=matrix.device)].sign().tolist()
