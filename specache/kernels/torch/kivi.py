"""KIVI's code in plain PyTorch (paper section 3.1): `zero + scale * code`.

Keys have a scale per channel and group of tokens, values one per token and group of channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specache.kernels.blocks import Block, by_head, store, store_codes, unpack_keys, unpack_values
from specache.kernels.packing import byte_table
from specache.kernels.types import LowBitKV, PageRun


def quantise(keys: Tensor, values: Tensor, run: PageRun, offset: int, low_bit_kv: LowBitKV) -> None:
    """Quantise keys, values [Hkv, count, D], whole groups, into a run from slot `offset` on."""
    g, (heads, count, dim) = low_bit_kv.group_size, keys.shape
    groups = keys.float().reshape(heads, count // g, g, dim)
    scale, zero = _scale_and_zero(groups.amin(2), groups.amax(2), low_bit_kv.bits)  # [Hkv, groups, D]
    key_codes = _codes(groups, scale.unsqueeze(2), zero.unsqueeze(2), low_bit_kv.bits).reshape(heads, count, dim)
    store(run.fields["key_scale"], scale, offset // g)
    store(run.fields["key_zero"], zero, offset // g)
    parts = [_quantise_group(group, low_bit_kv.bits) for group in values.float().split(low_bit_kv.value_group_size, dim=-1)]
    value_codes, scale, zero = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    store(run.fields["value_scale"], scale, offset)  # [Hkv, count, Gv]
    store(run.fields["value_zero"], zero, offset)
    store_codes(run, key_codes, value_codes, offset, low_bit_kv.bits)


def _quantise_group(group: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise groups [..., group] -> codes of that shape, scale and zero point [..., 1]."""
    scale, zero = _scale_and_zero(group.amin(-1, keepdim=True), group.amax(-1, keepdim=True), bits)
    return _codes(group, scale, zero, bits), scale, zero


def _scale_and_zero(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return float16 scale and zero point of groups with minimum `low` and maximum `high`."""
    if bits == 1:  # levels at the quarter points
        scale, zero = (high - low) / 2, (3 * low + high) / 4
    else:
        scale, zero = (high - low) / (2**bits - 1), low
    limit = torch.finfo(torch.float16).max
    return scale.clamp(max=limit).half(), zero.clamp(-limit, limit).half()


def _codes(group: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return codes for the rounded scale and zero point.

    A constant group (`scale` 0) gets code 0 and decodes to itself.
    """
    scale, zero = scale.float(), zero.float()
    steps = torch.where(scale > 0, (group - zero) / scale, 0.0)
    return steps.round().clamp(0, 2**bits - 1).to(torch.uint8)


class QueryScorer:
    """Scores one sequence's queries [Hkv, r, D] without decoding a key.

    `q . k = sum_d (q_d s_d) c_d + sum_d q_d z_d`.
    """

    def __init__(self, query: Tensor, low_bit_kv: LowBitKV) -> None:
        self._query = query
        self._low_bit_kv = low_bit_kv

    def __call__(self, block: Block) -> Tensor:
        """Score a block of N pages -> [Hkv, r, N 64]."""
        low_bit_kv, query = self._low_bit_kv, self._query
        codes = unpack_keys(block, _table(low_bit_kv, block), low_bit_kv)  # [N, Hkv, 64, D]
        codes = codes.unflatten(2, (-1, low_bit_kv.group_size))  # [N, Hkv, 64/g, g, D]
        grouped = query[None, :, None]  # [1, Hkv, 1, r, D]
        scaled = grouped * block.field("key_scale").float().unsqueeze(3)  # [N, Hkv, 64/g, r, D]
        bias = block.field("key_zero").float() @ query.transpose(1, 2)  # [N, Hkv, 64/g, r]
        scores = scaled @ codes.transpose(3, 4) + bias.unsqueeze(-1)  # [N, Hkv, 64/g, r, g]
        return scores.permute(1, 3, 0, 2, 4).flatten(2)


class ValueSum:
    """Sums `p_t v_t` of one sequence block by block, as `sum_t (p_t s_t) c_t + sum_t p_t z_t`."""

    def __init__(self, low_bit_kv: LowBitKV) -> None:
        self._low_bit_kv = low_bit_kv
        self._total: Tensor | None = None

    def add(self, weights: Tensor, block: Block) -> None:
        """Add the first T tokens of a block with weights [Hkv, r, T]."""
        count = weights.shape[-1]
        codes = by_head(unpack_values(block, _table(self._low_bit_kv, block), self._low_bit_kv), count)  # [Hkv, T, D]
        scale = by_head(block.field("value_scale").float(), count)  # [Hkv, T, Gv]
        zero = by_head(block.field("value_zero").float(), count)
        bias = weights @ zero  # [Hkv, r, Gv]
        parts = [
            (weights * scale[..., j].unsqueeze(1)) @ group + bias[..., j : j + 1]
            for j, group in enumerate(codes.split(self._low_bit_kv.value_group_size, dim=-1))
        ]
        part = torch.cat(parts, dim=-1)
        self._total = part if self._total is None else self._total + part

    def result(self) -> Tensor:
        """Return the sum [Hkv, r, D], after at least one block."""
        assert self._total is not None
        return self._total


def dequantise(block: Block, count: int, low_bit_kv: LowBitKV) -> tuple[Tensor, Tensor]:
    """Return the first `count` tokens of a block as float32 keys and values [Hkv, count, D]."""
    table = _table(low_bit_kv, block)
    codes = unpack_keys(block, table, low_bit_kv).unflatten(2, (-1, low_bit_kv.group_size))
    scale, zero = (block.field(name).float().unsqueeze(3) for name in ("key_scale", "key_zero"))
    keys = by_head((codes * scale + zero).flatten(2, 3), count)
    scale, zero = (
        block.field(name).float().repeat_interleave(low_bit_kv.value_group_size, -1)[..., : low_bit_kv.head_dim]
        for name in ("value_scale", "value_zero")
    )
    return keys, by_head(unpack_values(block, table, low_bit_kv) * scale + zero, count)


def _table(low_bit_kv: LowBitKV, block: Block) -> Tensor:
    return byte_table(low_bit_kv.bits, block[0].fields["key_codes"].device)
