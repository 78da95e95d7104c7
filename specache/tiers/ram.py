"""Rows in main memory: in blocks that forks share, or, for a GPU, in one pinned block per layer."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial

from torch import Tensor

from specache.tiers.base import Fetch, SlowTier
from specache.tiers.layer_rows import GROWTH, MIN_CAPACITY, LayerRows, new_rows, unique_bytes
from specache.tiers.row_memory import RowMemory
from specache.tiers.transfer import Offload


class RamTier:
    """The slow tier in RAM.

    Args:
        in_place: True: attention reads rows where they lie (tier `ram-inplace`). False: they are
            copied through a hot set (`ram`).
        memory: source of blocks, which forks share. None is a new one.
        offload: asynchronous copy of keys and values from a device; only readers wait for it. None
            copies them in `write`. It needs memory with one block per layer.
    """

    in_memory = True

    def __init__(self, in_place: bool, memory: RowMemory | None = None, offload: Offload | None = None) -> None:
        self.in_place = in_place
        self._memory = memory or RowMemory()
        self._offload = offload
        self._rows: dict[int, LayerRows] = {}
        self._expected = MIN_CAPACITY

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        heads, count, dim = keys.shape
        if layer not in self._rows:
            self._rows[layer] = new_rows(self._memory, (heads, 2 * dim), keys.dtype)
        rows = self._growing(self._rows[layer], start, start + count)
        parts = list(rows.parts(start, start + count))
        if len(parts) == 1:  # as in every decode step
            return self._copy(layer, parts[0], keys, values)
        sizes = [part.shape[1] for part in parts]
        for part, *tokens in zip(parts, keys.split(sizes, dim=1), values.split(sizes, dim=1), strict=True):
            self._copy(layer, part, *tokens)

    def read(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = self.rows(layer).read(start, stop)
        dim = rows.shape[-1] // 2
        return rows[..., :dim], rows[..., dim:]

    def rows(self, layer: int, used: int = 0, needed: int = 0) -> LayerRows:
        if self._offload is not None:
            self._offload.arrived(layer)
        return self._growing(self._rows[layer], used, needed) if needed else self._rows[layer]

    def buffer(self, layer: int) -> Tensor:
        """Return the rows [Hkv, capacity, 2 D] of a layer in one block, also those in transfer.

        Kernels that read them in place call `wait_for_offload` first.
        """
        [block] = self._rows[layer].blocks
        return block.rows

    def wait_for_offload(self) -> None:
        """Make device work queued from now on wait for all rows written so far."""
        if self._offload is not None:
            self._offload.wait_for_offload()

    def gather(self, layer: int, heads: Tensor, positions: Tensor) -> Tensor:
        return self.rows(layer).gather(heads, positions)

    def begin(self, layer: int, heads: Tensor, positions: Tensor) -> Fetch:
        return Fetch(partial(self.gather, layer, heads, positions))

    def reserve(self, tokens: int) -> None:
        self._expected = max(self._expected, tokens)

    def truncate_memory(self, layer: int, length: int) -> None:
        if layer in self._rows:
            self._rows[layer].truncate(length)

    @property
    def capacity(self) -> int:
        """Return the tokens for which every layer has memory."""
        return min((rows.capacity for rows in self._rows.values()), default=0)

    def make_room(self, tokens: int) -> None:
        """Grow every layer's one block to `tokens` tokens; until they are written, it does not
        move.
        """
        for rows in self._rows.values():
            self._make_room(rows, rows.capacity, tokens, 0)

    def fork(self) -> RamTier:
        other = RamTier(self.in_place, self._memory, self._offload)
        other._expected = self._expected
        try:
            other.share(self)
        except BaseException:
            other.close()
            raise
        return other

    def share(self, other: RamTier) -> None:
        """Store the rows of another tier over the same memory, in blocks that both hold."""
        for layer in other._rows:
            self._rows[layer] = other.rows(layer).fork()

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.all_rows())

    def all_rows(self) -> list[LayerRows]:
        """Return the rows of every layer. Another thread may be adding a layer."""
        return list(self._rows.values())

    def close(self) -> None:
        if self._offload is not None and self._rows:
            self._offload.finish()
        while self._rows:
            self._rows.popitem()[1].close()

    def __del__(self) -> None:
        """Release the blocks of a tier that was not closed, which others may share."""
        if getattr(self, "_rows", None) and not sys.is_finalizing():
            self.close()

    def _copy(self, layer: int, into: Tensor, keys: Tensor, values: Tensor) -> None:
        """Copy keys and values [Hkv, n, D] to rows `into` [Hkv, n, 2 D]."""
        if self._offload is not None:
            return self._offload.write(layer, into, keys, values)
        dim = keys.shape[2]
        into[..., :dim].copy_(keys)
        into[..., dim:].copy_(values)

    def _growing(self, rows: LayerRows, start: int, stop: int) -> LayerRows:
        """Return rows with tokens `[start, stop)` ready to be written, and some room to grow."""
        self._make_room(rows, start, stop, max(self._expected, int(rows.capacity * GROWTH)))
        return rows

    def _make_room(self, rows: LayerRows, start: int, stop: int, expected: int) -> None:
        if self._offload is not None and 0 < rows.capacity < stop:
            self._offload.finish()  # the block that is replaced may still be written
        rows.make_room(start, stop, expected)


def held_bytes(tiers: Iterable[SlowTier]) -> int:
    """Return the bytes of several tiers. Blocks that they share count once."""
    tiers = list(tiers)
    in_memory = [tier for tier in tiers if isinstance(tier, RamTier)]
    others = sum(tier.nbytes for tier in tiers if not isinstance(tier, RamTier))
    return others + unique_bytes(rows for tier in in_memory for rows in tier.all_rows())
