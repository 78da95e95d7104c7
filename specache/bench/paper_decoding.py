"""Measure one row of the paper's table: the largest batch that fits, and its decode speed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from specache.bench.base import Log
from specache.bench.compute_device import CUDA, free_bytes, peak_bytes, release_memory, reset_peak, synchronise
from specache.bench.contenders import Contender, SpeCacheContender, StockContender
from specache.bench.paper_fit import FAST, TRIED, Fit, FreeMemory, Needs, planned_fit, tried_fit, untried_fit
from specache.bench.paper_methods import Entry
from specache.bench.timing import Timing
from specache.bench.workload import Workload
from specache.errors import ConfigError
from specache.model.dimensions import dimensions_of
from specache.platform.machine import memory
from specache.platform.out_of_memory import is_out_of_memory

DEFAULT_SHARE = 0.9  # of free memory; allocators and other processes need the rest
WARMUP_STEPS = 2

_Decoded = tuple[Timing | None, int, float | None]


@dataclass(frozen=True)
class Schedule:
    """How many steps are decoded.

    Attributes:
        steps: decode steps per round. Their mean time is one sample.
        rounds: number of samples.
        search: whether larger and smaller batches than the planned one are tried on a GPU.
        shares_rows: whether all sequences read the 16-bit rows of one.
    """

    steps: int
    rounds: int
    search: bool = True
    shares_rows: bool = False

    @property
    def new_tokens(self) -> int:
        """Return the tokens that every sequence gains."""
        return WARMUP_STEPS + self.steps * self.rounds


@dataclass(frozen=True)
class BatchResult:
    """The largest batch of one method at one context.

    Attributes:
        timing: of a step, or `None` where not even one sequence fits.
        fast_bytes: most fast memory in use while decoding, without the weights. On a GPU: allocated
            bytes. On a CPU: the bytes that the cache counts and the planned working set of a step.
        hit_rate: share of the real token's selected rows that were already in fast memory, or
            `None` where nothing is fetched ahead.
        reason: why there is no timing.
    """

    fit: Fit
    timing: Timing | None = None
    fast_bytes: int | None = None
    hit_rate: float | None = None
    reason: str | None = None


def default_budget() -> int:
    """Return nine tenths of the GPU's free memory. Call it once the weights are loaded."""
    release_memory()
    return int((free_bytes(CUDA) or 0) * DEFAULT_SHARE)


class Decoding:
    """Measures methods with one model.

    Inside the `with` block, a GPU's memory is limited to the weights and the budget.

    Args:
        budget: bytes of fast memory in addition to the weights.
        most: the largest batch to try.

    Raises:
        ConfigError: the GPU has less free memory than the budget.
    """

    def __init__(self, model: Any, budget: int, most: int, schedule: Schedule, seed: int) -> None:
        self._model, self._budget, self._most, self._schedule, self._seed = model, budget, most, schedule, seed
        self._dimensions = dimensions_of(model)
        self._device = self._dimensions.device
        self._weight_bytes = 0

    def __enter__(self) -> Decoding:
        if self._device == CUDA:
            self._limit_gpu()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._device == CUDA:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def measure(self, entry: Entry, context: int, log: Log) -> BatchResult:
        """Find the largest batch of a method at one context and time it."""
        needs = Needs(self._dimensions, entry, context, self._schedule.new_tokens, self._schedule.shares_rows)
        main = memory()["usable_bytes"]
        free = FreeMemory(self._budget, None if main is None else int(main * DEFAULT_SHARE), self._most)
        if self._device == CUDA and not self._schedule.search:
            fit = untried_fit(needs, free)
        elif self._device == CUDA:
            fit = tried_fit(needs, free, lambda batch: self._decode(needs, batch, 0, log) is not None)
        else:
            fit = planned_fit(needs, free)
        while fit.batch:
            if measured := self._decode(needs, fit.batch, self._schedule.rounds, log):
                return BatchResult(fit, *measured)
            fit = Fit(fit.batch - max(1, fit.batch // 32), TRIED, FAST)
        return BatchResult(fit, reason=_reason(needs, free, fit))

    def _decode(self, needs: Needs, batch: int, rounds: int, log: Log) -> _Decoded | None:
        """Return time, fast memory and hit rate of a batch, or `None` if memory runs out.

        There is no time if `rounds` is 0.
        """
        work = Workload(self._model, batch, needs.context, self._seed)
        contender = needs.entry.contender(work, None if self._device == CUDA else self._budget, self._schedule.shares_rows)
        try:
            log(f"filling {batch:,} sequences")
            contender.prepare()
            work.drop_rows()
            reset_peak(self._device)
            hot = _hot_bytes(contender)
            log(f"decoding {batch:,} sequences")
            samples = self._samples(contender, rounds)
            # A step short of memory frees hot sets or static buffers and goes on, slower.
            if _hot_bytes(contender) < hot or _out_of_room(contender):
                return None
            timing = Timing(tuple(samples)) if samples else None
            return timing, self._fast_bytes(contender, needs, batch), _hit_rate(contender)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            contender.close()
            work.drop_rows()
            release_memory()

    def _samples(self, contender: Contender, rounds: int) -> list[float]:
        """Return the milliseconds of a step, one sample per round."""
        samples = []
        with contender.ready():
            for _ in range(WARMUP_STEPS):
                contender.step()
            for _ in range(rounds):
                synchronise()
                started = time.perf_counter()
                for _ in range(self._schedule.steps):
                    contender.step()
                synchronise()
                samples.append((time.perf_counter() - started) * 1e3 / self._schedule.steps)
        return samples

    def _fast_bytes(self, contender: Contender, needs: Needs, batch: int) -> int:
        if self._device == CUDA:
            return peak_bytes(CUDA) - self._weight_bytes
        if isinstance(contender, SpeCacheContender):
            return int(contender.held.stats()["fast_memory_peak_bytes"])
        assert isinstance(contender, StockContender)
        return contender.held_bytes + needs.decoding(batch)

    def _limit_gpu(self) -> None:
        release_memory()
        free = free_bytes(CUDA) or 0
        if self._budget > free:
            raise ConfigError(f"--fast-memory {self._budget:,} is more than the GPU has free beside the weights: {free:,} bytes.")
        self._weight_bytes = torch.cuda.memory_allocated()
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + self._budget) / total))


def _hot_bytes(contender: Contender) -> int:
    if not isinstance(contender, SpeCacheContender):
        return 0
    contender.held.release_device_batch()  # until then a batch on a GPU has hot sets of its own
    return contender.held.memory().hot


def _out_of_room(contender: Contender) -> bool:
    return isinstance(contender, SpeCacheContender) and contender.out_of_room


def _hit_rate(contender: Contender) -> float | None:
    return contender.held.stats()["hit_rate"] if isinstance(contender, SpeCacheContender) else None


def _reason(needs: Needs, free: FreeMemory, fit: Fit) -> str:
    """Say why not even one sequence fits."""
    if fit.found_by == TRIED:
        return f"memory ran out while one sequence was filled and decoded ({fit.limited_by})"
    needed, there = (needs.fast(1), free.fast) if fit.limited_by == FAST else (needs.main(1), free.main or 0)
    return f"one sequence needs {needed / 1e6:,.0f} MB of {fit.limited_by}, {there / 1e6:,.0f} MB are there"
