"""The jobs of one HTTP request while the engine runs them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request

from specache.engine.events import Event, Facts, Failed, Finished, NewToken
from specache.engine.ticket import Ticket
from specache.errors import QueueFullError
from specache.server.app_state import AppState
from specache.server.error_responses import ApiError, unavailable
from specache.server.generation import PreparedJob
from specache.server.request_context import RequestContext
from specache.server.request_numbers import request_numbers

_Result = TypeVar("_Result")
ABORTED = "aborted"


class RunningJobs:
    """Submits the jobs of a request in order, as the queue has room, and yields their events.

    Jobs are aborted when the request ends, however it does.
    """

    def __init__(self, state: AppState, context: RequestContext, jobs: Sequence[PreparedJob]) -> None:
        self.jobs = jobs
        self._state = state
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._submitted = self._ended = 0
        self._began = [0.0] * len(jobs)
        self._last_token: dict[tuple[int, int], float] = {}
        self._new = [0] * len(jobs)
        self._open = [False] * len(jobs)
        self._tickets: dict[int, Ticket] = {}

    async def start(self) -> None:
        """Submit the first job, and more if there is room.

        Raises:
            SpeCacheError: the first job is refused.
        """
        await self._submit_next()
        await self._submit_more()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield (index of the job, event) until all jobs have ended.

        Raises:
            ApiError, Exception: a job failed, or the server ended it.
        """
        while self._ended < len(self.jobs):
            if self._submitted == self._ended:  # others fill the queue
                await asyncio.sleep(0.05)
                await self._submit_more()
                continue
            index, event = await self._events.get()
            self._note(index, event)
            yield index, event
            if isinstance(event, Finished):
                self._ended += 1
                await self._submit_more()

    async def _submit_more(self) -> None:
        try:
            while self._submitted < len(self.jobs):
                await self._submit_next()
        except QueueFullError:
            return

    async def _submit_next(self) -> None:
        await self._state.work(self._submit, self._submitted)
        self._submitted += 1

    def _submit(self, index: int) -> None:
        """Submit a job, on a worker thread. If the request has ended meanwhile, abort it."""
        _, service = self._state.ready()
        self._began[index] = time.monotonic()
        ticket = service.submit(self.jobs[index].job, lambda event: self._put(index, event))
        self._tickets[index] = ticket
        self._open[index] = True
        self._state.running.add(self._context, ticket)
        self._context.at_end(lambda: self._end(index, ticket))

    def _put(self, index: int, event: Event) -> None:
        """Take an event on the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    def _note(self, index: int, event: Event) -> None:
        metrics, facts = self._state.metrics, self._context.facts
        if isinstance(event, NewToken):
            now = time.monotonic()
            if not self._new[index]:
                metrics.first_token(now - self._began[index])
                facts.setdefault("first", f"{now - self._context.began:.3f}s")
            before = self._last_token.get((index, event.row))
            if before is not None:
                metrics.next_token(now - before)
            self._last_token[index, event.row] = now
            self._new[index] += 1
        elif isinstance(event, Failed):
            self._open[index] = False
            self._keep(index, self._tickets[index].facts_now(), ["failed"])
            facts["ended"] = "failed"
            raise event.error
        elif isinstance(event, Finished):
            self._open[index] = False
            self._note_end(index, event)

    def _end(self, index: int, ticket: Ticket) -> None:
        """Abort a job when the request ends, and count one that is still open: its client left."""
        ticket.abort()
        if not self._open[index]:
            return
        log, new = self._context.facts, self._new[index]
        self._keep(index, ticket.facts_now(), [ABORTED])
        self._state.metrics.job_ended(0, 0, new, True)
        log["new"] = log.get("new", 0) + new
        log.setdefault("ended", ABORTED)

    def _note_end(self, index: int, event: Finished) -> None:
        facts, log = event.facts, self._context.facts
        aborted = ABORTED in event.reasons
        prompt = len(self.jobs[index].prompt_ids)
        self._state.metrics.job_ended(prompt, facts.cached_tokens, self._new[index], aborted)
        self._keep(index, facts, event.reasons)
        for name, value in (("prompt", prompt), ("cached", facts.cached_tokens), ("new", self._new[index])):
            log[name] = log.get(name, 0) + value
        if aborted:
            log["ended"] = ABORTED
            if self._state.closing:
                raise unavailable("The server is shutting down; this answer is not complete.", "shutting_down")
            raise ApiError(500, "The answer was ended before it was complete.", code=ABORTED)

    def _keep(self, index: int, facts: Facts, reasons: Sequence[str]) -> None:
        """Keep the numbers of a job that ended, for `/v1/status`."""
        prompt, new = len(self.jobs[index].prompt_ids), self._new[index]
        ended = {
            "finish_reasons": list(reasons),
            "time_to_first_token_seconds": round(facts.waited_s + facts.prefill_s, 4) if new else None,
            "decode_seconds": round(facts.decode_s, 4),
            "seconds": round(time.monotonic() - self._began[index], 4),
        }
        numbers = request_numbers(self._context.request_id, prompt, new, facts)
        self._state.recent.add(self._context.owner, {**numbers, **ended})


async def while_connected(http: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return the result of `work`, or cancel it as soon as the client leaves.

    Raises:
        ApiError: the client left; nobody reads the answer.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "The client left.", code="client_disconnected")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
