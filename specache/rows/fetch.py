"""Fetch 16-bit rows for a decode step (`start`, `finish`) and the next one (`submit`).

`InPlaceRowFetcher` reads rows in place from a tier that allows it. `HotSetRowFetcher` copies rows
through a hot set. It reads the rows that the draft token selects while the rest of the step
computes, and the rows that the real token misses while the layer computes what needs no rows. A
failed prefetch raises once, when the next step reaches the layer. Where C++ computes a step in one
call, it copies or reads the rows itself (`begin_at_once`), and no thread of ours takes part.

Positions are [Hkv, k], ascending, -1 where there is no pair. Rows are [Hkv, k, 2 D].
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from specache.errors import SlowTierError
from specache.rows.hot_set import HotSet, Lookup, Missing
from specache.stats import Counters
from specache.tiers.base import Fetch, SlowTier, StepReads
from specache.tiers.transfer import Transfer
from specache.tiers.worker import PrefetchWorker


class RowFetcher(Protocol):
    """Fetches the 16-bit rows of one layer of one sequence for a decode step."""

    in_place: bool  # whether rows are read in place (`InPlaceRowFetcher`)
    staged_rows: int  # the most rows in flight at once so far

    @property
    def slots(self) -> int:
        """Slots of the hot set, per KV head."""

    def begin_step(self) -> None:
        """Wait for the rows that the last step submitted."""

    def start(self, positions: Tensor, real_queries: int) -> tuple[Tensor, int, int]:
        """Start to fetch positions [Hkv, n, k] of a step's n queries, without waiting.

        The first `real_queries` queries get all of their rows. The others get the rows that are in
        the hot set or that a real query fetches.

        Returns:
            The positions, with -1 for rows that a query does not get, how many rows the real
            queries select, and how many of those were in the hot set.
        """

    def finish(self) -> Tensor:
        """Wait for the rows [Hkv, n, k, 2 D] of the positions that `start` returned."""

    def fetch(self, positions: Tensor) -> tuple[Tensor, int]:
        """Fetch the rows of all positions and wait -> (rows, how many were in the hot set)."""
        _, _, ready = self.start(positions.unsqueeze(1), 1)
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

    def begin_step(self) -> None:
        pass

    def start(self, positions: Tensor, real_queries: int) -> tuple[Tensor, int, int]:
        self._started = positions
        selected = int((positions[:, :real_queries] >= 0).sum())
        return positions, selected, selected

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
        self._prefetch: Fetch | None = None  # rows for the next step
        self._missing: Fetch | None = None  # rows of this step that were not in the hot set
        self._found: Lookup | None = None  # of the rows that `finish` returns
        self._reads: StepReads | None = None  # of steps in one call
        self.staged_rows = 0

    @property
    def slots(self) -> int:
        return self.hot.capacity

    def begin_step(self) -> None:
        self._cancel_started()
        fetch, self._prefetch = self._prefetch, None
        if fetch is not None:
            try:
                kv_rows = self._wait(fetch)
            except Exception as error:
                raise self._read_ahead_failed(error) from error
            self.hot.insert(fetch.positions, kv_rows)
        if self._reads is not None and not self._reads.native.finish_ahead():
            self._fetch_failed(self._reads)
        self.hot.advance()

    def start(self, positions: Tensor, real_queries: int) -> tuple[Tensor, int, int]:
        self._cancel_started()
        self.hot.grow(real_queries * positions.shape[2])
        found = self.hot.look_up(positions, real_queries)
        if len(found.missing):
            self._missing = self._begin(found.missing)
        self._found = found
        return found.positions, found.selected, found.ready

    def finish(self) -> Tensor:
        found, fetched = self._finish()
        rows = self.hot.rows_at(found.slots.flatten(1))  # [Hkv, n k, 2 D]
        if fetched is not None and not found.fits:  # also rows that the hot set has no room for
            missing = found.missing.positions
            rows[:, : missing.shape[1]][missing >= 0] = fetched
        return rows.unflatten(1, found.slots.shape[1:])

    @property
    def fits(self) -> bool:
        """Whether kernels find all rows of the step that was started in `hot.kv_rows`."""
        return self.hot.in_slots and self._found is not None and self._found.fits

    def finish_in_slots(self) -> Tensor:
        """Wait for rows that `fits`; return their slots [Hkv, n, k], -1 where there is none."""
        return self._finish()[0].slots

    @property
    def fetches_at_once(self) -> bool:
        """Whether kernels can fetch the rows themselves: into a hot set in C++.

        Rows on a disk need io_uring.
        """
        return self.hot.in_slots and (self._tier.in_memory or self._step_reads() is not None)

    def begin_at_once(self, pairs: int) -> tuple[HotSet, Any | None]:
        """Begin a step that fetches its rows at once: `begin_step`, with room for `pairs` pairs.

        Returns:
            The hot set, in C++, and the C++ object that reads the rows (`SlowTier.step_reads`),
            `None` where they lie in memory.
        """
        reads = self._step_reads()
        self.begin_step()
        self.hot.grow(pairs)
        return self.hot, None if reads is None else reads.native

    def ready_at_once(self, pairs: int) -> tuple[HotSet, Any | None] | None:
        """Return what `begin_at_once` does, for kernels that begin the step themselves.

        They call `finish_ahead` of what reads the rows, and advance the hot set.

        Returns:
            `None` where a step begins with more than that.
        """
        reads = self._step_reads()
        if self._prefetch is not None or (reads is not None and self.hot.capacity < pairs):  # rows may be on their way into it
            return None
        self._cancel_started()
        self.hot.grow(pairs)
        return self.hot, None if reads is None else reads.native

    def count_fetched(self, rows: int, seconds: float) -> None:
        """Count what kernels fetched: rows in memory, and for how long they copied them."""
        counters, waits, wait_s = self._counters, int(rows > 0), seconds
        if self._reads is not None:
            rows, waits, seconds, wait_s = self._reads.native.take_counts()
            self.staged_rows = max(self.staged_rows, rows)
        counters.bytes_fetched += rows * self.hot.kv_rows.shape[-1] * self.hot.kv_rows.itemsize
        counters.waits += waits
        counters.read_s += seconds
        counters.wait_s += wait_s

    def _finish(self) -> tuple[Lookup, Tensor | None]:
        """Wait for the missing rows [M, 2 D] and store them -> what was found, and the rows."""
        found, fetch = self._found, self._missing
        assert found is not None, "finish without start"
        try:
            fetched = None if fetch is None else self._wait(fetch)
        except BaseException:
            self._cancel_started()
            raise
        self._found = self._missing = None
        if fetched is not None:
            self.hot.fill(fetched)
        return found, fetched

    def submit(self, positions: Tensor) -> None:
        self._cancel_prefetch()
        self.hot.grow(positions.shape[1])
        self.hot.step += 1  # rows of the next step take precedence over those of this one
        missing = self.hot.missing(positions)
        if len(missing):
            self._prefetch = self._begin(missing, ahead=True)
        if self._missing is not None:
            self._missing.poll()

    def resize(self, slots: int) -> None:
        self.hot.grow_if_allowed(slots)

    def cancel(self) -> None:
        self._cancel_started()
        self._cancel_prefetch()

    def drop(self) -> None:
        self.cancel()
        self.hot.clear()

    def free(self) -> None:
        self.cancel()
        self._drop_reads()
        self.hot.free()

    def _fetch_failed(self, reads: StepReads) -> None:
        """Fetch what could not be read ahead, in a way that reports the cause."""
        missing = self.hot.missing(torch.tensor(reads.native.failed()).view(self.hot.position.shape[0], -1))
        reads.native.cancel()
        try:
            kv_rows = self._tier.gather(self._layer, missing.heads, missing.tokens)
        except Exception as error:
            raise self._read_ahead_failed(error) from error
        self.hot.insert(missing.positions, kv_rows)

    def _read_ahead_failed(self, error: Exception) -> SlowTierError:
        kind = type(error) if isinstance(error, SlowTierError) else SlowTierError
        return kind(f"Reading ahead in layer {self._layer} failed. {error}")

    def _step_reads(self) -> StepReads | None:
        """Return what reads the rows of a step in one call, as the tier is now."""
        reads = self._tier.step_reads(self._layer, self.hot.native, self._reads)
        if reads is not self._reads:
            self._drop_reads()
            self._reads = reads
        return reads

    def _drop_reads(self) -> None:
        reads, self._reads = self._reads, None
        if reads is not None:
            reads.native.cancel()

    def _cancel_prefetch(self) -> None:
        fetch, self._prefetch = self._prefetch, None
        if fetch is not None:
            fetch.cancel()
        if self._reads is not None:
            self._reads.native.cancel()
        self.hot.forget_ahead()

    def _cancel_started(self) -> None:
        fetch, self._missing, self._found = self._missing, None, None
        self.hot.forget()  # also where an interrupt came before `_missing` was set
        if fetch is not None:
            fetch.cancel()

    def _begin(self, missing: Missing, ahead: bool = False) -> Fetch | None:
        """Start to read the missing rows [M, 2 D].

        If no thread can take it, `Fetch.wait` reads. A read `ahead` is given up then: return None.
        """
        where = self._layer, missing.heads, missing.tokens
        begun = None if ahead else self._tier.begin(*where)
        fetch = begun or Fetch(partial(self._tier.gather, *where))
        fetch.positions, fetch.transfer = missing.positions, self._transfer
        if begun is None and not fetch.read_in_thread(self._worker) and ahead:
            return None
        self._count_rows(len(missing))
        return fetch

    def _wait(self, fetch: Fetch) -> Tensor:
        """Return the rows [M, 2 D], counting the time that reading and waiting took."""
        kv_rows = fetch.wait()
        self._counters.read_s += fetch.read_s
        if fetch.wait_s:
            self._counters.waits += 1
            self._counters.wait_s += fetch.wait_s
        return kv_rows

    def _count_rows(self, count: int) -> None:
        self._counters.bytes_fetched += count * self.hot.kv_rows.shape[-1] * self.hot.kv_rows.element_size()
        self.staged_rows = max(self.staged_rows, count)
