"""Fetch the rows of a decode step through a hot set (`specache.device.device_hot_set`).

Looking up, claiming and filling take one launch each. The numbers of a hot set are int32 per head
of a sequence: `table` [T + 2] position -> slot, `owner` and `used` [C + 2] by slot, `tick` [1].
Slot `C` stands for rows that are not cached, slot `C + 1` for rows without a slot. Positions are
int64 [k], -1 where there is no pair. Heads are independent: one program claims for one head, and
reads what it wrote behind a barrier.
"""

# mypy: disable-error-code="attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

AGE_BINS: tl.constexpr = tl.constexpr(256)  # of one of an age's two digits


@triton.jit
def claim_kernel(
    positions,  # [B, Hkv, k] to look up, heads `stride` apart
    table,
    owner,
    used,
    tick,
    found,  # int64 [B, Hkv, k], out: slots of the cached positions
    missing,  # int64 [B, Hkv, k], out: positions to be read, -1 elsewhere
    claimed,  # int64 [B, Hkv, k], out: slots that they go to
    wanted,  # int64 [B, Hkv, k], out: the positions once more (not AHEAD)
    victims,  # int64 [B, Hkv, k], scratch
    counters,  # int64 [3]: wanted, missing, read ahead
    stride,
    k,
    slots,
    tokens,
    AHEAD: tl.constexpr,  # prefetch: begin a tick, and skip positions that get no slot
    BLOCK: tl.constexpr,  # slots at a time
    BLOCK_K: tl.constexpr,  # positions at a time
):
    """Mark cached positions as used; give missing ones the least recently used slots.

    A program per head of a sequence.
    """
    bh = tl.program_id(0).to(tl.int64)
    asked, lines = positions + bh * stride, bh * k
    table, owner, used = table + bh * (tokens + 2), owner + bh * (slots + 2), used + bh * (slots + 2)
    now = tl.load(tick + bh)
    if AHEAD:
        now += 1
        tl.debug_barrier()  # every thread has read it
        tl.store(tick + bh, now)
    wants = 0
    misses = 0
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        position = tl.load(asked + j, mask=j < k, other=-1)
        slot = tl.load(table + position, mask=position >= 0, other=slots)
        absent = (position >= 0) & (slot == slots)
        tl.store(used + slot, tl.zeros_like(slot) + now, mask=slot < slots)
        tl.store(missing + lines + j, tl.where(absent, position, -1), mask=j < k)
        if not AHEAD:
            tl.store(found + lines + j, slot.to(tl.int64), mask=j < k)
            tl.store(wanted + lines + j, position, mask=j < k)
        wants += tl.sum((position >= 0).to(tl.int32), 0)
        misses += tl.sum(absent.to(tl.int32), 0)
    tl.debug_barrier()
    evicted = 0
    if misses > 0:
        evicted = evict(table, owner, used, victims + lines, misses, now, slots, tokens, BLOCK)
        tl.debug_barrier()
    newcomers = 0
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        position = tl.load(missing + lines + j, mask=j < k, other=-1)
        absent = (position >= 0).to(tl.int32)
        rank = newcomers + tl.cumsum(absent, 0) - 1
        granted = (absent > 0) & (rank < evicted)
        slot = tl.load(victims + lines + rank, mask=granted, other=slots + 1)
        tl.store(claimed + lines + j, slot, mask=j < k)
        tl.store(table + position, slot.to(tl.int32), mask=granted)
        tl.store(owner + slot, position.to(tl.int32), mask=granted)
        tl.store(used + slot, tl.zeros_like(rank) + now, mask=granted)
        if AHEAD:
            tl.store(missing + lines + j, tl.where(granted, position, -1), mask=j < k)
        newcomers += tl.sum(absent, 0)
    if AHEAD:
        tl.atomic_add(counters + 2, evicted.to(tl.int64))
    else:
        tl.atomic_add(counters, wants.to(tl.int64))
        tl.atomic_add(counters + 1, misses.to(tl.int64))


@triton.jit
def evict(table, owner, used, victims, count, now, slots, tokens, BLOCK: tl.constexpr):
    """Evict the `count` least recently used slots of a head, none that is used now -> how many.

    Their numbers go to `victims`, ascending. The age of the youngest is found in two digits, as
    `select` finds the k-th largest number.
    """
    bins = tl.arange(0, AGE_BINS)
    counts = tl.zeros((AGE_BINS,), tl.int32)
    for start in range(0, slots, BLOCK):
        age = ages(used, start, now, slots, BLOCK)
        counts += tl.histogram(age >> 8, AGE_BINS, mask=age > 0)
    evicted = tl.minimum(count, tl.sum(counts, 0))
    high = tl.sum((tl.cumsum(counts, 0, reverse=True) >= evicted).to(tl.int32), 0) - 1
    left = evicted - tl.sum(tl.where(bins > high, counts, 0), 0)
    counts = tl.zeros((AGE_BINS,), tl.int32)
    for start in range(0, slots, BLOCK):
        age = ages(used, start, now, slots, BLOCK)
        counts += tl.histogram(age & 255, AGE_BINS, mask=(age > 0) & ((age >> 8) == high))
    low = tl.sum((tl.cumsum(counts, 0, reverse=True) >= left).to(tl.int32), 0) - 1
    room = left - tl.sum(tl.where(bins > low, counts, 0), 0)  # of those that are exactly as old
    youngest = high * 256 + low
    before = 0
    equals_before = 0
    for start in range(0, slots, BLOCK):
        age = ages(used, start, now, slots, BLOCK)
        is_equal = ((age == youngest) & (age > 0)).to(tl.int32)
        chosen = (age > youngest) | ((is_equal > 0) & (equals_before + tl.cumsum(is_equal, 0) <= room))
        place = before + tl.cumsum(chosen.to(tl.int32), 0) - 1
        slot = start + tl.arange(0, BLOCK)
        position = tl.load(owner + slot, mask=chosen, other=tokens + 1)
        tl.store(table + position, tl.zeros_like(position) + slots, mask=position < tokens)
        tl.store(victims + place, slot.to(tl.int64), mask=chosen)
        before += tl.sum(chosen.to(tl.int32), 0)
        equals_before += tl.sum(is_equal, 0)
    return evicted


