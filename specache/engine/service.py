"""An engine whose steps run in a thread of its own, for callers on any thread."""

from __future__ import annotations

import atexit
import math
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from specache.config import SpeCacheConfig
from specache.engine.engine import Engine
from specache.engine.event_stream import stream
from specache.engine.events import Event, Failed, Finished, Job
from specache.engine.policy_engines import PolicyEngines
from specache.engine.prefix_reuse import PrefixReuse
from specache.engine.service_status import ServiceStatus, Totals, measured
from specache.engine.stored_prefixes import StoredPrefixes
from specache.engine.ticket import OnEvent, Ticket
from specache.engine.uncopied import Uncopied
from specache.errors import QueueFullError, ServiceClosedError, UsageError
from specache.platform.notices import warn_and_go_on

PAUSE_S = 0.05  # seconds after which a request that nothing but stored prefixes hinders looks again


class EngineService(Uncopied):
    """Runs the requests of many threads over one model: first come, first served.

    One thread steps the engine. It reads the prompt of one request, a chunk at a time between the
    decode steps of all others, and reports the events of every request.

        with specache.EngineService(model, config) as service:
            request = specache.make_request(model, input_ids, max_new_tokens=100, seed=1)
            ticket = service.submit(specache.Job(request), print)
            ticket.wait()

    Args:
        model, config: as for `Engine`.
        prefixes: stored prefixes that requests go on from; the service closes them at its end.
        most_waiting: the most requests in the queue.
        chunk_ms: how long the running requests may wait for a chunk of a prompt. The chunk's size
            is chosen by that once, at the start, and at most `prefill_chunk`, which `None` takes.
            Prompts whose RoPE frequencies or activation scales depend on all tokens of a pass are
            read in one.

    Raises:
        UnsupportedModelError, ConfigError, SlowTierError: as `SpeCache`.
        FastMemoryError: no request would fit into `fast_memory`.
    """

    instead = "Make another one, also in another process: specache.EngineService(model, config)."

    def __init__(
        self,
        model: Any,
        config: SpeCacheConfig | None = None,
        *,
        prefixes: StoredPrefixes | None = None,
        most_waiting: int = 64,
        chunk_ms: float | None = 250.0,
    ) -> None:
        if most_waiting < 1:
            raise UsageError(f"most_waiting must be at least 1, got {most_waiting!r}.")
        if chunk_ms is not None and not (chunk_ms > 0 and math.isfinite(chunk_ms)):
            raise UsageError(f"chunk_ms must be a positive number of milliseconds or None, got {chunk_ms!r}.")
        self._engines = PolicyEngines(model, config)
        self._engines.first.room.prefixes = self._prefixes = prefixes
        self._most_waiting = most_waiting
        self._chunk_ms = chunk_ms
        self._process = os.getpid()
        self._changed = threading.Condition()  # guards what follows
        self._open: set[Ticket] = set()
        self._queue: deque[Ticket] = deque()
        self._to_abort: set[Ticket] = set()
        self._totals = Totals()
        self._ends = 0  # requests that ended, changed on the thread of the service only
        self._ready = self._closing = False
        self._written = False  # the store has written a prefix since the thread last asked
        self._error: BaseException | None = None
        if prefixes is not None:
            prefixes.call_when_written(self._note_written)
        self._thread = threading.Thread(target=self._run, name="specache-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, job: Job, on_event: OnEvent) -> Ticket:
        """Queue a job.

        Args:
            on_event: called on the service's thread with every event of this job. It must be quick.
                If it raises, the request is aborted.

        Raises:
            QueueFullError: as many requests wait as may.
            FastMemoryError: the request can never fit; the message names the bytes.
            ConfigError, UsageError: its settings are not possible, or it ran before.
            ServiceClosedError: the service is closed, or stopped after an error.
        """
        self._check_process()
        try:
            self._engines.check(job)
        except Exception:
            with self._changed:
                self._totals.refused += 1
            raise
        ticket = Ticket(job, on_event, self._reuse(job), self._abort)
        with self._changed:
            self._check_open()
            waiting = self._waiting()
            if waiting >= self._most_waiting:
                self._totals.refused += 1
                after = self._totals.retry_after_s()
                raise QueueFullError(f"{waiting:,} requests wait, the most that may. Try again in {math.ceil(after)} s.", after)
            ticket.listen()
            self._open.add(ticket)
            self._queue.append(ticket)
            self._changed.notify_all()
        return ticket

    def stream(self, job: Job) -> AsyncIterator[Event]:
        """Submit a job and yield its events, in asyncio: `async for event in service.stream(job)`.

        Leaving the loop early, or cancelling the task, aborts the request. It raises what `submit`
        raises, and the error of a request that fails.
        """
        return stream(lambda listen: self.submit(job, listen))

    def status(self) -> ServiceStatus:
        """Return what the service does now, and what it did so far. Quick, from any thread."""
        self._check_process()
        numbers = measured(self._engines)
        prefixes = None if self._prefixes is None else self._prefixes.status()
        with self._changed:
            waiting = self._waiting()
            return ServiceStatus(
                ready=self._ready,
                waiting=waiting,
                running=len(self._open) - waiting,
                prefixes=prefixes,
                error=self._error,
                **self._totals.counts(),
                **numbers,
            )

    def wait_until_ready(self, timeout: float | None = None) -> bool:
        """Wait until requests are taken, and return whether they are; False after an error."""
        self._check_process()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._closing, timeout)
            return self._ready and not self._closing

    def close(self, grace_s: float = 0.0) -> None:
        """Refuse new jobs, let those that run go on for `grace_s` seconds, abort the rest, and end.

        Requests that still wait are aborted at once. Each gets its last event. Another call, or one
        in a forked process or on the service's own thread, does not wait.
        """
        if os.getpid() != self._process:
            return self._engines.first.cache.close()
        atexit.unregister(self.close)
        own = threading.current_thread() is self._thread
        with self._changed:
            self._closing = True
            self._to_abort |= {ticket for ticket in self._open if ticket.started_s is None}
            self._changed.notify_all()
            if not own:
                self._changed.wait_for(lambda: not self._open, grace_s)
            self._to_abort |= self._open
            self._changed.notify_all()
        if not own:
            self._thread.join()

    def __enter__(self) -> EngineService:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # On callers' threads

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise UsageError("This service runs in the process that this one was forked from. Make another one here.")

    def _check_open(self) -> None:
        if self._error is not None:
            raise ServiceClosedError(f"The service stopped after an error: {self._error!r}. Make another one.")
        if self._closing:
            raise ServiceClosedError("This service is closed. Make a new specache.EngineService(model, config).")

    def _reuse(self, job: Job) -> PrefixReuse | None:
        if self._prefixes is None:
            return None
        reads_all = job.prompt_logprobs is not None
        return PrefixReuse(self._prefixes, job.owner, self._engines.first.room, takes=not reads_all, keeps=job.cacheable)

    def _waiting(self) -> int:
        return sum(ticket.started_s is None for ticket in self._open)

    def _abort(self, ticket: Ticket) -> None:
        if os.getpid() != self._process:
            return
        with self._changed:
            if ticket in self._open:
                self._to_abort.add(ticket)
                self._changed.notify_all()

    def _note_written(self) -> None:
        """Have the service's thread ask what was written. Called on a thread of the store."""
        with self._changed:
            self._written = True
            self._changed.notify_all()

    # On the service's thread

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            if self._chunk_ms is not None:
                self._engines.choose_chunk(self._chunk_ms / 1000)
            self._begin()
            while self._wait_for_work():
                self._abort_requests()
                self._begin_next()
                self._engines.step(self._step)
        except BaseException as failed:
            error = failed
        finally:
            self._stop(error)

    def _begin(self) -> None:
        with self._changed:
            self._ready = True
            self._changed.notify_all()

    def _wait_for_work(self) -> bool:
        """Wait until there is a request. Return False if there will be none."""
        while True:
            with self._changed:
                if self._engines.are_blocked:
                    self._changed.wait_for(lambda: self._written or self._to_abort, PAUSE_S)
                    self._engines.retry()
                self._changed.wait_for(lambda: self._open or self._closing or self._written)
                written, self._written = self._written, False
                if not written:
                    return bool(self._open)
            self._collect_written()

    def _collect_written(self) -> None:
        """Let the store go on with what was written, and look again whether a request fits."""
        try:
            if self._prefixes is not None:
                self._prefixes.collect()
        except Exception as error:
            warn_and_go_on(f"Could not go on writing stored prompts: {error!r}", stacklevel=2)
        self._engines.retry()

    def _abort_requests(self) -> None:
        """Have requests end that are to be aborted, or whose deadline has passed."""
        now = time.monotonic()
        with self._changed:
            late = {ticket for ticket in self._open if ticket.job.deadline is not None and ticket.job.deadline <= now}
            aborted, self._to_abort = (self._to_abort | late) & self._open, set()
            queued = [ticket for ticket in self._queue if ticket in aborted]
            self._queue = deque(ticket for ticket in self._queue if ticket not in aborted)
        for ticket in queued:
            self._end(ticket, Finished(("aborted",) * len(ticket.job.request.token_ids), ticket.facts(None)))
        for ticket in aborted.difference(queued):
            ticket.leave_engine()

    def _begin_next(self) -> None:
        """Hand the oldest request to its engine, unless a prompt is being read or waits for memory.

        So requests begin in order, and one that shares a prompt with another finds it read.
        """
        if self._engines.has_prompt:
            return
        with self._changed:
            ticket = self._queue.popleft() if self._queue else None
        if ticket is None:
            return
        try:
            engine = self._engines.of(ticket.job)
            handle = engine.add(ticket.job.request, lambda handle: self._ended(ticket, engine), ticket.reuse)
            ticket.begin(handle, engine)
        except Exception as error:
            self._end(ticket, Failed(error))

    def _step(self, engine: Engine) -> None:
        """Run a step. Errors that are not of a request are raised."""
        before = self._ends
        try:
            engine.step()
        except BaseException as error:  # a processor may raise SystemExit, which ended its request
            if isinstance(error, Exception) or self._ends == before:
                raise

    def _ended(self, ticket: Ticket, engine: Engine) -> None:
        """Report the end of a request, whose memory is free."""
        handle = ticket.handle
        assert handle is not None, "it was handed to an engine"
        facts = ticket.facts(engine.cache.counters)
        self._engines.note_slow_bytes(facts.slow_bytes)
        reasons = tuple(str(reason) for reason in handle.finish_reasons)
        self._end(ticket, Finished(reasons, facts) if handle.error is None else Failed(handle.error))
        self._engines.retry()

    def _end(self, ticket: Ticket, event: Finished | Failed) -> None:
        """Count a request that ended, and report its last event."""
        with self._changed:
            if ticket not in self._open:
                return
            self._open.remove(ticket)
            self._ends += 1
            self._totals.add(ticket, event)
        ticket.finish(event)
        with self._changed:
            self._changed.notify_all()

    def _stop(self, error: BaseException | None) -> None:
        """End every request, and free everything."""
        with self._changed:
            self._closing, self._error = True, error
            unfinished = list(self._open)
            self._queue.clear()
            self._changed.notify_all()
        for ticket in unfinished:
            self._end(ticket, Failed(error or ServiceClosedError("The service was closed.")))
        for close in (self._engines.close, *([] if self._prefixes is None else [self._prefixes.close])):
            try:
                close()
            except Exception as failed:
                warn_and_go_on(f"The service did not end cleanly: {failed!r}", stacklevel=2)
