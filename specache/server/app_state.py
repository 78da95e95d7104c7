"""What all requests share: settings, the model once it is loaded, workers, counters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request

from specache.server.error_responses import ApiError, busy, unavailable
from specache.server.grammar_spec import grammar_of
from specache.server.memory_history import MemoryHistory
from specache.server.prometheus_metrics import Metrics
from specache.server.recent_requests import RecentRequests
from specache.server.request_context import RequestContext
from specache.server.responses.response_store import ResponseStore
from specache.server.running_requests import RunningRequests
from specache.server.settings import ServerSettings
from specache.server.tool_grammar import answer_grammar

if TYPE_CHECKING:
    from specache.engine.service import EngineService
    from specache.server.sampling_fields import SamplingFields
    from specache.server.served_model import ServedModel

_Result = TypeVar("_Result")
_Body = TypeVar("_Body", bound="SamplingFields")
_WORKERS = 2
_EXPIRE_SECONDS = 60.0


class AppState:
    """The state of one server.

    Attributes:
        served, service: the model and the engine's service; `None` while the model is loaded.
        responses: the responses that are kept for later requests.
        closing: whether the server is about to end.
        workers: threads for templates, tokenizers and requests; the engine has its own.
        grammar_worker: the thread that compiles grammars, which may take long.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.served: ServedModel | None = None
        self.service: EngineService | None = None
        self.closing = False
        self.metrics = Metrics(self)
        self.recent = RecentRequests()
        self.responses = ResponseStore(settings.most_response_bytes, settings.response_age_seconds)
        self.running = RunningRequests()
        self.history = MemoryHistory()
        self.open_streams = 0
        self.workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="specache-request")
        self.grammar_worker = ThreadPoolExecutor(1, thread_name_prefix="specache-grammar")

    def begin_serving(self, served: ServedModel, service: EngineService) -> None:
        """Serve a model that was loaded."""
        self.served, self.service = served, service

    def ready(self) -> tuple[ServedModel, EngineService]:
        """Return the model and its service.

        Raises:
            ApiError: 503, there are none now.
        """
        if self.closing:
            raise unavailable("The server is shutting down.", "shutting_down")
        if self.served is None or self.service is None:
            raise unavailable("The model is being loaded. GET /health says when it is there.", "loading")
        if not self.service.wait_until_ready(0):
            raise ApiError(
                503, "The engine has stopped after an error. Start the server again; its log says why.", code="engine_stopped"
            )
        return self.served, self.service

    def open_stream(self, context: RequestContext) -> None:
        """Count a request for answers, or for the tokens of a text, as open until its end.

        Raises:
            ApiError: 429, as many are open as may be.
        """
        if self.open_streams >= self.settings.most_streams:
            raise busy(f"{self.open_streams:,} requests are open already. Try again later.")
        self.open_streams += 1
        context.at_end(self._close_stream)

    async def work(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Run a function on a worker thread, so that the event loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(self.workers, function, *arguments)

    async def expire_responses(self) -> None:
        """Forget stored responses when they are too old, until cancelled."""
        while True:
            await asyncio.sleep(min(_EXPIRE_SECONDS, self.settings.response_age_seconds))
            self.responses.expire()

    async def make_jobs(self, make: Callable[[_Body], _Result], body: _Body) -> _Result:
        """Run a method of `JobMaker` on a worker thread, once the body's grammar is compiled.

        Grammars are compiled one after the other on a thread of their own: those of a few requests
        may take long, and others shall not wait for them.

        Raises:
            ApiError: the body is refused.
        """
        served, _ = self.ready()
        if grammar_of(body) is not None or body.tool_use is not None:
            await asyncio.get_running_loop().run_in_executor(self.grammar_worker, answer_grammar, served, body)
        return await self.work(make, body)

    def end(self) -> None:
        """End the worker threads. What they run ends first."""
        for threads in (self.workers, self.grammar_worker):
            threads.shutdown(wait=False, cancel_futures=True)

    def _close_stream(self) -> None:
        self.open_streams -= 1


def state_of(http: Request) -> AppState:
    """Return the state of the server that a request came to."""
    state: AppState = http.app.state.server
    return state
