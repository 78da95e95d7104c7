"""Which requests a service takes, in which order they run, and what waits for what."""

from __future__ import annotations

import re
import threading
from itertools import pairwise
from typing import Any

import pytest

import specache
from specache.engine import room
from specache.engine.events import Event, NewToken, PromptProgress, Started
from specache.engine.stored_prefixes import Unwritten
from tests.engine.serving import PATIENCE, Client, Gate, alone, ask, service_of, settings
from tests.tiny import llama, prompt


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def needed(model: Any, count: int, length: int = 150, new: int = 20, **options: Any) -> int:
    """The fast memory of so many requests that run at once."""
    gate = Gate()
    with service_of(model, **options) as service:
        blocker = ask(service, model, prompt(20), when=gate, max_new_tokens=1)
        gate.wait()
        clients = [ask(service, model, prompt(length, seed=i), max_new_tokens=new) for i in range(count)]
        gate.open()
        for client in (blocker, *clients):
            client.end()
        return service.status().fast_peak_bytes


def test_a_full_queue_refuses_with_a_time_to_try_again(model):
    gate = Gate()
    with service_of(model, most_waiting=2) as service:
        running = ask(service, model, prompt(40), when=gate)
        gate.wait()
        waiting = [ask(service, model, prompt(50 + i)) for i in range(2)]
        request = specache.make_request(model, prompt(40), max_new_tokens=3, do_sample=False)
        with pytest.raises(specache.QueueFullError, match="2 requests wait") as raised:
            Client(service, specache.Job(request))
        assert 1 <= raised.value.retry_after_s <= 60
        status = service.status()
        assert (status.waiting, status.running, status.refused) == (2, 1, 1)
        gate.open()
        for client in (running, *waiting):
            client.end()
        again = Client(service, specache.Job(request))  # the same request, once there is room
        assert again.end().reasons == ("length",)


def test_what_can_never_fit_is_refused_at_once_with_the_numbers(model):
    limit = needed(model, 1) * 11 // 10
    with service_of(model, settings(fast_memory=limit)) as service:
        running = ask(service, model, prompt(150), max_new_tokens=20)
        with pytest.raises(specache.FastMemoryError) as raised:
            ask(service, model, prompt(1900), max_new_tokens=20)
        numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]+", str(raised.value))]
        assert limit in numbers and any(number > limit for number in numbers)
        assert running.end().reasons == ("length",)
        assert service.status().refused == 1


