"""`/v1/status` while requests run: their numbers, whose they are, and memory over time."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

import specache
from specache.engine.events import Finished, NewToken, PromptProgress
from specache.engine.prefix_status import PrefixStatus
from specache.server.memory_history import MemoryHistory
from specache.server.request_context import RequestContext
from specache.server.running_requests import RunningRequests
from tests.server.live_server import live, wait_until
from tests.server.tiny_server import SHORT, TOKENIZER, chat, error_of, printable_model, prompt_of, running

ALICE, BOB = "a" * 24, "b" * 24
BODY = {"messages": [{"role": "user", "content": "Hello " * 60}], "max_tokens": 12, "temperature": 0}


class Paused:
    """A request in a service whose thread stands still at one of its events until `go_on`."""

    def __init__(self, service, model, until) -> None:
        self._until = until
        self._reached, self._going_on = threading.Event(), threading.Event()
        self.last = None
        ids = model_input(prompt_of("x" * 300))
        request = specache.make_request(model, ids, max_new_tokens=10, pad_token_id=TOKENIZER.pad_token_id)
        self.ticket = service.submit(specache.Job(request, cacheable=False), self._take)
        assert self._reached.wait(60)

    def go_on(self) -> None:
        self._going_on.set()
        assert self.ticket.wait(60)

    def _take(self, event) -> None:
        self.last = event
        if not self._reached.is_set() and self._until(event):
            self._reached.set()
            assert self._going_on.wait(60)


def model_input(ids: list[int]):
    import torch

    return torch.tensor([ids])


def context(owner: str) -> RequestContext:
    made = RequestContext()
    made.owner = owner
    return made


@pytest.fixture(scope="module")
def model():
    return printable_model()


@pytest.fixture
def service(model):
    with specache.EngineService(model, SHORT, chunk_ms=None) as service:
        assert service.wait_until_ready(60)
        yield service


def test_a_request_that_reads_its_prompt_shows_how_far(service, model):
    """Asked while the engine's thread stands in the middle of a step: no answer waits for it."""
    requests, alice = RunningRequests(), context("alice")
    paused = Paused(service, model, lambda event: isinstance(event, PromptProgress) and event.done > 0)
    requests.add(alice, paused.ticket)
    [row] = requests.of("alice")
    assert row["id"] == alice.request_id and row["state"] == "reading"
    assert row["prompt_tokens"] == 303 and 0 < row["read_tokens"] <= 303 and row["new_tokens"] == 0
    assert row["time_to_first_token_seconds"] is None and row["seconds"] > 0
    assert service.status().running == 1 and requests.of("bob") == []
    paused.go_on()


def test_a_request_that_answers_shows_its_bytes_in_fast_and_slow_memory(service, model):
    requests = RunningRequests()
    paused = Paused(service, model, lambda event: isinstance(event, NewToken))
    requests.add(context("alice"), paused.ticket)
    [row] = requests.of("alice")
    assert row["state"] == "answering" and row["new_tokens"] == 1 and row["time_to_first_token_seconds"] > 0
    assert min(row["fast_bytes"], row["slow_bytes"], row["ordinary_cache_bytes"]) > 0
    status = service.status()
    assert (status.running_fast_bytes, status.running_slow_bytes) == (row["fast_bytes"], row["slow_bytes"])
    assert status.ordinary_bytes == row["ordinary_cache_bytes"]
    paused.go_on()
    assert isinstance(paused.last, Finished) and requests.of("alice") == []
    facts = paused.last.facts
    assert facts.new_tokens == 10 and facts.ordinary_bytes > row["ordinary_cache_bytes"]
    assert paused.ticket.facts_now().ordinary_bytes == facts.ordinary_bytes, "the numbers of its end stay"
    assert service.status().ordinary_bytes == service.status().running_slow_bytes == 0


def test_a_request_that_waits_behind_another_says_so(service, model):
    requests, bob = RunningRequests(), context("bob")
    paused = Paused(service, model, lambda event: isinstance(event, NewToken))
    request = specache.make_request(model, model_input(prompt_of("y")), max_new_tokens=2)
    waiting = service.submit(specache.Job(request), lambda event: None)
    requests.add(bob, waiting)
    [row] = requests.of("bob")
    assert row["state"] == "waiting" and row["fast_bytes"] == row["new_tokens"] == row["read_tokens"] == 0
    paused.go_on()
    assert waiting.wait(60)


def test_what_has_ended_is_not_shown_even_if_it_comes_late(service, model):
    requests, left = RunningRequests(), context("alice")
    left.end()
    paused = Paused(service, model, lambda event: isinstance(event, NewToken))
    requests.add(left, paused.ticket)
    assert requests.of("alice") == []
    paused.go_on()


