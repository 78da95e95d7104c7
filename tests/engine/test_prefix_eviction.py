"""No running answer waits for a stored prompt that leaves memory: who needs its bytes waits."""

from __future__ import annotations

import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import specache
from specache.cache.sizes import page_layout
from specache.engine import prefix_writer
from specache.engine import service as service_module
from specache.engine.events import Event, NewToken
from specache.engine.prefix_store import PrefixStore
from specache.engine.service import EngineService
from specache.engine.stored_prefixes import RoomLater, Unwritten
from specache.planning.footprint import PlannedSequence
from specache.planning.plan import plan
from specache.sessions.prefix_folder import PrefixFolder
from tests.engine.prefixes import Server, config, fresh, text
from tests.engine.serving import PATIENCE, Client, alone, ask, service_of, settings
from tests.engine.test_service_prefixes import asked_in_turn
from tests.tiny import llama, prompt

LONG = 600  # tokens of the prompts that do not fit beside each other
STEPS = 25  # of an answer that runs, which are waited for


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


class SlowDisk:
    """Writing a prefix begins at once, and does not end before `go_on`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> None:
        self.writing, self._go_on = threading.Event(), threading.Event()
        self._fails = fails
        real = PrefixFolder.write

        def slow(folder: PrefixFolder, *args: Any) -> Any:
            self.writing.set()
            assert self._go_on.wait(PATIENCE)
            if self._fails:
                raise OSError(28, "No space left on device")
            return real(folder, *args)

        monkeypatch.setattr(PrefixFolder, "write", slow)
        monkeypatch.setattr(prefix_writer, "MOST_WAITING", 0)  # nothing is written before it must go

    def go_on(self) -> None:
        self._go_on.set()


class Stream:
    """A slow answer, which outlasts what is waited for meanwhile, and how many tokens it has."""

    def __init__(self, service: EngineService, model: Any) -> None:
        self._more = threading.Condition()
        self._count = 0
        self.client = ask(service, model, prompt(20, seed=9), when=self._take, max_new_tokens=ANSWER)
        self.goes_on()

    def _take(self, client: Client, event: Event) -> None:
        with self._more:
            self._count += isinstance(event, NewToken)
            self._more.notify_all()
        time.sleep(0.01)

    def goes_on(self) -> None:
        """Wait for `STEPS` more tokens."""
        with self._more:
            wanted = self._count + STEPS
            assert self._more.wait_for(lambda: self._count >= wanted, PATIENCE), "the answer does not go on"

    def end(self, model: Any) -> None:
        """Abort it; what it has is right."""
        self.client.ticket.abort()
        self.client.end()
        tokens = self.client.tokens()
        assert tokens == alone(model, prompt(20, seed=9), max_new_tokens=len(tokens))[0]


ANSWER = 1500  # most tokens of the answer that runs
BLOCK = 256


def tight(model: Any, root: Path, memory: str) -> EngineService:
    """A service in which a stream and one long prompt fit, but no stored prompt beside them."""
    config = settings()
    dimensions = specache.SpeCache(model, config).resources.dimensions
    if memory == "slow":  # each may copy a block that it shares
        blocks = -(-(20 + ANSWER) // BLOCK) + 1 + -(-(LONG + 8) // BLOCK) + 1
        store = PrefixStore(model, config, folder=root, most_slow_bytes=blocks * BLOCK * dimensions.stored_row_bytes)
        return service_of(model, config, prefixes=store)
    planned = [PlannedSequence(20, ANSWER), PlannedSequence(LONG, 8)]
    pages = 2 * sum(page_layout(config, layer.kv_heads, layer.head_dim).page_bytes for layer in dimensions.full_layers)
    needed = plan(dimensions, config.resolved("cpu"), planned).fast + pages
    config = settings(fast_memory=needed + pages)
    return service_of(model, config, prefixes=PrefixStore(model, config, folder=root))


def within_budgets(service: EngineService) -> None:
    status, store = service.status(), service._prefixes
    assert isinstance(store, PrefixStore)
    assert status.fast_budget_bytes is None or status.fast_peak_bytes <= status.fast_budget_bytes
    assert store._most_slow_bytes is None or status.slow_peak_bytes <= store._most_slow_bytes


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("memory", ["fast", "slow"])
def test_an_answer_goes_on_while_another_request_waits_for_a_prompt_to_be_written(model, tmp_path, monkeypatch, memory, fails):
    disk = SlowDisk(monkeypatch, fails)
    with warnings.catch_warnings(), tight(model, tmp_path, memory) as service:
        warnings.simplefilter("ignore")
        (first,) = asked_in_turn(service, model, [prompt(LONG)], max_new_tokens=8)
        stream = Stream(service, model)
        waiting = ask(service, model, prompt(LONG, seed=1), max_new_tokens=8)
        assert disk.writing.wait(PATIENCE)
        stream.goes_on()
        assert waiting.ticket.started_s is None and service.status().waiting == 1
        disk.go_on()
        waiting.end()
        assert not stream.client.ticket.done
        stream.end(model)
        again = ask(service, model, prompt(LONG), max_new_tokens=8)
        again.end()
        within_budgets(service)
        counters = service.status().prefixes.counters
    assert again.cached == (0 if fails else LONG - 1) and counters.brought_back == (not fails)
    assert counters.dropped == 0 and counters.evicted >= 1
    for client, seed in ((first, 0), (waiting, 1), (again, 0)):
        assert client.tokens() == alone(model, prompt(LONG, seed=seed), max_new_tokens=8)[0]
    assert service.status().fast_bytes == service.status().slow_bytes == 0


def test_a_request_that_waits_for_a_prompt_to_be_written_can_be_aborted(model, tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch)
    with tight(model, tmp_path, "fast") as service:
        asked_in_turn(service, model, [prompt(LONG)], max_new_tokens=8)
        stream = Stream(service, model)
        waiting = ask(service, model, prompt(LONG, seed=1), max_new_tokens=8)
        assert disk.writing.wait(PATIENCE)
        waiting.ticket.abort()
        assert waiting.end().reasons == ("aborted",)
        stream.goes_on()
        disk.go_on()
        small = ask(service, model, prompt(20, seed=2), max_new_tokens=2)
        assert small.end().reasons == ("length",)  # nothing holds up those behind it
        stream.end(model)
    assert service.status().fast_bytes == service.status().slow_bytes == 0


def test_a_request_alone_begins_when_the_prompt_in_its_way_is_written(model, tmp_path, monkeypatch):
    """The writer wakes the service, in which nothing runs."""
    monkeypatch.setattr(service_module, "PAUSE_S", PATIENCE)
    disk = SlowDisk(monkeypatch)
    with tight(model, tmp_path, "fast") as service:
        asked_in_turn(service, model, [prompt(LONG)], max_new_tokens=8)
        waiting = ask(service, model, prompt(2 * LONG, seed=1), max_new_tokens=8)
        assert disk.writing.wait(PATIENCE)
        disk.go_on()
        assert waiting.end().reasons == ("length",)
        assert waiting.facts.waited_s < PATIENCE / 2
        within_budgets(service)


def test_what_could_not_be_written_at_once_is_written_when_the_disk_has_time(model, tmp_path, monkeypatch):
    """Also of a service that has nothing else to do."""
    begun = threading.Semaphore(0)
    go_on = threading.Event()
    real = PrefixFolder.write

    def slow(folder: PrefixFolder, *args: Any) -> Any:
        begun.release()
        assert go_on.wait(PATIENCE)
        return real(folder, *args)

    monkeypatch.setattr(PrefixFolder, "write", slow)
    monkeypatch.setattr(prefix_writer, "MOST_WAITING", 1)
    store = PrefixStore(model, settings(), folder=tmp_path)
    with service_of(model, settings(), prefixes=store) as service:
        asked_in_turn(service, model, [prompt(LONG)], max_new_tokens=2)
        assert begun.acquire(timeout=PATIENCE)
        asked_in_turn(service, model, [prompt(LONG, seed=seed) for seed in range(1, 5)], max_new_tokens=2)
        assert service.status().prefixes.waiting_writes == 2
        go_on.set()
        for _ in range(4):
            assert begun.acquire(timeout=PATIENCE)
        store._disk._writer.wake = lambda: None
    assert service.status().prefixes.counters.written == 5


class TestStore:
    """What the engine asks for between two steps, with a disk that takes its time."""

    @pytest.fixture
    def disk(self, monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
        return SlowDisk(monkeypatch)

    @pytest.fixture
    def server(self, model: Any, tmp_path: Path, disk: SlowDisk) -> Any:
        server = Server(model, config(), PrefixStore(model, config(), folder=tmp_path))
        yield server
        disk.go_on()
        server.close()
        assert server.used == 0

    def test_a_prompt_that_is_being_written_is_still_shared(self, server, model, disk):
        trunk = text(400)
        server.read(trunk)
        with pytest.raises(RoomLater):
            server.store.make_room(1, 0, Unwritten.QUEUE)
        assert disk.writing.wait(PATIENCE)
        assert server.ask(trunk)[0] == fresh(model, config(), trunk)[0]
        assert server.reused[-1] == 399

    def test_one_write_at_a_time_is_asked_for(self, server, disk):
        for seed in range(3):
            server.read(text(400, seed))
        for _ in range(3):
            with pytest.raises(RoomLater):
                server.store.make_room(server.used, 0, Unwritten.QUEUE)
        assert server.store.status().waiting_writes == 1
        assert server.store.status().prefixes == 3

    def test_running_requests_do_not_wait_and_what_is_lost_is_said(self, server, disk):
        for seed in range(2):
            server.read(text(400, seed))
        with pytest.warns(RuntimeWarning, match="dropped before it was on the disk"):
            assert server.store.make_room(server.used, 0, Unwritten.DROP)
        assert server.used == 0
        assert server.store.status().counters.dropped == server.store.status().counters.evicted == 2
        assert "dropped" in server.store.status().problem

    def test_what_is_being_written_is_freed_when_the_writer_has_left_it(self, server, disk):
        server.read(text(400))
        with pytest.raises(RoomLater):
            server.store.make_room(1, 0, Unwritten.QUEUE)
        assert disk.writing.wait(PATIENCE)
        with pytest.warns(RuntimeWarning, match="dropped"):
            assert not server.store.make_room(server.used, 0, Unwritten.DROP)
        assert server.used > 0  # its pages are read
        disk.go_on()
        server.store.close()
        assert server.used == 0

    def test_a_write_that_a_running_request_has_no_room_for_is_given_up(self, server, model, disk, monkeypatch):
        """Its fork holds the pages of a prompt that has left the store."""
        monkeypatch.setattr(prefix_writer, "MOST_WAITING", 4)
        first, second = text(400), text(400, 1)
        server.read(first)
        assert disk.writing.wait(PATIENCE)
        server.read(second)
        used = server.used
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            server.store.make_room(used, 0, Unwritten.DROP)
        assert 0 < server.used < used * 3 // 4  # the first is still read by the writer
        assert server.store.status().waiting_writes == 1
        assert torch.tensor(server.ask(second)[0]).tolist() == fresh(model, config(), second)[0]
