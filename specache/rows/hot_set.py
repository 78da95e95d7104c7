"""Recently used 16-bit rows of one layer of one sequence, in fast memory.

Positions are [Hkv, k], ascending, -1 where there is no pair. Rows are [Hkv, k, 2 D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from specache.platform.budget import ByteBudget

NOWHERE = torch.iinfo(torch.int64).max  # position of an empty slot
SLOT_INDEX_BYTES = 32  # a hot-set slot's position and stamp, and its place in the sorted index: int64 each


class HotSet:
    """Recently used rows of one layer of one sequence in fast memory: `C` slots per KV head, least recently used out first.

    `stamp` is the tick at which a slot was last wanted. Slots wanted in the current tick are never evicted in it.
    """

    def __init__(
        self, num_kv_heads: int, capacity: int, row: int, dtype: torch.dtype, device: torch.device, budget: ByteBudget | None = None
    ) -> None:
        self._slot_bytes = num_kv_heads * (row * dtype.itemsize + SLOT_INDEX_BYTES)
        self._claim = (budget or ByteBudget()).claim(capacity * self._slot_bytes, "hot sets")
        self.rows = torch.zeros(num_kv_heads, capacity, row, dtype=dtype, device=device)
        self.position = torch.full((num_kv_heads, capacity), NOWHERE, device=device)
        self.stamp = torch.full((num_kv_heads, capacity), -1, device=device)
        self.step = 0
        self._sorted: tuple[Tensor, Tensor] | None = None
        self._reserved: tuple[Tensor, Tensor] | None = None  # heads and slots [M] whose rows are on their way

    @property
    def capacity(self) -> int:
        return self.position.shape[1]

    @property
    def nbytes(self) -> int:
        return self.capacity * self._slot_bytes

    def find(self, positions: Tensor) -> Tensor:
        """Slots [Hkv, k] of the positions, -1 for those that are not here; what is found counts as just used."""
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

    def insert(self, head: Tensor, positions: Tensor, rows: Tensor) -> None:
        """Add rows [M, 2 D] of (head, position) pairs that are not here, over the least recently used slots.

        What does not fit beside this step's own rows is left out.
        """
        self.reserve(head, positions)
        self.fill(rows)

    def reserve(self, head: Tensor, positions: Tensor) -> Tensor:
        """Slots [M] for (head, position) pairs that are not here, over the least recently used; -1 for what does not fit beside
        this step's own.

        The pairs count as here from now on. `fill` brings their rows, or `forget` takes them back.
        """
        within = torch.zeros(self.position.shape[0], len(head), dtype=torch.long, device=head.device)
        within[head, torch.arange(len(head), device=head.device)] = 1
        rank = (within.cumsum(1) - 1)[head, torch.arange(len(head), device=head.device)]  # n-th newcomer of its head
        if self.capacity == 0:
            self._reserved = head, torch.full_like(head, -1)
            return self._reserved[1]
        victims = self._victims(within.sum(1, keepdim=True), min(len(head), self.capacity))
        slot = victims[head, rank.clamp(max=victims.shape[1] - 1)].where(rank < self.capacity, -1)
        self._reserved = head, slot
        self._sorted = None
        fits = slot >= 0
        self.position[head[fits], slot[fits]] = positions[fits]
        self.stamp[head[fits], slot[fits]] = self.step
        return slot

    def fill(self, rows: Tensor) -> None:
        """The rows [M, 2 D] of what was reserved last."""
        if self._reserved is not None:
            head, slot = self._reserved
            fits = slot >= 0
            self.rows[head[fits], slot[fits]] = rows[fits]
            self._reserved = None

    def forget(self) -> None:
        """What was reserved is not here after all: its rows never came."""
        if self._reserved is not None:
            head, slot = self._reserved
            fits = slot >= 0
            self.position[head[fits], slot[fits]] = NOWHERE
            self.stamp[head[fits], slot[fits]] = -1
            self._sorted = None
            self._reserved = None

    def grow(self, capacity: int) -> None:
        """At least `capacity` slots."""
        extra = capacity - self.capacity
        if extra > 0:
            self._claim.resize((self.capacity + capacity) * self._slot_bytes)  # both, while one is copied into the other
            pad = torch.nn.functional.pad
            self.rows = pad(self.rows, (0, 0, 0, extra))
            self.position = pad(self.position, (0, extra), value=NOWHERE)
            self.stamp = pad(self.stamp, (0, extra), value=-1)
            self._sorted = None
            self._claim.resize(capacity * self._slot_bytes)

    def grow_if_allowed(self, capacity: int) -> None:
        """At least `capacity` slots, or as many as the byte budget leaves room for."""
        left = self._claim.budget.left
        if left is not None:
            capacity = min(capacity, left // self._slot_bytes)  # old and new slots are held at once for a moment
        self.grow(capacity)

    def clear(self) -> None:
        self.position.fill_(NOWHERE)
        self.stamp.fill_(-1)
        self._sorted = None
        self._reserved = None

    def free(self) -> None:
        """No slots, until it grows again."""
        self.rows = self.rows[:, :0].clone()
        self.position = self.position[:, :0].clone()
        self.stamp = self.stamp[:, :0].clone()
        self._sorted = None
        self._reserved = None
        self._claim.release()

    def _victims(self, count: Tensor, most: int) -> Tensor:
        """The `count` [Hkv, 1] least recently used slots of each head, ascending, in [Hkv, most].

        Behind them, and for slots that this step wants: -1.
        """
        stamps, order = self.stamp.sort(dim=1, stable=True)
        evicted = (torch.arange(most, device=order.device) < count) & (stamps[:, :most] < self.step)
        ascending = order[:, :most].where(evicted, NOWHERE).sort(dim=1).values
        return ascending.where(ascending < NOWHERE, -1)
