"""64 clients with mixed lengths, a third of which hang up: no error but 429, memory stays flat.

SPECACHE_SOAK_S=600 runs for ten minutes; the default is 6 seconds.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from specache.bench.control_group import MemoryGroup
from specache.errors import BenchmarkError
from tests.server.real_server import SERVED_NAME, RealServer, idle

SECONDS = float(os.environ.get("SPECACHE_SOAK_S", "6"))
pytestmark = pytest.mark.timeout(600 + 2 * SECONDS)
WARM_UP_S = 240.0  # at most, until prefixes had to go because the budget was full
CLIENTS, REPEATED, EVICTED = 64, 12, 8
FAST_BYTES, SLOW_BYTES = 8_000_000, 8_000_000
GROWTH = 1.05
DOCUMENTS = [
    "".join(f"Document {name} says {number * step % 97} of {number}. " for number in range(20))
    for name, step in zip("abc", (3, 5, 7), strict=True)
]


@dataclass
class Soak:
    """What the clients saw."""

    deadline: float = math.inf
    warm: list[tuple[int, int]] = field(default_factory=list)
    late: list[tuple[int, int]] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    sampled: dict[str, tuple[dict[str, Any], str]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def server(long_folder: Path) -> Iterator[RealServer]:
    """A server with small budgets, in a control group where the machine has them."""
    with ExitStack() as stack:
        group = None
        with suppress(BenchmarkError):  # no control groups here: the process's own memory is looked at all the same
            group = stack.enter_context(MemoryGroup())
        with ExitStack() as starting:
            if group is not None:
                starting.enter_context(group.entered())
            started = RealServer(long_folder, "--fast-memory", str(FAST_BYTES), "--slow-memory", str(SLOW_BYTES))
        stack.enter_context(started)
        if group is not None:
            group.limit(group.used + FAST_BYTES + SLOW_BYTES + 150_000_000)
        yield started


def body_of(chance: random.Random) -> dict[str, Any]:
    """Return a request: half of them share a document, half are sampled with a seed."""
    own = "".join(chance.choice("abcdefgh ") for _ in range(chance.choice((5, 40, 120, 260))))
    text = (chance.choice(DOCUMENTS) if chance.random() < 0.5 else "") + own
    sampling = {"temperature": 1.0, "seed": chance.randrange(10**6)} if chance.random() < 0.5 else {"temperature": 0}
    return {
        "model": SERVED_NAME,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": chance.choice((1, 3, 8, 20)),
        "stream": True,
        **sampling,
    }


async def one_client(client: httpx.AsyncClient, number: int, soak: Soak) -> None:
    chance = random.Random(number)
    while time.monotonic() < soak.deadline:
        body, hangs_up = body_of(chance), number % 3 == 0
        leaves_after = chance.choice((0, 1, 5, 12)) if hangs_up else None
        try:
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                soak.statuses[str(response.status_code)] += 1
                if response.status_code == 429:
                    await response.aread()
                    await asyncio.sleep(min(1.0, float(response.headers["retry-after"])) * chance.random())
                    continue
                if response.status_code != 200:
                    soak.problems.append((await response.aread()).decode(errors="replace")[:300])
                    continue
                text = await read_stream(response, soak, leaves_after)
        except httpx.HTTPError as error:
            soak.problems.append(f"{type(error).__name__}: {error}")
            continue
        if text is not None and "seed" in body and len(soak.sampled) < 4 * REPEATED:
            soak.sampled[json.dumps(body)] = (body, text)


async def read_stream(response: httpx.Response, soak: Soak, leaves_after: int | None) -> str | None:
    """Return the text of a stream, or None if the client hung up on it."""
    text, last, events = "", "", 0
    if leaves_after == 0:
        return None
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        last = line.removeprefix("data:").strip()
        events += 1
        if events == leaves_after:
            return None
        if last != "[DONE]":
            event = json.loads(last)
            if "error" in event:
                soak.problems.append(str(event["error"])[:300])
                return None
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    if last != "[DONE]":
        soak.problems.append(f"the stream ended with {last[:100]!r}")
    return text


def measured(server: RealServer) -> tuple[int, int]:
    """Return the server's resident bytes and open descriptors."""
    return server.process.memory_info().rss, server.process.num_fds()


async def run(server: RealServer, soak: Soak) -> None:
    """Warm up until prefixes are evicted, and go on for `SECONDS`."""
    limits = httpx.Limits(max_connections=2 * CLIENTS, max_keepalive_connections=CLIENTS)

    async def watch(client: httpx.AsyncClient) -> None:
        begun, shortest = time.monotonic(), SECONDS / 3  # in minutes of load the allocator's arenas still grow a little
        while time.monotonic() < soak.deadline:
            status = (await client.get("/v1/status")).json()
            (soak.warm if math.isinf(soak.deadline) else soak.late).append(measured(server))
            assert status["fast_bytes"] <= status["fast_budget_bytes"] == FAST_BYTES
            assert status["slow_bytes"] <= SLOW_BYTES
            full, waited = status["prefixes"]["evicted"] >= EVICTED, time.monotonic() - begun
            if math.isinf(soak.deadline) and waited > (shortest if full else max(shortest, WARM_UP_S)):
                soak.deadline = time.monotonic() + SECONDS
            await asyncio.sleep(0.5)

    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, trust_env=False) as client:
        await asyncio.gather(watch(client), *(one_client(client, number, soak) for number in range(CLIENTS)))


def alone(server: RealServer, body: dict[str, Any]) -> str:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={**body, "stream": False}, timeout=120, trust_env=False).json()
    text: str = answer["choices"][0]["message"]["content"] or ""
    return text


def test_many_clients_that_come_and_go(server):
    before, soak = measured(server), Soak()
    asyncio.run(run(server, soak))
    assert not soak.problems, (len(soak.problems), soak.problems[:5], server.log)
    assert set(soak.statuses) <= {"200", "429"} and soak.statuses["200"] > CLIENTS, soak.statuses

    status = server.wait_until(idle, "the end of every request", 60)
    assert status["fast_peak_bytes"] <= FAST_BYTES and status["slow_peak_bytes"] <= SLOW_BYTES
    for warm, late in zip(zip(*soak.warm, strict=True), zip(*soak.late, strict=True), strict=True):
        assert max(late) <= GROWTH * max(warm) + 2, (before, soak.warm, soak.late)
    server.wait_until(lambda _: measured(server)[1] <= before[1] + 8, "the end of every connection")  # by its descriptors

    repeated = list(soak.sampled.values())[:: max(1, len(soak.sampled) // REPEATED)]
    assert len(repeated) >= min(REPEATED, 8)
    assert [alone(server, body) for body, _ in repeated] == [text for _, text in repeated]
