"""Interleaved rounds, warm-up, quartiles and phases."""

from __future__ import annotations

import time
from contextlib import contextmanager

import pytest

from specache.bench.timing import PhaseClock, Timing, interleaved


def test_every_round_runs_each_function_once_and_starts_with_another():
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timings = interleaved(functions, rounds=2, warmup=1)
    assert "".join(calls) == "abcbcacab"
    assert {name: len(timing.samples_ms) for name, timing in timings.items()} == {"a": 2, "b": 2, "c": 2}


def test_time_spent_around_a_function_does_not_count():
    events: list[str] = []

    @contextmanager
    def around(name: str):
        events.append(f"enter {name}")
        yield
        events.append(f"leave {name}")

    def timer(function):
        events.append("start")
        function()
        events.append("stop")
        return 5.0

    timings = interleaved({"f": lambda: events.append("run")}, rounds=1, warmup=0, around=around, timer=timer)
    assert events == ["enter f", "start", "run", "stop", "leave f"]
    assert timings["f"].ms == 5.0


def test_median_and_quartiles():
    timing = Timing((9.0, 1.0, 2.0, 3.0, 100.0))
    assert timing.ms == 3.0 and timing.best_ms == 1.0 and timing.spread == [2.0, 9.0]
    assert Timing((4.0,)).spread == [4.0, 4.0]


def test_phases_are_summed_per_step_and_only_the_outer_of_nested_ones_counts():
    clock = PhaseClock()
    for _ in range(3):
        clock.begin_step()
        for _ in range(2):
            with clock("outer"), clock("inner"):
                time.sleep(0.002)
    medians = clock.medians(3)
    assert set(medians) == {"outer"} and medians["outer"] >= 4


def test_medians_are_over_the_last_steps_only():
    clock = PhaseClock()
    for phase in ("warm-up", "work", "work"):
        clock.begin_step()
        with clock(phase):
            pass
    assert set(clock.medians(2)) == {"work"}


def test_the_clock_goes_on_after_a_phase_that_fails():
    clock = PhaseClock()
    clock.begin_step()
    with pytest.raises(ValueError), clock("a"):
        raise ValueError
    with clock("b"):
        pass
    assert set(clock.medians(1)) == {"a", "b"}
