"""Quantise tokens and pack their codes (KIVI, paper section 3.1; the rotated code is ours).

Columns of a packed matrix are loaded in the order of the bytes, so that packing is a sum over
neighbours. Divisions and roots are IEEE's: equal inputs give the same codes, to the bit, as the
other backends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specache.kernels.triton.codes import PAGE, TILE, pointer

HALF_MAX: tl.constexpr = tl.constexpr(65504.0)
TINY: tl.constexpr = tl.constexpr(1.1754944e-38)
TO_WHOLE: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to whole, ties to even


@triton.jit
def kivi_keys_kernel(
    keys,  # [Hkv, n, DIM], the first of them token `start`
    addresses,  # int64 [pages]
    start,
    stride_h,
    stride_n,
    stride_d,
    key_codes,  # offsets in a page
    key_scale,
    key_zero,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BYTES_P: tl.constexpr,  # bytes of a row, up to a power of two
):
    """A program per (group of tokens, KV head)."""
    group, head = tl.program_id(0), tl.program_id(1)
    token, column = tl.arange(0, GROUP), columns_of(DIM, BITS, BYTES_P)
    of_token = head.to(tl.int64) * stride_h + (group * GROUP + token).to(tl.int64) * stride_n
    x = tl.load(keys + of_token[:, None] + column[None, :] * stride_d, mask=(column < DIM)[None, :], other=0.0).to(tl.float32)
    scale, zero = scale_and_zero(tl.min(x, 0), tl.max(x, 0), BITS)
    first = start + group * GROUP
    page = tl.load(addresses + first // PAGE)
    of_scale = (head * (PAGE // GROUP) + first % PAGE // GROUP) * DIM + column
    tl.store(pointer(page + key_scale, tl.float16) + of_scale, scale, mask=column < DIM)
    tl.store(pointer(page + key_zero, tl.float16) + of_scale, zero, mask=column < DIM)
    codes = codes_of(x, scale.to(tl.float32)[None, :], zero.to(tl.float32)[None, :], BITS)
    store_keys(page + key_codes, head, first % PAGE + token, tl.where((column < DIM)[None, :], codes, 0), DIM, BITS, BYTES_P)


@triton.jit
def kivi_values_kernel(
    values,  # [Hkv, n, DIM], the first of them token `start`
    addresses,
    start,
    n,
    stride_h,
    stride_n,
    stride_d,
    value_codes,
    value_scale,
    value_zero,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # channels that share a scale
    GROUP_P: tl.constexpr,
    DIM: tl.constexpr,
):
    """A program per (page, KV head, group of channels)."""
    page_index, head, group = start // PAGE + tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token, channel = tokens_of(BITS), group * GROUP + tl.arange(0, GROUP_P)
    index = page_index * PAGE + token - start
    written = (index >= 0) & (index < n)
    real = (channel < DIM) & (tl.arange(0, GROUP_P) < GROUP)
    of_value = head.to(tl.int64) * stride_h + index.to(tl.int64)[None, :] * stride_n + channel[:, None] * stride_d
    inside = real[:, None] & written[None, :]
    x = tl.load(values + of_value, mask=inside, other=0.0).to(tl.float32)  # [GROUP_P, 64]
    low = tl.min(tl.where(real[:, None], x, float("inf")), 0)
    high = tl.max(tl.where(real[:, None], x, float("-inf")), 0)
    scale, zero = scale_and_zero(low, high, BITS)
    page = tl.load(addresses + page_index)
    of_scale = (head * PAGE + token) * ((DIM + GROUP - 1) // GROUP) + group
    tl.store(pointer(page + value_scale, tl.float16) + of_scale, scale, mask=written)
    tl.store(pointer(page + value_zero, tl.float16) + of_scale, zero, mask=written)
    codes = codes_of(x, scale.to(tl.float32)[None, :], zero.to(tl.float32)[None, :], BITS)
    store_values(page + value_codes, head, channel, real, codes, written, DIM, BITS, GROUP_P)


@triton.jit
def centre_keys_kernel(
    keys,  # [Hkv, n, DIM], the first of them token `start`
    channel_scales,  # float32 [Hkv, DIM]
    out,  # float32 [Hkv, n, DIM]: centred by the group's mean and scaled
    addresses,
    start,
    stride_h,
    stride_n,
    stride_d,
    key_mean,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
):
    """A program per (group of tokens, KV head)."""
    group, head = tl.program_id(0), tl.program_id(1)
    token, channel = group * GROUP + tl.arange(0, GROUP), tl.arange(0, DIM_P)
    real = channel < DIM
    of_key = head.to(tl.int64) * stride_h + token.to(tl.int64)[:, None] * stride_n + channel[None, :] * stride_d
    x = tl.load(keys + of_key, mask=real[None, :], other=0.0).to(tl.float32)  # [GROUP, DIM_P]
    mean = tl.clamp(tl.sum(x, 0) / GROUP, -HALF_MAX, HALF_MAX).to(tl.float16)
    first = start + group * GROUP
    page = tl.load(addresses + first // PAGE)
    of_mean = (head * (PAGE // GROUP) + first % PAGE // GROUP) * DIM + channel
    tl.store(pointer(page + key_mean, tl.float16) + of_mean, mean, mask=real)
    scale = tl.load(channel_scales + head * DIM + channel, mask=real, other=0.0)
    of_out = (head.to(tl.int64) * tl.num_programs(0) * GROUP + token[:, None]) * DIM + channel[None, :]
    tl.store(out + of_out, (x - mean.to(tl.float32)[None, :]) * scale[None, :], mask=real[None, :])


@triton.jit
def rotated_keys_kernel(
    keys,  # float32 [Hkv, n, DIM], centred, scaled and rotated; the first of them token `start`
    levels,  # float32 [2^b]
    addresses,
    start,
    n,
    key_codes,
    key_scale,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    BYTES_P: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A program per (`TOKENS` tokens of one page, KV head)."""
    block, head = tl.program_id(0), tl.program_id(1)
    token, column = block * TOKENS + tl.arange(0, TOKENS), columns_of(DIM, BITS, BYTES_P)
    x = tl.load(keys + (head.to(tl.int64) * n + token)[:, None] * DIM + column[None, :], mask=(column < DIM)[None, :], other=0.0)
    codes, scale = encode(x, levels, DIM, BITS, 1)
    first = start + block * TOKENS
    page, slot = tl.load(addresses + first // PAGE), first % PAGE + tl.arange(0, TOKENS)
    tl.store(pointer(page + key_scale, tl.float16) + head * PAGE + slot, scale)
    store_keys(page + key_codes, head, slot, tl.where((column < DIM)[None, :], codes, 0), DIM, BITS, BYTES_P)


@triton.jit
def rotated_values_kernel(
    values,  # float32 [Hkv, n, DIM], rotated; the first of them token `start`
    levels,
    addresses,
    start,
    n,
    value_codes,
    value_scale,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_P: tl.constexpr,
):
    """A program per (page, KV head)."""
    page_index, head = start // PAGE + tl.program_id(0), tl.program_id(1)
    token, channel = tokens_of(BITS), tl.arange(0, DIM_P)
    index = page_index * PAGE + token - start
    written, real = (index >= 0) & (index < n), channel < DIM
    of_value = (head.to(tl.int64) * n + index)[None, :] * DIM + channel[:, None]
    x = tl.load(values + of_value, mask=real[:, None] & written[None, :], other=0.0)  # [DIM_P, 64]
    codes, scale = encode(x, levels, DIM, BITS, 0)
    page = tl.load(addresses + page_index)
    tl.store(pointer(page + value_scale, tl.float16) + head * PAGE + token, scale, mask=written)
    store_values(page + value_codes, head, channel, real, codes, written, DIM, BITS, DIM_P)


@triton.jit
def columns_of(DIM: tl.constexpr, BITS: tl.constexpr, BYTES_P: tl.constexpr):
    """Return the column in each slot of a row's bytes, low bits first, int32 [BYTES_P 8 / b].

    `DIM` and up stand for none.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    WHOLE: tl.constexpr = DIM // (4 * PER_BYTE) * 4  # bytes in whole words
    WIDTH: tl.constexpr = (DIM * BITS + 7) // 8 - WHOLE
    slot = tl.arange(0, BYTES_P * PER_BYTE)
    byte, inside = slot // PER_BYTE, slot % PER_BYTE
    in_words = byte // 4 * (4 * PER_BYTE) + inside * 4 + byte % 4
    behind = inside * WIDTH + byte + WHOLE * (PER_BYTE - 1)
    return tl.where(byte < WHOLE, in_words, tl.where(byte < WHOLE + WIDTH, behind, DIM))


@triton.jit
def tokens_of(BITS: tl.constexpr):
    """Return the token in each slot of a row of value codes, int32 [64]."""
    PER_BYTE: tl.constexpr = 8 // BITS
    slot = tl.arange(0, PAGE)
    byte = slot // PER_BYTE
    return byte // 4 * (4 * PER_BYTE) + slot % PER_BYTE * 4 + byte % 4


@triton.jit
def packed(codes, ROWS: tl.constexpr, BYTES: tl.constexpr, BITS: tl.constexpr):
    """Pack codes int32 [ROWS, BYTES 8 / b], in the order of their slots, -> int32 [ROWS, BYTES]."""
    shift = tl.arange(0, 8 // BITS) * BITS
    return tl.sum(tl.reshape(codes, (ROWS, BYTES, 8 // BITS)) << shift[None, None, :], 2)


@triton.jit
def store_keys(address, head, token, codes, DIM: tl.constexpr, BITS: tl.constexpr, BYTES_P: tl.constexpr):
    """Pack codes int32 [tokens, BYTES_P 8 / b] into the rows `token` of a page's key codes."""
    ROW: tl.constexpr = (DIM * BITS + 7) // 8
    WHOLE: tl.constexpr = DIM * BITS // 32 * 4
    byte = tl.arange(0, BYTES_P)
    tile, inside = token // TILE, token % TILE
    in_words = (byte // 4 * (4 * TILE) + byte % 4)[None, :] + (inside * 4)[:, None]
    behind = (byte + WHOLE * (TILE - 1))[None, :] + (inside * (ROW - WHOLE))[:, None]
    at = (head * (PAGE * ROW) + tile * (TILE * ROW))[:, None] + tl.where((byte < WHOLE)[None, :], in_words, behind)
    data = packed(codes, codes.shape[0], BYTES_P, BITS).to(tl.uint8)
    mask = (byte < ROW)[None, :] & (token >= 0)[:, None]
    tl.store(pointer(address, tl.uint8) + at, data, mask=mask)


@triton.jit
def store_values(address, head, channel, real, codes, written, DIM: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr):
    """Pack codes int32 [ROWS, 64] of `written` tokens into rows `channel` of a page's values."""
    BYTES: tl.constexpr = 8 * BITS
    byte = tl.arange(0, BYTES)
    tile = channel // TILE
    high = tl.minimum(DIM - tile * TILE, TILE)
    of_row = head * (DIM * BYTES) + tile * (TILE * BYTES) + channel % TILE * 4
    at = pointer(address, tl.uint8) + of_row[:, None] + (byte // 4 * 4)[None, :] * high[:, None] + (byte % 4)[None, :]
    # a byte holds several tokens: keep the bits of those that are not written
    kept = packed(tl.where(written, 0, (1 << BITS) - 1)[None, :], 1, BYTES, BITS)
    old = tl.load(at, mask=real[:, None] & (kept != 0), other=0).to(tl.int32)
    data = packed(tl.where(written[None, :], codes, 0), ROWS, BYTES, BITS) | (old & kept)
    tl.store(at, data.to(tl.uint8), mask=real[:, None] & (byte >= 0)[None, :])


@triton.jit
def scale_and_zero(low, high, BITS: tl.constexpr):
    """Return float16 scale and zero point of groups with minimum `low` and maximum `high`."""
    if BITS == 1:  # levels at the quarter points
        scale, zero = (high - low) * 0.5, (low + low + low + high) * 0.25
    else:
        scale, zero = tl.div_rn(high - low, tl.full(low.shape, (1 << BITS) - 1, tl.float32)), low
    return tl.minimum(scale, HALF_MAX).to(tl.float16), tl.clamp(zero, -HALF_MAX, HALF_MAX).to(tl.float16)


@triton.jit
def codes_of(x, scale, zero, BITS: tl.constexpr):
    """Return clamp(round((x - zero) / scale), 0, 2^b - 1) int32; codes are 0 where scale is 0."""
    divisor = tl.broadcast_to(tl.where(scale > 0, scale, 1.0), x.shape)
    steps = tl.clamp(tl.div_rn(x - zero, divisor), 0.0, (1 << BITS) - 1.0)
    return tl.where(scale > 0, (steps + TO_WHOLE) - TO_WHOLE, 0.0).to(tl.int32)


@triton.jit
def encode(x, levels, DIM: tl.constexpr, BITS: tl.constexpr, AXIS: tl.constexpr):
    """Encode rotated vectors along `AXIS` -> int32 codes of that shape, float16 scale.

    The scale is `|x|^2 / <x, levels>`.
    """
    rms = tl.sqrt_rn(tl.sum(x * x, AXIS) / DIM)
    shown = tl.broadcast_to(tl.expand_dims(tl.maximum(rms, TINY), AXIS), x.shape)
    unit = tl.div_rn(x, shown)
    codes = tl.zeros(x.shape, tl.int32)
    below = tl.load(levels)
    level = tl.zeros(x.shape, tl.float32) + below
    for i in tl.static_range(1, 1 << BITS):
        above = tl.load(levels + i)
        higher = unit > (above + below) / 2
        codes += higher.to(tl.int32)
        level = tl.where(higher, above, level)
        below = above
    product = tl.maximum(tl.sum(unit * level, AXIS), TINY)
    scale = tl.div_rn(rms * tl.sum(unit * unit, AXIS), product)
    return codes, tl.clamp(scale, -HALF_MAX, HALF_MAX).to(tl.float16)
