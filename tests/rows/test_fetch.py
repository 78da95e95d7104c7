"""The prefetch engine: what is submitted is there at the next step, or says why; what is cancelled
is never heard of again.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from specache.errors import CorruptRowError, SlowTierError
from specache.rows.fetch import HotSetRowFetcher
from specache.rows.hot_set import HotSet
from specache.stats import Counters, MemoryUse, report
from specache.tiers import base as base_module
from specache.tiers import worker as worker_module
from specache.tiers.base import Fetch
from specache.tiers.ram import RamTier
from specache.tiers.transfer import Transfer
from specache.tiers.worker import PrefetchWorker
from tests.tiers.tier_rows import random_rows

HEADS, DIM, TOKENS = 2, 8, 500
WAIT = 60.0  # seconds that a test waits for another thread at most


class GatedTier(RamTier):
    """Rows in memory that come when the test says so, or not at all."""

    def __init__(self) -> None:
        super().__init__(in_place=False)
        self.gate = threading.Event()
        self.gate.set()
        self.running = threading.Semaphore(0)
        self.fault: Exception | None = None
        self.asked: list[int] = []  # pairs per read
        self.write(0, 0, *random_rows(HEADS, TOKENS, DIM, torch.float32))

    def begin(self, layer: int, heads: Tensor, positions: Tensor) -> Fetch | None:
        return None  # it takes a thread

    def gather(self, layer: int, heads: Tensor, positions: Tensor) -> Tensor:
        self.asked.append(len(positions))
        self.running.release()
        assert self.gate.wait(WAIT)
        if self.fault is not None:
            raise self.fault
        return super().gather(layer, heads, positions)


class Clock:
    """The time by which reads and waits are measured, which passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(base_module, "time", made)
    return made


@pytest.fixture
def tier() -> GatedTier:
    return GatedTier()


@pytest.fixture
def worker() -> Iterator[PrefetchWorker]:
    made = PrefetchWorker()
    yield made
    made.close()


def rows_of(tier: GatedTier, worker: PrefetchWorker, slots: int = 0) -> HotSetRowFetcher:
    hot = HotSet(HEADS, slots, 2 * DIM, torch.float32, torch.device("cpu"))
    return HotSetRowFetcher(tier, 0, hot, worker, Transfer(torch.device("cpu")), Counters(prefetches=True))


def wanted(*positions: int) -> Tensor:
    return torch.tensor(positions).expand(HEADS, -1)


def expected(tier: GatedTier, positions: Tensor) -> Tensor:
    rows = stored(tier)
    return torch.stack([rows[head, positions[head]] for head in range(HEADS)])


def until(happened: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + WAIT
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.001)


def comes_when_waited_for(tier: GatedTier, clock: Clock, fetch: Fetch | None, seconds: float) -> None:
    """Have rows that a thread is reading come so long after the step has begun to wait for them."""
    assert tier.running.acquire(timeout=WAIT)
    assert fetch is not None and fetch._future is not None
    result = fetch._future.result

    def wait() -> Any:
        clock.now += seconds
        tier.gate.set()
        return result()

    fetch._future.result = wait  # type: ignore[method-assign]


def stored(tier: GatedTier) -> Tensor:
    """The rows [Hkv, S, 2 D], of which a cut tier has fewer."""
    return tier.rows(0).read(0, min(TOKENS, tier.capacity))


def test_prefetched_rows_are_available_in_the_next_step_without_a_wait(tier, worker):
    rows = rows_of(tier, worker)
    rows.begin_step()
    rows.submit(wanted(3, 70, 400))
    assert tier.running.acquire(timeout=WAIT)
    until(lambda: rows._prefetch.done)
    rows.begin_step()
    fetched, ready = rows.fetch(wanted(3, 70, 400))
    assert torch.equal(fetched, expected(tier, wanted(3, 70, 400)))
    assert (ready, rows._counters.waits, rows._counters.wait_s) == (6, 0, 0.0)
    assert rows._counters.read_s > 0
    assert tier.asked == [6]


def test_a_request_leaves_out_what_the_hot_set_has(tier, worker):
    rows = rows_of(tier, worker, slots=10)
    rows.begin_step()
    rows.fetch(wanted(1, 2, 3))
    rows.submit(wanted(2, 3, 4))
    rows.begin_step()
    rows.submit(wanted(1, 2, 3, 4))  # all there: nothing to read
    rows.begin_step()
    assert tier.asked == [6, 2]


def test_a_wait_is_timed_and_counted(tier, worker, clock):
    rows = rows_of(tier, worker)
    rows.begin_step()
    tier.gate.clear()
    rows.submit(wanted(5))
    comes_when_waited_for(tier, clock, rows._prefetch, seconds=0.1)
    rows.begin_step()
    counters = rows._counters
    assert (counters.waits, counters.wait_s, counters.read_s) == (1, 0.1, 0.1)
    tier.gate.clear()
    rows.start(pass_of(wanted(6)), 1)
    comes_when_waited_for(tier, clock, rows._missing, seconds=0.1)
    rows.finish()  # nothing else is done meanwhile
    assert counters.waits == 2
    figures = report(MemoryUse(), counters, 0)
    assert (figures["waits"], figures["read_s"], figures["wait_s"]) == (2, counters.read_s, counters.wait_s)
    assert figures["read_hidden"] == max(0.0, 1 - counters.wait_s / counters.read_s)


