"""The order of copies and computation: right in every order that the events allow, and each mistake
in the events is found.

A mistake is planted in a correct decode by changing one thing. It is found if in some order an
attention is given a wrong row. Where none is, either the event is not needed or the simulation is
too tame to need it; the test fails on both.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from torch import Tensor

from specache.config import ReadPath
from specache.device.device_rows import DeviceRowFetcher
from specache.tiers.streams import Event, InlineStreams, Queue, Streams, Work
from tests.device.decoding_by_hand import Change, Decode, Program
from tests.device.simulated import SimulatedStreams, orders

MAPPED, COPY = ReadPath.MAPPED, ReadPath.COPY
PROGRAMS = [
    Program(read, begin_together, undone, host_waits, joined)
    for read, (begin_together, undone, host_waits, joined) in itertools.product(
        ReadPath, [(False, False, False, False), (True, True, True, False), (False, True, False, True), (False, True, False, False)]
    )
]
EVENTS = [  # of a layer: the queue that records it, and the way of reading that needs it
    ("_claimed", Queue.COMPUTE, MAPPED),
    ("_arrived", Queue.COPY, MAPPED),
    ("_asked", Queue.COMPUTE, COPY),
    ("_fetched", Queue.COPY, COPY),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_attention_is_given_the_stored_rows_in_every_order(program):
    assert not Decode(InlineStreams(), program).run().wrong
    for order, seed in orders(seeds=8):
        assert not Decode(SimulatedStreams(order, seed), program, seed).run().wrong, (order, seed)


def is_found(program: Program, mistake: Change) -> bool:
    """Whether some order shows the mistake, which is none where everything runs at once."""
    assert not Decode(InlineStreams(), program, change=mistake).run().wrong
    return any(Decode(SimulatedStreams(order, seed), program, seed, mistake).run().wrong for order, seed in orders(seeds=30))


class ChangedStreams:
    """Streams with a planted mistake around some events."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    def event(self) -> Event:
        return self._streams.event()

    def run(self, queue: Queue, work: Work) -> None:
        self._streams.run(queue, work)

    def record(self, queue: Queue, event: Event) -> None:
        self._streams.record(queue, event)

    def wait(self, queue: Queue, event: Event) -> None:
        self._streams.wait(queue, event)

    def finish(self, queue: Queue) -> None:
        self._streams.finish(queue)

    def share(self, tensor: Tensor) -> None:
        self._streams.share(tensor)

    def synchronize(self, event: Event) -> None:
        self._streams.synchronize(event)

    def drain(self) -> None:
        self._streams.drain()


class DroppedWait(ChangedStreams):
    """Nobody waits for one event."""

    def __init__(self, streams: Streams, event: Event) -> None:
        super().__init__(streams)
        self._event = event

    def wait(self, queue: Queue, event: Event) -> None:
        if event is not self._event:
            super().wait(queue, event)


class EarlyRecord(ChangedStreams):
    """One event is recorded before the last work that it is to mark, instead of behind it."""

    def __init__(self, streams: Streams, event: Event, queue: Queue) -> None:
        super().__init__(streams)
        self._event, self._queue = event, queue

    def run(self, queue: Queue, work: Work) -> None:
        if queue is self._queue:
            super().record(queue, self._event)
        super().run(queue, work)

    def record(self, queue: Queue, event: Event) -> None:
        if event is not self._event:
            super().record(queue, event)


class MistakenEvents(ChangedStreams):
    """One event is waited for in place of another."""

    def __init__(self, streams: Streams, others: Mapping[int, Event]) -> None:
        super().__init__(streams)
        self._others = others  # by the event's identity

    def wait(self, queue: Queue, event: Event) -> None:
        super().wait(queue, self._others.get(id(event), event))


@pytest.mark.parametrize(("name", "queue", "read"), EVENTS)
def test_a_dropped_wait_is_found(name, queue, read):
    def mistake(layers: list[DeviceRowFetcher]) -> None:
        for rows in layers:
            rows._streams = DroppedWait(rows._streams, getattr(rows, name))

    assert is_found(Program(read), mistake)


@pytest.mark.parametrize(("name", "queue", "read"), EVENTS)
def test_an_event_that_is_recorded_too_early_is_found(name, queue, read):
    def mistake(layers: list[DeviceRowFetcher]) -> None:
        for rows in layers:
            rows._streams = EarlyRecord(rows._streams, getattr(rows, name), queue)

    assert is_found(Program(read), mistake)


def test_a_buffer_that_is_reused_too_soon_is_found():
    """One buffer for what all layers read ahead: the next layer writes its positions while the last
    one's are being read.
    """

    def mistake(layers: list[DeviceRowFetcher]) -> None:
        for rows in layers[1:]:
            rows._ahead, rows._ahead_slots = layers[0]._ahead, layers[0]._ahead_slots

    assert is_found(Program(), mistake)


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("_claimed", Program()),
        ("_arrived", Program(begin_together=True)),  # otherwise every other layer's event is a later one, and costs time only
        ("_asked", Program(COPY)),
        ("_fetched", Program(COPY)),
    ],
)
def test_waiting_for_the_event_of_another_layer_is_found(name, program):
    def mistake(layers: list[DeviceRowFetcher]) -> None:
        events = [getattr(rows, name) for rows in layers]
        others = {id(event): other for event, other in zip(events[1:], events[:-1], strict=True)}
        for rows in layers:
            rows._streams = MistakenEvents(rows._streams, others)

    assert is_found(program, mistake)


def test_a_slot_that_is_given_away_while_its_row_is_in_flight_is_found():
    """A step is undone, and with its prefetch the knowledge that a copy into those slots is on its
    way.
    """

    class Forgetful(DeviceRowFetcher):
        def cancel(self) -> None:
            super().cancel()
            self._in_flight = False

    def mistake(layers: list[DeviceRowFetcher]) -> None:
        for rows in layers:
            rows.__class__ = Forgetful

    assert is_found(Program(undone=True), mistake)
