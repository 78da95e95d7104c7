"""The state of a sliding-window layer of one sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from specache.attention.decode import StepKind
from specache.attention.dense import attend_part, merge, windowed
from specache.cache.base_layer import LayerState
from specache.cache.sizes import ORDINARY_ITEMSIZE
from specache.kernels.finite import check_finite
from specache.kernels.torch.exact import Part
from specache.kernels.types import AttentionParams
from specache.model.dimensions import row_bytes
from specache.platform.budget import ByteBudget
from specache.stats import MemoryUse


class WindowLayer(LayerState):
    """A sliding layer: the newest `window` tokens in a ring, slot = position modulo window.

    Attributes:
        length: tokens of the sequence.
    """

    def __init__(self, index: int, window: int, keys: Tensor, budget: ByteBudget) -> None:
        heads, _, dim = keys.shape
        size = window * row_bytes(heads, dim, keys.itemsize)
        super().__init__(index, keys, window, budget.claim(size, "sliding windows"))
        self.window = window
        self.length = 0
        self._longest = 0  # the length before the last truncation: what it had written is still in the ring

    @property
    def held_bytes(self) -> int:
        return self._kv_rows.shape[2] * self._row_bytes()

    def memory(self, itemsize: int | None = None) -> MemoryUse:
        ordinary = min(self.length, self.window) * self._row_bytes(ORDINARY_ITEMSIZE)
        return MemoryUse(windows=self._kv_rows.shape[2] * self._row_bytes(itemsize), ordinary_windows=ordinary)

    @property
    def ring(self) -> Tensor:
        """Keys and values [2, Hkv, window, D]; slots that no token has used are undefined."""
        return self._kv_rows

    @property
    def written(self) -> int:
        """The tokens that the ring was written for: one more than `length` after a truncation.

        The slot of a dropped token held one that the window has dropped for it.
        """
        return max(self.length, self._longest)

    def restore(self, ring: Tensor, length: int, written: int | None = None) -> None:
        """Restore the `ring` of a sequence of `length` tokens. It may lack unused slots.

        Args:
            written: what the ring was written for (`written`), if that is more.
        """
        self._kv_rows[:, :, : ring.shape[2]].copy_(ring)
        self.length, self._longest = length, written or 0

    def ring_at(self, length: int, keys: Tensor, values: Tensor) -> Tensor:
        """Return the ring as it will be after `length` tokens, before a pass stores its own.

        Args:
            length: tokens, between those stored and those after the pass.
            keys, values: [Hkv, n, D] of the pass.

        Returns:
            A copy [2, Hkv, min(length, window), D] without the slots that no token has used.
        """
        count = min(length, self.window)
        slots = torch.arange(length - count, length, device=self._kv_rows.device) % self.window
        old = max(0, self.length - (length - count))  # tokens of that ring that are stored already
        ring = self._kv_rows.new_empty(*self._kv_rows.shape[:2], count, self._kv_rows.shape[3])
        ring[:, :, slots[:old]] = self._kv_rows[:, :, slots[:old]]
        new = slice(length - count + old - self.length, length - self.length)
        for half, tensor in zip(ring, (keys, values), strict=True):
            half[:, slots[old:]] = tensor[:, new]
        return ring

    def move_ring(self, into: Tensor) -> None:
        """Move the ring to the buffer `into` [2, Hkv, window, D]."""
        into.copy_(self._kv_rows)
        self._kv_rows = into

    def prefill(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        """Attend exactly, within the window, with the next n prompt tokens and store them."""
        check_finite(keys, values, self.index)
        earlier = torch.arange(max(0, self.length - self.window + 1), self.length, device=keys.device) % self.window
        seen_keys = torch.cat([self._kv_rows[0, :, earlier], keys], dim=1)
        seen_values = torch.cat([self._kv_rows[1, :, earlier], values], dim=1)
        out, _ = merge([windowed(query, seen_keys, seen_values, self.window, params)], params.sinks)
        self.store(keys, values)
        return out

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams, kind: StepKind) -> Tensor:
        """Attend exactly, within the window, with a step's queries [Hq, n, D].

        The first token is stored if the step commits it.
        """
        check_finite(keys, values, self.index)
        if kind.commits:
            self.store(keys[:, :1], values[:, :1])
            keys, values = keys[:, 1:], values[:, 1:]
        ring = min(self.length, self.window)
        seen_keys = torch.cat([self._kv_rows[0, :, :ring], keys], dim=1)
        seen_values = torch.cat([self._kv_rows[1, :, :ring], values], dim=1)
        part: Part = attend_part(query, seen_keys, seen_values, params, self._mask(query, ring, kind))
        return merge([part], params.sinks)[0]

    def store(self, keys: Tensor, values: Tensor) -> None:
        """Add n tokens, keys and values [Hkv, n, D]."""
        self.length += keys.shape[1]
        keys, values = keys[:, -self.window :], values[:, -self.window :]
        slots = torch.arange(self.length - keys.shape[1], self.length, device=keys.device) % self.window
        self._kv_rows[0, :, slots] = keys
        self._kv_rows[1, :, slots] = values

    def truncate(self, length: int) -> None:
        """Drop the last token, or what a failed pass wrote. Else check `can_truncate`."""
        if length < self.length:
            self._longest, self.length = self.written, length

    def undo(self, length: int) -> None:
        """Drop what an unfinished decode pass may have written behind `length` tokens."""
        self._longest, self.length = max(self.written, length + 1), length

    def can_truncate(self, length: int) -> bool:
        """Return whether the ring holds what a sequence of `length` tokens sees next."""
        return length >= self.length or length >= self.written - 1 or self.written <= self.window

    def fork(self) -> WindowLayer:
        other = WindowLayer(self.index, self.window, self._kv_rows[0], self._claim.budget)
        other._kv_rows.copy_(self._kv_rows)
        other.length, other._longest = self.length, self._longest
        return other

    def release(self) -> None:
        self.length = self._longest = 0
        self._free()

    def _mask(self, query: Tensor, ring: int, kind: StepKind) -> Tensor:
        """Return which keys a step's queries see, bool [n, ring + own].

        The draft query does not see the token that leaves its window; the real query does not see
        the draft token.
        """
        own = 0 if kind is StepKind.SINGLE else 1
        seen = torch.ones(kind.queries, ring + own, dtype=torch.bool, device=query.device)
        if own and self.length >= self.window:
            seen[-1, self.length % self.window] = False
        if kind is StepKind.PAIR:
            seen[0, -1] = False
        return seen