def test_what_does_not_fit_now_waits_and_runs_then(model):
    one, two = needed(model, 1), needed(model, 2)
    with service_of(model, settings(fast_memory=(one * 3 + two * 2) // 5)) as service:
        gate = Gate()
        ended: list[bool] = []  # whether the first had ended when the others began

        def notes(client: Client, event: Event) -> None:
            if isinstance(event, Started):
                ended.append(clients[0].ticket.done)

        clients = [ask(service, model, prompt(150, seed=0), when=gate, max_new_tokens=20)]
        gate.wait()
        clients += [ask(service, model, prompt(150, seed=i), when=notes, max_new_tokens=20) for i in (1, 2)]
        gate.open()
        for index, client in enumerate(clients):
            client.end()
            assert client.tokens() == alone(model, prompt(150, seed=index), max_new_tokens=20)[0]
        status = service.status()
    assert status.fast_peak_bytes <= status.fast_budget_bytes
    assert ended == [True, True]


def test_a_large_request_that_waits_is_not_overtaken_by_small_ones(model):
    """It runs as soon as it fits, although later ones would have fitted before."""
    order: list[str] = []

    def notes(name: str) -> Any:
        return lambda client, event: order.append(name) if isinstance(event, Started) else None

    one, two = needed(model, 1), needed(model, 2)
    gate = Gate()
    with service_of(model, settings(fast_memory=(one * 3 + two * 2) // 5)) as service:
        clients = [ask(service, model, prompt(150), when=gate, max_new_tokens=20)]
        gate.wait()
        clients.append(ask(service, model, prompt(150, seed=1), when=notes("large"), max_new_tokens=20))
        clients += [ask(service, model, prompt(20, seed=i), when=notes("small"), max_new_tokens=2) for i in range(6)]
        gate.open()
        for client in clients:
            client.end()
    assert order == ["large"] + ["small"] * 6


def test_requests_with_other_policies_wait_for_the_memory_of_all(model):
    one, two = needed(model, 1), needed(model, 2)
    with service_of(model, settings(fast_memory=(one * 3 + two * 2) // 5)) as service:
        gate = Gate()
        clients = [ask(service, model, prompt(150, seed=0), when=gate, max_new_tokens=20)]
        gate.wait()
        jobs: list[dict[str, Any]] = [{"policy": "on-demand"}, {"top_k": 20}]
        clients += [ask(service, model, prompt(150, seed=i + 1), job=job, max_new_tokens=20) for i, job in enumerate(jobs)]
        gate.open()
        for index, (client, job) in enumerate(zip(clients, [{}, *jobs], strict=True)):
            client.end()
            assert client.tokens() == alone(model, prompt(150, seed=index), settings(**job), max_new_tokens=20)[0]
        status = service.status()
    assert status.fast_peak_bytes <= status.fast_budget_bytes and status.fast_bytes == 0


def test_requests_begin_in_the_order_of_their_submission(model):
    order: list[int] = []
    gate = Gate()
    with service_of(model) as service:
        ask(service, model, prompt(20), when=gate)
        gate.wait()
        jobs: list[dict[str, Any]] = [{}, {"policy": "on-demand"}, {}, {"top_k": 8}, {"policy": "on-demand"}, {}]
        clients = [
            ask(
                service, model, prompt(90, seed=i), job=job,
                when=lambda client, event, i=i: order.append(i) if isinstance(event, Started) else None,
            )
            for i, job in enumerate(jobs)
        ]  # fmt: skip
        gate.open()
        for client in clients:
            client.end()
    assert order == list(range(6))


@pytest.mark.parametrize("policy", ["verified", "on-demand"])
def test_a_running_stream_waits_for_one_chunk_of_a_long_prompt_at_most(model, policy):
    """Between two tokens of every stream, other requests read at most one chunk."""
    seen: list[tuple[str, Event]] = []

    def notes(name: str) -> Any:
        return lambda client, event: seen.append((name, event))

    gate = Gate()
    with service_of(model) as service:
        ask(service, model, prompt(20), when=gate, max_new_tokens=1)
        gate.wait()
        streams = []
        for i in range(3):
            options: dict[str, Any] = {"job": {"policy": policy} if i else {}, "max_new_tokens": 60}
            streams.append(ask(service, model, prompt(30 + i, seed=i), when=notes(f"stream {i}"), **options))
        reader = ask(service, model, prompt(900, seed=9), when=notes("reader"), max_new_tokens=3)
        gate.open()  # none has begun before the last was asked for
        for client in (*streams, reader):
            client.end()
    for stream in range(3):
        waited = []
        tokens = [i for i, (name, event) in enumerate(seen) if name == f"stream {stream}" and isinstance(event, NewToken)]
        for before, after in pairwise(tokens):
            between = [event for name, event in seen[before:after] if name != f"stream {stream}"]
            waited.append(sum(isinstance(event, PromptProgress) and event.done > 0 for event in between))
        assert max(waited) == 1 and sum(waited) >= 15  # it read beside this stream, a chunk per token


def test_a_long_prompt_goes_on_while_many_answer(model):
    """Streams do not keep a reader from reading either: one chunk for each of their tokens."""
    with service_of(model) as service:
        streams = [ask(service, model, prompt(30, seed=i), max_new_tokens=1500) for i in range(2)]
        reader = ask(service, model, prompt(600, seed=9), max_new_tokens=2)
        reader.end()
        assert all(not stream.ticket.done for stream in streams)
        for stream in streams:
            stream.ticket.abort()
            stream.end()


class Hoarder:
    """A store of nothing that holds bytes of fast memory, which it frees when it likes."""

    def __init__(self, size: int, seconds: float) -> None:
        self._size = size
        self._claim: Any = None
        self._timer = threading.Timer(seconds, lambda: self._claim.release())

    def begin(self, owner: str, token_ids: list[int], cache: specache.SpeCache) -> None:
        if self._claim is None:
            self._claim = cache.resources.budget.claim(self._size, "what is being written")
            self._timer.start()

    def count(self, tokens: int) -> None:
        pass

    def make_room(self, fast_bytes: int, slow_bytes: int, unwritten: Unwritten) -> bool:
        return False

    def make_room_for_rows(self, nbytes: int, unwritten: Unwritten) -> bool:
        return True

    def call_when_written(self, written: Any) -> None:
        pass

    def collect(self) -> None:
        pass

    def add_running(self, owner: str, sequence: Any) -> None:
        pass

    def keep(self, owner: str, sequence: Any) -> None:
        sequence.clear()

    def drop_running(self, sequence: Any) -> None:
        pass

    def status(self) -> None:
        pass

    def close(self) -> None:
        self._timer.cancel()  # its thread ends with the test


@pytest.mark.parametrize("leaves", [True, False])
def test_a_request_waits_for_prefixes_that_are_on_their_way_out_but_not_for_ever(model, monkeypatch, leaves):
    """A prefix that is written to a disk in the background holds its bytes until then."""
    monkeypatch.setattr(room, "LONGEST_BLOCK_S", PATIENCE if leaves else 0.2)
    limit = needed(model, 1) * 5 // 4
    with service_of(model, settings(fast_memory=limit), prefixes=Hoarder(limit * 2 // 5, 0.4 if leaves else PATIENCE)) as service:
        client = ask(service, model, prompt(150), max_new_tokens=20)
        if leaves:
            assert client.end().reasons == ("length",) and client.facts.waited_s > 0.3
        else:
            with pytest.raises(specache.FastMemoryError):
                client.end()
        small = ask(service, model, prompt(20), max_new_tokens=2)
        small.end()


def test_a_request_that_waits_for_prefixes_can_be_aborted(model):
    limit = needed(model, 1) * 5 // 4
    with service_of(model, settings(fast_memory=limit), prefixes=Hoarder(limit // 2, PATIENCE)) as service:
        client = ask(service, model, prompt(150), max_new_tokens=20)
        client.ticket.abort()
        assert client.end().reasons == ("aborted",) and client.facts.waited_s < PATIENCE / 2
