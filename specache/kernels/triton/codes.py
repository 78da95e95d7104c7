"""Decode the packed codes of a page in registers, and multiply with them.

The level of a code is a small whole number (KIVI: the code; rotated: `LEVEL_STEPS`), exact in
bfloat16. The other factor is split into bfloat16 parts, so that products run on tensor cores. Two
parts keep 16 significant bits, more than a 16-bit model's numbers have; three, for float32 models,
keep all. The byte order is that of `specache.kernels.packing`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from specache.config import PAGE_TOKENS
from specache.kernels.torch.rotated import LEVEL_STEPS

INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))
PAGE: tl.constexpr = tl.constexpr(PAGE_TOKENS)
TILE: tl.constexpr = tl.constexpr(16)  # rows of a tile of packed codes: `packing.TILE`
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)  # a finite peak below every score: -inf minus it is -inf


def _bfloat16_bits(number: int) -> int:
    """Return the bfloat16 bits of a whole number that is exact in bfloat16."""
    if number == 0:
        return 0
    exponent = abs(number).bit_length() - 1
    return (0x8000 if number < 0 else 0) | (127 + exponent) << 7 | (abs(number) << 7 >> exponent) & 0x7F


def _table(numbers: list[int]) -> tl.constexpr:
    """Pack two bfloat16 numbers into a 32-bit word, the first in the lower half."""
    word = sum(_bfloat16_bits(number) << 16 * i for i, number in enumerate(numbers))
    return tl.constexpr(word - (1 << 32) if word >> 31 else word)


def _both_signs(steps: tuple[int, ...]) -> list[int]:
    return [*(-x for x in reversed(steps)), *steps]


def _bytes(numbers: tuple[int, ...]) -> tl.constexpr:
    """Pack four numbers below 128 into a 32-bit word."""
    return tl.constexpr(sum(number << 8 * i for i, number in enumerate(numbers)))


KIVI_LOW: tl.constexpr = _table([0, 1])
KIVI_HIGH: tl.constexpr = _table([2, 3])
ROTATED_1: tl.constexpr = _table(_both_signs(LEVEL_STEPS[1]))
ROTATED_2_LOW: tl.constexpr = _table(_both_signs(LEVEL_STEPS[2])[:2])
ROTATED_2_HIGH: tl.constexpr = _table(_both_signs(LEVEL_STEPS[2])[2:])
ROTATED_4_LOW: tl.constexpr = _bytes(LEVEL_STEPS[4][:4])  # of the positive half
ROTATED_4_HIGH: tl.constexpr = _bytes(LEVEL_STEPS[4][4:])


@triton.jit
def levels_of(codes, BITS: tl.constexpr, ROTATED: tl.constexpr):
    """Return the levels of int32 codes, whole numbers in bfloat16."""
    if BITS == 4:
        if ROTATED:
            half = tl.where(codes > 7, codes - 8, 7 - codes)
            size = (tl.where(half > 3, ROTATED_4_HIGH, ROTATED_4_LOW) >> (half & 3) * 8) & 127
            levels = tl.where(codes > 7, size, -size).to(tl.float32).to(tl.bfloat16)
        else:
            levels = codes.to(tl.float32).to(tl.bfloat16)
    else:
        LOW: tl.constexpr = (ROTATED_1 if BITS == 1 else ROTATED_2_LOW) if ROTATED else KIVI_LOW
        HIGH: tl.constexpr = ROTATED_2_HIGH if ROTATED else KIVI_HIGH
        if BITS == 1:
            pair = tl.full(codes.shape, LOW, tl.int32)
        else:
            pair = tl.where(codes > 1, HIGH, LOW)
        levels = (pair >> (codes & 1) * 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return levels


@triton.jit
def key_levels(
    codes,
    head,
    first,
    FIRST_COLUMN: tl.constexpr,
    BITS: tl.constexpr,
    ROTATED: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Decode channels of tokens `[first, first + TOKENS)` -> bfloat16 [TOKENS, COLUMNS].

    `codes` is the address of the page's key codes. `FIRST_COLUMN` and `COLUMNS` are multiples of
    32. Channels from `DIM` on are undefined, but finite.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    WORDS: tl.constexpr = DIM // (4 * PER_BYTE)
    ROW: tl.constexpr = (DIM * BITS + 7) // 8
    token = first + tl.arange(0, TOKENS)
    tile, inside = token // TILE, token % TILE
    word = FIRST_COLUMN // (4 * PER_BYTE) + tl.arange(0, COLUMNS // (4 * PER_BYTE))
    at = head * (PAGE * ROW // 4) + tile * (TILE * ROW // 4) + inside  # [TOKENS]
    words = pointer(codes, tl.int32) + at[:, None] + (word * TILE)[None, :]
    packed = tl.load(words, mask=(word < WORDS)[None, :], other=0)
    levels = tl.reshape(unpacked(packed, BITS, ROTATED), (TOKENS, COLUMNS))
    if WORDS * 4 * PER_BYTE < DIM:  # columns behind the last whole word
        WIDTH: tl.constexpr = ROW - 4 * WORDS
        column = FIRST_COLUMN + tl.arange(0, COLUMNS)
        left = column - WORDS * 4 * PER_BYTE
        behind = (left >= 0) & (column < DIM)
        at = head * (PAGE * ROW) + tile * (TILE * ROW) + 4 * WORDS * TILE + inside * WIDTH
        bytes_ = pointer(codes, tl.uint8) + at[:, None] + (left % WIDTH)[None, :]
        byte = tl.load(bytes_, mask=behind[None, :], other=0).to(tl.int32)
        shift = tl.where(behind, left // WIDTH * BITS, 0)
        rest = levels_of((byte >> shift[None, :]) & ((1 << BITS) - 1), BITS, ROTATED)
        levels = tl.where(behind[None, :], rest, levels)
    return levels


@triton.jit
def value_levels(codes, head, BITS: tl.constexpr, ROTATED: tl.constexpr, DIM: tl.constexpr, DIM_P: tl.constexpr):
    """Decode all values of a page -> levels bfloat16 [DIM_P, 64].

    `codes` is the address of the page's value codes.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    channel = tl.arange(0, DIM_P)
    tile, inside = channel // TILE, channel % TILE
    word = tl.arange(0, PAGE // (4 * PER_BYTE))
    at = head * (DIM * 2 * BITS) + tile * (TILE * 2 * BITS) + inside  # [DIM_P]
    if DIM % 16:  # the last tile has fewer rows
        offsets = at[:, None] + word[None, :] * tl.minimum(DIM - tile * TILE, TILE)[:, None]
    else:
        offsets = at[:, None] + (word * TILE)[None, :]
    packed = tl.load(pointer(codes, tl.int32) + offsets, mask=(channel < DIM)[:, None], other=0)
    return tl.reshape(unpacked(packed, BITS, ROTATED), (DIM_P, PAGE))


@triton.jit
def pointer(address, TYPE: tl.constexpr):
    """Return a pointer to an address that is a multiple of 16, such as that of a page's field."""
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)


