"""What the disk tier has of one layer: a table of blocks in files, and a tail in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specache.tiers.disk.extents import BlockTable
from specache.tiers.disk.row_layout import BLOCK_TOKENS, RowLayout


@dataclass(frozen=True)
class StoredLayer:
    """Replaced as a whole, so that a failed write leaves the one before.

    Only slots of the tail that no state counts are written to: who reads an older state is never disturbed.
    """

    layout: RowLayout
    table: BlockTable
    tail: Tensor  # [Hkv, 64, 2 D], of which the first `held` are the tokens behind the table's
    held: int

    @classmethod
    def of(cls, layout: RowLayout, dtype: torch.dtype, table: BlockTable | None = None, rows: Tensor | None = None) -> StoredLayer:
        """Blocks in files, and rows [Hkv, t < 64, 2 D] behind them; nothing of what is left out."""
        tail = torch.empty(layout.num_kv_heads, BLOCK_TOKENS, 2 * layout.head_dim, dtype=dtype)
        count = 0 if rows is None else rows.shape[1]
        if rows is not None:
            tail[:, :count] = rows
        return cls(layout, table or BlockTable(), tail, count)

    @property
    def on_disk(self) -> int:
        """Tokens in files."""
        return self.table.blocks * BLOCK_TOKENS

    @property
    def length(self) -> int:
        return self.on_disk + self.held

    @property
    def tail_rows(self) -> Tensor:
        """[Hkv, held, 2 D]."""
        return self.tail[:, : self.held]

    def with_own_tail(self) -> StoredLayer:
        """The same, and its tail is written to by nobody else."""
        return replace(self, tail=self.tail.clone())

    def joined(self, keys: Tensor, values: Tensor, start: int, stop: int) -> Tensor:
        """Rows [Hkv, stop - start, 2 D] of a range of the tail and new keys and values [Hkv, n, D] behind it.

        Copied by NumPy: a copy is small, and PyTorch would share it among threads that are busy with something else.
        """
        layout = self.layout
        rows = torch.empty(layout.num_kv_heads, stop - start, 2 * layout.head_dim, dtype=self.tail.dtype)
        old = max(min(self.held, stop) - start, 0)
        new = slice(max(start - self.held, 0), max(stop - self.held, 0))
        _bits(rows)[:, :old] = _bits(self.tail)[:, start : start + old]
        if new.start < new.stop:
            for half, tensor in zip(rows[:, old:].split(layout.head_dim, dim=-1), (keys, values), strict=True):
                _bits(half)[:] = _bits(tensor[:, new].cpu())
        return rows

    def grown(self, table: BlockTable, keys: Tensor, values: Tensor) -> StoredLayer:
        """With new keys and values [Hkv, n, D], of which (and of the tail) `table` has the whole blocks."""
        total = self.held + keys.shape[1]
        whole = (table.blocks - self.table.blocks) * BLOCK_TOKENS
        if whole:
            return StoredLayer.of(self.layout, self.tail.dtype, table, self.joined(keys, values, whole, total))
        _bits(self.tail)[:, self.held : total] = _bits(self.joined(keys, values, self.held, total))
        return replace(self, held=total)


def _bits(tensor: Tensor) -> NDArray[np.int16]:
    """The same memory, in units that NumPy knows (it has no bfloat16)."""
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).view(torch.int16).numpy()
