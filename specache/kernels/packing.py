"""Codes packed into bytes, in the order in which vector instructions want them.

A matrix of codes [rows, columns] takes `rows C` bytes, `C = ceil(columns b / 8)`, in tiles of 16 rows; a byte holds `P = 8 / b`:

- A tile starts with `columns // (4 P)` chunks of [16 rows, 4 bytes]. Bits `m b` and up of byte `i` of a row hold its column
  `4 P chunk + 4 m + i`. So the same bits of all 64 bytes are 4 neighbouring columns of 16 rows, and a dot product of bytes in
  32-bit lanes adds up one row per lane: nothing is ever shuffled between lanes.
- The columns that are left, `r` of them, follow as [16 rows, w bytes], `w = ceil(r b / 8)`: byte `i` holds column
  `4 P chunks + w m + i`.
- The last tile may have fewer rows.

Keys are stored with tokens as rows, values with channels as rows: either way a lane adds up over columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specache.kernels.constants import constant

TILE = 16  # rows


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one row (`C`)."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., rows, columns] -> packed bytes [..., rows C]."""
    rows, columns = codes.shape[-2:]
    place = _places(rows, columns, bits, codes.device)
    packed = codes.new_empty(*codes.shape[:-2], place.numel())
    packed[..., place.flatten()] = _pack_rows(codes, bits).flatten(-2)
    return packed


def replace_rows(packed: Tensor, codes: Tensor, first: int, rows: int, bits: int) -> None:
    """Write rows `[first, first + n)` of a packed matrix [..., rows C] from codes [..., n, columns]."""
    place = _places(rows, codes.shape[-1], bits, codes.device)[first : first + codes.shape[-2]]
    packed[..., place.flatten()] = _pack_rows(codes, bits).flatten(-2)


def unpack(packed: Tensor, table: Tensor, rows: int, columns: int) -> Tensor:
    """Packed bytes [..., rows C] -> float32 [..., rows, columns]: what `table` [256, P] says each byte stands for."""
    bits = 8 // table.shape[1]
    place = _places(rows, columns, bits, packed.device)
    in_rows = packed.index_select(-1, place.flatten()).unflatten(-1, place.shape)  # [..., rows, C]
    decoded = torch.nn.functional.embedding(in_rows.int(), table).flatten(-2)  # [..., rows, C P]
    return decoded.index_select(-1, _slots(columns, bits, packed.device))


@constant(16)
def byte_table(bits: int, device: torch.device) -> Tensor:
    """float32 [256, P]: the codes in each possible byte."""
    shifts = torch.arange(0, 8, bits, device=device)
    return ((torch.arange(256, device=device)[:, None] >> shifts) & (2**bits - 1)).float()


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n, columns] -> bytes [..., n, C], row by row."""
    per_byte, columns = 8 // bits, codes.shape[-1]
    slots = row_bytes(columns, bits) * per_byte
    slotted = codes.new_zeros(*codes.shape[:-1], slots)
    slotted[..., _slots(columns, bits, codes.device)] = codes
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (slotted.unflatten(-1, (-1, per_byte)) << shifts).sum(-1, dtype=torch.uint8)


@constant(64)
def _slots(columns: int, bits: int, device: torch.device) -> Tensor:
    """int64 [columns]: where a column's code is among the `C P` of a row, counted byte by byte, low bits first."""
    per_byte = 8 // bits
    column = torch.arange(columns, device=device)
    chunk, inside = column // (4 * per_byte), column % (4 * per_byte)
    slot = (4 * chunk + inside % 4) * per_byte + inside // 4
    chunks = columns // (4 * per_byte)
    full = chunks * 4 * per_byte
    width = max(1, row_bytes(columns, bits) - 4 * chunks)
    left = column - full
    return torch.where(column < full, slot, (4 * chunks + left % width) * per_byte + left // width)


@constant(64)
def _places(rows: int, columns: int, bits: int, device: torch.device) -> Tensor:
    """int64 [rows, C]: where byte `j` of a row is stored."""
    size = row_bytes(columns, bits)
    chunked = columns // (32 // bits) * 4  # bytes of a row in whole chunks
    row, byte = torch.arange(rows, device=device)[:, None], torch.arange(size, device=device)
    tile, inside = row // TILE, row % TILE
    high = (rows - tile * TILE).clamp(max=TILE)  # rows of the tile
    whole = byte // 4 * high * 4 + inside * 4 + byte % 4
    rest = chunked * high + inside * (size - chunked) + byte - chunked
    return tile * TILE * size + torch.where(byte < chunked, whole, rest)
