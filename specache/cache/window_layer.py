"""The state of a sliding-window layer of one sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from specache.attention.decode import StepKind
from specache.attention.dense import AttentionParams, Part, attend_part, merge, windowed
from specache.cache.layers import check_finite
from specache.platform.budget import ByteBudget


class WindowLayer:
    """A sliding layer: the newest `window` tokens at 16 bits in a ring buffer, slot = position modulo window."""

    def __init__(self, index: int, window: int, keys: Tensor, budget: ByteBudget) -> None:
        heads, _, dim = keys.shape
        self.index = index
        self.window = window
        self.length = 0
        self._claim = budget.claim(2 * heads * window * dim * keys.itemsize, "sliding windows")
        self._ring = torch.zeros(2, heads, window, dim, dtype=keys.dtype, device=keys.device)

    @property
    def dtype(self) -> torch.dtype:
        return self._ring.dtype

    @property
    def nbytes(self) -> int:
        return self._ring.nbytes

    @property
    def held_bytes(self) -> int:
        return self._claim.size

    @property
    def ring(self) -> Tensor:
        """Keys and values [2, Hkv, window, D]; slots of tokens that never came are undefined."""
        return self._ring

    def restore(self, ring: Tensor, length: int) -> None:
        """Take over the `ring` of a sequence of `length` tokens, whole or without the slots that none of them has used."""
        self._ring[:, :, : ring.shape[2]].copy_(ring)
        self.length = length

    def ring_at(self, length: int, keys: Tensor, values: Tensor) -> Tensor:
        """The ring as it is after `length` tokens, while the pass that brings keys and values [Hkv, n, D] has not stored them yet.

        Args:
            length: from the stored tokens to those with the pass.

        Returns:
            A copy [2, Hkv, min(length, window), D]: slots that no token has used are left out.
        """
        count = min(length, self.window)
        slots = torch.arange(length - count, length, device=self._ring.device) % self.window
        old = max(0, self.length - (length - count))  # of its tokens, those that are stored
        ring = self._ring.new_empty(*self._ring.shape[:2], count, self._ring.shape[3])
        ring[:, :, slots[:old]] = self._ring[:, :, slots[:old]]
        new = slice(length - count + old - self.length, length - self.length)
        for half, tensor in zip(ring, (keys, values), strict=True):
            half[:, slots[old:]] = tensor[:, new]
        return ring

    def move_ring(self, into: Tensor) -> None:
        """Keep the ring in `into` [2, Hkv, window, D] from now on."""
        into.copy_(self._ring)
        self._ring = into

    @property
    def ordinary_bytes(self) -> int:
        """Bytes of the same layer in an ordinary hybrid cache of a 16-bit dtype."""
        return 2 * 2 * self._ring.shape[1] * self._ring.shape[3] * min(self.length, self.window)

    def prefill(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams) -> Tensor:
        """Exact windowed attention of the next n prompt tokens, which are then stored."""
        check_finite(keys, values, self.index)
        earlier = torch.arange(max(0, self.length - self.window + 1), self.length, device=keys.device) % self.window
        seen_keys = torch.cat([self._ring[0, :, earlier], keys], dim=1)
        seen_values = torch.cat([self._ring[1, :, earlier], values], dim=1)
        out, _ = merge([windowed(query, seen_keys, seen_values, self.window, params)], params.sinks)
        self._write(keys, values)
        return out

    def decode(self, query: Tensor, keys: Tensor, values: Tensor, params: AttentionParams, kind: StepKind) -> Tensor:
        """Exact windowed attention of a pass's rows [Hq, n, D]; row 0 is stored if the pass commits it."""
        check_finite(keys, values, self.index)
        if kind.commits:
            self._write(keys[:, :1], values[:, :1])
            keys, values = keys[:, 1:], values[:, 1:]
        ring = min(self.length, self.window)
        seen_keys = torch.cat([self._ring[0, :, :ring], keys], dim=1)
        seen_values = torch.cat([self._ring[1, :, :ring], values], dim=1)
        part: Part = attend_part(query, seen_keys, seen_values, params, self._mask(query, ring, kind))
        return merge([part], params.sinks)[0]

    def truncate(self, length: int) -> None:
        """Forget the last token, or what a failed pass wrote; going further back needs `can_truncate`."""
        self.length = min(self.length, length)

    def can_truncate(self, length: int) -> bool:
        """Whether the ring still holds what a sequence of `length` tokens sees next."""
        return length >= self.length - 1 or self.length <= self.window

    def fork(self) -> WindowLayer:
        other = WindowLayer(self.index, self.window, self._ring[0], self._claim.budget)
        other._ring.copy_(self._ring)
        other.length = self.length
        return other

    def release(self) -> None:
        self.length = 0
        self._ring = self._ring[:, :, :0].clone()
        self._claim.release()

    def _write(self, keys: Tensor, values: Tensor) -> None:
        self.length += keys.shape[1]
        keys, values = keys[:, -self.window :], values[:, -self.window :]
        slots = torch.arange(self.length - keys.shape[1], self.length, device=keys.device) % self.window
        self._ring[0, :, slots] = keys
        self._ring[1, :, slots] = values

    def _mask(self, query: Tensor, ring: int, kind: StepKind) -> Tensor:
        """bool [n, ring + own]: the row past the ring does not see the token that leaves its window; row 0 not row 1."""
        own = 0 if kind is StepKind.SINGLE else 1
        seen = torch.ones(kind.rows, ring + own, dtype=torch.bool, device=query.device)
        if own and self.length >= self.window:
            seen[-1, self.length % self.window] = False
        if kind is StepKind.PAIR:
            seen[0, -1] = False
        return seen
