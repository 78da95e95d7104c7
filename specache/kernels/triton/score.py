"""Score every low-bit key (Algorithm 3), and replace the scores of fetched keys by exact ones."""

from __future__ import annotations

import triton
import triton.language as tl

from specache.kernels.triton.codes import LOWEST, PAGE, exact_product, key_levels, level_product, pointer


@triton.jit
def score_kernel(
    query,  # [B, Hkv, ROWS, DIM], ROWS = G n
    rotated_query,  # float32 of the same shape: the unscaled, rotated query; not read with KIVI's code
    addresses,  # int64 [B, capacity / PAGE]
    lengths,
    scores,  # [B, Hkv, ROWS, capacity], out: float32; with HALF float16 relative to their group's largest
    peaks,  # float32 [B, Hkv, ROWS, capacity / GROUP], out (HALF): that largest
    totals,  # the same, out (HALF): sums of exp(score - peak)
    capacity,
    scaling,
    softcap,
    key_codes,  # offsets in a page
    key_scale,
    key_bias,
    unit,  # of a rotated level
    ROTATED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,  # channels at a time
    ROWS: tl.constexpr,
    ROWS_P: tl.constexpr,  # of a program
    ROW_BLOCKS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HALF: tl.constexpr,  # for 16-bit models
    BLOCK: tl.constexpr,  # tokens of a program, whole pages
):
    """Score low-bit keys. A program per (block of tokens, KV head and block of queries, sequence).

    The queries of a block share a pass over the codes. KIVI: `q . k_t = sum_d (q_d s_d) c_td +
    sum_d q_d z_d`, with `q_d s_d` computed once per group of tokens. Rotated: `q . mean + scale_t
    <R (q / w), level_t>`.
    """
    block, b = tl.program_id(0), tl.program_id(2)
    head, row_block = tl.program_id(1) // ROW_BLOCKS, tl.program_id(1) % ROW_BLOCKS
    first_row = (b * (tl.num_programs(1) // ROW_BLOCKS) + head).to(tl.int64) * ROWS
    length = tl.load(lengths + b)
    pages = addresses + b * (capacity // PAGE)
    CHUNKS: tl.constexpr = (DIM + CHUNK - 1) // CHUNK
    channel, row = tl.arange(0, CHUNK), row_block * ROWS_P + tl.arange(0, ROWS_P)
    of_query = (first_row * DIM + row * DIM)[None, :] + channel[:, None]
    real = (channel < DIM)[:, None] & (row < ROWS)[None, :]
    token_in_group = tl.arange(0, GROUP)
    out = scores + (first_row + row) * capacity  # [ROWS_P]
    if CHUNKS == 1:
        q = tl.load(query + of_query, mask=real, other=0.0).to(tl.float32)  # [CHUNK, ROWS_P]
        if ROTATED:
            factors = tl.load(rotated_query + of_query, mask=real, other=0.0)

    last_group = tl.minimum((block + 1) * BLOCK, (length + GROUP - 1) // GROUP * GROUP) // GROUP
    for group in range(block * (BLOCK // GROUP), last_group):
        first = group * GROUP
        page, slot = tl.load(pages + first // PAGE), first % PAGE
        of_group = (head * (PAGE // GROUP) + slot // GROUP) * DIM
        found = tl.zeros((GROUP, ROWS_P), tl.float32)
        bias = tl.zeros((ROWS_P,), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            channel = chunk * CHUNK + tl.arange(0, CHUNK)
            if CHUNKS > 1:  # read again from the cache: all channels at once take too many registers
                real = (channel < DIM)[:, None] & (row < ROWS)[None, :]
                q = tl.load(query + of_query + chunk * CHUNK, mask=real, other=0.0).to(tl.float32)
            offset = tl.load(pointer(page + key_bias, tl.float16) + of_group + channel, mask=channel < DIM, other=0.0)
            bias += tl.sum(q * offset.to(tl.float32)[:, None], 0)
            if not ROTATED:
                scale = tl.load(pointer(page + key_scale, tl.float16) + of_group + channel, mask=channel < DIM, other=0.0)
                factors = q * scale.to(tl.float32)[:, None]
            elif CHUNKS > 1:
                factors = tl.load(rotated_query + of_query + chunk * CHUNK, mask=real, other=0.0)
            levels = key_levels(page + key_codes, head, slot, chunk * CHUNK, BITS, ROTATED, GROUP, DIM, CHUNK)
            found = level_product(levels, factors, found, not HALF)
        if ROTATED:
            of_token = head * PAGE + slot + token_in_group
            found *= (tl.load(pointer(page + key_scale, tl.float16) + of_token).to(tl.float32) * unit)[:, None]
        found = (found + bias[None, :]) * scaling  # [GROUP, ROWS_P]
        if SOFTCAP:
            found = capped(found, softcap)
        token = first + token_in_group
        found = tl.where((token < length)[:, None], found, float("-inf"))
        if HALF:
            peak = tl.maximum(tl.max(found, 0), LOWEST)  # [ROWS_P]
            found -= peak[None, :]
            of_group = (first_row + row) * (capacity // GROUP) + group
            tl.store(peaks + of_group, peak, mask=row < ROWS)
            tl.store(totals + of_group, tl.sum(tl.exp(found), 0), mask=row < ROWS)
        found = found.to(scores.dtype.element_ty)
        tl.store(out[None, :] + token[:, None], found, mask=(row < ROWS)[None, :])

    if not HALF:
        for first in range(tl.maximum(block * BLOCK, last_group * GROUP), tl.minimum((block + 1) * BLOCK, capacity), PAGE):
            token = first + tl.arange(0, PAGE)
            behind = ((token < capacity) & (token < (block + 1) * BLOCK))[:, None] & (row < ROWS)[None, :]
            tl.store(out[None, :] + token[:, None], tl.full((PAGE, ROWS_P), float("-inf"), tl.float32), mask=behind)


@triton.jit
def capped(x, softcap):
    """softcap * tanh(x / softcap)."""
    small = tl.exp(-2.0 * tl.abs(x / softcap))
    size = softcap * (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def rescore_kernel(
    query,  # [B, Hkv, G, n, DIM]
    scores,  # [B, Hkv, G, n, capacity], changed
    peaks,  # float32 [B, Hkv, G, n, capacity / GROUP] that they are relative to (HALF)
    kept,  # float32 [B, Hkv, G, n, k], out (HALF): the exact scores
    positions,  # int64 [B, Hkv, n, k], -1: none
    kv_rows,  # [B, Hkv, n, k, 2 DIM], the keys in front
    capacity,
    k,
    heads,
    stride_b,  # of `rows`
    stride_h,
    stride_n,
    stride_k,
    scaling,
    softcap,
    G: tl.constexpr,
    G_P: tl.constexpr,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,  # channels at a time
    SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replace scores by exact ones. A program per (block of keys, query, KV head of a sequence)."""
    n, row, bh = tl.num_programs(1), tl.program_id(1), tl.program_id(2)
    g = tl.arange(0, G_P)
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(positions + (bh.to(tl.int64) * n + row) * k + j, mask=j < k, other=-1)
    chosen = position >= 0
    of_rows = (bh // heads).to(tl.int64) * stride_b + (bh % heads) * stride_h + row * stride_n
    of_key = of_rows + j.to(tl.int64) * stride_k  # [BLOCK]
    line = (bh.to(tl.int64) * G + g) * n + row  # [G_P]
    exact = tl.zeros((BLOCK, G_P), tl.float32)
    for first in range(0, DIM, CHUNK):
        channel = first + tl.arange(0, CHUNK)
        real = channel < DIM
        keys = tl.load(kv_rows + of_key[:, None] + channel[None, :], mask=chosen[:, None] & real[None, :], other=0.0)
        of_query = line[None, :] * DIM + channel[:, None]
        q = tl.load(query + of_query, mask=real[:, None] & (g < G)[None, :], other=0.0)
        exact = exact_product(keys, q, exact)
    exact *= scaling
    if SOFTCAP:
        exact = capped(exact, softcap)
    real = chosen[:, None] & (g < G)[None, :]
    if HALF:
        tl.store(kept + line[None, :] * k + j[:, None], exact, mask=(j < k)[:, None] & (g < G)[None, :])
        exact -= tl.load(peaks + line[None, :] * (capacity // GROUP) + position[:, None] // GROUP, mask=real, other=0.0)
    tl.store(scores + line[None, :] * capacity + position[:, None], exact.to(scores.dtype.element_ty), mask=real)
