"""What a service does now, and what it did so far."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from specache.engine.events import Failed, Finished
from specache.engine.policy_engines import PolicyEngines
from specache.engine.ticket import Ticket

LATEST = 128  # requests that recent times are computed from
LONGEST_RETRY_S = 60.0
COUNTED = (  # fields of `Counters`
    *("rows_selected", "rows_ready", "bytes_fetched", "read_s", "wait_s", "waits"),
    *("decode_steps", "decoded_tokens", "prefill_s", "decode_s"),
)


@dataclass(frozen=True)
class ServiceStatus:
    """The numbers of a service. Totals count from its start.

    Attributes:
        ready: whether it has begun to take requests; False until the chunk is chosen.
        waiting, running: requests in the queue, and requests that read their prompt or decode.
        finished, aborted, failed, refused: requests by how they ended; `refused` never queued.
        prompt_tokens_read, prompt_tokens_cached: prompt tokens that were read, and those that were
            stored before.
        new_tokens: new tokens of requests that ended.
        first_token_s: median seconds from submission to the first token, of the latest requests.
        chunk_tokens: prompt tokens that are read between two decode steps.
        fast_bytes, fast_peak_bytes, fast_budget_bytes: fast memory in use now and at most (with
            planned working sets), and the limit.
        fast_working_bytes: the part of `fast_bytes` that is planned working sets.
        slow_bytes, slow_peak_bytes: 16-bit rows of running sequences and, in main memory, of stored
            prefixes; what they share counts once.
        hot_bytes, window_bytes, checkpoint_bytes: parts of the running sequences' memory.
        running_fast_bytes, running_slow_bytes: the running sequences' cache in fast memory, without
            working sets, and their 16-bit rows. Rows that they share count once per engine.
        ordinary_bytes: the bytes of an ordinary 16-bit cache of the running sequences.
        hit_rate: share of the selected rows that were ready when needed.
        bytes_fetched, read_s, wait_s, waits: reads of the slow tier, their time, and how long steps
            waited for them.
        decode_steps, decoded_tokens, prefill_s, decode_s: work of the model.
        prefixes: the store's own status, `None` without one.
        error: the error that stopped the service.
    """

    ready: bool
    waiting: int
    running: int
    finished: int
    aborted: int
    failed: int
    refused: int
    prompt_tokens_read: int
    prompt_tokens_cached: int
    new_tokens: int
    first_token_s: float | None
    chunk_tokens: int
    fast_bytes: int
    fast_peak_bytes: int
    fast_budget_bytes: int | None
    fast_working_bytes: int
    slow_bytes: int
    slow_peak_bytes: int
    hot_bytes: int
    window_bytes: int
    checkpoint_bytes: int
    running_fast_bytes: int
    running_slow_bytes: int
    ordinary_bytes: int
    hit_rate: float | None
    rows_selected: int
    rows_ready: int
    bytes_fetched: int
    read_s: float
    wait_s: float
    waits: int
    decode_steps: int
    decoded_tokens: int
    prefill_s: float
    decode_s: float
    prefixes: Any
    error: BaseException | None


class Totals:
    """Counts the requests of a service as they end."""

    def __init__(self) -> None:
        self.finished = self.aborted = self.failed = self.refused = 0
        self.prompt_tokens_read = self.prompt_tokens_cached = self.new_tokens = 0
        self._first_token_s: deque[float] = deque(maxlen=LATEST)
        self._started_s: deque[float] = deque(maxlen=LATEST)

    @property
    def first_token_s(self) -> float | None:
        """Return the median time from submission to the first token, of the latest requests."""
        return statistics.median(self._first_token_s) if self._first_token_s else None

    def retry_after_s(self) -> float:
        """Return when a place in the queue is expected to be free, by how often requests left."""
        if not self._started_s:
            return 1.0
        between = (time.monotonic() - self._started_s[0]) / len(self._started_s)
        return min(max(1.0, between), LONGEST_RETRY_S)

    def add(self, ticket: Ticket, event: Finished | Failed) -> None:
        """Count a request that ended with this event."""
        if isinstance(event, Failed):
            self.failed += 1
        elif "aborted" in event.reasons:
            self.aborted += 1
        else:
            self.finished += 1
        self.prompt_tokens_cached += ticket.cached_tokens
        self.prompt_tokens_read += max(0, ticket.read_tokens - ticket.cached_tokens)
        self.new_tokens += ticket.new_tokens
        if ticket.started_s is not None:
            self._started_s.append(ticket.started_s)
        if ticket.first_token_s is not None:
            self._first_token_s.append(ticket.first_token_s - ticket.submitted_s)

    def counts(self) -> dict[str, Any]:
        """Return the fields of `ServiceStatus` that are counted here."""
        public = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**public, "first_token_s": self.first_token_s}


def measured(engines: PolicyEngines) -> dict[str, Any]:
    """Return the fields of `ServiceStatus` that are asked of the engines. From any thread."""
    counters, memory, budget = engines.counters(), engines.memory(), engines.first.cache.resources.budget
    rate = counters.rows_ready / counters.rows_selected if counters.prefetches and counters.rows_selected else None
    return {
        "chunk_tokens": engines.first.chunk,
        "fast_bytes": budget.used,
        "fast_peak_bytes": budget.peak,
        "fast_budget_bytes": budget.limit,
        "fast_working_bytes": budget.working,
        "slow_bytes": engines.slow_bytes,
        "slow_peak_bytes": engines.slow_peak_bytes,
        "hot_bytes": memory.hot,
        "window_bytes": memory.windows,
        "checkpoint_bytes": memory.checkpoints,
        "running_fast_bytes": memory.fast + memory.hot + memory.windows,
        "running_slow_bytes": memory.slow,
        "ordinary_bytes": memory.full + memory.ordinary_windows,
        "hit_rate": rate,
        **{name: getattr(counters, name) for name in COUNTED},
    }