def pass_of(*rows: Tensor) -> Tensor:
    """Positions [Hkv, n, k] of a pass's rows."""
    return torch.stack(rows, dim=1)


def test_started_reads_run_while_the_step_computes(tier, worker):
    """The draft query gets rows that the real query reads, and does without others. No row is read
    twice.
    """
    rows = rows_of(tier, worker, slots=10)
    rows.begin_step()
    rows.fetch(wanted(1, 2))
    tier.gate.clear()
    positions, _, ready = rows.start(pass_of(wanted(2, 3), wanted(3, 4)), 1)
    assert ready == HEADS
    assert positions[:, 0].tolist() == [[2, 3]] * HEADS
    assert positions[:, 1].tolist() == [[3, -1]] * HEADS
    assert tier.running.acquire(timeout=WAIT) and tier.running.acquire(timeout=WAIT)  # the second read runs
    rows.submit(wanted(3))
    threading.Timer(0.1, tier.gate.set).start()
    found = rows.finish()
    assert torch.equal(found[:, 0], expected(tier, wanted(2, 3)))
    assert torch.equal(found[:, 1, :1], expected(tier, wanted(3)))
    assert (found[:, 1, 1] == 0).all()
    assert tier.asked == [2 * HEADS, HEADS]


def test_of_a_started_read_only_what_was_left_of_it_is_a_wait(tier, worker, clock):
    rows = rows_of(tier, worker)
    rows.begin_step()
    tier.gate.clear()
    rows.start(pass_of(wanted(7)), 1)
    comes_when_waited_for(tier, clock, rows._missing, seconds=0.05)
    clock.now += 0.15  # while the step computes
    rows.finish()
    late = rows._counters
    assert (late.waits, late.wait_s, late.read_s) == (1, pytest.approx(0.05), pytest.approx(0.2))
    rows.start(pass_of(wanted(8)), 1)
    until(lambda: rows._missing.done)
    before = late.wait_s
    rows.finish()
    assert (late.waits, late.wait_s) == (1, before)


def test_a_started_read_that_no_thread_began_is_read_by_the_step(tier, worker):
    other, rows = rows_of(tier, worker), rows_of(tier, worker)
    rows.begin_step()
    tier.gate.clear()
    other.submit(wanted(1))
    assert tier.running.acquire(timeout=WAIT)  # the only thread is busy
    rows.start(pass_of(wanted(5)), 1)

    def opens() -> None:
        if tier.running.acquire(timeout=WAIT):  # the step reads now
            tier.gate.set()

    opener = threading.Thread(target=opens)
    opener.start()
    assert torch.equal(rows.finish()[:, 0], expected(tier, wanted(5)))
    assert rows._counters.wait_s == rows._counters.read_s > 0
    opener.join()


@pytest.mark.parametrize("end", ["fails", "cancel", "drop", "begin_step", "is interrupted"])
def test_rows_of_a_failed_read_are_not_cached(tier, worker, monkeypatch, end):
    rows = rows_of(tier, worker)
    rows.begin_step()
    rows.fetch(wanted(1, 2))
    if end == "fails":
        tier.fault = CorruptRowError("row 5 is bad")
        rows.start(pass_of(wanted(2, 5)), 1)
        with pytest.raises(CorruptRowError, match="row 5 is bad"):
            rows.finish()
        tier.fault = None
    elif end == "is interrupted":  # when its rows have their slots, and before it is known that it began

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(tier, "begin", interrupted)
            with pytest.raises(KeyboardInterrupt):
                rows.start(pass_of(wanted(2, 5)), 1)
        rows.cancel()
    else:
        rows.start(pass_of(wanted(2, 5)), 1)
        getattr(rows, end)()
    tier.write(0, 5, *random_rows(HEADS, 1, DIM, torch.float32, seed=3))  # the sequence was cut and goes on otherwise
    found, ready = rows.fetch(wanted(2, 5))
    assert torch.equal(found, expected(tier, wanted(2, 5)))
    assert ready == (0 if end == "drop" else HEADS)


def test_hidden_reads_are_reported_where_there_were_any():
    counters = Counters(prefetches=True)
    assert report(MemoryUse(), counters, 0)["read_hidden"] is None
    counters.read_s, counters.wait_s = 2.0, 0.5
    assert report(MemoryUse(), counters, 0)["read_hidden"] == 0.75
    assert report(MemoryUse(), Counters(read_s=2.0, wait_s=0.5), 0)["read_hidden"] is None


