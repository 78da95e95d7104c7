"""The rotated code in plain PyTorch (**ours**): random-sign Hadamard rotation and normal quantiser.

Keys of a group of `g` tokens are centred and scaled per channel, rotated, and rounded to the
Lloyd-Max levels of a normal distribution times one scale per token. Values are only rotated and
rounded. The scale is `|y|^2 / <y, levels>`, which makes the inner product of a vector with its own
code exact: nothing shrinks on average, as it does with the least-squares scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from specache.kernels.blocks import Block, by_head, store, store_codes, unpack_keys, unpack_values
from specache.kernels.constants import constant
from specache.kernels.packing import byte_table
from specache.kernels.types import LowBitKV, PageRun

ROTATION_SEED = 0x5BECAC4E  # the signs are a part of the format
# Lloyd-Max levels of a standard normal distribution (Max, 1960, table I), positive half, as whole
# multiples of a unit, so that integer kernels compute exact products. 2 bits: 0.453 and 1.51
# (Max: 0.4528, 1.510); 4 bits: within 0.024 of Max's.
LEVEL_STEPS = {1: (1,), 2: (3, 10), 4: (3, 9, 15, 22, 29, 37, 48, 63)}
LEVEL_UNIT = {1: 0.7979, 2: 0.151, 4: 2.733 / 63}


@constant(16)
def levels(bits: int, device: torch.device) -> Tensor:
    """Return the level of each code, float32 [2^b], ascending."""
    half = LEVEL_STEPS[bits]
    return torch.tensor([*(-x for x in reversed(half)), *half], dtype=torch.float32, device=device) * LEVEL_UNIT[bits]


@constant(16)
def rotation(dim: int, device: torch.device) -> Tensor:
    """Return the rotation, orthogonal float32 [D, D]: random signs, then a Hadamard matrix.

    It is block-diagonal where D is no power of two.
    """
    hadamards, left = [], dim
    while left:
        size = 1 << (left.bit_length() - 1)
        hadamards.append(_hadamard(size))
        left -= size
    generator = torch.Generator().manual_seed(ROTATION_SEED)
    signs = torch.randint(0, 2, (dim,), generator=generator).float() * 2.0 - 1.0
    return (torch.block_diag(*hadamards) * signs).to(device)


def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float32)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / math.sqrt(size)


def quantise(keys: Tensor, values: Tensor, run: PageRun, offset: int, low_bit_kv: LowBitKV) -> None:
    """Quantise keys, values [Hkv, count, D], whole groups, into a run from slot `offset` on."""
    assert low_bit_kv.channel_scales is not None, "the rotated code needs the layer's key scales"
    g, turn = low_bit_kv.group_size, rotation(low_bit_kv.head_dim, keys.device)
    groups = keys.float().unflatten(1, (-1, g))  # [Hkv, groups, g, D]
    mean = _half(groups.mean(2))  # [Hkv, groups, D]
    centred = (groups - mean.float().unsqueeze(2)).flatten(1, 2)  # [Hkv, count, D]
    key_codes, key_scale = _encode((centred * low_bit_kv.channel_scales.unsqueeze(1)) @ turn.T, low_bit_kv.bits)
    value_codes, value_scale = _encode(values.float() @ turn.T, low_bit_kv.bits)
    store_codes(run, key_codes, value_codes, offset, low_bit_kv.bits)
    store(run.fields["key_mean"], mean, offset // g)
    store(run.fields["key_scale"], key_scale, offset)
    store(run.fields["value_scale"], value_scale, offset)


def _encode(rotated: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Encode rotated vectors [Hkv, count, D] -> uint8 codes, float16 scale [Hkv, count, 1].

    The zero vector gets scale 0.
    """
    table = levels(bits, rotated.device)
    rms = rotated.square().mean(-1, keepdim=True).sqrt()
    unit = rotated / rms.clamp(min=torch.finfo(torch.float32).tiny)
    codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2)
    product = (unit * table[codes]).sum(-1, keepdim=True)
    scale = rms * unit.square().sum(-1, keepdim=True) / product.clamp(min=torch.finfo(torch.float32).tiny)
    return codes.to(torch.uint8), _half(scale)


