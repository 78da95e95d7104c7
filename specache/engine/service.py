"""An engine whose steps run in a thread of its own, for callers on other threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from specache.config import SpeCacheConfig
from specache.engine.engine import Engine
from specache.engine.events import Event, Facts, Failed, Finished, Job, NewToken, PromptProgress, Started
from specache.engine.handle import Handle
from specache.errors import QueueFullError, UsageError

OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class ServiceStatus:
    """What a service does now, and what it did so far.

    Attributes:
        waiting, running: requests in the queue, and requests that read their prompt or decode.
        finished, failed: requests that ended since the start.
    """

    waiting: int
    running: int
    finished: int
    failed: int
    error: BaseException | None = None


class Ticket:
    """A submitted job. Every method may be called from any thread.

    Attributes:
        job: the job.
        submitted: the `time.monotonic()` of its submission.
    """

    def __init__(self, service: EngineService, job: Job, on_event: OnEvent) -> None:
        self.job = job
        self.submitted = time.monotonic()
        self.handle: Handle | None = None
        self._service = service
        self._on_event = on_event
        self._started: float | None = None
        self._first: float | None = None
        self._ended = threading.Event()

    @property
    def done(self) -> bool:
        """Return whether the last event was reported."""
        return self._ended.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the last event and return whether it was reported."""
        return self._ended.wait(timeout)

    def abort(self) -> None:
        """End the request within one step. Its last event is `Finished`."""
        self._service._abort(self)

    def _emit(self, event: Event) -> None:
        self._on_event(event)


class EngineService:
    """Runs requests over one model for many threads at once.

        service = EngineService(model, config)
        ticket = service.submit(Job(specache.make_request(model, ids, max_new_tokens=9)), print)
        ticket.wait()
        service.close()

    Args:
        model, config: as for `Engine`.
        most_waiting: requests in the queue, beyond which `submit` refuses.
        chunk_ms: how long other requests may wait while a chunk of a prompt is read.
    """

    def __init__(
        self,
        model: Any,
        config: SpeCacheConfig | None = None,
        *,
        prefixes: Any = None,
        most_waiting: int = 64,
        chunk_ms: float = 250.0,
    ) -> None:
        self._engine = Engine(model, config)
        self._most_waiting = most_waiting
        self._changed = threading.Condition()
        self._tickets: dict[Handle, Ticket] = {}
        self._closing = False
        self._finished = self._failed = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="specache-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job, on_event: OnEvent) -> Ticket:
        """Queue a job.

        Args:
            on_event: called on the service's thread with every event of this job. It must be quick.

        Raises:
            QueueFullError: as many requests wait as may.
            UsageError: the service is closed, or the request ran before.
        """
        ticket = Ticket(self, job, on_event)
        with self._changed:
            if self._closing:
                raise UsageError("This service is closed. Make a new specache.EngineService(model, config).")
            waiting = sum(one._started is None for one in self._tickets.values())
            if waiting >= self._most_waiting:
                raise QueueFullError(f"{waiting:,} requests wait already. Try again later.", retry_after_s=1.0)
            job.request.callback = lambda row, token: self._new_token(ticket, row, token)
            job.request.progress = lambda done, total: self._progress(ticket, done, total)
            handle = self._engine.add(job.request, self._ended)
            ticket.handle = handle
            self._tickets[handle] = ticket
            self._changed.notify_all()
        return ticket

    def status(self) -> ServiceStatus:
        """Return what the service does now. Quick, from any thread."""
        with self._changed:
            tickets = list(self._tickets.values())
            waiting = sum(one._started is None for one in tickets)
            return ServiceStatus(waiting, len(tickets) - waiting, self._finished, self._failed, self._error)

    def close(self, grace_s: float = 0.0) -> None:
        """Refuse new jobs, wait `grace_s` seconds for those that run, abort the rest, end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._tickets, grace_s)
            for ticket in list(self._tickets.values()):
                if ticket.handle is not None:
                    self._engine.abort(ticket.handle)
        self._thread.join()

    def __enter__(self) -> EngineService:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _abort(self, ticket: Ticket) -> None:
        if ticket.handle is not None:
            self._engine.abort(ticket.handle)
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._tickets or self._closing)
                    if self._closing and not self._tickets:
                        break
                self._engine.step()
        except BaseException as error:
            self._error = error
            for ticket in list(self._tickets.values()):
                self._end(ticket, Failed(error))
        finally:
            with self._changed:
                self._closing = True
            self._engine.close()

    def _progress(self, ticket: Ticket, done: int, total: int) -> None:
        if ticket._started is None:
            ticket._started = time.monotonic()
            ticket._emit(Started(0))
        ticket._emit(PromptProgress(done, total))

    def _new_token(self, ticket: Ticket, row: int, token: int) -> None:
        if ticket._first is None:
            ticket._first = time.monotonic()
        ticket._emit(NewToken(row, token))

    def _ended(self, handle: Handle) -> None:
        ticket = self._tickets[handle]
        if handle.error is not None:
            return self._end(ticket, Failed(handle.error))
        now = time.monotonic()
        started = ticket._started or now
        first = ticket._first or now
        request = ticket.job.request
        facts = Facts(
            prompt_tokens=sum(len(ids) for ids in {tuple(ids) for ids in request.token_ids}),
            new_tokens=sum(len(row) for row in handle.new_token_ids),
            waited_s=started - ticket.submitted,
            prefill_s=first - started,
            decode_s=now - first,
        )
        self._end(ticket, Finished(tuple(str(reason) for reason in handle.finish_reasons), facts))

    def _end(self, ticket: Ticket, event: Finished | Failed) -> None:
        try:
            ticket._emit(event)
        finally:
            with self._changed:
                if ticket.handle is not None:
                    self._tickets.pop(ticket.handle, None)
                self._failed += isinstance(event, Failed)
                self._finished += isinstance(event, Finished)
                self._changed.notify_all()
            ticket._ended.set()
