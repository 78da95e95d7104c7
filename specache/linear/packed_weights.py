"""Weights of linear layers packed at 8 and 4 bits, as the C++ products read them.

A matrix [N, K] is cut into tiles of 16 outputs and blocks of 32 inputs, `T` and `B` of them; N is
padded with zeros. Each output of a block has a scale (at 4 bits also a zero) in bfloat16:

    8 bits: W = code * scale, codes -127 to 127
    4 bits: W = (code - 8) * scale + zero, codes 0 to 15

Codes lie in the order of the products' registers (`csrc/impl_product.hpp`): of a tile and a block,
[8, 16, 4] int8, four consecutive inputs of each of the 16 outputs; at 4 bits [4, 16, 4] uint8, the
first 16 inputs in the low halves of the bytes and the others in the high ones. Scales and zeros are
int16 [T, B, 16], the bits of bfloat16, so that `model.to(dtype)` leaves them as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specache.platform.mapped_memory import Arena

TILE = 16  # outputs of a tile
BLOCK = 32  # inputs that share a scale
TINY = torch.finfo(torch.bfloat16).tiny
CODES_AT_ONCE = 1 << 22  # elements of a matrix that are packed, or formed from their codes, at a time


class PackedWeights(NamedTuple):
    """A packed matrix of `outputs` rows. `zeros` is None at 8 bits."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    outputs: int

    @property
    def inputs(self) -> int:
        return self.codes.shape[1] * BLOCK


def fits(weight: Tensor) -> bool:
    """Return whether a matrix [N, K] can be packed: K is a multiple of 32."""
    return weight.shape[1] % BLOCK == 0


def packed_bytes(outputs: int, inputs: int, bits: int) -> int:
    """Return the bytes of codes, scales and zeros of a packed matrix [outputs, inputs]."""
    rows = -(-outputs // TILE) * TILE
    return rows * inputs * bits // 8 + rows * (inputs // BLOCK) * 2 * (1 if bits == 8 else 2)


def pack(weight: Tensor, bits: int, arena: Arena | None = None) -> PackedWeights:
    """Pack a matrix [N, K] of a float type at 8 or 4 bits, a part at a time.

    Beside the result it takes the memory of a few million elements, however large the matrix is.

    Args:
        arena: memory for the result, behind that of the matrices packed before it.
    """
    arena = arena or Arena()
    outputs, inputs = weight.shape
    tiles, blocks = -(-outputs // TILE), inputs // BLOCK
    lanes = BLOCK // 4 if bits == 8 else BLOCK // 8
    codes = arena.empty((tiles, blocks, lanes, TILE, 4), torch.int8 if bits == 8 else torch.uint8)
    scales = arena.empty((tiles, blocks, TILE), torch.int16)
    zeros = None if bits == 8 else arena.empty((tiles, blocks, TILE), torch.int16)
    step = max(CODES_AT_ONCE // (TILE * inputs), 1)
    for start in range(0, tiles, step):
        part = slice(start, min(start + step, tiles))
        block = weight[part.start * TILE : part.stop * TILE].float()
        missing = (part.stop - part.start) * TILE - len(block)
        if missing:
            block = torch.nn.functional.pad(block, (0, 0, 0, missing))
        block = block.view(-1, TILE, blocks, BLOCK)
        if zeros is None:
            scale, code = _round_8(block)
            codes[part] = code.view(-1, TILE, blocks, BLOCK // 4, 4).permute(0, 2, 3, 1, 4)
        else:
            scale, zero, code = _round_4(block)
            zeros[part] = _bits(zero)
            low, high = code.view(-1, TILE, blocks, 2, BLOCK // 8, 4).permute(3, 0, 2, 4, 1, 5)
            codes[part] = low | high << 4
        scales[part] = _bits(scale)
    return PackedWeights(codes, scales, zeros, outputs)


def unpack(packed: PackedWeights, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
    """Return the matrix [n, K] that the codes of tiles `start` to `stop` stand for.

    The last tile has rows past the matrix's last output too.
    """
    part = slice(start, stop)
    codes, scale = packed.codes[part], _floats(packed.scales[part])
    tiles, blocks = scale.shape[0], scale.shape[2]
    if packed.zeros is None:
        code = codes.permute(0, 3, 1, 2, 4).reshape(tiles, TILE, blocks, BLOCK)
        matrix = code.float().mul_(scale)
    else:
        halves = torch.stack([codes & 15, codes >> 4], dim=2)  # [T, B, 2, 4, 16, 4]
        code = halves.permute(0, 4, 1, 2, 3, 5).reshape(tiles, TILE, blocks, BLOCK)
        matrix = code.float().sub_(8).mul_(scale).add_(_floats(packed.zeros[part]))
    return matrix.view(tiles * TILE, -1).to(dtype)


def _round_8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round [T, 16, B, 32] -> (scales [T, 16, B], codes int8). NaN and infinity get NaN scales."""
    scale = _rounded_up(weight.abs().amax(-1) / 127)
    code = (weight / scale.float().unsqueeze(-1)).round_().clamp_(-127, 127)
    return scale, code.nan_to_num_(0).to(torch.int8)


def _round_4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round [T, 16, B, 32] -> (scales, zeros [T, 16, B], codes uint8).

    Scales reach from the least to the largest weight of a block. Fitting them to the codes by least
    squares takes an eighth off the squared error, and nothing off the divergence of SmolLM2.
    """
    low, high = weight.aminmax(dim=-1)
    scale = _rounded_up((high - low) / 15)
    zero = (low + 8 * scale.float()).to(torch.bfloat16)
    code = ((weight - zero.float().unsqueeze(-1)) / scale.float().unsqueeze(-1) + 8).round_().clamp_(0, 15)
    return scale, zero, code.nan_to_num_(0).to(torch.uint8)


def _rounded_up(scale: Tensor) -> Tensor:
    """Round positive float32 numbers up to bfloat16, so that no code is beyond the last level."""
    scale = scale.clamp(min=TINY)
    near = scale.to(torch.bfloat16)
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where((near.float() < scale) & near.isfinite(), above, near)


def _bits(numbers: Tensor) -> Tensor:
    """Return bfloat16 numbers [T, 16, B] as their bits [T, B, 16]."""
    return numbers.transpose(1, 2).contiguous().view(torch.int16)


def _floats(bits: Tensor) -> Tensor:
    """Return bits [T, B, 16] as float32 numbers [T, 16, B, 1]."""
    return bits.view(torch.bfloat16).float().transpose(1, 2).unsqueeze(-1)