@triton.jit
def ages(used, start, now, slots, BLOCK: tl.constexpr):
    """Return ticks since slots from `start` on were used, at most 65,535; 0 past the last."""
    slot = start + tl.arange(0, BLOCK)
    return tl.minimum(now - tl.load(used + slot, mask=slot < slots, other=now), 65535)


@triton.jit
def lookup_kernel(
    positions,  # [B, Hkv, k], heads `stride` apart
    table,
    used,
    tick,
    hot,  # [B, Hkv, C + 2, WIDTH]
    out,  # [B, Hkv, k, WIDTH], out: the cached rows, zeros for the others
    here,  # int64 [B, Hkv, k], out: their positions, -1 for the others
    stride,
    k,
    slots,
    tokens,
    WIDTH: tl.constexpr,
    WIDTH_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy cached rows, mark them as used. A program per (block, head of a sequence)."""
    bh = tl.program_id(1).to(tl.int64)
    j, element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH_P)
    position = tl.load(positions + bh * stride + j, mask=j < k, other=-1)
    slot = tl.load(table + bh * (tokens + 2) + position, mask=position >= 0, other=slots)
    is_here = slot < slots
    tl.store(used + bh * (slots + 2) + slot, tl.zeros_like(slot) + tl.load(tick + bh), mask=is_here)
    tl.store(here + bh * k + j, tl.where(is_here, position, -1), mask=j < k)
    at = (bh * (slots + 2) + slot)[:, None] * WIDTH + element[None, :]
    row = tl.load(hot + at, mask=is_here[:, None] & (element < WIDTH)[None, :], other=0.0)
    to = (bh * k + j)[:, None] * WIDTH + element[None, :]
    tl.store(out + to, row, mask=(j < k)[:, None] & (element < WIDTH)[None, :])


@triton.jit
def fill_kernel(
    source,  # MAPPED: int64 [B], addresses of rows [Hkv, capacity, WIDTH]; else rows [B, Hkv, k, WIDTH]
    stride_h,  # of a sequence's rows, in elements, as the next one
    stride_s,
    missing,  # int64 [B, Hkv, k]: positions to be read, -1 elsewhere
    claimed,  # int64 [B, Hkv, k]: slots that they go to
    found,  # int64 [B, Hkv, k]: slots of the others (JOIN)
    hot,  # [B, Hkv, C + 2, WIDTH]
    out,  # [B, Hkv, k, WIDTH], out: all of them (JOIN)
    k,
    heads,
    slots,
    MAPPED: tl.constexpr,
    JOIN: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write missing rows into their slots and, with JOIN, all rows into `out`.

    A program per (block of positions, head of a sequence).
    """
    bh = tl.program_id(1).to(tl.int64)
    j, element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH_P)
    position = tl.load(missing + bh * k + j, mask=j < k, other=-1)
    is_missing = position >= 0
    inside = (element < WIDTH)[None, :]
    to = (bh * k + j)[:, None] * WIDTH + element[None, :]
    if MAPPED:
        kv_rows = tl.load(source + bh // heads).to(tl.pointer_type(hot.dtype.element_ty))
        at = (bh % heads) * stride_h + position * stride_s
        row = tl.load(kv_rows + at[:, None] + element[None, :], mask=is_missing[:, None] & inside, other=0.0)
    else:
        row = tl.load(source + to, mask=is_missing[:, None] & inside, other=0.0)
    slot = tl.load(claimed + bh * k + j, mask=is_missing, other=slots + 1)
    first = bh * (slots + 2)
    tl.store(hot + (first + slot)[:, None] * WIDTH + element[None, :], row, mask=(slot < slots)[:, None] & inside)
    if JOIN:
        slot = tl.load(found + bh * k + j, mask=(j < k) & (position < 0), other=slots)
        is_here = slot < slots
        kept = tl.load(hot + (first + slot)[:, None] * WIDTH + element[None, :], mask=is_here[:, None] & inside, other=0.0)
        tl.store(out + to, tl.where(is_here[:, None], kept, row), mask=(j < k)[:, None] & inside)
