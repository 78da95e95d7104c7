"""The engines of a service: one for its settings, and one for each policy that requests ask for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from specache.cache.sizes import on_disk
from specache.config import SpeCacheConfig
from specache.engine.chunk_ladder import choose_chunk
from specache.engine.chunk_timer import ChunkTimer
from specache.engine.engine import Engine
from specache.engine.events import Job
from specache.model.identity.wrappers import unwrapped
from specache.platform import forks
from specache.stats import Counters, MemoryUse

MOST_IDLE = 4  # engines of other settings that are kept without a request

Changes = tuple[tuple[str, Any], ...]  # settings that differ from the service's, by name


class PolicyEngines:
    """Engines over one fast memory. All of them are stepped by one thread, in turn.

    Args:
        model, config: as for `Engine`.

    Raises:
        FastMemoryError: no request fits into `fast_memory`.

    Attributes:
        first: the engine of the service's own settings.
    """

    def __init__(self, model: Any, config: SpeCacheConfig | None) -> None:
        self.first = Engine(model, config)
        try:
            self.first.room.check_smallest(self.first.cache)
        except BaseException:
            self.first.close()
            raise
        self._model = unwrapped(model)
        self._others: OrderedDict[Changes, Engine] = OrderedDict()  # least recently used first
        self._closed = Counters()  # what engines that were closed have counted
        self._counting = forks.lock()  # what an engine has counted moves from it to `_closed`
        self._disk_peak = 0

    @property
    def all(self) -> list[Engine]:
        """Return every engine. Any thread may ask."""
        return [self.first, *list(self._others.values())]

    @property
    def has_prompt(self) -> bool:
        """Return whether an engine has a prompt to read, so that no other may begin one."""
        return any(engine.has_prompt for engine in self.all)

    def choose_chunk(self, seconds: float) -> None:
        """Choose how many prompt tokens are read at a time, before the first request."""
        cache = self.first.cache
        self.first.chunk = choose_chunk(cache.config, seconds, ChunkTimer.over(self._model, cache))

    @property
    def are_blocked(self) -> bool:
        """Return whether a request waits for memory although nothing runs."""
        engines = self.all
        return any(engine.is_blocked for engine in engines) and not any(engine.planned() for engine in engines)

    def check(self, job: Job) -> None:
        """Refuse a job whose settings are not possible, or which can never fit into fast memory.

        Any thread may call this.

        Raises:
            ConfigError, UsageError: the settings, or a request for another model.
            FastMemoryError: names the bytes that it needs.
        """
        job.request.check_model(self._model)
        cache, request = self.first.cache, replace(job.request, chunk=None)
        if job.prompt_logprobs is not None:
            request.on_prompt_logits = lambda row, start, logits: None
        self.first.room.check_alone(cache, cache.config_with(**dict(self._changes(job))), request, self.first.chunk)

    def of(self, job: Job) -> Engine:
        """Return the engine for a job's settings, made if there is none."""
        changes = self._changes(job)
        if not changes:
            return self.first
        if changes not in self._others:
            self._close_idle(MOST_IDLE - 1)
            self._others[changes] = self.first.beside(**dict(changes))
        self._others.move_to_end(changes)
        return self._others[changes]

    def step(self, run: Callable[[Engine], Any]) -> None:
        """Run `run` on every engine that has work, first on the one that reads a prompt.

        So there is at most one chunk of a prompt between two steps of each.
        """
        for engine in sorted(self.all, key=lambda engine: not engine.has_prompt):
            if engine.has_work:
                run(engine)

    def retry(self) -> None:
        """Have every engine check again whether its oldest request fits."""
        for engine in self.all:
            engine.retry()

    def close(self) -> None:
        """Close every engine, also if closing one fails."""
        try:
            self._close_idle(0, also_busy=True)
        finally:
            self.first.close()

    def counters(self) -> Counters:
        """Return the sum of what all engines have counted. Any thread may call this."""
        with self._counting:
            total = _added(Counters(), self._closed)
            for engine in self.all:
                total = _added(total, engine.cache.counters)
        first = self.first.cache.counters
        total.prefetches, total.speculates, total.compile_error = first.prefetches, first.speculates, first.compile_error
        return total

    def memory(self) -> MemoryUse:
        """Return the bytes of all running sequences. Any thread may call this."""
        return sum((engine.cache.memory() for engine in self.all), MemoryUse())

    @property
    def slow_bytes(self) -> int:
        """Return the bytes of 16-bit rows: all in main memory, or those of requests on disk."""
        cache = self.first.cache
        return self.memory().slow if on_disk(cache.config) else cache.context.row_memory.used

    @property
    def slow_peak_bytes(self) -> int:
        """Return the most of `slow_bytes` so far. On disk it is looked at when a request ends."""
        return max(self._disk_peak, self.slow_bytes, self.first.cache.context.row_memory.peak)

    def note_slow_bytes(self, ended: int) -> None:
        """Note `slow_bytes` with those of a request that has just ended."""
        if on_disk(self.first.cache.config):
            self._disk_peak = max(self._disk_peak, self.slow_bytes + ended)

    def _close_idle(self, most: int, also_busy: bool = False) -> None:
        """Close engines of other settings until at most `most` are left, those with work apart."""
        for changes, engine in list(self._others.items()):
            if len(self._others) > most and (also_busy or not engine.has_work):
                with self._counting:
                    del self._others[changes]
                    self._closed = _added(self._closed, engine.cache.counters)
                engine.close()

    def _changes(self, job: Job) -> Changes:
        """Return the settings of a job that differ from the service's."""
        own = self.first.cache.config
        asked: dict[str, Any] = {"policy": job.policy, "top_k": job.top_k, "long_top_k": job.top_k}  # one k at every length
        changes = {name: value for name, value in asked.items() if value is not None}
        same = not changes or own.with_changes(**changes).resolved(self.first.cache.info.device.type) == own
        return () if same else tuple(changes.items())


def _added(one: Counters, other: Counters) -> Counters:
    total = Counters()
    for field in fields(Counters):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, int | float) and isinstance(theirs, int | float) and not isinstance(mine, bool):
            setattr(total, field.name, mine + theirs)
    return total
