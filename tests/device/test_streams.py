"""The simulated queues follow CUDA's rules, on which the other tests rely."""

from __future__ import annotations

import pytest
import torch

from specache.tiers.streams import InlineStreams, Queue, streams_for
from tests.device.simulated import Order, SimulatedStreams, orders

COMPUTE, COPY = Queue.COMPUTE, Queue.COPY
ORDERS = orders(seeds=20)


class Log(list[str]):
    """What ran, in its order."""

    def of(self, name: str):
        return lambda: self.append(name)


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_work_of_a_queue_runs_in_the_order_it_was_queued(order, seed):
    streams, log = SimulatedStreams(order, seed), Log()
    for i in range(6):
        streams.run(COMPUTE, log.of(f"compute {i}"))
        streams.run(COPY, log.of(f"copy {i}"))
    streams.drain()
    for name in ("compute", "copy"):
        assert [one for one in log if one.startswith(name)] == [f"{name} {i}" for i in range(6)]


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_what_waits_runs_after_what_was_recorded(order, seed):
    streams, log = SimulatedStreams(order, seed), Log()
    event = streams.event()
    streams.run(COPY, log.of("before"))
    streams.record(COPY, event)
    streams.run(COPY, log.of("behind"))
    streams.wait(COMPUTE, event)
    streams.run(COMPUTE, log.of("after"))
    streams.finish(COMPUTE)
    assert log.index("before") < log.index("after")


def outcomes(queue_work) -> set[tuple[str, ...]]:
    """All orders in which the work of a program was seen to run."""
    seen = set()
    for order, seed in orders(seeds=60):
        streams, log = SimulatedStreams(order, seed), Log()
        queue_work(streams, log)
        streams.drain()
        seen.add(tuple(log))
    return seen


def test_without_an_event_either_may_come_first():
    def program(streams: SimulatedStreams, log: Log) -> None:
        streams.run(COMPUTE, log.of("compute"))
        streams.run(COPY, log.of("copy"))

    assert outcomes(program) == {("compute", "copy"), ("copy", "compute")}


def test_a_wait_for_an_event_that_was_never_recorded_is_none():
    def program(streams: SimulatedStreams, log: Log) -> None:
        event = streams.event()
        streams.run(COPY, log.of("copy"))
        streams.wait(COMPUTE, event)
        streams.run(COMPUTE, log.of("compute"))
        streams.record(COPY, event)  # too late

    assert outcomes(program) == {("compute", "copy"), ("copy", "compute")}


def test_a_wait_means_the_latest_record_and_no_later_one():
    def program(streams: SimulatedStreams, log: Log) -> None:
        event = streams.event()
        streams.run(COPY, log.of("a"))
        streams.record(COPY, event)
        streams.run(COPY, log.of("b"))
        streams.record(COPY, event)
        streams.wait(COMPUTE, event)
        streams.run(COPY, log.of("c"))
        streams.record(COPY, event)
        streams.run(COMPUTE, log.of("compute"))

    assert outcomes(program) == {("a", "b", "compute", "c"), ("a", "b", "c", "compute")}


def test_copies_run_as_late_and_as_early_as_they_may():
    def program(streams: SimulatedStreams, log: Log) -> None:
        event = streams.event()
        streams.run(COMPUTE, log.of("1"))
        streams.record(COMPUTE, event)
        streams.run(COMPUTE, log.of("2"))
        streams.wait(COPY, event)
        streams.run(COPY, log.of("copy"))
        streams.finish(COMPUTE)

    for order, expected in ((Order.COPY_LATE, ["1", "2"]), (Order.COPY_EARLY, ["1", "copy", "2"])):
        streams, log = SimulatedStreams(order), Log()
        program(streams, log)
        assert log == expected


@pytest.mark.parametrize(("order", "seed"), ORDERS)
def test_the_host_waits_for_one_event_and_nothing_behind_it_need_have_run(order, seed):
    streams, log = SimulatedStreams(order, seed), Log()
    event = streams.event()
    streams.synchronize(event)  # never recorded
    streams.run(COPY, log.of("before"))
    streams.record(COPY, event)
    streams.run(COPY, log.of("behind"))
    streams.synchronize(event)
    assert log[0] == "before"


def test_on_a_cpu_work_runs_where_it_is_queued():
    streams, log = streams_for(torch.device("cpu")), Log()
    assert isinstance(streams, InlineStreams)
    event = streams.event()
    streams.run(COMPUTE, log.of("compute"))
    streams.record(COMPUTE, event)
    streams.wait(COPY, event)
    streams.run(COPY, log.of("copy"))
    assert log == ["compute", "copy"]
