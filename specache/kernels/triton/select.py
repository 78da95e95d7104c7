"""Select the `k` largest probabilities per KV head and query, averaged over `G` heads.

A probability is not negative, so its bits as an integer have its order. A radix select finds the
k-th largest number digit by digit, from the highest: each pass counts, over all blocks, the numbers
that share the digits found so far by their next digit. Then the numbers above it, and the first
ones of its equals, are written in ascending order of position. Each block knows how many the blocks
before it write.

Numbers have 31 bits; for a 16-bit model, whose scores are no finer, only the upper 16: the exponent
and 8 bits behind it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specache.kernels.triton.codes import LOWEST

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
    """Reduce blocks of scores to peaks and sums. A program per (line of scores, block).

    Lines come first: only a grid's first dimension may have more than 65,535 programs.
    """
    line, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(scores + line.to(tl.int64) * size + at, mask=at < size, other=float("-inf"))
    peak = tl.maximum(tl.max(found, 0), LOWEST)
    tl.store(peaks + line * blocks + block, peak)
    tl.store(totals + line * blocks + block, tl.sum(tl.exp(found - peak), 0))


@triton.jit
def mean_prob_kernel(
    scores,  # float32 [B, Hkv, G, n, size]
    rest_lse,  # float32 [B, Hkv, G, n]
    lengths,  # int32 [B]
    peaks,  # [B, Hkv, G, n, blocks]
    totals,
    mean_prob,  # int32 [B, Hkv, n, size], out: the bits of the mean probability
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
    tl.store(mean_prob + line * size + at, bits, mask=at < size)
    counts = tl.histogram(digit_of(bits, 0, 31), BINS, mask=at < tl.load(lengths + bh // heads))
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram + line * (digits_of(31) * BINS) + bins, counts, mask=counts > 0)


@triton.jit
def parts_kernel(
    scores,  # float16 [lines, size], relative to
    references,  # float32 [lines, size / GROUP]
    lengths,  # int32 [B]
    peaks,  # float32 [lines, size / GROUP], out
    totals,  # the same, out: sums of exp(score - peak)
    size,
    lines,  # of a sequence
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # of a program
):
    """Recompute peaks and sums of groups after exact scores replaced others.

    A program per (line, block of groups).
    """
    line = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + line // lines)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    of_group = line * (size // GROUP) + group
    reference = tl.load(references + of_group, mask=group * GROUP < length, other=0.0)
    found = tl.load(scores + line * size + at, mask=at < length, other=float("-inf")).to(tl.float32) + reference[:, None]
    peak = tl.maximum(tl.max(found, 1), LOWEST)
    tl.store(peaks + of_group, peak, mask=group * GROUP < length)
    tl.store(totals + of_group, tl.sum(tl.exp(found - peak[:, None]), 1), mask=group * GROUP < length)


@triton.jit
def normaliser_kernel(
    peaks,  # float32 [lines, groups]
    totals,
    rest_lse,  # float32 [lines]
    lengths,  # int32 [B]
    normaliser,  # float32 [lines], out: log-sum-exp of the low-bit copy and the rest
    groups,
    lines,  # of a sequence
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the normaliser of a line of scores. A program per line."""
    line = tl.program_id(0).to(tl.int64)
    count = (tl.load(lengths + line // lines) + GROUP - 1) // GROUP
    peak_of, total_of = tl.full((BLOCK,), LOWEST, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        peak = tl.load(peaks + line * groups + at, mask=at < count, other=LOWEST)
        total = tl.load(totals + line * groups + at, mask=at < count, other=0.0)
        higher_of = tl.maximum(peak_of, peak)
        total_of = total_of * tl.exp(peak_of - higher_of) + total * tl.exp(peak - higher_of)
        peak_of = higher_of
    highest = tl.max(peak_of, 0)
    lse = highest + tl.log(tl.sum(total_of * tl.exp(peak_of - highest), 0))
    rest = tl.load(rest_lse + line)
    higher = tl.maximum(tl.maximum(lse, rest), LOWEST)
    tl.store(normaliser + line, higher + tl.log(tl.exp(lse - higher) + tl.exp(rest - higher)))


@triton.jit
def half_mean_prob_kernel(
    scores,  # float16 [B, Hkv, G, n, size], relative to
    references,  # float32 [B, Hkv, G, n, size / GROUP]
    normaliser,  # float32 [B, Hkv, G, n]
    lengths,  # int32 [B]
    mean_prob,  # int16 [B, Hkv, n, size], out: the upper bits of the mean probability
    histogram,  # int32 [B, Hkv, n, digits, BINS], zeros; the first digit is counted here
    size,
    heads,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per (block, row, KV head of a sequence)."""
    block, row, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.num_programs(1)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(lengths + bh // heads)
    mean = tl.zeros((BLOCK,), tl.float32)
    for g in range(G):
        line = (bh.to(tl.int64) * G + g) * n + row
        found = tl.load(scores + line * size + at, mask=inside, other=float("-inf")).to(tl.float32)
        found += tl.load(references + line * (size // GROUP) + at // GROUP, mask=inside, other=0.0)
        mean += tl.exp(found - tl.load(normaliser + line)) / G
    bits = ((mean.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >> 15) & 0xFFFF
    line = bh.to(tl.int64) * n + row
    tl.store(mean_prob + line * size + at, bits.to(tl.int16), mask=inside)
    counts = tl.histogram(digit_of(bits, 0, 16), BINS, mask=inside)
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram + line * (digits_of(16) * BINS) + bins, counts, mask=counts > 0)


@triton.jit
def digit_kernel(
    mean_prob,
    lengths,
    histogram,
    size,
    k,
    short_k,
    long_from,
    heads,
    NUMBER: tl.constexpr,  # bits
    DIGIT: tl.constexpr,  # to count
    BLOCK: tl.constexpr,
):
    """A program per (block, row, KV head of a sequence)."""
    block, row, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = bh.to(tl.int64) * tl.num_programs(1) + row
    length = tl.load(lengths + bh // heads)
    of_line = histogram + line * (digits_of(NUMBER) * BINS)
    prefix, _ = kth(of_line, pairs_of(length, k, short_k, long_from), DIGIT, NUMBER)
    at = block * BLOCK + tl.arange(0, BLOCK)
    bits = numbers(mean_prob + line * size, at, length)
    same = (at < length) & ((bits >> (NUMBER - DIGIT_BITS * DIGIT)) == prefix)
    counts = tl.histogram(digit_of(bits, DIGIT, NUMBER), BINS, mask=same)
    bins = tl.arange(0, BINS)
    tl.atomic_add(of_line + DIGIT * BINS + bins, counts, mask=counts > 0)


@triton.jit
def count_kernel(
    mean_prob,
    lengths,
    histogram,
    above,  # int32 [B, Hkv, n, blocks], out: numbers above the k-th largest
    equal,  # int32 [B, Hkv, n, blocks], out: its equals
    size,
    k,
    short_k,
    long_from,
    heads,
    NUMBER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program per (block, row, KV head of a sequence)."""
    block, row, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = bh.to(tl.int64) * tl.num_programs(1) + row
    length = tl.load(lengths + bh // heads)
    count = pairs_of(length, k, short_k, long_from)
    level, _ = kth(histogram + line * (digits_of(NUMBER) * BINS), count, digits_of(NUMBER), NUMBER)
    at = block * BLOCK + tl.arange(0, BLOCK)
    bits = numbers(mean_prob + line * size, at, length)
    tl.store(above + line * tl.num_programs(0) + block, tl.sum(((bits > level) & (at < length)).to(tl.int32), 0))
    tl.store(equal + line * tl.num_programs(0) + block, tl.sum(((bits == level) & (at < length)).to(tl.int32), 0))


@triton.jit
def positions_kernel(
    mean_prob,
    lengths,
    histogram,
    above,
    equal,
    positions,  # int64 [B, Hkv, n, k], out
    size,
    k,
    short_k,
    long_from,
    heads,
    NUMBER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS_P: tl.constexpr,
):
    """A program per (block, row, KV head of a sequence)."""
    block, row, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks = tl.num_programs(0)
    line = bh.to(tl.int64) * tl.num_programs(1) + row
    length = tl.load(lengths + bh // heads)
    count = pairs_of(length, k, short_k, long_from)
    level, room = kth(histogram + line * (digits_of(NUMBER) * BINS), count, digits_of(NUMBER), NUMBER)
    part = tl.arange(0, BLOCKS_P)
    above_before = tl.sum(tl.load(above + line * blocks + part, mask=part < block, other=0), 0)
    equal_before = tl.sum(tl.load(equal + line * blocks + part, mask=part < block, other=0), 0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    bits = numbers(mean_prob + line * size, at, length)
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
def pairs_of(length, k, short_k, long_from):
    """Return the pairs that a query selects in a sequence of so many low-bit tokens."""
    return tl.minimum(tl.where(length < long_from, short_k, k), length)


@triton.constexpr_function
def digits_of(number):
    """Return the digits of numbers with this many bits."""
    return (number + 7) // 8


@triton.jit
def numbers(mean_prob, at, length):
    """Load numbers of a line at these indices, 0 past its end."""
    found = tl.load(mean_prob + at, mask=at < length, other=0).to(tl.int32)
    if mean_prob.dtype.element_ty == tl.int16:
        found = found & 0xFFFF
    return found


@triton.jit
def digit_of(bits, DIGIT: tl.constexpr, NUMBER: tl.constexpr):
    """Return a digit of non-negative numbers. The last one may be shorter."""
    SHIFT: tl.constexpr = NUMBER - DIGIT_BITS * (DIGIT + 1)
    if SHIFT < 0:
        return bits & (BINS // 2 - 1)
    return (bits >> SHIFT) & (BINS - 1)


@triton.jit
def kth(histogram, k, FOUND: tl.constexpr, NUMBER: tl.constexpr):
    """Return the first `FOUND` digits of the k-th largest number, and its rank among equals.

    `histogram` is a line's int32 [digits, BINS]. With `k` 0, the digits are above every number.
    """
    bins, prefix = tl.arange(0, BINS), 0
    for digit in tl.static_range(FOUND):
        counts = tl.load(histogram + digit * BINS + bins)
        at_least = tl.cumsum(counts, 0, reverse=True)
        found = tl.sum((at_least >= k).to(tl.int32), 0) - 1
        k -= tl.sum(tl.where(bins > found, counts, 0), 0)
        if DIGIT_BITS * (digit + 1) > NUMBER:
            prefix = prefix * (BINS // 2) + found
        else:
            prefix = prefix * BINS + found
    return prefix, k
