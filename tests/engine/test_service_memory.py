"""What a service holds beside its limits: nothing after errors, and only what fits."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import specache
from specache.cache.compressed_layer import CompressedLayer
from specache.config import Policy, SlowTierKind
from specache.engine.events import Event, NewToken
from specache.engine.prefix_store import PrefixStore
from specache.errors import FastMemoryError, SlowTierError
from specache.platform.budget import Claim
from specache.sessions.prefix_reading import read_pieces
from specache.tiers.ram import RamTier
from specache.tiers.tier_choice import TierChoice
from tests.engine.prefixes import Server, config, text
from tests.engine.serving import PATIENCE, Client, Gate, ask, service_of, settings
from tests.engine.test_service_prefixes import asked_in_turn, sharing
from tests.tiny import llama, prompt


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def opened(model: Any, root: Path, settings: specache.SpeCacheConfig | None = None) -> Server:
    settings = settings or config()
    return Server(model, settings, PrefixStore(model, settings, folder=root))


@pytest.mark.parametrize(("where", "call"), [("fork", 2), ("__init__", 5)])
def test_an_error_that_the_caller_keeps_keeps_no_memory(model, monkeypatch, where, call):
    """Three layers are read, then the second one of the second answer fails."""
    real, calls = getattr(CompressedLayer, where), []

    def fails(self: CompressedLayer, *args: Any, **options: Any) -> Any:
        calls.append(where)
        if len(calls) == call:
            raise FastMemoryError("no room")
        return real(self, *args, **options)

    with service_of(model, settings(fast_memory=10**9)) as service:
        with monkeypatch.context() as patched:
            patched.setattr(CompressedLayer, where, fails)
            client = ask(service, model, prompt(150), num_return_sequences=2, do_sample=True, seed=1)
            with pytest.raises(FastMemoryError) as kept:
                client.end()
        status = service.status()
        assert status.fast_bytes == status.slow_bytes == 0
        assert kept.value.__traceback__ is not None


def test_an_abort_reaches_a_request_whose_settings_have_become_those_of_the_service(model, tmp_path):
    """`auto` chooses another policy when the rows move to a disk."""

    def when(client: Client, event: Event) -> None:
        if isinstance(event, NewToken) and len(client.of(NewToken)) == 1:
            service._engines.first.cache.choose_tier(TierChoice(SlowTierKind.DISK, str(tmp_path), 1, 0))
            client.ticket.abort()

    with service_of(model, settings(slow_tier="auto", policy="auto")) as service, pytest.warns(RuntimeWarning, match="on disk"):
        client = ask(service, model, prompt(150), when=when, job={"policy": Policy.VERIFIED}, max_new_tokens=300)
        assert client.end().reasons == ("aborted",)
        assert len(client.tokens()) <= 2
        assert ask(service, model, prompt(150)).end().reasons == ("length",)
        status = service.status()
    assert (status.finished, status.aborted, status.failed) == (1, 1, 0) and status.fast_bytes == 0


@pytest.mark.parametrize("new", [2, 300])
def test_stored_rows_go_before_those_of_a_request_exceed_slow_memory(model, new):
    with service_of(model) as service:
        asked_in_turn(service, model, [prompt(1000)], max_new_tokens=new)
        most = service.status().slow_peak_bytes * 3 // 2
    with sharing(model, most_slow_bytes=most) as service:
        asked_in_turn(service, model, [prompt(1000, seed=i) for i in range(3)], max_new_tokens=new)
        status = service.status()
    assert 0 < status.slow_peak_bytes <= most and status.prefixes.counters.evicted >= 1


def test_rows_that_come_back_from_a_disk_stay_within_slow_memory(model, tmp_path):
    server = opened(model, tmp_path)
    for seed in range(3):
        server.read(text(900, seed))
    one = server.base.context.row_memory.peak // 3
    server.close()
    most = 5 * one // 2
    store = PrefixStore(model, config(), folder=tmp_path, most_slow_bytes=most)
    with service_of(model, config(), prefixes=store) as service:
        for seed in range(3):
            client = ask(service, model, prompt(900, seed=seed), max_new_tokens=2)
            client.end()
            assert client.cached == 899
        status = service.status()
    assert status.slow_peak_bytes <= most and status.prefixes.counters.brought_back == 3


def test_a_prompt_counts_once_as_a_hit_or_a_miss(model):
    with sharing(model) as service:
        clients = asked_in_turn(service, model, [prompt(200, seed=1)] * 3)
        counters = service.status().prefixes.counters
    assert (counters.misses, counters.hits) == (1, 2)
    assert counters.cached_tokens == sum(client.cached for client in clients) > 0


def test_a_prefix_stays_when_there_is_no_room_to_bring_it_back(model, tmp_path, monkeypatch):
    server = opened(model, tmp_path)
    server.read(text(400))
    server.close()
    server = opened(model, tmp_path)

    def full(*args: Any) -> None:
        raise SlowTierError("no memory is left")

    with monkeypatch.context() as patched:
        patched.setattr(RamTier, "write", full)
        assert server.store.take("", text(400), server.base) is None
    assert server.store.match("", text(400)) == 399 and server.used == 0
    server.close()


def test_the_readers_of_a_prefix_may_be_looked_at_while_others_come(model, tmp_path):
    server = opened(model, tmp_path / "prefixes", config("disk", tmp_path))
    server.read(text(400))
    server.store.close()
    server = opened(model, tmp_path / "prefixes", config("disk", tmp_path))
    disk = server.store._disk
    assert disk is not None and disk._folder is not None
    (saved,) = disk._folder.saved
    errors: list[Exception] = []
    stop = threading.Event()

    def look() -> None:
        try:
            while not stop.is_set():
                assert saved.is_read in (True, False)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(2)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        sequences = []
        for _ in range(100):
            sequences.append(server.base.new_sequence())
            for _ in read_pieces(saved, sequences[-1], 399):
                pass
            if len(sequences) > 5:
                sequences.pop(0).clear()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
    for sequence in sequences:
        sequence.clear()
    server.close()
    assert not errors


def test_a_few_tokens_more_are_not_brought_back_from_a_disk(model, tmp_path):
    """All rows would be read for them."""
    trunk = text(400)
    asked = trunk + text(5, 1) + text(20, 2)
    server = opened(model, tmp_path)
    server.read(asked[:405] + text(60, 3))
    server.store.make_room(1 << 40, 0)
    server.read(trunk + text(60, 4))
    assert server.store.status().counters.brought_back == 1  # 400 tokens, of which none are in memory
    server.ask(asked)
    assert server.store.status().counters.brought_back == 1
    assert 400 <= server.reused[-1] < 405
    server.close()


def test_what_the_disk_has_leaves_memory_before_what_would_be_waited_for(model, tmp_path, monkeypatch):
    server, texts = opened(model, tmp_path), [text(400, seed) for seed in range(2)]
    disk = server.store._disk
    assert disk is not None and disk._folder is not None and disk._writer is not None
    server.read(texts[0])
    go_on = threading.Event()
    real = disk._folder.write

    def slow(*args: Any) -> Any:
        assert go_on.wait(PATIENCE)
        return real(*args)

    for prefix in disk._writer.pending():
        disk._writer.wait_for(prefix)
    monkeypatch.setattr(disk._folder, "write", slow)
    server.read(texts[1])  # is being written from now on
    server.ask(texts[0])  # is the one used last
    assert server.store.make_room(1, 0)
    in_memory = server.store._index.in_memory()
    assert [prefix.text.tolist() for prefix in in_memory] == [texts[1]]
    go_on.set()
    server.close()


def test_a_request_that_waits_beside_a_long_answer_begins_when_others_than_requests_give_bytes_back(model):
    """A prefix that is being written holds bytes that no request will free."""
    with service_of(model) as service:
        asked_in_turn(service, model, [prompt(150)], max_new_tokens=20)
        one = service.status().fast_peak_bytes
    with service_of(model, settings(fast_memory=4 * one)) as service:
        budget = service._engines.first.cache.resources.budget
        being_written: list[Claim] = []
        gate = Gate()

        def when(client: Client, event: Event) -> None:
            if isinstance(event, NewToken) and not being_written:  # between two passes
                being_written.append(budget.claim((budget.left or 0) - one * 3 // 4, "what is being written"))
            gate(client, event)
            time.sleep(0.005)  # the answer is still long when a slow machine has come to the end of this test

        job = {"deadline": time.monotonic() + PATIENCE}
        long = ask(service, model, prompt(150, seed=1), when=when, max_new_tokens=1500, job=job)
        gate.wait()
        gate.open()
        waiting = ask(service, model, prompt(150, seed=2), max_new_tokens=2)
        assert not waiting.ticket.wait(0.2) and not long.ticket.done
        being_written[0].release()
        waiting.end()
        assert not long.ticket.done
        long.ticket.abort()


def test_the_status_may_be_asked_for_while_the_store_closes(model, tmp_path, monkeypatch):
    server = opened(model, tmp_path)
    folder = type(server.store._disk._folder)
    nbytes = folder.nbytes.fget

    def closed_meanwhile(self: Any) -> int:
        server.store.close()
        return nbytes(self)

    monkeypatch.setattr(folder, "nbytes", property(closed_meanwhile))
    assert server.store.status().waiting_writes == 0
    server.close()
