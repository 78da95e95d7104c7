"""The rotated code in plain PyTorch (**ours**): random-sign Hadamard rotation, normal quantiser, one scale per token.

Keys of a group of `g` tokens lose their mean per channel, are weighted per channel, rotated and rounded to the Lloyd-Max levels of
a normal distribution times one scale per token; values the same without mean and weights. The scale is `|y|^2 / <y, levels>`: with
it the inner product of a vector with its own code is exact, so that nothing is shrunk on average (the least-squares scale shrinks).
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
# Lloyd-Max levels of a standard normal distribution (Max, 1960, table I), positive half, as whole multiples of a unit: integer
# kernels form exact products with them. 2 bits: 0.453 and 1.51 (Max: 0.4528, 1.510); 4 bits: within 0.024 of Max's.
LEVEL_STEPS = {1: (1,), 2: (3, 10), 4: (3, 9, 15, 22, 29, 37, 48, 63)}
LEVEL_UNIT = {1: 0.7979, 2: 0.151, 4: 2.733 / 63}


@constant(16)
def levels(bits: int, device: torch.device) -> Tensor:
    """float32 [2^b], ascending: what each code stands for."""
    half = LEVEL_STEPS[bits]
    return torch.tensor([*(-x for x in reversed(half)), *half], dtype=torch.float32, device=device) * LEVEL_UNIT[bits]


@constant(16)
def rotation(dim: int, device: torch.device) -> Tensor:
    """float32 [D, D], orthogonal: random signs, then a Hadamard matrix (block-diagonal where D is no power of two)."""
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


def quantise(keys: Tensor, values: Tensor, run: PageRun, offset: int, copy: LowBitKV) -> None:
    """Quantise and pack keys, values [Hkv, count, D], whole groups, into pages from slot `offset` on."""
    assert copy.key_weights is not None, "the rotated code needs the layer's key weights"
    g, turn = copy.group_size, rotation(copy.head_dim, keys.device)
    groups = keys.float().unflatten(1, (-1, g))  # [Hkv, groups, g, D]
    mean = _half(groups.mean(2))  # [Hkv, groups, D]
    centred = (groups - mean.float().unsqueeze(2)).flatten(1, 2)  # [Hkv, count, D]
    key_codes, key_scale = _encode((centred * copy.key_weights.unsqueeze(1)) @ turn.T, copy.bits)
    value_codes, value_scale = _encode(values.float() @ turn.T, copy.bits)
    store_codes(run, key_codes, value_codes, offset, copy.bits)
    store(run.fields["key_mean"], mean, offset // g)
    store(run.fields["key_scale"], key_scale, offset)
    store(run.fields["value_scale"], value_scale, offset)


def _encode(rotated: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Rotated vectors [Hkv, count, D] -> codes uint8 of the same shape, scale float16 [Hkv, count, 1]. Zero encodes as scale 0."""
    table = levels(bits, rotated.device)
    rms = rotated.square().mean(-1, keepdim=True).sqrt()
    unit = rotated / rms.clamp(min=torch.finfo(torch.float32).tiny)
    codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2)
    product = (unit * table[codes]).sum(-1, keepdim=True)
    scale = rms * unit.square().sum(-1, keepdim=True) / product.clamp(min=torch.finfo(torch.float32).tiny)
    return codes.to(torch.uint8), _half(scale)


def _half(x: Tensor) -> Tensor:
    """float16, too large values clamped."""
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).half()


class QueryScorer:
    """Scores of one sequence's queries [Hkv, r, D]: `q . mean + scale_t <R (q / w), levels_t>`, without forming a key."""

    def __init__(self, query: Tensor, copy: LowBitKV) -> None:
        assert copy.key_weights is not None, "the rotated code needs the layer's key weights"
        self._query = query
        self._rotated = (query / copy.key_weights.unsqueeze(1)) @ rotation(copy.head_dim, query.device).T
        self._copy = copy

    def __call__(self, block: Block) -> Tensor:
        """A block of N pages -> [Hkv, r, N 64]."""
        decoded = by_head(unpack_keys(block, _level_table_of(self._copy, block), self._copy))  # [Hkv, N 64, D]
        scores = self._rotated @ decoded.transpose(1, 2)  # [Hkv, r, N 64]
        scores *= by_head(block.field("key_scale").float()).transpose(1, 2)
        mean = by_head(block.field("key_mean").float())  # [Hkv, N 64/g, D]
        bias = self._query @ mean.transpose(1, 2)  # [Hkv, r, N 64/g]
        scores.unflatten(2, (-1, self._copy.group_size)).add_(bias.unsqueeze(-1))
        return scores


class ValueSum:
    """`sum_t p_t v_t` of one sequence, block by block; rotated back once, at the end."""

    def __init__(self, copy: LowBitKV) -> None:
        self._copy = copy
        self._total: Tensor | None = None

    def add(self, weights: Tensor, block: Block) -> None:
        """weights [Hkv, r, T] over the first T tokens of a block."""
        count = weights.shape[-1]
        decoded = by_head(unpack_values(block, _level_table_of(self._copy, block), self._copy), count)  # [Hkv, T, D]
        scale = by_head(block.field("value_scale").float(), count)  # [Hkv, T, 1]
        part = (weights * scale.transpose(1, 2)) @ decoded
        self._total = part if self._total is None else self._total + part

    def result(self) -> Tensor:
        """[Hkv, r, D]; at least one block was added."""
        assert self._total is not None
        return self._total @ rotation(self._copy.head_dim, self._total.device)


def dequantise(block: Block, count: int, copy: LowBitKV) -> tuple[Tensor, Tensor]:
    """The first `count` tokens of a block as float32 keys and values [Hkv, count, D]."""
    assert copy.key_weights is not None, "the rotated code needs the layer's key weights"
    turn = rotation(copy.head_dim, copy.key_weights.device)
    table = _level_table_of(copy, block)
    rotated = by_head(unpack_keys(block, table, copy) * block.field("key_scale").float(), count)
    values = by_head(unpack_values(block, table, copy) * block.field("value_scale").float(), count)
    mean = by_head(block.field("key_mean").float()).repeat_interleave(copy.group_size, dim=1)[:, :count]
    return rotated @ turn / copy.key_weights.unsqueeze(1) + mean, values @ turn


def _level_table_of(copy: LowBitKV, block: Block) -> Tensor:
    return _level_table(copy.bits, block[0].fields["key_codes"].device)


@constant(16)
def _level_table(bits: int, device: torch.device) -> Tensor:
    """float32 [256, 8 / b]: the levels in each possible byte."""
    return levels(bits, device)[byte_table(bits, device).long()]
