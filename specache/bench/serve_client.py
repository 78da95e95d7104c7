"""The load generator: sends the requests of a trace to an OpenAI API and measures their streams.

It runs in a process of its own, on a core of its own if the machine has two.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

from specache.bench.serve_trace import TraceRequest
from specache.errors import BenchmarkError

CHAT_PATH = "/v1/chat/completions"
_DATA = "data:"
_DONE = "[DONE]"


@dataclass(frozen=True)
class LoadJob:
    """What the load generator sends, and where.

    Attributes:
        url: of the server, without a path.
        model: name of the model in the requests.
        clients: most requests at once. A later one waits until another has ended.
        timeout_s: for a whole request.
        core: that this process runs on; `None` for any.
        fields: of every request, beside the messages and the answer's length.
    """

    url: str
    model: str
    requests: tuple[TraceRequest, ...]
    clients: int
    timeout_s: float
    core: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class Answered:
    """One request as its client saw it. Times are in seconds of `time.perf_counter`.

    Attributes:
        sent: when it was sent.
        arrivals: when each piece of the answer with text arrived. A piece has one token or a few.
        ended: when the stream ended.
        error: HTTP status, `stream` (an error inside the stream), `connection` or `timeout`; `None`
            if the answer is complete.
        message: what the error said.
        prompt_tokens, answer_tokens, cached_tokens: as the server reports them, else `None`.
    """

    sent: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    text: str = ""
    error: str | None = None
    message: str | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    cached_tokens: int | None = None

    @property
    def first_s(self) -> float | None:
        """Return the time to the first piece with text; None without one."""
        return self.arrivals[0] - self.sent if self.arrivals else None

    @property
    def gaps_s(self) -> list[float]:
        """Return the times between pieces of text."""
        return [later - earlier for earlier, later in pairwise(self.arrivals)]

    def read(self, event: dict[str, Any], now: float) -> None:
        """Take one event of the stream. An event that says nothing (a role) is no token."""
        if event.get("error"):
            self.error, self.message = "stream", str(event["error"])
            return
        for choice in event.get("choices") or ():
            text = (choice.get("delta") or {}).get("content")
            if text:
                self.arrivals.append(now)
                self.text += text
        if usage := event.get("usage"):
            self.prompt_tokens = usage.get("prompt_tokens")
            self.answer_tokens = usage.get("completion_tokens")
            self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


def serve(connection: Connection, job: LoadJob) -> None:
    """Send the requests and send back the list of `Answered`. Runs in the child process."""
    if job.core is not None:
        os.sched_setaffinity(0, {job.core})
    connection.send(asyncio.run(send_all(job)))


async def send_all(job: LoadJob) -> list[Answered]:
    """Send every request at its time and return the answers, in the order of the requests.

    Raises:
        BenchmarkError: httpx is not installed.
    """
    try:
        import httpx
    except ImportError:
        raise BenchmarkError("bench serve needs: pip install 'specache[bench]'") from None
    free = asyncio.Semaphore(job.clients)
    limits = httpx.Limits(max_connections=job.clients, max_keepalive_connections=job.clients)
    async with httpx.AsyncClient(base_url=job.url, timeout=job.timeout_s, limits=limits, trust_env=False) as client:
        begin = time.perf_counter()

        async def send(request: TraceRequest) -> Answered:
            await asyncio.sleep(begin + request.at_s - time.perf_counter())
            async with free:
                return await _send(client, job, request)

        return await asyncio.gather(*map(send, job.requests))


async def _send(client: Any, job: LoadJob, request: TraceRequest) -> Answered:
    """Send one request and read its stream to the end."""
    import httpx

    answered = Answered(sent=time.perf_counter())
    body = {
        "model": job.model,
        "messages": list(request.messages),
        "max_tokens": request.answer_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"tools": list(request.tools)} if request.tools else {}),
        **job.fields,
    }
    try:
        async with asyncio.timeout(job.timeout_s), client.stream("POST", CHAT_PATH, json=body) as response:
            if response.status_code != 200:
                answered.error = str(response.status_code)
                answered.message = (await response.aread()).decode(errors="replace")[:500]
            else:
                await _read_stream(response, answered)
    except (TimeoutError, httpx.TimeoutException):
        answered.error, answered.message = "timeout", f"no complete answer after {job.timeout_s:,.0f} s"
    except httpx.HTTPError as error:
        answered.error, answered.message = "connection", f"{type(error).__name__}: {error}"
    answered.ended = time.perf_counter()
    return answered


async def _read_stream(response: Any, answered: Answered) -> None:
    async for line in response.aiter_lines():
        if not line.startswith(_DATA):
            continue  # a comment keeps the connection alive
        data = line.removeprefix(_DATA).strip()
        if data == _DONE:
            return
        try:
            event = json.loads(data)
        except json.JSONDecodeError:
            answered.error, answered.message = "stream", f"not JSON: {data[:200]}"
            return
        answered.read(event, time.perf_counter())
        if answered.error is not None:
            return
