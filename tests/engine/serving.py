"""Services over tiny models, and what they report."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import specache
from specache.engine.events import Event, Facts, Failed, Finished, Job, NewToken, PromptProgress, Started
from specache.engine.service import EngineService
from specache.engine.ticket import Ticket

PATIENCE = 60  # seconds that a test waits for an event


def settings(**changes: Any) -> specache.SpeCacheConfig:
    sizes = {"group_size": 16, "residual": 16, "slow_tier": "ram", "policy": "verified", "top_k": 24, "prefill_chunk": 32}
    return specache.SpeCacheConfig(**{**sizes, **changes})


def service_of(model: Any, config: specache.SpeCacheConfig | None = None, **options: Any) -> EngineService:
    """A service that reads `prefill_chunk` tokens at a time."""
    return EngineService(model, config or settings(), **{"chunk_ms": None, **options})


def alone(model: Any, ids: Tensor, config: specache.SpeCacheConfig | None = None, **options: Any) -> list[list[int]]:
    """The new tokens [B][tokens] of the same request by `specache.generate`."""
    with torch.random.fork_rng():
        output = specache.generate(model, ids, config=config or settings(), **{"do_sample": False, "max_new_tokens": 8, **options})
    return output[:, ids.shape[1] :].tolist()


class Client:
    """A job and its events, in order.

    Args:
        when: called on the service's thread with every event, after it was recorded.
    """

    def __init__(self, service: EngineService, job: Job, when: Callable[[Client, Event], None] | None = None) -> None:
        self.events: list[Event] = []
        self._when = when
        self._submitted = threading.Event()
        self.ticket: Ticket = service.submit(job, self._take)
        self._submitted.set()

    def _take(self, event: Event) -> None:
        self._submitted.wait(PATIENCE)
        self.events.append(event)
        if self._when is not None:
            self._when(self, event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def tokens(self, row: int = 0) -> list[int]:
        return [event.token_id for event in self.of(NewToken) if event.row == row]

    def end(self) -> Finished:
        """Wait for the end, and raise the error of a request that failed."""
        assert self.ticket.wait(PATIENCE), "the request has not ended"
        last = self.events[-1]
        if isinstance(last, Failed):
            raise last.error
        assert isinstance(last, Finished)
        return last

    @property
    def facts(self) -> Facts:
        return self.end().facts

    @property
    def cached(self) -> int:
        return self.of(Started)[0].cached_tokens

    @property
    def progress(self) -> list[int]:
        return [event.done for event in self.of(PromptProgress)]


def ask(
    service: EngineService,
    model: Any,
    ids: Tensor,
    when: Callable[[Client, Event], None] | None = None,
    job: dict[str, Any] | None = None,
    **options: Any,
) -> Client:
    """Submit a request with options of `make_request` and fields of `Job`."""
    request = specache.make_request(model, ids, **{"do_sample": False, "max_new_tokens": 8, **options})
    return Client(service, Job(request, **(job or {})), when)


class Gate:
    """Stops the service's thread at an event, until it is opened."""

    def __init__(self, at: Callable[[Event], bool] = lambda event: isinstance(event, NewToken)) -> None:
        self.reached = threading.Event()
        self._at = at
        self._open = threading.Event()

    def __call__(self, client: Client, event: Event) -> None:
        if self._at(event) and not self.reached.is_set():
            self.reached.set()
            assert self._open.wait(PATIENCE)

    def wait(self) -> None:
        assert self.reached.wait(PATIENCE)

    def open(self) -> None:
        self._open.set()
