"""The hot set: recently used 16-bit rows of one layer of one sequence, in fast memory.

Positions are [Hkv, k], ascending, -1 where there is no pair. Rows are [Hkv, k, 2 D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from specache.model.dimensions import row_bytes
from specache.platform.budget import ByteBudget

NOWHERE = torch.iinfo(torch.int64).max  # position of an empty slot
SLOT_INDEX_BYTES = 32  # per slot: position, stamp, and value and index of the sorted positions, int64


def slot_bytes(heads: int, dim: int, itemsize: int) -> int:
    """Return the bytes of one hot-set slot of each of `heads` KV heads: a row and its index."""
    return row_bytes(heads, dim, itemsize) + heads * SLOT_INDEX_BYTES


class HotSet:
    """An LRU cache with `C` slots per KV head.

    `stamp` is the `step` in which a slot was last used. Slots used in the current step are not
    evicted.
    """

    def __init__(
        self, num_kv_heads: int, capacity: int, row: int, dtype: torch.dtype, device: torch.device, budget: ByteBudget | None = None
    ) -> None:
        self._slot_bytes = slot_bytes(num_kv_heads, row // 2, dtype.itemsize)
        self._claim = (budget or ByteBudget()).claim(capacity * self._slot_bytes, "hot sets")
        self.kv_rows = torch.zeros(num_kv_heads, capacity, row, dtype=dtype, device=device)
        self.position = torch.full((num_kv_heads, capacity), NOWHERE, device=device)
        self.stamp = torch.full((num_kv_heads, capacity), -1, device=device)
        self.step = 0
        self._sorted: tuple[Tensor, Tensor] | None = None
        self._reserved: tuple[Tensor, Tensor, Tensor] | None = None  # of rows in flight: heads, slots, and which have one

    @property
    def capacity(self) -> int:
        return self.position.shape[1]

    def find(self, positions: Tensor) -> Tensor:
        """Return the slots [Hkv, k] of the positions, -1 if not cached. Mark them as used."""
        if self.capacity == 0:
            return torch.full_like(positions, -1)
        if self._sorted is None:
            self._sorted = self.position.sort(dim=1)
        ordered, order = self._sorted
        index = torch.searchsorted(ordered, positions.contiguous()).clamp_(max=self.capacity - 1)
        slots = order.gather(1, index).where(ordered.gather(1, index) == positions, -1)
        head, column = (slots >= 0).nonzero(as_tuple=True)
        self.stamp[head, slots[head, column]] = self.step
        return slots

    def insert(self, positions: Tensor, kv_rows: Tensor) -> None:
        """Insert the rows [M, 2 D] of the M pairs of [Hkv, k], none cached; evict the oldest slots.

        Rows that do not fit beside the rows used in this step are left out.
        """
        self.reserve(positions)
        self.fill(kv_rows)

    def reserve(self, positions: Tensor) -> Tensor:
        """Reserve slots [Hkv, k] for positions that are not cached; evict the oldest slots.

        A position that does not fit beside the rows used in this step gets -1. The others count as
        cached from now on: `fill` must bring their rows, or `forget` undo the reservation.
        """
        wanted = positions >= 0
        slots = torch.full_like(positions, -1)
        if self.capacity:
            fits = wanted & (wanted.cumsum(1) <= self.capacity)
            slots = least_recently_used(self.step - self.stamp, fits, self.capacity)
            slots = slots.where(slots < self.capacity, -1)
        head, column = (slots >= 0).nonzero(as_tuple=True)
        slot = slots[head, column]
        self._reserved = head, slot, (slots >= 0)[wanted]
        self._sorted = None
        self.position[head, slot] = positions[head, column]
        self.stamp[head, slot] = self.step
        return slots

    def fill(self, kv_rows: Tensor) -> None:
        """Store the rows [M, 2 D] of the last reservation, one per position."""
        if self._reserved is not None:
            head, slot, fits = self._reserved
            self.kv_rows[head, slot] = kv_rows[fits]
            self._reserved = None

    def forget(self) -> None:
        """Undo the last reservation, whose rows did not come."""
        if self._reserved is not None:
            head, slot, _ = self._reserved
            self.position[head, slot] = NOWHERE
            self.stamp[head, slot] = -1
            self._sorted = None
            self._reserved = None

    def grow(self, capacity: int) -> None:
        """Grow to at least `capacity` slots."""
        extra = capacity - self.capacity
        if extra > 0:
            self._claim.resize((self.capacity + capacity) * self._slot_bytes)  # old and new at once
            pad = torch.nn.functional.pad
            self.kv_rows = pad(self.kv_rows, (0, 0, 0, extra))
            self.position = pad(self.position, (0, extra), value=NOWHERE)
            self.stamp = pad(self.stamp, (0, extra), value=-1)
            self._sorted = None
            self._claim.resize(capacity * self._slot_bytes)

    def grow_if_allowed(self, capacity: int) -> None:
        """Grow to at least `capacity` slots, or as many as the byte budget allows."""
        left = self._claim.budget.left
        if left is not None:
            capacity = min(capacity, left // self._slot_bytes)  # old and new slots are in memory at once
        self.grow(capacity)

    def clear(self) -> None:
        """Empty all slots and keep their memory."""
        self.position.fill_(NOWHERE)
        self.stamp.fill_(-1)
        self._sorted = None
        self._reserved = None

    def free(self) -> None:
        """Release all slots and their memory."""
        self.kv_rows = self.kv_rows[:, :0].clone()
        self.position = self.position[:, :0].clone()
        self.stamp = self.stamp[:, :0].clone()
        self._sorted = None
        self._reserved = None
        self._claim.release()


def least_recently_used(age: Tensor, missing: Tensor, none: Tensor | int) -> Tensor:
    """Return the slots [..., k] to evict for the true elements of `missing`, `none` elsewhere.

    The victims of a head are its oldest slots, of equally old ones the first, and are assigned in
    ascending order. Slots of age 0 are not evicted: the last elements get `none` instead.

    Args:
        age: [..., C], for how long each slot has not been used.
        missing: bool [..., k], at most `C` of a head true.
        none: above every slot.
    """
    oldest = age.sort(dim=-1, descending=True, stable=True)
    ages, victims = oldest.values[..., : missing.shape[-1]], oldest.indices[..., : missing.shape[-1]]
    evicted = (ages > 0) & (torch.arange(ages.shape[-1], device=age.device) < missing.sum(-1, keepdim=True))
    victims = victims.where(evicted, none).sort(dim=-1).values
    rank = missing.cumsum(-1).sub_(1).clamp_(min=0)  # n-th newcomer of its head
    return victims.gather(-1, rank).where(missing, none)
