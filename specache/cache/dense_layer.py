"""A full-attention layer of one sequence under policy `full`."""

from __future__ import annotations

from torch import Tensor

from specache.attention.dense import attend_part, merge
from specache.cache.base_layer import LayerState
from specache.cache.sizes import ORDINARY_ITEMSIZE, dense_capacity
from specache.kernels.finite import check_finite
from specache.kernels.types import AttentionParams
from specache.platform.budget import ByteBudget
from specache.stats import MemoryUse


class DenseLayer(LayerState):
    """A full-attention layer under policy `full`: an ordinary 16-bit cache in fast memory."""

    def __init__(self, index: int, keys: Tensor, budget: ByteBudget) -> None:
        super().__init__(index, keys, 0, budget.claim(0, "the 16-bit cache (policy 'full')"))
        self.length = 0

    @property
    def keys(self) -> Tensor:
        return self._kv_rows[0, :, : self.length]

    @property
    def values(self) -> Tensor:
        return self._kv_rows[1, :, : self.length]

    @property
    def held_bytes(self) -> int:
        return self._kv_rows.shape[2] * self._row_bytes()

    def memory(self, itemsize: int | None = None) -> MemoryUse:
        full = self.length * self._row_bytes(ORDINARY_ITEMSIZE)
        return MemoryUse(fast=self._kv_rows.shape[2] * self._row_bytes(itemsize), full=full)

    def prefill(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        check_finite(keys, values, self.index)
        parts = [attend_part(query, self.keys, self.values, params)] if self.length else []
        parts.append(attend_part(query, keys, values, params, causal=True))
        out, _ = merge(parts, params.sinks)
        self.extend(keys, values)
        return out

    def extend(self, keys: Tensor, values: Tensor) -> None:
        """Add n tokens, keys and values [Hkv, n, D]."""
        needed = self.length + keys.shape[1]
        if needed > self._kv_rows.shape[2]:
            capacity = dense_capacity(self.length, needed)
            size = capacity * self._row_bytes()
            self._claim.resize(self.held_bytes + size)  # old and new buffer at once
            grown = self._kv_rows.new_empty(*self._kv_rows.shape[:2], capacity, self._kv_rows.shape[3])
            grown[:, :, : self.length] = self._kv_rows[:, :, : self.length]
            self._kv_rows = grown
            self._claim.resize(size)
        self._kv_rows[0, :, self.length : needed] = keys
        self._kv_rows[1, :, self.length : needed] = values
        self.length = needed

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        """Store one token, then attend exactly with query [Hq, 1, D] -> [Hq, 1, D]."""
        check_finite(keys, values, self.index)
        self.extend(keys, values)
        return merge([attend_part(query, self.keys, self.values, params)], params.sinks)[0]

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)

    def can_truncate(self, length: int) -> bool:
        return True

    def shrink(self) -> None:
        """Free the room behind the stored tokens."""
        if self._kv_rows.shape[2] > self.length:
            self._kv_rows = self._kv_rows[:, :, : self.length].clone()
            self._claim.resize(self.held_bytes)

    def fork(self) -> DenseLayer:
        other = DenseLayer(self.index, self._kv_rows[0], self._claim.budget)
        other._claim.resize(self.held_bytes)
        other._kv_rows, other.length = self._kv_rows.clone(), self.length
        return other

    def release(self) -> None:
        self.length = 0
        self._free()
