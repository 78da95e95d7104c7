"""Fetch 16-bit rows for a decode step (`start`, `finish`) and the next one (`submit`).

`InPlaceRowFetcher` reads rows in place from a tier that allows it. `HotSetRowFetcher` copies rows
through a hot set. It reads the rows that the draft token selects while the rest of the step
computes, and the rows that the real token misses while the layer computes what needs no rows. A
failed prefetch raises once, when the next step reaches the layer.

Positions are [Hkv, k], ascending, -1 where there is no pair. Rows are [Hkv, k, 2 D].
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from specache.errors import SlowTierError
from specache.rows.hot_set import HotSet
from specache.stats import Counters
from specache.tiers.base import SlowTier
from specache.tiers.disk.begun_read import BegunRead
from specache.tiers.transfer import Arrival, Transfer
from specache.tiers.worker import PrefetchRequest, PrefetchWorker


class RowFetcher(Protocol):
    """Fetches the 16-bit rows of one layer of one sequence for a decode step."""

    in_place: bool  # whether rows are read in place (`InPlaceRowFetcher`)
    staged_rows: int  # the most rows in flight at once so far

    @property
    def slots(self) -> int:
        """Slots of the hot set, per KV head."""

    def begin_step(self) -> None:
        """Wait for the rows that the last step submitted."""

    def start(self, positions: Tensor, real_queries: int) -> tuple[Tensor, int]:
        """Start to fetch positions [Hkv, n, k] of a step's n queries, without waiting.

        The first `real_queries` queries get all of their rows. The others get the rows that are in
        the hot set or that a real query fetches.

        Returns:
            The positions, with -1 for rows that a query does not get, and how many rows of the real
            queries were in the hot set.
        """

    def finish(self) -> Tensor:
        """Wait for the rows [Hkv, n, k, 2 D] of the positions that `start` returned."""

    def fetch(self, positions: Tensor) -> tuple[Tensor, int]:
        """Fetch the rows of all positions and wait -> (rows, how many were in the hot set)."""
        _, ready = self.start(positions.unsqueeze(1), 1)
        return self.finish().squeeze(1), ready

    def submit(self, positions: Tensor) -> None:
        """Start to prefetch these rows for the next step."""

    def resize(self, slots: int) -> None:
        """Keep this many recently used rows per KV head, or as many as the byte budget allows."""

    def cancel(self) -> None:
        """Cancel submitted and started reads, because the step is undone. Drop their errors."""

    def drop(self) -> None:
        """Drop all rows, fetched or in flight, because the sequence was truncated."""

    def free(self) -> None:
        """`drop`, and release the fast memory. The next step allocates what its own pairs need."""


class InPlaceRowFetcher(RowFetcher):
    """Reads rows in place from the tier: every row is always available, and none is copied."""

    in_place = True
    staged_rows = 0
    slots = 0

    def __init__(self, tier: SlowTier, layer: int) -> None:
        self._tier = tier
        self._layer = layer
        self._started = torch.empty(0, 0, 0, dtype=torch.long)

    def stored(self) -> Tensor:
        """Return all rows [Hkv, capacity, 2 D], a view of the tier's buffer."""
        return self._tier.rows(self._layer)

    def begin_step(self) -> None:
        pass

    def start(self, positions: Tensor, real_queries: int) -> tuple[Tensor, int]:
        self._started = positions
        return positions, int((positions[:, :real_queries] >= 0).sum())

    def finish(self) -> Tensor:
        positions = self._started
        heads = torch.arange(positions.shape[0], device=positions.device).view(-1, 1, 1).expand_as(positions)
        rows = self._tier.gather(self._layer, heads.flatten(), positions.clamp(min=0).flatten())
        return rows.unflatten(0, positions.shape)

    def submit(self, positions: Tensor) -> None:
        pass

    def resize(self, slots: int) -> None:
        pass

    def cancel(self) -> None:
        pass

    def drop(self) -> None:
        pass

    def free(self) -> None:
        pass


@dataclass
class _InFlight:
    """Rows that are prefetched for the next step."""

    head: Tensor  # [M]
    position: Tensor  # [M]
    request: PrefetchRequest


@dataclass
class _Started:
    """The slots of the rows that `finish` returns, and the read of those that were missing."""

    slots: Tensor  # [Hkv, n, k], -1 where there is none
    head: Tensor  # [M], of the rows that are read
    column: Tensor  # [M], their index in the [n k] of a head
    read: BegunRead | None


