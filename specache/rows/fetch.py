"""Getting 16-bit rows to where they are needed: select -> start -> finish, submit -> wait, and the hot set they land in.

`InPlaceRows` serves the tier whose rows are read where they lie. `FetchedRows` copies rows through a hot set: what a step's guess
selects is read while the rest of the step computes, what the real token still lacks while its layer computes what needs no rows. A
read ahead that failed raises when the next step reaches its layer, once.
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

    def start(self, positions: Tensor, real_rows: int) -> tuple[Tensor, int]:
        """Begin to fetch positions [Hkv, n, k] of a pass's n rows, without waiting. The first `real_rows` get all of theirs, the
        others what is here or on its way to those.

        Returns the positions with -1 for those that the others do without, and how many of the real rows' were here.
        """

    def finish(self) -> Tensor:
        """Rows [Hkv, n, k, 2 D] of the positions that `start` returned, waiting for those that are on their way."""

    def fetch(self, positions: Tensor) -> tuple[Tensor, int]:
        """Rows of all positions, waiting for those not here -> (rows, how many were here)."""
        _, ready = self.start(positions.unsqueeze(1), 1)
        return self.finish().squeeze(1), ready

    def submit(self, positions: Tensor) -> None:
        """Have these here when the next step begins."""

    def resize(self, slots: int) -> None:
        """Keep this many recently used rows per KV head, fewer where the byte budget has no room."""

    def cancel(self) -> None:
        """Forget what was submitted or started (the step is undone). Its error, if it has one, is nobody's any more."""

    def drop(self) -> None:
        """Forget everything fetched or in flight (the sequence was cut)."""

    def free(self) -> None:
        """`drop`, and give back the fast memory that it took. The next step takes what its own pairs need."""


class InPlaceRows(Rows):
    """Rows read where they lie: everything is always here, and nothing is held twice."""

    in_place = True

    def __init__(self, tier: SlowTier, layer: int) -> None:
        self._tier = tier
        self._layer = layer
        self._started = torch.empty(0, 0, 0, dtype=torch.long)

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

    def start(self, positions: Tensor, real_rows: int) -> tuple[Tensor, int]:
        self._started = positions
        return positions, int((positions[:, :real_rows] >= 0).sum())

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
    head: Tensor  # [M]
    position: Tensor  # [M]
    request: PrefetchRequest


@dataclass
class _Started:
    """What `finish` gives, and the part of it that is being read."""

    slots: Tensor  # [Hkv, n, k], -1 where there is none
    head: Tensor  # [M]
    column: Tensor  # [M], among the [n k] of a head
    read: BegunRead | None


class FetchedRows(Rows):
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
        self._started: _Started | None = None
        self._staged_bytes = 0  # most bytes that were in flight at once

    @property
    def nbytes(self) -> int:
        return self.hot.nbytes + self._staged_bytes

    @property
    def exact_bytes(self) -> int:
        return self.hot.rows.nbytes + self._staged_bytes

    def begin_step(self) -> None:
        self._cancel_started()
        flight, self._in_flight = self._in_flight, None
        if flight is not None:
            self.hot.insert(flight.head, flight.position, self._arrived(flight.request))
        self.hot.step += 1

    def start(self, positions: Tensor, real_rows: int) -> tuple[Tensor, int]:
        self._cancel_started()
        k = positions.shape[2]
        self.hot.grow(real_rows * k)
        wanted, others = positions.flatten(1).split([real_rows * k, (positions.shape[1] - real_rows) * k], dim=1)
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
            fetched = None if started.read is None else self._taken(started.read)
        except BaseException:
            self._cancel_started()
            raise
        if fetched is not None:
            self.hot.fill(fetched)
        self._started = None
        rows = self._rows_at(started.slots.flatten(1))  # [Hkv, n k, 2 D]
        if fetched is not None:
            rows[started.head, started.column] = fetched  # also those for which the hot set has no room
        return rows.unflatten(1, started.slots.shape[1:])

    def submit(self, positions: Tensor) -> None:
        self._cancel_submitted()
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
        """Also where it was interrupted before it was noted."""
        started, self._started = self._started, None
        self.hot.forget()
        if started is not None and started.read is not None:
            started.read.cancel()

    def _taken(self, read: BegunRead) -> Tensor:
        """Rows whose read was begun in this layer, waiting for them if need be."""
        arrival, read_s, wait_s = read.take()
        self._counters.read_s += read_s
        if wait_s:
            self._count_wait(wait_s)
        return arrival.wait()

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

    def _rows_at(self, slots: Tensor) -> Tensor:
        """Rows [Hkv, m, 2 D] of slots [Hkv, m], zero at -1."""
        if self.hot.capacity == 0:
            return self.hot.rows.new_zeros(*slots.shape, self.hot.rows.shape[-1])
        index = slots.clamp(min=0).unsqueeze(-1).expand(-1, -1, self.hot.rows.shape[-1])
        return self.hot.rows.gather(1, index).masked_fill_((slots < 0).unsqueeze(-1), 0.0)

    def _read(self, head: Tensor, position: Tensor) -> Callable[[], Arrival]:
        """A read of M rows, to run on any thread. It refers to the tier and not to the hot set."""
        head, position = head.cpu(), position.cpu()
        tier, layer, transfer = self._tier, self._layer, self._transfer
        return lambda: transfer(tier.gather(layer, head, position))
