"""The end of a service: closed, dropped, or forked away from."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import specache
from specache.cache.sequence import Sequence
from specache.engine.events import Event, Finished, Job, Started
from specache.engine.stored_prefixes import RoomLater
from tests.engine.serving import PATIENCE, Client, Gate, ask, service_of
from tests.tiny import llama, prompt


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def test_closing_ends_running_and_waiting_requests_as_aborted(model):
    gate = Gate()
    service = service_of(model)
    running = ask(service, model, prompt(90), when=gate, max_new_tokens=1500)
    gate.wait()
    waiting = ask(service, model, prompt(40))
    closing = threading.Thread(target=service.close)
    closing.start()
    until(lambda: service._closing)
    gate.open()
    closing.join(PATIENCE)
    assert running.end().reasons == waiting.end().reasons == ("aborted",)
    assert running.tokens() and not waiting.of(Started)
    with pytest.raises(specache.ServiceClosedError, match="closed"):
        ask(service, model, prompt(40))
    service.close()
    assert service.status().fast_bytes == 0


def test_closing_with_grace_lets_running_requests_finish(model):
    gate = Gate()
    service = service_of(model)
    running = ask(service, model, prompt(90), when=gate, max_new_tokens=20)
    gate.wait()
    gate.open()
    service.close(grace_s=PATIENCE)
    assert running.end().reasons == ("length",) and len(running.tokens()) == 20


class Store:
    """Holds nothing, and is asked what was written whenever it says so.

    Args:
        full: whether nothing finds room before a prefix is written, which never is.
    """

    def __init__(self, full: bool = False) -> None:
        self.asked = self.collected = 0
        self._full = full

    def call_when_written(self, written: Callable[[], None]) -> None:
        self.written = written

    def begin(self, *_: Any) -> None:
        self.asked += 1
        if self._full:
            raise RoomLater

    def collect(self) -> None:
        self.collected += 1

    def keep(self, owner: str, sequence: Sequence) -> None:
        sequence.clear()

    def make_room_for_rows(self, *_: Any) -> bool:
        return True

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def test_closing_with_grace_ends_a_request_that_waits_for_memory_at_once(model):
    store: Any = Store(full=True)
    service = service_of(model, prefixes=store)
    waiting = ask(service, model, prompt(40))
    until(lambda: store.asked > 2)
    service.close(grace_s=PATIENCE)
    assert waiting.end().reasons == ("aborted",)
    assert waiting.facts.waited_s < PATIENCE / 2
    assert service.status().fast_bytes == 0


def test_a_service_without_requests_goes_on_however_many_prefixes_are_written(model):
    """As many as wait after a busy hour: each wakes it."""
    store: Any = Store()
    with service_of(model, prefixes=store) as service:
        assert service.wait_until_ready(PATIENCE)
        for count in range(sys.getrecursionlimit() + 1):
            store.written()
            until(lambda: store.collected > count)  # noqa: B023 -- called at once
        assert ask(service, model, prompt(40)).end().reasons == ("length",)


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end
        time.sleep(0)


def test_a_listener_may_submit_abort_ask_for_the_status_and_close(model):
    others: list[Any] = []

    def when(client: Client, event: Event) -> None:
        if isinstance(event, Finished) and not others:
            assert service.status().error is None
            others.append(service.submit(Job(specache.make_request(model, prompt(30), max_new_tokens=900)), lambda event: None))
            others[0].abort()
            service.close()

    service = service_of(model)
    ask(service, model, prompt(40), when=when).end()
    assert others[0].wait(PATIENCE)
    service.close()
    assert service.status().aborted == 1


def test_a_service_that_nobody_closed_lets_the_process_end():
    code = (
        "import specache; from specache.engine.service import EngineService; from tests.tiny import llama, prompt\n"
        "model = llama(); service = EngineService(model, specache.SpeCacheConfig(), chunk_ms=None)\n"
        "import threading; began = threading.Event()\n"
        "job = specache.Job(specache.make_request(model, prompt(60), max_new_tokens=1900, do_sample=False))\n"
        "ends = []\n"
        "def listen(event):\n"
        "    began.set()\n"
        "    ends.append(event)\n"
        "service.submit(job, listen); began.wait(60)\n"
        "import atexit; atexit._run_exitfuncs(); print(type(ends[-1]).__name__, ends[-1].reasons)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "Finished ('aborted',)\n"), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_is_refused_and_never_waits(model):
    gate = Gate()
    with service_of(model) as service:
        client = ask(service, model, prompt(40), when=gate, max_new_tokens=10)
        gate.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
            child = os.fork()
        if child == 0:
            try:
                refused = 0
                for call in (lambda: service.submit(client.ticket.job, print), client.ticket.wait, service.wait_until_ready):
                    try:
                        call()
                    except specache.UsageError:
                        refused += 1
                client.ticket.abort()
                service.close()
                os._exit(refused)
            finally:
                os._exit(99)
        gate.open()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert client.end().reasons == ("length",)
