"""The hot set: recently used 16-bit rows of one layer of one sequence, in fast memory.

Positions are [Hkv, k], ascending, -1 where there is no pair. Rows are [Hkv, k, 2 D].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specache.model.dimensions import row_bytes
from specache.platform.budget import ByteBudget

NOWHERE = torch.iinfo(torch.int64).max  # position of an empty slot
SLOT_INDEX_BYTES = 32  # per slot: position, stamp, and value and index of the sorted positions, int64


def slot_bytes(heads: int, dim: int, itemsize: int) -> int:
    """Return the bytes of one hot-set slot of each of `heads` KV heads: a row and its index."""
    return row_bytes(heads, dim, itemsize) + heads * SLOT_INDEX_BYTES


@dataclass
class Missing:
    """Rows that are not cached.

    Attributes:
        positions: int64 [Hkv, k], -1 where none is missing.
        heads, tokens: int64 [M] of the M missing ones, in their order.
    """

    positions: Tensor
    heads: Tensor
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Lookup:
    """What the hot set has for a step's n queries.

    Attributes:
        positions: int64 [Hkv, n, k] of the rows that a query gets, -1 where it gets none.
        slots: int64 [Hkv, n, k] of these rows, -1 where there is none.
        missing: rows of the real queries that were not cached. They are reserved.
        selected: pairs of the real queries. `ready` of them were cached.
        fits: whether every missing row has a slot.
    """

    positions: Tensor
    slots: Tensor
    missing: Missing
    selected: int
    ready: int
    fits: bool


class HotSet:
    """An LRU cache with `C` slots per KV head, on PyTorch operations.

    `stamp` is the `step` in which a slot was last used. Slots used in the current step are not
    evicted. On a CPU with the C++ extension, `specache.rows.native_hot_set` does the same.
    """

    in_slots = False  # whether kernels read the rows in their slots
    native: Any = None  # the C++ object then
    step: int

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

    def look_up(self, positions: Tensor, real_queries: int) -> Lookup:
        """Look up positions [Hkv, n, k] and reserve what the first `real_queries` queries miss.

        The other queries get the rows that are cached or reserved by then.
        """
        n, k = positions.shape[1:]
        wanted, others = positions.flatten(1).split([real_queries * k, (n - real_queries) * k], dim=1)
        slots = self.find(wanted)
        ready = int((slots >= 0).sum())
        missing = _listed(wanted.where(slots < 0, -1))
        if len(missing):
            slots = torch.maximum(slots, self.reserve(missing.positions))
        fits = bool(((slots >= 0) | (wanted < 0)).all())
        if others.shape[1]:
            there = self.find(others)
            slots = torch.cat([slots, there], dim=1)
            wanted = torch.cat([wanted, others.where(there >= 0, -1)], dim=1)
        selected = int((positions[:, :real_queries] >= 0).sum())
        return Lookup(wanted.view_as(positions), slots.view_as(positions), missing, selected, ready, fits)

    def missing(self, positions: Tensor) -> Missing:
        """Return which of positions [Hkv, k] are not cached. Mark the others as used."""
        return _listed(positions.where(self.find(positions) < 0, -1))

    def rows_at(self, slots: Tensor) -> Tensor:
        """Return the rows [Hkv, m, 2 D] of slots [Hkv, m], zero at -1."""
        if self.capacity == 0:
            return self.kv_rows.new_zeros(*slots.shape, self.kv_rows.shape[-1])
        index = slots.clamp(min=0).unsqueeze(-1).expand(-1, -1, self.kv_rows.shape[-1])
        return self.kv_rows.gather(1, index).masked_fill_((slots < 0).unsqueeze(-1), 0.0)

    def advance(self) -> None:
        """Begin the next step."""
        self.step += 1

    def forget_ahead(self) -> None:
        """Undo what a step inserted for the next one, which does not come."""

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
            kv_rows = pad(self.kv_rows, (0, 0, 0, extra))
            self._replace(kv_rows, pad(self.position, (0, extra), value=NOWHERE), pad(self.stamp, (0, extra), value=-1))
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
        self._replace(*(slots[:, :0].clone() for slots in (self.kv_rows, self.position, self.stamp)))
        self._reserved = None
        self._claim.release()

    def _replace(self, kv_rows: Tensor, position: Tensor, stamp: Tensor) -> None:
        """Use other memory with the same slots, or with more or none."""
        self.kv_rows, self.position, self.stamp = kv_rows, position, stamp
        self._sorted = None


def _listed(positions: Tensor) -> Missing:
    """Return the missing rows of positions [Hkv, k], -1 where none is missing."""
    head, column = (positions >= 0).nonzero(as_tuple=True)
    return Missing(positions, head.cpu(), positions[head, column].cpu())


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
