"""A step takes fewer threads while other processes have the cores, and all again afterwards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from statistics import mode

import pytest
import torch

import specache
from specache.engine import model_passes
from specache.platform.step_threads import LONGEST_WAIT, SHORTEST_WAIT, StepThreads, step_threads
from tests.tiny import llama, prompt


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Machine:
    """Steps take 10 ms with four threads, more with fewer, and a second if a core is missing."""

    def __init__(self) -> None:
        self.now, self.lost, self.busy, self.used = 0.0, 0, 0, list[int]()
        self.threads = StepThreads(lambda: self.now, lambda: self.lost)

    def step(self) -> int:
        with self.threads.step():
            used = step_threads()
            missing = used + self.busy > 4
            self.now += 1.0 if missing else 0.04 / used
            self.lost += 300 if missing else 1
        self.used.append(used)
        return used

    def steps_of(self, seconds: float) -> list[int]:
        start = self.now
        steps = []
        while self.now < start + seconds:
            steps.append(self.step())
        return steps


def test_all_threads_are_used_while_nobody_else_wants_the_cores(four_threads):
    assert set(Machine().steps_of(5)) == {4}


@pytest.mark.parametrize("busy", [1, 2, 3])
def test_other_processes_get_their_cores_within_a_few_steps(busy, four_threads):
    machine = Machine()
    machine.steps_of(1)
    machine.busy = busy
    machine.steps_of(6 * SHORTEST_WAIT)
    assert mode(machine.used[-50:]) == 4 - busy


def test_all_threads_are_used_again_once_the_others_are_done(four_threads):
    machine = Machine()
    machine.busy = 1
    machine.steps_of(60)
    machine.busy = 0
    machine.steps_of(LONGEST_WAIT + 1)
    assert set(machine.used[-50:]) == {4}


def test_trials_become_rare_while_the_others_stay(four_threads):
    machine = Machine()
    machine.busy = 1
    machine.steps_of(600)
    steps = machine.steps_of(240)
    assert steps.count(4) <= 4
    assert set(steps) == {3, 4}


def test_fewer_threads_that_are_no_faster_are_not_kept(four_threads):
    machine = Machine()
    for _ in range(50):
        with machine.threads.step():
            machine.now, machine.lost = machine.now + 1 / step_threads(), machine.lost + 1000
            machine.used.append(step_threads())
    assert set(machine.used) == {1, 2, 3, 4}
    assert machine.used.count(4) > 30


def test_a_first_step_that_prepares_much_is_no_measure(four_threads):
    machine = Machine()
    with machine.threads.step():
        machine.now, machine.lost = machine.now + 5, machine.lost + 5000
    assert set(machine.steps_of(5)) == {4}


def test_pytorchs_number_is_never_exceeded(four_threads):
    machine = Machine()
    machine.busy = 1
    machine.steps_of(10)
    torch.set_num_threads(2)
    assert {machine.step() for _ in range(20)} == {2}


def test_outside_of_a_step_and_after_an_error_pytorchs_number_holds(four_threads):
    machine = Machine()
    machine.busy = 1
    machine.steps_of(10)
    assert step_threads() == 4
    with machine.threads.like_a_step():
        assert step_threads() == 3
    with pytest.raises(ZeroDivisionError), machine.threads.step():
        raise ZeroDivisionError
    assert step_threads() == 4


def test_an_answer_is_the_same_with_any_numbers_of_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # of our kernels alone
    used: list[int] = []

    class Changing(StepThreads):
        """Tries another number after every step, and keeps it."""

        def _note(self, usual: int, number: int, most: int, seconds: float, losses: int) -> None:
            used.append(number)
            self._trial = number % most + 1

    model = llama()
    config = specache.SpeCacheConfig(top_k=8, group_size=16, residual=16)
    new = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = specache.generate(model, prompt(150), config=config, **new)
    changing: defaultdict[int, StepThreads] = defaultdict(Changing)
    monkeypatch.setattr(model_passes, "of_steps", changing)
    found = specache.generate(model, prompt(150), config=config, **new)
    assert set(used) == {1, 2, 3}
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(one, other) for one, other in zip(found.logits, expected.logits, strict=True))