class HotSetRowFetcher(RowFetcher):
    """Copies rows from a slow tier through a hot set, ahead of time where they were submitted.

    Args:
        tier, layer: the source of the rows.
        hot: the layer's hot set. It grows to hold the pairs of one step, whatever its budget.
        worker, transfer: the background threads, and the copy to the device.
        counters: counts waits, reads and bytes.
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
        self._started: _Started | None = None
        self.staged_rows = 0

    @property
    def slots(self) -> int:
        return self.hot.capacity

    def begin_step(self) -> None:
        self._cancel_started()
        flight, self._in_flight = self._in_flight, None
        if flight is not None:
            self.hot.insert(flight.head, flight.position, self._wait_for_prefetch(flight.request))
        self.hot.step += 1

    def start(self, positions: Tensor, real_queries: int) -> tuple[Tensor, int]:
        self._cancel_started()
        k = positions.shape[2]
        self.hot.grow(real_queries * k)
        wanted, others = positions.flatten(1).split([real_queries * k, (positions.shape[1] - real_queries) * k], dim=1)
        slots = self.hot.find(wanted)
        missing = (slots < 0) & (wanted >= 0)
        ready = int((slots >= 0).sum())
        head, column = missing.nonzero(as_tuple=True)
        read = None
        if len(head):
            position = wanted[head, column]
            slots[head, column] = self.hot.reserve(head, position)
            self._count_rows(len(head))
            read = BegunRead(self._tier, self._layer, head.cpu(), position.cpu(), self._worker, self._transfer)
        if others.shape[1]:
            there = self.hot.find(others)
            slots = torch.cat([slots, there], dim=1)
            others = others.where(there >= 0, -1)
        self._started = _Started(slots.view_as(positions), head, column, read)
        return torch.cat([wanted, others], dim=1).view_as(positions), ready

    def finish(self) -> Tensor:
        started = self._started
        assert started is not None, "finish without start"
        try:
            fetched = None if started.read is None else self._wait_for_read(started.read)
        except BaseException:
            self._cancel_started()
            raise
        if fetched is not None:
            self.hot.fill(fetched)
        self._started = None
        rows = self._rows_at(started.slots.flatten(1))  # [Hkv, n k, 2 D]
        if fetched is not None:
            rows[started.head, started.column] = fetched  # also rows that the hot set has no room for
        return rows.unflatten(1, started.slots.shape[1:])

    def submit(self, positions: Tensor) -> None:
        self._cancel_submitted()
        self.hot.grow(positions.shape[1])
        self.hot.step += 1  # rows of the next step take precedence over those of this one
        slots = self.hot.find(positions)
        head, column = ((slots < 0) & (positions >= 0)).nonzero(as_tuple=True)
        if len(head):
            wanted = positions[head, column]
            request = self._worker.submit(self._read(head, wanted))
            if request is not None:
                self._count_rows(len(head))
                self._in_flight = _InFlight(head, wanted, request)
        if self._started is not None and self._started.read is not None:
            self._started.read.poll()

    def resize(self, slots: int) -> None:
        self.hot.grow_if_allowed(slots)

    def cancel(self) -> None:
        self._cancel_started()
        self._cancel_submitted()

    def drop(self) -> None:
        self.cancel()
        self.hot.clear()

    def free(self) -> None:
        self.cancel()
        self.hot.free()

    def _cancel_submitted(self) -> None:
        flight, self._in_flight = self._in_flight, None
        if flight is not None:
            flight.request.cancel()

    def _cancel_started(self) -> None:
        started, self._started = self._started, None
        self.hot.forget()  # also where an interrupt came before `_started` was set
        if started is not None and started.read is not None:
            started.read.cancel()

    def _wait_for_read(self, read: BegunRead) -> Tensor:
        """Wait for the rows [M, 2 D] of a read that `start` began."""
        arrival, read_s, wait_s = read.take()
        self._counters.read_s += read_s
        if wait_s:
            self._count_wait(wait_s)
        return arrival.wait()

    def _wait_for_prefetch(self, request: PrefetchRequest) -> Tensor:
        """Wait for the rows [M, 2 D] of a prefetch that the last step submitted."""
        waits = not request.done
        started = time.perf_counter()
        try:
            arrival, seconds = request.result()
        except Exception as error:
            kind = type(error) if isinstance(error, SlowTierError) else SlowTierError
            raise kind(f"Reading ahead in layer {self._layer} failed. {error}") from error
        except BaseException:
            request.cancel()  # an interrupt ended the wait
            raise
        if waits:
            self._count_wait(time.perf_counter() - started)
        self._counters.read_s += seconds
        return arrival.wait()

    def _count_rows(self, count: int) -> None:
        self._counters.bytes_fetched += count * self.hot.kv_rows.shape[-1] * self.hot.kv_rows.element_size()
        self.staged_rows = max(self.staged_rows, count)

    def _count_wait(self, seconds: float) -> None:
        self._counters.waits += 1
        self._counters.wait_s += seconds

    def _rows_at(self, slots: Tensor) -> Tensor:
        """Return the rows [Hkv, m, 2 D] of slots [Hkv, m], zero at -1."""
        if self.hot.capacity == 0:
            return self.hot.kv_rows.new_zeros(*slots.shape, self.hot.kv_rows.shape[-1])
        index = slots.clamp(min=0).unsqueeze(-1).expand(-1, -1, self.hot.kv_rows.shape[-1])
        return self.hot.kv_rows.gather(1, index).masked_fill_((slots < 0).unsqueeze(-1), 0.0)

    def _read(self, head: Tensor, position: Tensor) -> Callable[[], Arrival]:
        """Return a function that reads M rows, on any thread. It does not refer to the hot set."""
        head, position = head.cpu(), position.cpu()
        tier, layer, transfer = self._tier, self._layer, self._transfer
        return lambda: transfer(tier.gather(layer, head, position))
