"""Rows in main memory: one growing buffer [Hkv, capacity, 2 D] per layer, pinned on CUDA."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specache.tiers.base import Fetch, StepReads
from specache.tiers.transfer import HostMemory, Offload

GROWTH = 1.25  # factor by which a full buffer grows
MIN_CAPACITY = 64  # tokens


def ram_capacity(expected: int, tokens: int) -> int:
    """Return the capacity of a buffer made for `expected` tokens after it has grown to `tokens`.

    It grows token by token.
    """
    capacity = max(expected, MIN_CAPACITY)
    while capacity < tokens:
        capacity = max(capacity + 1, int(capacity * GROWTH))
    return capacity


class RamTier:
    """The slow tier in RAM.

    Args:
        in_place: True: attention reads rows where they lie (tier `ram-inplace`). False: they are
            copied through a hot set (`ram`).
        pinned: use page-locked memory, for asynchronous copies to CUDA.
        memory: source of buffers; None is the system's allocator.
        offload: asynchronous copy of keys and values from a device; only readers wait for it. None
            copies them in `write`.
    """

    in_memory = True

    def __init__(
        self, in_place: bool, pinned: bool = False, memory: HostMemory | None = None, offload: Offload | None = None
    ) -> None:
        self.in_place = in_place
        self.pinned = pinned
        self._memory: HostMemory = memory or SystemMemory(pinned)
        self._offload = offload
        self._rows: dict[int, Tensor] = {}
        self._expected = MIN_CAPACITY
        self.version = 0

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        heads, count, dim = keys.shape
        rows = self._ensure(layer, start, start + count, heads, dim, keys.dtype)
        if self._offload is not None:
            self._offload.write(layer, rows[:, start : start + count], keys, values)
            return
        rows[:, start : start + count, :dim].copy_(keys)
        rows[:, start : start + count, dim:].copy_(values)

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = self.rows(layer)[:, start:stop]
        dim = rows.shape[-1] // 2
        return rows[..., :dim], rows[..., dim:]

    def rows(self, layer: int, used: int = 0, needed: int = 0) -> Tensor:
        if self._offload is not None:
            self._offload.arrived(layer)
        rows = self._rows[layer]
        heads, capacity, width = rows.shape
        return rows if capacity >= needed else self._ensure(layer, used, needed, heads, width // 2, rows.dtype)

    def buffer(self, layer: int) -> Tensor:
        """Return `rows` without waiting for rows in transfer.

        Kernels that read them in place call `wait_for_offload` first.
        """
        return self._rows[layer]

    def wait_for_offload(self) -> None:
        """Make device work queued from now on wait for all rows written so far."""
        if self._offload is not None:
            self._offload.wait_for_offload()

    def gather(self, layer: int, heads: Tensor, positions: Tensor) -> Tensor:
        rows = self.rows(layer)
        flat = rows.flatten(0, 1)  # [Hkv capacity, 2 D], a view
        return flat.index_select(0, heads * rows.shape[1] + positions)

    def begin(self, layer: int, heads: Tensor, positions: Tensor) -> Fetch:
        return Fetch(partial(self.gather, layer, heads, positions))

    def has_room(self, layer: int, length: int) -> bool:
        return True  # buffers grow

    def count_appended(self, layer: int) -> None:
        pass

    def step_reads(self, layer: int, hot: Any, before: StepReads | None) -> None:
        return None

    def reserve(self, tokens: int) -> None:
        self._expected = max(self._expected, tokens)

    @property
    def capacity(self) -> int:
        """Return the tokens that fit into every layer's buffer without moving it."""
        return min((rows.shape[1] for rows in self._rows.values()), default=0)

    def make_room(self, tokens: int) -> None:
        """Grow every layer's buffer to `tokens` tokens; until they are written, rows do not
        move.
        """
        for layer, rows in self._rows.items():
            if rows.shape[1] < tokens:
                grown = self._memory.take((rows.shape[0], tokens, rows.shape[2]), rows.dtype)
                self.version += 1
                self._move(rows, grown, rows.shape[1])
                self._rows[layer] = grown

    def fork(self) -> RamTier:
        other = RamTier(self.in_place, self.pinned, self._memory, self._offload)
        other._expected = self._expected
        try:
            for layer in self._rows:
                rows = self.rows(layer)
                other._rows[layer] = other._memory.take(rows.shape, rows.dtype)
                other._rows[layer].copy_(rows)
        except BaseException:
            other.close()
            raise
        return other

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in list(self._rows.values()))  # another thread may be adding a layer

    def close(self) -> None:
        if self._offload is not None and self._rows:
            self._offload.finish()
        self.version += 1
        while self._rows:
            self._memory.give_back(self._rows.popitem()[1])

    def __del__(self) -> None:
        """Return the buffers of a tier that was not closed to a pool that others may still use."""
        if getattr(self, "_rows", None) and not sys.is_finalizing():
            self.close()

    def _ensure(self, layer: int, used: int, needed: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
        rows = self._rows.get(layer)
        if rows is None or rows.shape[1] < needed:
            capacity = max(needed, self._expected, int(rows.shape[1] * GROWTH) if rows is not None else 0)
            grown = self._memory.take((heads, capacity, 2 * dim), dtype)
            self.version += 1
            if rows is not None:
                self._move(rows, grown, used)
            self._rows[layer] = rows = grown
        return rows

    def _move(self, rows: Tensor, grown: Tensor, used: int) -> None:
        """Copy the first `used` tokens to `grown` and free the old buffer."""
        if self._offload is not None:
            self._offload.finish()
        grown[:, :used].copy_(rows[:, :used])
        self._memory.give_back(rows)


class SystemMemory:
    """Buffers from PyTorch's allocator, freed by reference counting."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, pin_memory=self._pinned)

    def give_back(self, buffer: Tensor) -> None:
        pass