@triton.jit
def unpacked(words, BITS: tl.constexpr, ROTATED: tl.constexpr):
    """Decode int32 [rows, words] -> levels bfloat16 [rows, words, 8 / b, 4], in order."""
    shift = tl.arange(0, 8 // BITS)[:, None] * BITS + tl.arange(0, 4)[None, :] * 8
    return levels_of((words[:, :, None, None] >> shift[None, None, :, :]) & ((1 << BITS) - 1), BITS, ROTATED)


@triton.jit
def product(a, b, accumulator):
    """Return accumulator float32 + a @ b of equal 16-bit types. The interpreter needs float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    return tl.dot(a, b, accumulator)


@triton.jit
def level_product(levels, factors, accumulator, EXACT: tl.constexpr):
    """Return accumulator + levels bfloat16 @ factors float32.

    The factors are split into two parts of 8 significant bits, with EXACT into three, which keep a
    whole float32. Parts are truncated, not rounded, so that the rest is exact.
    """
    high = upper_half(factors)
    middle = factors - high
    if EXACT:
        middle = upper_half(middle)
        accumulator = product(levels, (factors - high - middle).to(tl.bfloat16), accumulator)
    accumulator = product(levels, middle.to(tl.bfloat16), accumulator)
    return product(levels, high.to(tl.bfloat16), accumulator)


@triton.jit
def rounded_product(levels, factors, accumulator):
    """Return accumulator + levels @ factors, rounded to bfloat16 as 16-bit models do."""
    if INTERPRETED:  # there a cast truncates
        bits = factors.to(tl.int32, bitcast=True)
        factors = upper_half((bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True))
    return product(levels, factors.to(tl.bfloat16), accumulator)


@triton.jit
def upper_half(x):
    """Clear the lower half of a float32's bits, which leaves a bfloat16."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def exact_product(a, b, accumulator):
    """Return accumulator float32 + a @ b without rounding, on tensor cores if equally 16-bit."""
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return product(a, b, accumulator)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="tf32x3")
