"""A read that a step begins and needs a little later, in the same layer: what it computes meanwhile hides the read.

The system reads where the tier can begin a read without a thread, else a thread of the prefetch worker; where none of them was
free, the step reads when it needs the rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from specache.tiers.base import RowsInFlight, SlowTier
from specache.tiers.transfer import Arrival, Transfer
from specache.tiers.worker import PrefetchRequest, PrefetchWorker, timed


class Taken(NamedTuple):
    """Rows, the seconds that reading them took, and how many of these the step waited.

    Handing a read to the system is neither. Nobody is told when such a read ends: it counts for as long as it was seen to run.
    """

    arrival: Arrival
    read_s: float
    wait_s: float


class BegunRead:
    """Rows of M (KV head, position) pairs of a layer, both int64 [M] on the CPU. `take` them once, or `cancel`."""

    def __init__(
        self, tier: SlowTier, layer: int, heads: Tensor, positions: Tensor, worker: PrefetchWorker, transfer: Transfer
    ) -> None:
        self._transfer = transfer
        self._read: Callable[[], Arrival] = lambda: transfer(tier.gather(layer, heads, positions))
        started = time.perf_counter()
        self._flight: RowsInFlight | None = tier.begin(layer, heads, positions)
        self._begun = self._running = time.perf_counter()  # `running`: when it was last seen to run
        at_once = self._flight is not None and self._flight.arrived
        self._waited = self._begun - started if at_once else 0.0
        self._request: PrefetchRequest | None = worker.submit(self._read) if self._flight is None else None

    def look(self) -> None:
        """See whether it still runs."""
        if self._flight is not None and not self._flight.arrived:
            self._running = time.perf_counter()

    def take(self) -> Taken:
        """The rows, waiting for them. Raises what the read raised."""
        if self._flight is not None:
            return self._take_flight(self._flight)
        if self._request is None or self._request.cancel():
            arrival, seconds = timed(self._read)
            return Taken(arrival, seconds, seconds)
        done, asked = self._request.done, time.perf_counter()
        arrival, seconds = self._request.result()
        return Taken(arrival, seconds, 0.0 if done else time.perf_counter() - asked)

    def cancel(self) -> None:
        """Nobody will ask for the rows."""
        if self._flight is not None:
            self._flight.cancel()
        if self._request is not None:
            self._request.cancel()

    def _take_flight(self, flight: RowsInFlight) -> Taken:
        self.look()
        asked = time.perf_counter()
        arrival = self._transfer(flight.take())
        waited = self._waited + time.perf_counter() - asked
        return Taken(arrival, self._running - self._begun + waited, waited)
