"""Codes packed into bytes: 8 at 1 bit, 4 at 2 bits, 2 at 4 bits; code `i` of a byte sits at bits `i b` and up."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., D] -> packed bytes [..., ceil(D b / 8)], first code in the lowest bits."""
    per_byte = 8 // bits
    short = -codes.shape[-1] % per_byte
    if short:
        codes = torch.nn.functional.pad(codes, (0, short))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes.unflatten(-1, (-1, per_byte)) << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, table: Tensor, dim: int) -> Tensor:
    """Packed bytes [..., C] -> float32 [..., dim]: what `table` [256, 8 / b] says each byte stands for."""
    decoded = torch.nn.functional.embedding(packed.int(), table)  # [..., C, 8 / b]
    return decoded.flatten(-2)[..., :dim]


@lru_cache(maxsize=16)
def byte_table(bits: int, device: torch.device) -> Tensor:
    """float32 [256, 8 / b]: the codes in each possible byte."""
    shifts = torch.arange(0, 8, bits, device=device)
    return ((torch.arange(256, device=device)[:, None] >> shifts) & (2**bits - 1)).float()
