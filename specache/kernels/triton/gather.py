"""Gather rows by position from device memory, or from pinned host memory by its mapped address."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_kernel(
    stored,  # int64 [B]: addresses of each sequence's rows [Hkv, capacity, WIDTH]
    stride_h,  # of them, in elements, as the next one
    stride_s,
    positions,  # int64 [B, Hkv, m], -1: none
    out,  # [B, Hkv, m, WIDTH]: zeros for none
    m,
    heads,
    WIDTH: tl.constexpr,
    WIDTH_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per (block of positions, KV head of a sequence)."""
    bh = tl.program_id(1)
    j, element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH_P)
    position = tl.load(positions + bh.to(tl.int64) * m + j, mask=j < m, other=-1)
    kv_rows = tl.load(stored + bh // heads).to(tl.pointer_type(out.dtype.element_ty))
    at = (bh % heads).to(tl.int64) * stride_h + position * stride_s
    chosen = (position >= 0)[:, None] & (element < WIDTH)[None, :]
    data = tl.load(kv_rows + at[:, None] + element[None, :], mask=chosen, other=0.0)
    to = (bh.to(tl.int64) * m + j)[:, None] * WIDTH + element[None, :]
    tl.store(out + to, data, mask=(j < m)[:, None] & (element < WIDTH)[None, :])
