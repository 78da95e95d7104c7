"""A read that an attention layer starts early, hidden behind its computation.

The system performs the read if the tier can start one without a thread, else a thread of the
prefetch worker. If no thread is free, the step reads when it needs the rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from specache.tiers.base import RowsInFlight, SlowTier
from specache.tiers.transfer import Arrival, Transfer
from specache.tiers.worker import PrefetchRequest, PrefetchWorker, timed


class FinishedRead(NamedTuple):
    """The result of a read: rows, seconds the read took, and seconds of these the step waited.

    Submitting the read to the system counts as neither. The kernel reports no completion time, so
    `read_s` covers the time in which the read was observed running.
    """

    arrival: Arrival
    read_s: float
    wait_s: float


class BegunRead:
    """A started read of M (KV head, position) pairs of a layer, both int64 [M] on the CPU.

    Call `take` once, or `cancel`.
    """

    def __init__(
        self, tier: SlowTier, layer: int, heads: Tensor, positions: Tensor, worker: PrefetchWorker, transfer: Transfer
    ) -> None:
        self._transfer = transfer
        self._read: Callable[[], Arrival] = lambda: transfer(tier.gather(layer, heads, positions))
        started = time.perf_counter()
        self._flight: RowsInFlight | None = tier.begin(layer, heads, positions)
        self._begun = self._running = time.perf_counter()  # `running`: when it was last observed running
        at_once = self._flight is not None and self._flight.arrived
        self._waited = self._begun - started if at_once else 0.0
        self._request: PrefetchRequest | None = worker.submit(self._read) if self._flight is None else None

    def poll(self) -> None:
        """Record whether the read is still running."""
        if self._flight is not None and not self._flight.arrived:
            self._running = time.perf_counter()

    def take(self) -> FinishedRead:
        """Return the rows, waiting for them. Raise what the read raised."""
        if self._flight is not None:
            return self._take_flight(self._flight)
        if self._request is None or self._request.cancel():
            arrival, seconds = timed(self._read)
            return FinishedRead(arrival, seconds, seconds)
        done, asked = self._request.done, time.perf_counter()
        arrival, seconds = self._request.result()
        return FinishedRead(arrival, seconds, 0.0 if done else time.perf_counter() - asked)

    def cancel(self) -> None:
        """Discard the read."""
        if self._flight is not None:
            self._flight.cancel()
        if self._request is not None:
            self._request.cancel()

    def _take_flight(self, flight: RowsInFlight) -> FinishedRead:
        self.poll()
        asked = time.perf_counter()
        arrival = self._transfer(flight.take())
        waited = self._waited + time.perf_counter() - asked
        return FinishedRead(arrival, self._running - self._begun + waited, waited)