def test_a_key_sees_its_own_running_requests_and_everybodys_totals():
    started, going_on = threading.Event(), threading.Event()
    model = printable_model()
    model.register_forward_hook(lambda *_: (started.set(), going_on.wait(60))[0] if armed.is_set() else None)
    armed = threading.Event()
    with running(model, keys={"alice": ALICE, "bob": BOB}, chunk_ms=None) as client:
        armed.set()
        asking = threading.Thread(target=lambda: client.post("/v1/chat/completions", json=BODY, headers=bearer(ALICE)))
        asking.start()
        try:
            assert started.wait(60)  # the thread that submitted it may have to note it still
            wait_until(lambda: client.get("/v1/status", headers=bearer(ALICE)).json()["running_requests"])
            alice, bob = (client.get("/v1/status", headers=bearer(key)).json() for key in (ALICE, BOB))
        finally:
            going_on.set()
            asking.join(60)
        assert [row["state"] for row in alice["running_requests"]] == ["reading"]
        assert bob["running_requests"] == bob["requests"] == [] and bob["running"] == alice["running"] == 1
        after = client.get("/v1/status", headers=bearer(ALICE)).json()
        assert after["running_requests"] == [] and after["requests"][0]["id"] == alice["running_requests"][0]["id"]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_every_answer_carries_the_name_that_the_status_has(client):
    response = client.post("/v1/chat/completions", json={**BODY, "messages": [{"role": "user", "content": "Hi"}]})
    assert client.get("/v1/status").json()["requests"][0]["id"] == response.headers["x-request-id"]
    names = {client.get(path).headers["x-request-id"] for path in ("/health", "/", "/nothing", "/v1/models")}
    assert len(names) == 4


def test_an_answer_whose_client_left_stays_in_the_status_as_aborted():
    import httpx

    model = printable_model(4096)
    began, asked = threading.Event(), threading.Event()

    def hold(*_):
        time.sleep(0.005)  # so that it has not ended when it is aborted
        if began.is_set():
            asked.wait(60)  # it is still answering when the status is asked

    model.register_forward_hook(hold)
    with live(model=model) as server, httpx.Client(base_url=server.address, timeout=60) as client:
        body = {**BODY, "max_tokens": 3000, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()  # the client hangs up as soon as nothing refers to it
            next(line for line in lines if '"content":"' in line and '"content":""' not in line)
            began.set()
            name = response.headers["x-request-id"]
            [row] = client.get("/v1/status").json()["running_requests"]
            asked.set()
            assert row["id"] == name and row["state"] == "answering"
        wait_until(lambda: client.get("/v1/status").json()["running"] == 0)
        status = client.get("/v1/status").json()
        [row] = status["requests"]
        assert row["id"] == name and row["finish_reasons"] == ["aborted"] and 0 < row["new_tokens"] < 3000
        assert row["ordinary_cache_bytes"] > 0 and status["running_requests"] == []


def test_a_request_that_fails_stays_in_the_status_as_failed():
    model = printable_model()
    fails = threading.Event()

    def fail(*_):
        if fails.is_set():
            raise RuntimeError("made to fail")

    with running(model) as client:
        model.register_forward_hook(fail)
        fails.set()
        chat(client, code=500)
        fails.clear()
        status = client.get("/v1/status").json()
        assert status["requests"][0]["finish_reasons"] == ["failed"] and status["running_requests"] == []
        assert chat(client)


def test_the_limits_that_a_client_must_keep_to_are_told(client):
    limits = client.get("/v1/status").json()["limits"]
    assert limits == {"body_bytes": 16 * 2**20, "prompt_tokens": 512, "positions": 512, "default_new_tokens": 4096}


def test_memory_over_time_is_kept_whether_or_not_somebody_looks():
    with running() as client:
        chat(client, "x" * 200)
        wait_until(lambda: len(client.app.state.history.since(0)["samples"]) >= 2, 20)
        memory = client.get("/v1/status?since=0").json()["memory"]
        assert memory["names"] == ["time", "fast_bytes", "slow_bytes", "kept_bytes", "ordinary_cache_bytes"]
        first, second, *_ = memory["samples"]
        assert 0.5 < second[0] - first[0] < 10 and abs(time.time() - second[0]) < 60
        later = client.get(f"/v1/status?since={first[0]}").json()["memory"]["samples"]
        assert later and later[0] == second
        assert "memory" not in client.get("/v1/status").json()


@pytest.mark.parametrize("since", ["", "x", "nan", "inf", "-inf", "1,2"])
def test_since_must_be_a_time(client, since):
    response = client.get("/v1/status", params={"since": since})
    assert response.status_code == 400 and error_of(response)["param"] == "since"


def sample(
    history: MemoryHistory, *, used: int, working: int = 0, slow: int = 0, running=(0, 0, 0), stored: int | None = None
) -> tuple[int, ...]:
    """Add a status to a history and return its sample without the time.

    Args:
        running: fast, slow and ordinary bytes of what runs.
    """
    names = ("running_fast_bytes", "running_slow_bytes", "ordinary_bytes")
    prefixes = None if stored is None else PrefixStatus(fast_bytes=stored)
    numbers = dict(zip(names, running, strict=True), fast_bytes=used, fast_working_bytes=working, slow_bytes=slow)
    history.add(SimpleNamespace(**numbers, prefixes=prefixes))
    return tuple(history.since(0)["samples"][-1][1:])


def test_what_stored_and_running_texts_share_counts_once():
    history, running = MemoryHistory(), (25, 100, 110)
    assert sample(history, used=30, slow=100, stored=30) == (0, 0, 130, 0)
    assert sample(history, used=32, slow=140, stored=30, running=running) == (25, 100, 7 + 40, 110)
    assert sample(history, used=20, slow=100, stored=30, running=running) == (20, 100, 0, 110), "no more than there is"
    assert sample(history, used=999, working=970, slow=100, stored=30, running=running) == (25, 100, 4, 110), "without working sets"


def test_the_history_is_bounded():
    history = MemoryHistory(most=3)
    for fast in range(5):
        sample(history, used=fast, running=(fast, 0, 0))
    assert [one[1] for one in history.since(0)["samples"]] == [2, 3, 4]