def _half(x: Tensor) -> Tensor:
    """Convert to float16, clamped to its range."""
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).half()


class QueryScorer:
    """Scores one sequence's queries [Hkv, r, D] without decoding a key.

    `q . k = q . mean + scale_t <R (q / w), levels_t>`.
    """

    def __init__(self, query: Tensor, low_bit_kv: LowBitKV) -> None:
        assert low_bit_kv.channel_scales is not None, "the rotated code needs the layer's key scales"
        self._query = query
        self._rotated = (query / low_bit_kv.channel_scales.unsqueeze(1)) @ rotation(low_bit_kv.head_dim, query.device).T
        self._low_bit_kv = low_bit_kv

    def __call__(self, block: Block) -> Tensor:
        """Score a block of N pages -> [Hkv, r, N 64]."""
        decoded = by_head(unpack_keys(block, _level_table_of(self._low_bit_kv, block), self._low_bit_kv))  # [Hkv, N 64, D]
        scores = self._rotated @ decoded.transpose(1, 2)  # [Hkv, r, N 64]
        scores *= by_head(block.field("key_scale").float()).transpose(1, 2)
        mean = by_head(block.field("key_mean").float())  # [Hkv, N 64/g, D]
        bias = self._query @ mean.transpose(1, 2)  # [Hkv, r, N 64/g]
        scores.unflatten(2, (-1, self._low_bit_kv.group_size)).add_(bias.unsqueeze(-1))
        return scores


class ValueSum:
    """Sums `p_t v_t` of one sequence block by block. The sum is rotated back once, at the end."""

    def __init__(self, low_bit_kv: LowBitKV) -> None:
        self._low_bit_kv = low_bit_kv
        self._total: Tensor | None = None

    def add(self, weights: Tensor, block: Block) -> None:
        """Add the first T tokens of a block with weights [Hkv, r, T]."""
        count = weights.shape[-1]
        decoded = by_head(unpack_values(block, _level_table_of(self._low_bit_kv, block), self._low_bit_kv), count)  # [Hkv, T, D]
        scale = by_head(block.field("value_scale").float(), count)  # [Hkv, T, 1]
        part = (weights * scale.transpose(1, 2)) @ decoded
        self._total = part if self._total is None else self._total + part

    def result(self) -> Tensor:
        """Return the sum [Hkv, r, D], after at least one block."""
        assert self._total is not None
        return self._total @ rotation(self._low_bit_kv.head_dim, self._total.device)


def dequantise(block: Block, count: int, low_bit_kv: LowBitKV) -> tuple[Tensor, Tensor]:
    """Return the first `count` tokens of a block as float32 keys and values [Hkv, count, D]."""
    assert low_bit_kv.channel_scales is not None, "the rotated code needs the layer's key scales"
    turn = rotation(low_bit_kv.head_dim, low_bit_kv.channel_scales.device)
    table = _level_table_of(low_bit_kv, block)
    rotated = by_head(unpack_keys(block, table, low_bit_kv) * block.field("key_scale").float(), count)
    values = by_head(unpack_values(block, table, low_bit_kv) * block.field("value_scale").float(), count)
    mean = by_head(block.field("key_mean").float()).repeat_interleave(low_bit_kv.group_size, dim=1)[:, :count]
    return rotated @ turn / low_bit_kv.channel_scales.unsqueeze(1) + mean, values @ turn


def _level_table_of(low_bit_kv: LowBitKV, block: Block) -> Tensor:
    return _level_table(low_bit_kv.bits, block[0].fields["key_codes"].device)


@constant(16)
def _level_table(bits: int, device: torch.device) -> Tensor:
    """Return the levels in each possible byte, float32 [256, 8 / b]."""
    return levels(bits, device)[byte_table(bits, device).long()]
