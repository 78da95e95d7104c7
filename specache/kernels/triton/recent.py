"""Attention outside the low-bit copy, one launch per layer, and the merge of both parts.

`recent_kernel` appends the real token to the residual and attends to it, and to the draft token.
`join_kernel` merges the result with the low-bit part, in the layout and dtype that the model uses
next.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specache.kernels.triton.codes import LOWEST, exact_product, product
from specache.kernels.triton.score import capped


@triton.jit
def recent_kernel(
    query,  # [B, Hkv, ROWS, DIM], ROWS = G n
    keys,  # [B, Hkv, n, DIM], the step's own
    values,
    residual,  # [B, 2, Hkv, size, DIM], changed: the real token is appended
    counts,  # int64 [B]: tokens in it before
    sinks,  # float32 [Hkv G] (SINKS)
    finite,  # uint8 []: set to 0 if the real token is not finite
    out,  # float32 [B, Hkv, ROWS, DIM], out
    lse,  # float32 [B, Hkv, ROWS], out: with the sinks
    own_lse,  # the same without
    scaling,
    softcap,
    size,
    heads,
    keys_b,  # strides
    keys_h,
    keys_n,
    values_b,
    values_h,
    values_n,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_P: tl.constexpr,  # of a program
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens at a time
):
    """Append the real token and attend. A program per (block of queries, KV head of a sequence)."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    channel, token = tl.arange(0, DIM_P), tl.arange(0, BLOCK)
    row = tl.program_id(0) * ROWS_P + tl.arange(0, ROWS_P)
    inside, real = channel < DIM, row < ROWS
    slot = tl.load(counts + b)
    own_keys, own_values = keys + b * keys_b + h * keys_h, values + b * values_b + h * values_h
    stored_keys = residual + (2 * b * heads + h) * size * DIM
    stored_values = residual + ((2 * b + 1) * heads + h) * size * DIM
    key, value = tl.load(own_keys + channel, mask=inside, other=0.0), tl.load(own_values + channel, mask=inside, other=0.0)
    tl.store(stored_keys + slot * DIM + channel, key, mask=inside)
    tl.store(stored_values + slot * DIM + channel, value, mask=inside)
    nothing = (key - key).to(tl.float32) + (value - value).to(tl.float32)  # NaN if not finite
    if tl.sum((nothing != 0.0).to(tl.int32), 0) > 0:
        tl.store(finite, 0)
    tl.debug_barrier()

    q = tl.load(query + ((bh * ROWS + row) * DIM)[None, :] + channel[:, None], mask=inside[:, None] & real[None, :], other=0.0)
    peak, total = tl.full((ROWS_P,), LOWEST, tl.float32), tl.zeros((ROWS_P,), tl.float32)
    summed = tl.zeros((DIM_P, ROWS_P), tl.float32)
    for start in range(0, slot + 1, BLOCK):
        at = start + token
        seen = at <= slot
        block = tl.load(stored_keys + at[:, None] * DIM + channel[None, :], mask=seen[:, None] & inside[None, :], other=0.0)
        score = exact_product(block, q, tl.zeros((BLOCK, ROWS_P), tl.float32)) * scaling
        if SOFTCAP:
            score = capped(score, softcap)
        score = tl.where(seen[:, None], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 0))
        shrink, weights = tl.exp(peak - higher), tl.exp(score - higher[None, :])
        summed *= shrink[None, :]
        block = tl.load(stored_values + at[None, :] * DIM + channel[:, None], mask=inside[:, None] & seen[None, :], other=0.0)
        if block.dtype == tl.float32:
            summed = exact_product(block, weights, summed)
        else:
            high = weights.to(block.dtype)
            summed = product(block, (weights - high.to(tl.float32)).to(block.dtype), summed)
            summed = product(block, high, summed)
        total = total * shrink + tl.sum(weights, 0)
        peak = higher
    if N == 2:  # the draft query sees its own token too
        key = tl.load(own_keys + keys_n + channel, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(own_values + values_n + channel, mask=inside, other=0.0).to(tl.float32)
        score = tl.sum(q.to(tl.float32) * key[:, None], 0) * scaling  # [ROWS_P]
        if SOFTCAP:
            score = capped(score, softcap)
        score = tl.where(row % 2 == 1, score, float("-inf"))
        higher = tl.maximum(peak, score)
        shrink, weight = tl.exp(peak - higher), tl.exp(score - higher)
        summed = summed * shrink[None, :] + value[:, None] * weight[None, :]
        total = total * shrink + weight
        peak = higher
    line = bh * ROWS + row
    own = peak + tl.log(total)
    tl.store(own_lse + line, own, mask=real)
    if SINKS:
        sink = tl.load(sinks + h * (ROWS // N) + row // N, mask=real, other=0.0)
        higher = tl.maximum(own, sink)
        own = higher + tl.log(tl.exp(own - higher) + tl.exp(sink - higher))
    tl.store(lse + line, own, mask=real)
    tl.store(out + (line * DIM)[None, :] + channel[:, None], summed / total[None, :], mask=inside[:, None] & real[None, :])


@triton.jit
def join_kernel(
    low_bit_out,  # float32 [B, Hkv, ROWS, DIM]
    low_bit_lse,  # float32 [B, Hkv, ROWS]
    recent,  # what `recent_kernel` wrote
    recent_lse,
    own_lse,
    out,  # [B, n, Hkv G, DIM], out
    heads,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
):
    """Merge both parts. A program per (query, KV head of a sequence)."""
    row, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, DIM_P)
    inside = channel < DIM
    line = bh * ROWS + row
    low_bit, outside = tl.load(low_bit_lse + line), tl.load(recent_lse + line)
    higher = tl.maximum(low_bit, outside)
    total = higher + tl.log(tl.exp(low_bit - higher) + tl.exp(outside - higher))
    joined = tl.load(low_bit_out + line * DIM + channel, mask=inside, other=0.0) * tl.exp(low_bit - total)
    joined += tl.load(recent + line * DIM + channel, mask=inside, other=0.0) * tl.exp(tl.load(own_lse + line) - total)
    head = (bh % heads) * (ROWS // N) + row // N
    to = (((bh // heads) * N + row % N) * heads * (ROWS // N) + head) * DIM
    tl.store(out + to + channel, joined.to(out.dtype.element_ty), mask=inside)
