"""Find the largest batch that fits: on a CPU by the planner's arithmetic, on a GPU by trying."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from specache.bench.compute_device import CUDA
from specache.bench.paper_methods import FULL, Entry
from specache.bench.synthetic import reserved_tokens
from specache.cache.sizes import ordinary_bytes
from specache.model.dimensions import ModelDimensions
from specache.planning.advice import bisect, largest
from specache.planning.footprint import PlannedSequence
from specache.planning.plan import MemoryPlan, plan

PLANNED, COUNTED, TRIED = "plan", "bytes", "trial"  # how a batch was found
FAST, MAIN, ASKED = "fast memory", "main memory", "max batch"  # what one more sequence would exceed


@dataclass(frozen=True)
class Fit:
    """The largest batch.

    Attributes:
        batch: 0 where not even one sequence fits.
        found_by: `plan`: by the arithmetic that makes `generate` refuse a batch. `bytes`: by the
            bytes of transformers' rows, and the same arithmetic for the working set. `trial`: this
            batch was filled and decoded, and one more sequence could not be.
        limited_by: the memory, or the option, that one more sequence would exceed.
    """

    batch: int
    found_by: str
    limited_by: str


@dataclass(frozen=True)
class FreeMemory:
    """The limits of a batch.

    Attributes:
        fast: bytes of fast memory in addition to the weights.
        main: bytes of main memory, or `None` where the system does not report it.
        most: the most sequences to try.
    """

    fast: int
    main: int | None
    most: int


@dataclass(frozen=True)
class Needs:
    """Memory needs of one method at one context, for any batch.

    Attributes:
        new: tokens that decoding adds to every sequence.
        shares_rows: whether all sequences read the 16-bit rows of one.
    """

    model: ModelDimensions
    entry: Entry
    context: int
    new: int
    shares_rows: bool = False

    def fast(self, batch: int) -> int:
        """Return the peak bytes of fast memory, over prefill and decoding."""
        planned = self._plan(batch)
        if self.entry.name != FULL:
            return planned.fast
        working_set = max(planned.prefill.working_set, planned.decode.working_set + self._regrown(batch))
        return self._rows(batch) + working_set

    def decoding(self, batch: int) -> int:
        """Return the bytes of fast memory that a step needs in addition to the cache."""
        grows = self._regrown(batch) if self.entry.name == FULL else 0
        return self._plan(batch).decode.working_set + grows

    def main(self, batch: int) -> int:
        """Return the bytes of main memory: the slow tier and, on a CPU, fast memory too."""
        return self._slow(batch) + (0 if self.model.device == CUDA else self.fast(batch))

    def _slow(self, batch: int) -> int:
        if not self.entry.planned.keeps_slow:
            return 0
        tokens = reserved_tokens(self.entry.planned.config, self.context, torch.device(self.model.device), self.new)
        return (
            (1 if self.shares_rows else batch)
            * tokens
            * sum(layer.row_bytes(self.model.itemsize) for layer in self.model.full_layers)
        )

    def _plan(self, batch: int) -> MemoryPlan:
        return plan(self.model, self.entry.planned.config, [PlannedSequence(self.context, self.new)] * batch)

    def _rows(self, batch: int) -> int:
        """Return the bytes of transformers' cache in the model's dtype."""
        return batch * ordinary_bytes(self.model, self.context + self.new, self.model.itemsize)

    def _regrown(self, batch: int) -> int:
        """Return the bytes of one layer's keys, which transformers copies to append a token."""
        return batch * (self.context + self.new) * max(layer.row_bytes(self.model.itemsize) for layer in self.model.layers) // 2


def planned_fit(needs: Needs, free: FreeMemory) -> Fit:
    """Find the largest batch by arithmetic."""

    def exceeds(batch: int) -> str | None:
        if batch > free.most:
            return ASKED
        if needs.fast(batch) > free.fast:
            return FAST
        return MAIN if free.main is not None and needs.main(batch) > free.main else None

    batch = largest(lambda batch: exceeds(batch) is None, 1, free.most)
    return Fit(batch, COUNTED if needs.entry.name == FULL else PLANNED, exceeds(batch + 1) or ASKED)


def untried_fit(needs: Needs, free: FreeMemory) -> Fit:
    """Return the planned batch, but at least one sequence if main memory has room for it."""
    hosted = largest(lambda batch: free.main is None or needs.main(batch) <= free.main, 1, free.most)
    fit = planned_fit(needs, free)
    return Fit(1, fit.found_by, fit.limited_by) if hosted and not fit.batch else fit


def tried_fit(needs: Needs, free: FreeMemory, decodes: Callable[[int], bool]) -> Fit:
    """Find the largest batch by trying batches around the planned one.

    Args:
        decodes: fills and decodes a batch, and returns whether memory sufficed.
    """
    hosted = largest(lambda batch: free.main is None or needs.main(batch) <= free.main, 1, free.most)
    batch = largest_near(planned_fit(needs, free).batch, decodes, hosted)
    limit = ASKED if batch == free.most else MAIN if batch == hosted else FAST
    return Fit(batch, TRIED, limit)


def largest_near(start: int, fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to `most` that fits, or 0 where none does.

    `fits` must be monotonic. Each call takes minutes, so the search starts from `start` with steps
    that double, and then bisects.
    """
    start, step = max(1, min(start, most)), 1
    if most < 1:
        return 0
    if found := largest(fits, start, most):
        return found
    high, low = start - 1, max(0, start - step)
    while low and not fits(low):
        high, step = low - 1, 2 * step
        low = max(0, low - step)
    return bisect(fits, low, high)
