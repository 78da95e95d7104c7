"""Rows in main memory: one growing buffer [Hkv, capacity, 2 D] per layer, pinned when the model is on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

GROWTH = 1.25  # a full buffer grows to this times its size
MIN_CAPACITY = 64  # tokens


def ram_capacity(expected: int, tokens: int) -> int:
    """Tokens that a buffer made for `expected` has room for when it has grown, one by one, to hold `tokens`."""
    capacity = max(expected, MIN_CAPACITY)
    while capacity < tokens:
        capacity = max(capacity + 1, int(capacity * GROWTH))
    return capacity


class RamTier:
    """The slow tier in RAM.

    Args:
        in_place: rows are read where they lie (tier `ram-inplace`) instead of being copied through a hot set (`ram`).
        pinned: page-locked memory, for copies to CUDA that run beside the computation.
    """

    def __init__(self, in_place: bool, pinned: bool = False) -> None:
        self.in_place = in_place
        self.pinned = pinned
        self._rows: dict[int, Tensor] = {}
        self._expected = MIN_CAPACITY

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        heads, count, dim = keys.shape
        rows = self._ensure(layer, start, start + count, heads, dim, keys.dtype)
        rows[:, start : start + count, :dim].copy_(keys)
        rows[:, start : start + count, dim:].copy_(values)

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = self._rows[layer][:, start:stop]
        dim = rows.shape[-1] // 2
        return rows[..., :dim], rows[..., dim:]

    def rows(self, layer: int) -> Tensor:
        return self._rows[layer]

    def gather(self, layer: int, heads: Tensor, positions: Tensor) -> Tensor:
        rows = self._rows[layer]
        flat = rows.flatten(0, 1)  # [Hkv capacity, 2 D]; a view
        return flat.index_select(0, heads * rows.shape[1] + positions)

    def reserve(self, tokens: int) -> None:
        self._expected = max(self._expected, tokens)

    def fork(self) -> RamTier:
        other = RamTier(self.in_place, self.pinned)
        other._expected = self._expected
        other._rows = {layer: self._clone(rows) for layer, rows in self._rows.items()}
        return other

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._rows.values())

    def close(self) -> None:
        self._rows.clear()

    def _ensure(self, layer: int, used: int, needed: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
        rows = self._rows.get(layer)
        if rows is None or rows.shape[1] < needed:
            capacity = max(needed, self._expected, int(rows.shape[1] * GROWTH) if rows is not None else 0)
            grown = torch.empty(heads, capacity, 2 * dim, dtype=dtype, pin_memory=self.pinned)
            if rows is not None:
                grown[:, :used].copy_(rows[:, :used])
            self._rows[layer] = rows = grown
        return rows

    def _clone(self, rows: Tensor) -> Tensor:
        return torch.empty_like(rows, pin_memory=self.pinned).copy_(rows)
