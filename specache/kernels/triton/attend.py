"""Attention over the low-bit copy with fetched pairs swapped in (Algorithm 3).

`fetched_kernel` removes the fetched positions from the scores and attends to their rows.
`low_bit_kernel` attends to the other tokens, a split of them per program. `merge_kernel` merges the
parts by their log-sum-exp. A part is not normalised: `peak`, `total` and the weighted sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specache.kernels.triton.codes import (
    LOWEST,
    PAGE,
    exact_product,
    level_product,
    pointer,
    product,
    rounded_product,
    value_levels,
)


@triton.jit
def fetched_kernel(
    scores,  # [B, Hkv, G, n, capacity]; -inf is put at the fetched positions
    exact,  # float32 [B, Hkv, G, n, k], theirs (HALF; else they are in `scores`)
    positions,  # int64 [B, Hkv, n, k], -1: none
    kv_rows,  # [B, Hkv, n, k, 2 DIM], the values behind
    sums,  # float32 [B, Hkv, G, n, DIM], out
    peaks,  # float32 [B, Hkv, G, n, parts], out: the last part
    totals,
    capacity,
    k,
    heads,
    parts,
    stride_b,  # of `rows`
    stride_h,
    stride_n,
    stride_k,
    G: tl.constexpr,
    G_P: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Attend to fetched rows. A program per (query, KV head of a sequence)."""
    n, row, bh = tl.num_programs(0), tl.program_id(0), tl.program_id(1)
    channel, g = tl.arange(0, DIM_P), tl.arange(0, G_P)
    line = (bh.to(tl.int64) * G + g) * n + row  # [G_P]
    of_rows = (bh // heads).to(tl.int64) * stride_b + (bh % heads) * stride_h + row * stride_n
    peak, total = tl.full((G_P,), LOWEST, tl.float32), tl.zeros((G_P,), tl.float32)
    summed = tl.zeros((G_P, DIM_P), tl.float32)
    for start in range(0, k, BLOCK):
        j = start + tl.arange(0, BLOCK)
        position = tl.load(positions + (bh.to(tl.int64) * n + row) * k + j, mask=j < k, other=-1)
        chosen = (g < G)[:, None] & (position >= 0)[None, :]
        score = scores + line[:, None] * capacity + position[None, :]
        if HALF:
            found = tl.load(exact + line[:, None] * k + j[None, :], mask=chosen, other=float("-inf"))  # [G_P, BLOCK]
        else:
            found = tl.load(score, mask=chosen, other=float("-inf"))
        tl.store(score, tl.full((G_P, BLOCK), float("-inf"), scores.dtype.element_ty), mask=chosen)
        higher = tl.maximum(peak, tl.max(found, 1))
        shrink, weights = tl.exp(peak - higher), tl.exp(found - higher[:, None])
        value = kv_rows + of_rows + j.to(tl.int64)[:, None] * stride_k + DIM + channel[None, :]
        values = tl.load(value, mask=(position >= 0)[:, None] & (channel < DIM)[None, :], other=0.0)  # [BLOCK, DIM_P]
        summed *= shrink[:, None]
        if values.dtype == tl.float32:
            summed = exact_product(weights, values, summed)
        else:
            high = weights.to(values.dtype)
            summed = product((weights - high.to(tl.float32)).to(values.dtype), values, summed)
            summed = product(high, values, summed)
        total = total * shrink + tl.sum(weights, 1)
        peak = higher
    real = g < G
    tl.store(sums + line[:, None] * DIM + channel[None, :], summed, mask=real[:, None] & (channel < DIM)[None, :])
    tl.store(peaks + line * parts + parts - 1, peak, mask=real)
    tl.store(totals + line * parts + parts - 1, total, mask=real)


@triton.jit
def low_bit_kernel(
    scores,  # [B, Hkv, ROWS, capacity], ROWS = G n
    references,  # float32 [B, Hkv, ROWS, capacity / KEY_GROUP] that they are relative to (HALF)
    addresses,  # int64 [B, capacity / PAGE]
    lengths,
    sums,  # float32 [B, Hkv, splits, ROWS, DIM], out
    peaks,  # float32 [B, Hkv, ROWS, parts], out
    totals,
    capacity,
    parts,
    value_codes,  # offsets in a page
    value_scale,
    value_zero,
    unit,  # of a rotated level
    ROTATED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # channels that share a scale; a power of two
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_P: tl.constexpr,  # of a program
    ROW_BLOCKS: tl.constexpr,
    HALF: tl.constexpr,  # for 16-bit models
    KEY_GROUP: tl.constexpr,
    SPLIT: tl.constexpr,  # tokens of a program, whole pages
):
    """Attend to low-bit tokens. A program per (split, KV head and block of queries, sequence).

    The queries of a block share a pass over the codes. KIVI: `sum_t p_t v_t = sum_t (p_t s_t) c_t +
    sum_t p_t z_t` per group of channels. Rotated: the sum stays rotated.
    """
    part, b = tl.program_id(0), tl.program_id(2)
    head, row_block = tl.program_id(1) // ROW_BLOCKS, tl.program_id(1) % ROW_BLOCKS
    bh = (b * (tl.num_programs(1) // ROW_BLOCKS) + head).to(tl.int64)
    length = tl.load(lengths + b)
    pages = addresses + b * (capacity // PAGE)
    GROUPS: tl.constexpr = 1 if ROTATED else DIM_P // GROUP
    REAL_GROUPS: tl.constexpr = 1 if ROTATED else (DIM + GROUP - 1) // GROUP
    channel, group, slot = tl.arange(0, DIM_P), tl.arange(0, GROUPS), tl.arange(0, PAGE)
    row = row_block * ROWS_P + tl.arange(0, ROWS_P)
    score = scores + (bh * ROWS + row) * capacity  # [ROWS_P]
    peak, total = tl.full((ROWS_P,), LOWEST, tl.float32), tl.zeros((ROWS_P,), tl.float32)
    offset = tl.zeros((GROUPS, ROWS_P), tl.float32)
    if GROUPS == 1:
        summed = tl.zeros((DIM_P, ROWS_P), tl.float32)
    else:
        summed = tl.zeros((GROUPS, GROUP, ROWS_P), tl.float32)

    for first in range(part * SPLIT, tl.minimum((part + 1) * SPLIT, length), PAGE):
        page, inside = tl.load(pages + first // PAGE), first + slot < length
        seen = inside[:, None] & (row < ROWS)[None, :]
        found = tl.load(score[None, :] + (first + slot)[:, None], mask=seen, other=float("-inf")).to(tl.float32)  # [PAGE, ROWS_P]
        if HALF:
            reference = references + (bh * ROWS + row) * (capacity // KEY_GROUP)
            if KEY_GROUP == PAGE:
                found += tl.load(reference + first // PAGE, mask=row < ROWS, other=0.0)[None, :]
            else:
                found += tl.load(reference[None, :] + ((first + slot) // KEY_GROUP)[:, None], mask=seen, other=0.0)
        higher = tl.maximum(peak, tl.max(found, 0))
        shrink, weights = tl.exp(peak - higher), tl.exp(found - higher[None, :])
        total = total * shrink + tl.sum(weights, 0)
        peak = higher
        of_scale = (head * PAGE + slot[None, :]) * REAL_GROUPS + group[:, None]
        scaled = inside[None, :] & (group < REAL_GROUPS)[:, None]
        scale = tl.load(pointer(page + value_scale, tl.float16) + of_scale, mask=scaled, other=0.0).to(tl.float32)  # [GROUPS, PAGE]
        if not ROTATED:
            zero = tl.load(pointer(page + value_zero, tl.float16) + of_scale, mask=scaled, other=0.0).to(tl.float32)
            offset = offset * shrink[None, :] + tl.sum(zero[:, :, None] * weights[None, :, :], 1)
        levels = value_levels(page + value_codes, head, BITS, ROTATED, DIM, DIM_P)
        if GROUPS == 1:
            factors = weights * (tl.reshape(scale, (PAGE,)) * unit)[:, None]
            summed *= shrink[None, :]
        else:
            factors = weights[None, :, :] * scale[:, :, None]
            summed *= shrink[None, None, :]
            levels = tl.reshape(levels, (GROUPS, GROUP, PAGE))
        if HALF:
            summed = rounded_product(levels, factors, summed)
        else:
            summed = level_product(levels, factors, summed, True)

    if not ROTATED:
        if GROUPS == 1:
            summed += offset
        else:
            summed += offset[:, None, :]
    summed = tl.reshape(summed, (DIM_P, ROWS_P))
    line = (bh * tl.num_programs(0) + part) * ROWS + row
    real = (channel < DIM)[:, None] & (row < ROWS)[None, :]
    if part * SPLIT < length:
        tl.store(sums + line[None, :] * DIM + channel[:, None], summed, mask=real)
    tl.store(peaks + (bh * ROWS + row) * parts + part, peak, mask=row < ROWS)
    tl.store(totals + (bh * ROWS + row) * parts + part, total, mask=row < ROWS)


@triton.jit
def merge_kernel(
    low_bit_sums,  # float32 [B, Hkv, splits, ROWS, DIM]
    fetched_sums,  # float32 [B, Hkv, ROWS, DIM]
    peaks,  # float32 [B, Hkv, ROWS, parts]
    totals,
    out,  # float32 [B, Hkv, ROWS, DIM]
    low_bit,  # the same, out: the low-bit part, where it is still rotated
    lse,  # float32 [B, Hkv, ROWS]
    splits,
    parts,
    ROTATED: tl.constexpr,
    FETCHED: tl.constexpr,  # whether there is a part behind the splits
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
    PARTS_P: tl.constexpr,
):
    """Merge all parts. A program per (query, KV head of a sequence)."""
    row, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    line = bh * ROWS + row
    channel, part = tl.arange(0, DIM_P), tl.arange(0, PARTS_P)
    peak_of = tl.load(peaks + line * parts + part, mask=part < parts, other=LOWEST)
    peak = tl.max(peak_of, 0)
    total = tl.sum(tl.load(totals + line * parts + part, mask=part < parts, other=0.0) * tl.exp(peak_of - peak), 0)
    tl.store(lse + line, peak + tl.log(total))
    inverse = 1.0 / tl.maximum(total, 1.1754944e-38)
    summed = tl.zeros((DIM_P,), tl.float32)
    for i in range(0, splits):
        if tl.load(totals + line * parts + i) > 0:  # an empty split has written no sum
            weight = tl.exp(tl.load(peaks + line * parts + i) - peak) * inverse
            one = low_bit_sums + ((bh * splits + i) * ROWS + row) * DIM + channel
            summed += weight * tl.load(one, mask=channel < DIM, other=0.0)
    fetched = tl.zeros((DIM_P,), tl.float32)
    if FETCHED:
        weight = tl.exp(tl.load(peaks + line * parts + parts - 1) - peak) * inverse
        fetched = weight * tl.load(fetched_sums + line * DIM + channel, mask=channel < DIM, other=0.0)
    if ROTATED:
        tl.store(low_bit + line * DIM + channel, summed, mask=channel < DIM)
        tl.store(out + line * DIM + channel, fetched, mask=channel < DIM)
    else:
        tl.store(out + line * DIM + channel, fetched + summed, mask=channel < DIM)
