"""Pack codes into bytes, in an order that suits vector instructions.

A matrix of codes [rows, columns] takes `rows C` bytes, `C = ceil(columns b / 8)`, in tiles of 16
rows. A byte holds `P = 8 / b` codes:

- A tile starts with `columns // (4 P)` chunks of [16 rows, 4 bytes]. Bits `m b` and up of byte `i`
  of a row hold its column `4 P chunk + 4 m + i`. So the same bits of all 64 bytes are 4
  neighbouring columns of 16 rows, and a dot product of bytes in 32-bit lanes adds up one row per
  lane, without shuffles.
- The remaining `r` columns follow as [16 rows, w bytes], `w = ceil(r b / 8)`: byte `i` holds column
  `4 P chunks + w m + i`.
- The last tile may have fewer rows.

Keys are stored with tokens as rows, values with channels as rows: either way a lane adds up over
columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specache.kernels.constants import constant

TILE = 16  # rows


def row_bytes(columns: int, bits: int) -> int:
    """Return the bytes of one row (`C`)."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., rows, columns] -> bytes [..., rows C]."""
    rows, columns = codes.shape[-2:]
    place = places(rows, columns, bits, codes.device)
    packed = codes.new_empty(*codes.shape[:-2], place.numel())
    packed[..., place.flatten()] = _pack_rows(codes, bits).flatten(-2)
    return packed


def replace_rows(packed: Tensor, codes: Tensor, first: int, rows: int, bits: int) -> None:
    """Overwrite rows `[first, first + n)` of packed [..., rows C] by codes [..., n, columns]."""
    place = places(rows, codes.shape[-1], bits, codes.device)[first : first + codes.shape[-2]]
    packed[..., place.flatten()] = _pack_rows(codes, bits).flatten(-2)


def unpack(packed: Tensor, table: Tensor, rows: int, columns: int) -> Tensor:
    """Decode packed bytes [..., rows C] by `table` [256, P] -> float32 [..., rows, columns]."""
    bits = 8 // table.shape[1]
    place = places(rows, columns, bits, packed.device)
    in_rows = packed.index_select(-1, place.flatten()).unflatten(-1, place.shape)  # [..., rows, C]
    decoded = torch.nn.functional.embedding(in_rows.int(), table).flatten(-2)  # [..., rows, C P]
    return decoded.index_select(-1, slots(columns, bits, packed.device))


@constant(16)
def byte_table(bits: int, device: torch.device) -> Tensor:
    """Return the codes in each possible byte, float32 [256, P]."""
    shifts = torch.arange(0, 8, bits, device=device)
    return ((torch.arange(256, device=device)[:, None] >> shifts) & (2**bits - 1)).float()


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [..., n, columns] row by row -> bytes [..., n, C]."""
    per_byte, columns = 8 // bits, codes.shape[-1]
    slotted = codes.new_zeros(*codes.shape[:-1], row_bytes(columns, bits) * per_byte)
    slotted[..., slots(columns, bits, codes.device)] = codes
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (slotted.unflatten(-1, (-1, per_byte)) << shifts).sum(-1, dtype=torch.uint8)


@constant(64)
def slots(columns: int, bits: int, device: torch.device) -> Tensor:
    """Return each column's index among the `C P` codes of a row, int64 [columns].

    Codes are counted byte by byte, low bits first.
    """
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
def places(rows: int, columns: int, bits: int, device: torch.device) -> Tensor:
    """Return the place of byte `j` of a row in the packed matrix, int64 [rows, C]."""
    size = row_bytes(columns, bits)
    chunked = columns // (32 // bits) * 4  # bytes of a row in whole chunks
    row, byte = torch.arange(rows, device=device)[:, None], torch.arange(size, device=device)
    tile, inside = row // TILE, row % TILE
    high = (rows - tile * TILE).clamp(max=TILE)  # rows of the tile
    whole = byte // 4 * high * 4 + inside * 4 + byte % 4
    rest = chunked * high + inside * (size - chunked) + byte - chunked
    return tile * TILE * size + torch.where(byte < chunked, whole, rest)
