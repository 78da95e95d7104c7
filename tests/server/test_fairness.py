"""A long prompt beside running streams: counted in steps, and in memory that is freed at once."""

from __future__ import annotations

import queue
import threading
from itertools import pairwise
from typing import Any

import pytest

import specache
from specache import SpeCacheConfig
from specache.engine.events import Event, Failed, Finished, Job, NewToken, PromptProgress
from specache.engine.service import EngineService
from tests.tiny import llama, prompt

PROMPT, STREAMS = 7000, 4


@pytest.fixture(scope="module")
def model() -> Any:
    return llama(max_position_embeddings=16384)


def job(model: Any, tokens: int, seed: int, new: int) -> Job:
    return Job(specache.make_request(model, prompt(tokens, seed), max_new_tokens=new, do_sample=False))


def test_no_stream_waits_longer_than_one_chunk_and_one_decode_step(model):
    """Events are reported in the order of the engine's steps, so that gaps are counted in steps."""
    events: queue.Queue[tuple[str, Any]] = queue.Queue()
    with EngineService(model, SpeCacheConfig(), chunk_ms=5) as service:
        tickets = [
            service.submit(job(model, 40 + index, index, 4000), lambda event, name=str(index): events.put((name, event)))
            for index in range(STREAMS)
        ]
        seen: list[tuple[str, Any]] = []
        decoding: set[str] = set()
        while len(decoding) < STREAMS:
            seen.append(events.get(timeout=60))
            if isinstance(seen[-1][1], NewToken):
                decoding.add(seen[-1][0])
        reader = service.submit(job(model, PROMPT, 99, 1), lambda event: events.put(("reader", event)))
        during: list[tuple[str, Any]] = []
        while not (during and during[-1][0] == "reader" and isinstance(during[-1][1], NewToken | Failed)):
            during.append(events.get(timeout=120))
        for ticket in (*tickets, reader):
            ticket.abort()
            assert ticket.wait(30)
    chunks = [index for index, (_, event) in enumerate(during) if isinstance(event, PromptProgress) and event.done]
    assert isinstance(during[-1][1], NewToken) and len(chunks) >= 4
    ends = [during[index][1].done for index in chunks]
    assert ends[-1] == PROMPT and len({later - earlier for earlier, later in pairwise((0, *ends[:-1]))}) == 1  # one size, kept
    for earlier, later in pairwise(chunks):
        streams = [name for name, event in during[earlier:later] if isinstance(event, NewToken)]
        assert sorted(streams) == [str(index) for index in range(STREAMS)]  # each decoded one token between two chunks


def test_two_readers_take_turns_with_the_streams_in_the_order_they_came(model):
    events: queue.Queue[tuple[str, Any]] = queue.Queue()
    with EngineService(model, SpeCacheConfig(), chunk_ms=5) as service:
        tickets = [
            service.submit(job(model, 3000, seed, 2), lambda event, name=name: events.put((name, event)))
            for name, seed in (("first", 1), ("second", 2))
        ]
        assert all(ticket.wait(120) for ticket in tickets)
    order = [name for name, event in list(events.queue) if isinstance(event, PromptProgress)]
    assert order == sorted(order) and set(order) == {"first", "second"}


def test_an_aborted_reader_ends_within_a_step_and_the_streams_go_on(model):
    events: queue.Queue[tuple[str, Any]] = queue.Queue()
    with EngineService(model, SpeCacheConfig(), chunk_ms=5) as service:
        stream = service.submit(job(model, 40, 1, 4000), lambda event: events.put(("stream", event)))
        while not isinstance(events.get(timeout=60)[1], NewToken):
            pass
        submitted = threading.Event()

        def abort_when_read(event: Event) -> None:
            events.put(("reader", event))
            if isinstance(event, PromptProgress) and event.done:
                assert submitted.wait(30)
                reader.abort()

        reader = service.submit(job(model, PROMPT, 99, 1), abort_when_read)
        submitted.set()
        last: list[tuple[str, Any]] = []
        while not (last and last[-1][0] == "reader" and isinstance(last[-1][1], Finished)):
            last.append(events.get(timeout=60))
        assert last[-1][1].reasons == ("aborted",)
        assert sum(name == "reader" and isinstance(event, PromptProgress) and event.done > 0 for name, event in last) == 1
        for _ in range(5):
            assert events.get(timeout=60)[0] == "stream"
        stream.abort()
        assert stream.wait(30)
