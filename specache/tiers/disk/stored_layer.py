"""The disk tier's state of one layer: a table of blocks in files, and a tail in memory."""

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
    """Immutable state of a layer, so that a failed write leaves the previous state.

    Writes go only to tail slots that no state counts, so a reader of an older state is never
    disturbed.
    """

    layout: RowLayout
    table: BlockTable
    tail: Tensor  # [Hkv, 64, 2 D]; the first `held` slots are the tokens behind the table's
    held: int

    @classmethod
    def of(cls, layout: RowLayout, dtype: torch.dtype, table: BlockTable | None = None, rows: Tensor | None = None) -> StoredLayer:
        """Return a layer of blocks in files, and rows [Hkv, t < 64, 2 D] behind them.

        Both may be omitted.
        """
        tail = torch.empty(layout.num_kv_heads, BLOCK_TOKENS, 2 * layout.head_dim, dtype=dtype)
        count = 0 if rows is None else rows.shape[1]
        if rows is not None:
            tail[:, :count] = rows
        return cls(layout, table or BlockTable(), tail, count)

    @property
    def on_disk(self) -> int:
        """Return the number of tokens in files."""
        return self.table.blocks * BLOCK_TOKENS

    @property
    def length(self) -> int:
        return self.on_disk + self.held

    @property
    def tail_rows(self) -> Tensor:
        """Return the rows [Hkv, held, 2 D] of the tail."""
        return self.tail[:, : self.held]

    def with_own_tail(self) -> StoredLayer:
        """Return the same state with a tail of its own."""
        return replace(self, tail=self.tail.clone())

    def joined(self, keys: Tensor, values: Tensor, start: int, stop: int) -> Tensor:
        """Join the tail with new keys and values [Hkv, n, D].

        NumPy copies: the copy is small, and PyTorch would distribute it over threads that are busy.

        Returns:
            rows `[start, stop)` of both, [Hkv, stop - start, 2 D].
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
        """Return the state after new keys and values [Hkv, n, D].

        `table` already has the full blocks of tail and new rows.
        """
        total = self.held + keys.shape[1]
        whole = (table.blocks - self.table.blocks) * BLOCK_TOKENS
        if whole:
            return StoredLayer.of(self.layout, self.tail.dtype, table, self.joined(keys, values, whole, total))
        halves = self.tail[:, self.held : total].split(self.layout.head_dim, dim=-1)
        for half, tensor in zip(halves, (keys, values), strict=True):
            _bits(half)[:] = _bits(tensor.cpu())
        return replace(self, held=total)


def _bits(tensor: Tensor) -> NDArray[np.int16]:
    """View the memory as int16, since NumPy has no bfloat16."""
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).view(torch.int16).numpy()
