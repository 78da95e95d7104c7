"""What the attention layers of one sequence have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from specache.model.dimensions import row_bytes
from specache.platform.budget import Claim
from specache.stats import MemoryUse


class LayerState(ABC):
    """One attention layer of one sequence, with keys and values in fast memory.

    Args:
        index: the layer's number in the model.
        keys: any keys [Hkv, n, D] of the layer; they determine heads, head dimension, dtype and
            device.
        tokens: keys and values that the buffer has room for, all zero at first.
        claim: the bytes claimed for it.
    """

    def __init__(self, index: int, keys: Tensor, tokens: int, claim: Claim) -> None:
        heads, _, dim = keys.shape
        self.index = index
        self._claim = claim
        self._kv_rows = torch.zeros(2, heads, tokens, dim, dtype=keys.dtype, device=keys.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self._kv_rows.dtype

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes held of the budget."""

    @abstractmethod
    def memory(self, itemsize: int | None = None) -> MemoryUse:
        """Return the bytes in use, with row elements of `itemsize` bytes (default: the model's)."""

    def random_rows(self, tokens: int) -> Tensor:
        """Return random keys or values [Hkv, tokens, D], the same in every call."""
        _, heads, _, dim = self._kv_rows.shape
        generator = torch.Generator(self._kv_rows.device).manual_seed(0)
        return torch.randn(heads, tokens, dim, generator=generator, dtype=self.dtype, device=self._kv_rows.device)

    def _row_bytes(self, itemsize: int | None = None) -> int:
        """Return the bytes of one token's `[K | V]`, all KV heads."""
        return row_bytes(self._kv_rows.shape[1], self._kv_rows.shape[3], itemsize or self._kv_rows.itemsize)

    def _free(self) -> None:
        self._kv_rows = self._kv_rows[:, :, :0].clone()
        self._claim.release()
