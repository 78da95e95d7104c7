"""Counters in Prometheus' form, in a registry of this server's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from specache.server.service_numbers import flat_numbers, in_seconds, totals

if TYPE_CHECKING:
    from specache.server.app_state import AppState

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class Metrics:
    """What the server counted since it started."""

    def __init__(self, state: AppState) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ServiceCollector(state))
        self._requests = self._counter("http_requests", "HTTP requests by address and status.", ["route", "status"])
        self._request_seconds = self._histogram("http_request_seconds", "From a request's headers to its last byte.", ["route"])
        self._first_token = self._histogram("time_to_first_token_seconds", "From a job's submission to its first token.")
        self._between_tokens = self._histogram("time_between_tokens_seconds", "Between two tokens of an answer.")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, stored ones included.")
        self._cached_tokens = self._counter("cached_prompt_tokens", "Prompt tokens that were stored before.")
        self._new_tokens = self._counter("generated_tokens", "New tokens of answers.")
        self._aborted = self._counter("aborted_requests", "Jobs that ended before their answer did.")
        open_streams = Gauge(
            "specache_open_requests", "Requests for answers, and for the tokens of texts, that are open.", registry=self._registry
        )
        open_streams.set_function(lambda: state.open_streams)
        stored = Gauge("specache_stored_response_bytes", "Memory of stored responses.", registry=self._registry)
        stored.set_function(lambda: state.responses.used_bytes)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count an HTTP request. `status` 0: the client left before an answer."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Record the time of a job's first token."""
        self._first_token.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """Record the time since the token before, of the same answer."""
        self._between_tokens.observe(seconds)

    def job_ended(self, prompt: int, cached: int, new: int, aborted: bool) -> None:
        """Count the tokens of a job."""
        self._prompt_tokens.inc(prompt)
        self._cached_tokens.inc(cached)
        self._new_tokens.inc(new)
        self._aborted.inc(int(aborted))

    def text(self) -> bytes:
        """Return everything in the text format of Prometheus."""
        return generate_latest(self._registry)

    def _counter(self, name: str, help: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"specache_{name}", help, labels or [], registry=self._registry)

    def _histogram(self, name: str, help: str, labels: list[str] | None = None) -> Histogram:
        return Histogram(f"specache_{name}", help, labels or [], buckets=_SECONDS, registry=self._registry)


class _ServiceCollector(Collector):
    """The engine's numbers, read when they are asked for."""

    def __init__(self, state: AppState) -> None:
        self._state = state

    def describe(self) -> list[Metric]:
        return []  # what there is depends on the engine

    def collect(self) -> Iterator[Any]:
        numbers = {} if self._state.service is None else flat_numbers(self._state.service.status())
        yield GaugeMetricFamily("specache_up", "1 once the model is loaded.", float(self._state.served is not None))
        for name, value in numbers.items():
            kind: Any = CounterMetricFamily if name in totals() else GaugeMetricFamily
            yield kind(f"specache_engine_{in_seconds(name)}", "See ServiceStatus and PrefixStatus.", value=value)
