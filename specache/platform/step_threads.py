"""How many threads a decode step computes with: fewer while other processes want the cores.

A step consists of hundreds of short parallel phases, and each ends when its last thread does. If a
thread waits for a core that another process has, all wait with it, a time slice per phase: on two
cores, one busy process made a step ninety times slower. With a thread less it does not. Results
have the same bits with any number of threads.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from specache.platform import machine

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

MOST_LOSSES = 8  # of a core, in a step that nobody disturbs,
MOST_LOSSES_PER_SECOND = 200  # or in a longer one
FASTER = 0.9  # another number of threads is kept if a step lasts at most so much of the time
SHORTEST_WAIT, LONGEST_WAIT = 4.0, 60.0  # seconds between trials that fail
_WEIGHT = 0.3  # of a slower step in the mean; a faster one replaces it

_limit = threading.local()


def step_threads() -> int:
    """Return how many threads a native kernel runs with: PyTorch's number, or fewer in a step."""
    most = torch.get_num_threads()
    return min(most, getattr(_limit, "threads", None) or most)


def lost_cores() -> int:
    """Return how often threads of this process had to leave a core to others; 0 if unknown."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@functools.cache
def warn_of_cpu_limit() -> None:
    """Warn once if PyTorch has more threads than a control group lets run.

    Commands choose the number themselves (`cli/threads.py`). A library leaves PyTorch's alone, and
    fewer threads in our kernels do not help while PyTorch's own operations use all.
    """
    quota, threads = machine.cpu_quota(), torch.get_num_threads()
    if quota is None or os.environ.get("OMP_NUM_THREADS") or threads <= max(1, int(quota)):
        return
    warnings.warn(
        f"PyTorch computes with {threads} threads, and a container's limit gives this process the time of {quota:g} cores: when it "
        "is used up, all threads stand still, and steps take several times as long. Call "
        f"torch.set_num_threads({max(1, int(quota))}) first.",
        RuntimeWarning,
        stacklevel=2,
    )


class StepThreads:
    """Chooses the number of threads of each step, by how long the last ones took.

    After a step in which cores were lost often, the next ones are tried with a thread less each;
    after one in which they were not, one with all. A number that is at least a tenth faster is
    kept. The waits between trials that fail double.

    Args:
        clock: seconds.
        losses: as `lost_cores`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, losses: Callable[[], int] = lost_cores) -> None:
        self._clock, self._losses = clock, losses
        self._fewer: int | None = None  # the number in use; None is all
        self._trial: int | None = None  # of the next step
        self._seconds: float | None = None  # of a step with the number in use
        self._wait, self._next_trial = SHORTEST_WAIT, -float("inf")

    @contextmanager
    def step(self) -> Iterator[None]:
        """Return a block, a step, in which `step_threads` is the number chosen for it."""
        most = torch.get_num_threads()
        usual = min(self._fewer or most, most)
        used, self._trial = min(self._trial or usual, most), None
        losses, started = self._losses(), self._clock()
        with _limited_to(used):
            yield
        if most > 1:
            self._note(usual, used, most, self._clock() - started, self._losses() - losses)

    @contextmanager
    def like_a_step(self) -> Iterator[None]:
        """Return a block in which `step_threads` is the number in use. It is not measured."""
        with _limited_to(self._fewer):
            yield

    def _note(self, usual: int, used: int, most: int, seconds: float, losses: int) -> None:
        """Note what a step took, and choose whether the next one is a trial."""
        now = self._clock()
        if used != usual:
            return self._end_trial(usual, used, most, now, seconds)
        if self._seconds is None:  # the first step prepares much: no measure of the next ones
            self._seconds = seconds
            return
        self._seconds = min(seconds, _WEIGHT * seconds + (1 - _WEIGHT) * self._seconds)
        if now < self._next_trial:
            return
        if losses >= max(MOST_LOSSES, MOST_LOSSES_PER_SECOND * seconds):
            self._trial = used - 1 or None
        elif used < most:
            self._trial = most

    def _end_trial(self, usual: int, used: int, most: int, now: float, seconds: float) -> None:
        if self._seconds is not None and seconds <= FASTER * self._seconds:
            self._fewer, self._seconds = None if used == most else used, seconds
            self._wait = SHORTEST_WAIT
            self._next_trial = now + self._wait if used < most else now
        elif 1 < used < usual:
            self._trial = used - 1
        else:
            self._next_trial = now + self._wait
            self._wait = min(2 * self._wait, LONGEST_WAIT)


@contextmanager
def _limited_to(threads: int | None) -> Iterator[None]:
    before = getattr(_limit, "threads", None)
    _limit.threads = threads
    try:
        yield
    finally:
        _limit.threads = before


of_steps: defaultdict[int, StepThreads] = defaultdict(StepThreads)  # of this process, by the tokens of a pass