@pytest.mark.parametrize("fault", [CorruptRowError("row 7 is bad"), RuntimeError("the disk is gone")])
def test_a_background_error_surfaces_once_with_its_cause(tier, worker, fault):
    rows = rows_of(tier, worker)
    rows.begin_step()
    tier.fault = fault
    rows.submit(wanted(5))
    with pytest.raises(CorruptRowError if isinstance(fault, CorruptRowError) else SlowTierError, match=str(fault)) as raised:
        rows.begin_step()
    assert raised.value.__cause__ is fault
    tier.fault = None
    rows.begin_step()
    assert torch.equal(rows.fetch(wanted(5))[0], expected(tier, wanted(5)))


@pytest.mark.parametrize("forget", ["cancel", "drop", "submit"])
def test_a_running_read_can_be_cancelled_and_its_error_is_dropped(tier, worker, forget):
    rows = rows_of(tier, worker)
    rows.begin_step()
    tier.gate.clear()
    tier.fault = RuntimeError("late")
    rows.submit(wanted(5))
    assert tier.running.acquire(timeout=WAIT)
    if forget == "submit":
        rows.submit(wanted(9))
        threading.Timer(0.05, lambda: (setattr(tier, "fault", None), tier.gate.set())).start()
    else:
        getattr(rows, forget)()  # at once, though the read still runs
        tier.gate.set()
    time.sleep(0.1)
    tier.fault = None
    rows.begin_step()
    assert torch.equal(rows.fetch(wanted(9))[0], expected(tier, wanted(9)))


def test_rows_of_a_cancelled_read_are_not_used(tier, worker):
    rows = rows_of(tier, worker, slots=4)
    rows.begin_step()
    tier.gate.clear()
    rows.submit(wanted(5))
    assert tier.running.acquire(timeout=WAIT)
    rows.drop()
    stale = stored(tier)[:, 5].clone()
    tier.write(0, 5, *random_rows(HEADS, 1, DIM, torch.float32, seed=3))  # the sequence was cut and goes on otherwise
    tier.gate.set()
    rows.begin_step()
    fetched = rows.fetch(wanted(5))[0][:, 0]
    assert torch.equal(fetched, stored(tier)[:, 5])
    assert not torch.equal(fetched, stale)


def test_a_queued_read_that_is_cancelled_never_begins(tier, worker):
    tier.gate.clear()
    first, second = rows_of(tier, worker), rows_of(tier, worker)
    first.submit(wanted(1))
    second.submit(wanted(2, 3))
    assert tier.running.acquire(timeout=WAIT)
    second.cancel()
    tier.gate.set()
    first.begin_step()
    worker.close()
    assert tier.asked == [2]


def test_a_full_queue_refuses_and_the_step_fetches_for_itself(tier, worker, monkeypatch):
    monkeypatch.setattr(worker_module, "QUEUE_LIMIT", 2)
    small = PrefetchWorker()
    tier.gate.clear()
    layers = [rows_of(tier, small) for _ in range(4)]
    for number, rows in enumerate(layers):
        rows.submit(wanted(number))
    assert [rows._prefetch is not None for rows in layers] == [True, True, False, False]
    tier.gate.set()
    for number, rows in enumerate(layers):
        rows.begin_step()
        fetched, ready = rows.fetch(wanted(number))
        assert torch.equal(fetched, expected(tier, wanted(number)))
        assert ready == (HEADS if number < 2 else 0)
        assert rows._counters.bytes_fetched == fetched.nbytes  # once, whoever read it
    for rows in layers[:2] * 5:  # finished requests have left the queue
        rows.submit(wanted(100))
        assert rows._prefetch is not None
        rows.begin_step()
        rows.drop()
    small.close()


def test_several_layers_are_read_at_a_time(tier):
    several = PrefetchWorker(threads=3)
    tier.gate.clear()
    layers = [rows_of(tier, several) for _ in range(3)]
    for rows in layers:
        rows.submit(wanted(1))
    for _ in layers:
        assert tier.running.acquire(timeout=WAIT)  # all of them, though none has ended
    tier.gate.set()
    for rows in layers:
        rows.begin_step()
        assert torch.equal(rows.fetch(wanted(1))[0], expected(tier, wanted(1)))
    several.close()


@pytest.mark.parametrize("end", ["close", "abandon"])
def test_the_worker_leaves_no_thread(tier, end):
    before = set(threading.enumerate())
    ended = PrefetchWorker(threads=2)
    rows = rows_of(tier, ended)
    rows.submit(wanted(1))
    rows.begin_step()
    getattr(ended, end)()
    for thread in set(threading.enumerate()) - before:
        thread.join(WAIT)
    assert set(threading.enumerate()) <= before


def test_a_dropped_request_frees_its_rows(tier, worker):
    rows = rows_of(tier, worker)
    rows.submit(wanted(1, 2))
    assert tier.running.acquire(timeout=WAIT)  # a thread reads, and its result is kept for the step
    arrived = weakref.ref(rows._prefetch.wait())
    rows.drop()

    def is_gone() -> bool:  # the thread drops what it has read a moment after it came
        gc.collect()
        return arrived() is None

    until(is_gone)
