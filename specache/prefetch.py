"""Getting 16-bit rows to where they are needed: select -> submit -> wait, and the hot set they land in.

`InPlaceRows` serves the tier whose rows are read where they lie. `FetchedRows` copies rows through a hot set: what a step's guess
selects is read in the background while the rest of the step computes, what the real token still lacks is read at once. A read that
failed in the background raises when the next step reaches its layer, once.
Positions are [Hkv, k], ascending, -1 where there is no pair. Rows are [Hkv, k, 2 D].
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specache.budget import ByteBudget
from specache.errors import SlowTierError
from specache.stats import Counters
from specache.tiers.base import SlowTier
from specache.tiers.transfer import Arrival, Transfer
from specache.tiers.worker import PrefetchRequest, PrefetchWorker, timed

NOWHERE = torch.iinfo(torch.int64).max  # position of an empty slot
SLOT_INDEX_BYTES = 32  # a hot-set slot's position and stamp, and its place in the sorted index: int64 each


class Rows(Protocol):
    """The 16-bit rows of one layer of one sequence, as a decode step asks for them."""

    in_place: bool  # rows are read where they lie (`InPlaceRows`)

    @property
    def nbytes(self) -> int:
        """Fast memory held, in bytes."""

    @property
    def exact_bytes(self) -> int:
        """Of `nbytes`, those of rows, in the model's dtype; the rest is their index."""

    def begin_step(self) -> None:
        """Wait for what the last step submitted."""

    def fetch(self, positions: Tensor) -> tuple[Tensor, int]:
        """Rows of all positions, waiting for those not here -> (rows, how many were here)."""

    def available(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the positions that are here, without waiting -> (rows, the positions with -1 for those that are not)."""

    def submit(self, positions: Tensor) -> None:
        """Have these here when the next step begins."""

    def resize(self, slots: int) -> None:
        """Keep this many recently used rows per KV head, fewer where the byte budget has no room."""

    def cancel(self) -> None:
        """Forget what was submitted (the step it was for is undone). Its error, if it has one, is nobody's any more."""

    def drop(self) -> None:
        """Forget everything fetched or in flight (the sequence was cut)."""


class InPlaceRows:
    """Rows read where they lie: everything is always here, and nothing is held twice."""

    in_place = True

    def __init__(self, tier: SlowTier, layer: int) -> None:
        self._tier = tier
        self._layer = layer

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def exact_bytes(self) -> int:
        return 0

    def stored(self) -> Tensor:
        """All rows [Hkv, capacity, 2 D], where they lie."""
        return self._tier.rows(self._layer)

    def begin_step(self) -> None:
        pass

    def fetch(self, positions: Tensor) -> tuple[Tensor, int]:
        heads = torch.arange(positions.shape[0]).unsqueeze(1).expand_as(positions)
        rows = self._tier.gather(self._layer, heads.flatten(), positions.clamp(min=0).flatten())
        return rows.unflatten(0, positions.shape), int((positions >= 0).sum())

    def available(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.fetch(positions)[0], positions

    def submit(self, positions: Tensor) -> None:
        pass

    def resize(self, slots: int) -> None:
        pass

    def cancel(self) -> None:
        pass

    def drop(self) -> None:
        pass


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
        order = self.stamp.argsort(dim=1, stable=True)  # [Hkv, C], least recently used first
        within = torch.zeros(self.position.shape[0], len(head), dtype=torch.long, device=head.device)
        within[head, torch.arange(len(head), device=head.device)] = 1
        rank = (within.cumsum(1) - 1)[head, torch.arange(len(head), device=head.device)]  # n-th newcomer of its head
        fits = rank < self.capacity
        head, positions, rows, rank = head[fits], positions[fits], rows[fits], rank[fits]
        slot = order[head, rank]
        free = self.stamp[head, slot] < self.step
        head, slot = head[free], slot[free]
        self.rows[head, slot] = rows[free]
        self.position[head, slot] = positions[free]
        self.stamp[head, slot] = self.step
        self._sorted = None

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


@dataclass
class _InFlight:
    head: Tensor  # [M]
    position: Tensor  # [M]
    request: PrefetchRequest


class FetchedRows:
    """Rows copied from a slow tier through a hot set, ahead of need where they were submitted.

    Args:
        tier, layer: where the rows are.
        hot: the layer's hot set; grows to hold the pairs of one step, whatever its budget.
        worker, transfer: the background threads, and how rows get to the device.
        counters: where waits, reads and bytes are counted.
    """

    in_place = False

    def __init__(
        self, tier: SlowTier, layer: int, hot: HotSet, worker: PrefetchWorker, transfer: Transfer, counters: Counters
    ) -> None:
        self.hot = hot
        self._tier = tier
        self._layer = layer
        self._worker = worker
        self._transfer = transfer
        self._counters = counters
        self._in_flight: _InFlight | None = None
        self._staged_bytes = 0  # most bytes that were in flight at once

    @property
    def nbytes(self) -> int:
        return self.hot.nbytes + self._staged_bytes

    @property
    def exact_bytes(self) -> int:
        return self.hot.rows.nbytes + self._staged_bytes

    def begin_step(self) -> None:
        flight, self._in_flight = self._in_flight, None
        if flight is not None:
            self.hot.insert(flight.head, flight.position, self._arrived(flight.request))
        self.hot.step += 1

    def fetch(self, positions: Tensor) -> tuple[Tensor, int]:
        self.hot.grow(positions.shape[1])
        rows, slots = self._here(positions)
        missing = (slots < 0) & (positions >= 0)
        ready = int((slots >= 0).sum())
        if missing.any():
            head, column = missing.nonzero(as_tuple=True)
            wanted = positions[head, column]
            self._count_rows(len(head))
            arrival, seconds = timed(self._read(head, wanted))
            self._count_wait(seconds)
            self._counters.read_s += seconds
            fetched = arrival.wait()
            rows[head, column] = fetched
            self.hot.insert(head, wanted, fetched)
        return rows, ready

    def available(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        rows, slots = self._here(positions)
        return rows, positions.where(slots >= 0, -1)

    def submit(self, positions: Tensor) -> None:
        self.cancel()
        self.hot.grow(positions.shape[1])
        self.hot.step += 1  # what the next step wants outranks what this one used
        slots = self.hot.find(positions)
        head, column = ((slots < 0) & (positions >= 0)).nonzero(as_tuple=True)
        if len(head):
            wanted = positions[head, column]
            request = self._worker.submit(self._read(head, wanted))
            if request is not None:
                self._count_rows(len(head))
                self._in_flight = _InFlight(head, wanted, request)

    def resize(self, slots: int) -> None:
        self.hot.grow_if_allowed(slots)

    def cancel(self) -> None:
        flight, self._in_flight = self._in_flight, None
        if flight is not None:
            flight.request.cancel()

    def drop(self) -> None:
        self.cancel()
        self.hot.clear()

    def _arrived(self, request: PrefetchRequest) -> Tensor:
        """Rows that were read in the background, waiting for them if need be."""
        waits = not request.done
        started = time.perf_counter()
        try:
            arrival, seconds = request.result()
        except Exception as error:
            kind = type(error) if isinstance(error, SlowTierError) else SlowTierError
            raise kind(f"Reading ahead in layer {self._layer} failed. {error}") from error
        except BaseException:
            request.cancel()  # the wait was interrupted
            raise
        if waits:
            self._count_wait(time.perf_counter() - started)
        self._counters.read_s += seconds
        return arrival.wait()

    def _count_rows(self, count: int) -> None:
        size = count * self.hot.rows.shape[-1] * self.hot.rows.element_size()
        self._counters.bytes_fetched += size
        self._staged_bytes = max(self._staged_bytes, size)

    def _count_wait(self, seconds: float) -> None:
        self._counters.waits += 1
        self._counters.wait_s += seconds

    def _here(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [Hkv, k, 2 D] (zero where absent) and slots [Hkv, k]."""
        slots = self.hot.find(positions)
        if self.hot.capacity == 0:
            return self.hot.rows.new_zeros(*positions.shape, self.hot.rows.shape[-1]), slots
        index = slots.clamp(min=0).unsqueeze(-1).expand(-1, -1, self.hot.rows.shape[-1])
        rows = self.hot.rows.gather(1, index)
        return rows.masked_fill_((slots < 0).unsqueeze(-1), 0.0), slots

    def _read(self, head: Tensor, position: Tensor) -> Callable[[], Arrival]:
        """A read of M rows, to run on any thread."""
        head, position = head.cpu(), position.cpu()
        return lambda: self._transfer(self._tier.gather(self._layer, head, position))
