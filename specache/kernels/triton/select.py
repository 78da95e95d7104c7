"""The `k` largest probabilities per KV head and row, averaged over the `G` query heads: linear in `S`.

A probability is not negative, so its bits as an integer have its order. The k-th largest number is found digit by digit, from
the highest: each pass counts, over all blocks, the numbers that share the digits found so far by their next one. What is above
it, and of its equals the first ones, is then written in ascending order of position, each block knowing what those before it write.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specache.kernels.triton.codes import LOWEST

DIGITS: tl.constexpr = tl.constexpr(4)
DIGIT_BITS: tl.constexpr = tl.constexpr(8)
BINS: tl.constexpr = tl.constexpr(256)


@triton.jit
def peaks_kernel(
    scores,  # float32 [lines, size]
    peaks,  # float32 [lines, blocks], out
    totals,  # float32 [lines, blocks], out: sum of exp(score - peak)
    size,
    BLOCK: tl.constexpr,
):
    """A program per (block, line of scores)."""
    block, line = tl.program_id(0), tl.program_id(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(scores + line.to(tl.int64) * size + at, mask=at < size, other=float("-inf"))
    peak = tl.maximum(tl.max(found, 0), LOWEST)
    tl.store(peaks + line * tl.num_programs(0) + block, peak)
    tl.store(totals + line * tl.num_programs(0) + block, tl.sum(tl.exp(found - peak), 0))


@triton.jit
def mass_kernel(
    scores,  # float32 [B, Hkv, G, n, size]
    rest_lse,  # float32 [B, Hkv, G, n]
    lengths,  # int32 [B]
    peaks,  # [B, Hkv, G, n, blocks]
    totals,
    mass,  # int32 [B, Hkv, n, size], out: the bits of the mean probability
    histogram,  # int32 [B, Hkv, n, DIGITS, BINS], zeros; the first digit is counted here
    size,
    heads,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_P: tl.constexpr,
):
    """A program per (block, row, KV head of a sequence)."""
    block, row, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks, n = tl.num_programs(0), tl.num_programs(1)
    at, part = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCKS_P)
    mean = tl.zeros((BLOCK,), tl.float32)
    for g in range(G):
        line = (bh.to(tl.int64) * G + g) * n + row
        peak_of = tl.load(peaks + line * blocks + part, mask=part < blocks, other=LOWEST)
        peak = tl.max(peak_of, 0)
        total = tl.sum(tl.load(totals + line * blocks + part, mask=part < blocks, other=0.0) * tl.exp(peak_of - peak), 0)
        rest = tl.load(rest_lse + line)
        lse = peak + tl.log(total)
        higher = tl.maximum(tl.maximum(lse, rest), LOWEST)
        lse = higher + tl.log(tl.exp(lse - higher) + tl.exp(rest - higher))
        found = tl.load(scores + line * size + at, mask=at < size, other=float("-inf"))
        mean += tl.exp(found - peak) * (tl.exp(peak - lse) / G)
    bits = mean.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    line = bh.to(tl.int64) * n + row
    tl.store(mass + line * size + at, bits, mask=at < size)
    counts = tl.histogram(digit_of(bits, 0), BINS, mask=at < tl.load(lengths + bh // heads))
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram + line * (DIGITS * BINS) + bins, counts, mask=counts > 0)


@triton.jit
def digit_kernel(
    mass,
    lengths,
    histogram,
    size,
    k,
    heads,
    DIGIT: tl.constexpr,  # to count
    BLOCK: tl.constexpr,
):
    """A program per (block, row, KV head of a sequence)."""
    block, row, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = bh.to(tl.int64) * tl.num_programs(1) + row
    length = tl.load(lengths + bh // heads)
    prefix, _ = kth(histogram + line * (DIGITS * BINS), tl.minimum(k, length), DIGIT)
    at = block * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(mass + line * size + at, mask=at < length, other=0)
    same = (at < length) & ((bits >> (DIGIT_BITS * (DIGITS - DIGIT) - 1)) == prefix)
    counts = tl.histogram(digit_of(bits, DIGIT), BINS, mask=same)
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram + line * (DIGITS * BINS) + DIGIT * BINS + bins, counts, mask=counts > 0)


@triton.jit
def count_kernel(
    mass,
    lengths,
    histogram,
    above,  # int32 [B, Hkv, n, blocks], out: numbers above the k-th largest
    equal,  # int32 [B, Hkv, n, blocks], out: its equals
    size,
    k,
    heads,
    BLOCK: tl.constexpr,
):
    """A program per (block, row, KV head of a sequence)."""
    block, row, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = bh.to(tl.int64) * tl.num_programs(1) + row
    length = tl.load(lengths + bh // heads)
    level, _ = kth(histogram + line * (DIGITS * BINS), tl.minimum(k, length), DIGITS)
    at = block * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(mass + line * size + at, mask=at < length, other=0)
    tl.store(above + line * tl.num_programs(0) + block, tl.sum(((bits > level) & (at < length)).to(tl.int32), 0))
    tl.store(equal + line * tl.num_programs(0) + block, tl.sum(((bits == level) & (at < length)).to(tl.int32), 0))


@triton.jit
def positions_kernel(
    mass,
    lengths,
    histogram,
    above,
    equal,
    positions,  # int64 [B, Hkv, n, k], out
    size,
    k,
    heads,
    BLOCK: tl.constexpr,
    BLOCKS_P: tl.constexpr,
):
    """A program per (block, row, KV head of a sequence)."""
    block, row, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks = tl.num_programs(0)
    line = bh.to(tl.int64) * tl.num_programs(1) + row
    length = tl.load(lengths + bh // heads)
    count = tl.minimum(k, length)
    level, room = kth(histogram + line * (DIGITS * BINS), count, DIGITS)
    part = tl.arange(0, BLOCKS_P)
    above_before = tl.sum(tl.load(above + line * blocks + part, mask=part < block, other=0), 0)
    equal_before = tl.sum(tl.load(equal + line * blocks + part, mask=part < block, other=0), 0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(mass + line * size + at, mask=at < length, other=0)
    is_equal = ((bits == level) & (at < length)).to(tl.int32)
    first_ones = (is_equal > 0) & (equal_before + tl.cumsum(is_equal, 0) <= room)
    wanted = ((bits > level) & (at < length)) | first_ones
    before = above_before + tl.minimum(equal_before, room)
    place = before + tl.cumsum(wanted.to(tl.int32), 0) - 1
    tl.store(positions + line * k + place, at.to(tl.int64), mask=wanted)
    if block == 0:
        for start in range(0, k, BLOCK):
            j = start + tl.arange(0, BLOCK)
            tl.store(positions + line * k + j, tl.full((BLOCK,), -1, tl.int64), mask=(j >= count) & (j < k))


@triton.jit
def digit_of(bits, DIGIT: tl.constexpr):
    """The digit of non-negative numbers of 31 bits; the last one has a bit less."""
    SHIFT: tl.constexpr = DIGIT_BITS * (DIGITS - 1 - DIGIT) - 1
    if SHIFT < 0:
        return bits & (BINS // 2 - 1)
    return (bits >> SHIFT) & (BINS - 1)


@triton.jit
def kth(histogram, k, FOUND: tl.constexpr):
    """The first `FOUND` digits of the k-th largest number, and which of the numbers that share them it is.

    `histogram` is a line's int32 [DIGITS, BINS]. With `k` 0: more than every number.
    """
    bins, prefix = tl.arange(0, BINS), 0
    for digit in tl.static_range(FOUND):
        counts = tl.load(histogram + digit * BINS + bins)
        at_least = tl.cumsum(counts, 0, reverse=True)
        found = tl.sum((at_least >= k).to(tl.int32), 0) - 1
        k -= tl.sum(tl.where(bins > found, counts, 0), 0)
        if digit == DIGITS - 1:
            prefix = prefix * (BINS // 2) + found
        else:
            prefix = prefix * BINS + found
    return prefix, k
