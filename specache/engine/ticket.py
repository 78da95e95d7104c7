"""A job that was submitted to a service: its events, its times and its end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from specache.engine.events import Event, Facts, Failed, Finished, Job, NewToken, PromptLogprobs, PromptProgress, Started
from specache.engine.handle import Handle
from specache.engine.prefix_reuse import PrefixReuse
from specache.engine.token_logprobs import prompt_logprobs, token_logprob
from specache.errors import UsageError
from specache.platform.notices import warn_and_go_on
from specache.stats import Counters, MemoryUse

if TYPE_CHECKING:
    from specache.engine.engine import Engine

OnEvent = Callable[[Event], None]


class Ticket:
    """A submitted job. Its methods may be called from any thread.

    Attributes:
        job: the job.
        handle: its request in an engine, `None` while it is in the queue.
        reuse: the stored prefixes of its request, `None` without.
        submitted_s, started_s, first_token_s: the `time.monotonic()` of its submission, of the
            beginning of its prompt, and of its first token; `None` before.
        read_tokens: prompt tokens that were read or stored before.
        new_tokens: the new tokens of all rows so far.
    """

    def __init__(self, job: Job, on_event: OnEvent, reuse: PrefixReuse | None, abort: Callable[[Ticket], None]) -> None:
        self.job = job
        self.handle: Handle | None = None
        self.reuse = reuse
        self.submitted_s = time.monotonic()
        self.started_s: float | None = None
        self.first_token_s: float | None = None
        self.read_tokens = 0
        self.new_tokens = 0
        self._process = os.getpid()
        self._on_event: OnEvent | None = on_event
        self._abort = abort
        self._done = threading.Event()
        self._counters = (0, 0)
        self._engine: Engine | None = None

    @property
    def done(self) -> bool:
        """Return whether the last event was reported."""
        return self._done.is_set()

    @property
    def cached_tokens(self) -> int:
        """Return the prompt tokens that were stored before and not read again."""
        return 0 if self.reuse is None else self.reuse.cached_tokens

    @cached_property
    def prompt_tokens(self) -> int:
        """Return the tokens of all distinct prompts."""
        return sum(map(len, set(map(tuple, self.job.request.token_ids))))

    def facts_now(self) -> Facts:
        """Return what the request needed until now. Quick, and it hinders no step."""
        engine = self._engine
        return self.facts(None if engine is None else engine.cache.counters)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the last event, at most `timeout` seconds, and return whether it came.

        Raises:
            UsageError: this process was forked from the one of the service.
        """
        if os.getpid() != self._process:
            raise UsageError("The service runs in the process that this one was forked from. Wait there.")
        return self._done.wait(timeout)

    def abort(self) -> None:
        """End the request within one step. Its last event is `Finished`."""
        self._abort(self)

    def listen(self) -> None:
        """Have the request report to this ticket.

        Raises:
            UsageError: it reports to another one.
        """
        request = self.job.request
        if request.state.new_token_ids() is not None or request.on_token is not None:
            raise UsageError("This request was submitted before. Make another one with specache.make_request(model, ...).")
        request.chunk = None  # others wait for a chunk, so the service decides
        request.progress, request.on_token = self._progress, self._new_token
        request.on_prompt_logits = None if self.job.prompt_logprobs is None else self._prompt_logits

    # On the service's thread

    def begin(self, handle: Handle, engine: Engine) -> None:
        """Note the request in its engine, and what the engine's cache has counted so far."""
        self.handle, self._engine = handle, engine
        counters = engine.cache.counters
        self._counters = counters.rows_ready, counters.rows_selected

    def leave_engine(self) -> None:
        """Have the engine that has the request abort it."""
        if self.handle is not None and self._engine is not None:
            self._engine.abort(self.handle)

    def finish(self, event: Finished | Failed) -> None:
        """Report the last event, once."""
        if not self.done:
            self.emit(event)
            self._on_event = self._engine = None  # they may hold much
            self._abort = _ended
            request = self.job.request
            request.progress = request.on_prompt_logits = None
            request.on_token = _ended  # which still says that it was submitted
            self._done.set()

    def emit(self, event: Event) -> None:
        """Report an event. If that fails, nobody listens any more: end the request."""
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except BaseException as error:
            self._on_event = None
            warn_and_go_on(f"A request was ended because an event could not be reported: {error!r}", stacklevel=2)
            self._abort(self)

    def facts(self, counters: Counters | None) -> Facts:
        """Return what the request needed until now.

        Args:
            counters: of its cache; `None` if it has not left the queue.
        """
        now = time.monotonic()
        started = now if self.started_s is None else self.started_s
        first = max(started, now if self.first_token_s is None else self.first_token_s)
        memory = MemoryUse() if self.handle is None else self.handle.memory_now()
        return Facts(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            new_tokens=self.new_tokens,
            fast_bytes=memory.fast + memory.hot + memory.windows,
            slow_bytes=memory.slow,
            ordinary_bytes=memory.full + memory.ordinary_windows,
            hit_rate=self._hit_rate(counters),
            waited_s=started - self.submitted_s,
            prefill_s=first - started,
            decode_s=now - first,
        )

    def _hit_rate(self, counters: Counters | None) -> float | None:
        if counters is None or not counters.prefetches:
            return None
        ready, selected = counters.rows_ready - self._counters[0], counters.rows_selected - self._counters[1]
        return ready / selected if selected else None

    def _progress(self, done: int, total: int) -> None:
        if self.started_s is None:
            self.started_s = time.monotonic()
            self.emit(Started(self.cached_tokens))
        self.read_tokens = done
        self.emit(PromptProgress(done, total))

    def _new_token(self, row: int, token: int, logits: Tensor) -> None:
        self.new_tokens += 1
        if self.first_token_s is None:
            self.first_token_s = time.monotonic()
        if self.job.top_logprobs is None:
            return self.emit(NewToken(row, token))
        found = token_logprob(token, logits, self.job.top_logprobs)
        self.emit(NewToken(row, token, found.logprob, found.top))

    def _prompt_logits(self, row: int, start: int, logits: Tensor) -> None:
        first, tokens = prompt_logprobs(self.job.request.token_ids[row], start, logits, self.job.prompt_logprobs or 0)
        if tokens:
            self.emit(PromptLogprobs(row, first, tokens))


def _ended(*_: Any) -> None:
    """Stand in for what an ended request called, which would keep its ticket and service alive."""
