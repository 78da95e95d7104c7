"""Timing on a noisy machine: interleaved rounds, medians and quartiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median

import numpy as np

from specache.bench.compute_device import host_ms, synchronise


@dataclass(frozen=True)
class Timing:
    """Samples of one function, in milliseconds."""

    samples_ms: tuple[float, ...]

    @property
    def ms(self) -> float:
        """Return the median in milliseconds."""
        return median(self.samples_ms)

    @property
    def best_ms(self) -> float:
        return min(self.samples_ms)

    @property
    def spread(self) -> list[float]:
        """Return the first and third quartile in milliseconds."""
        return [float(quartile) for quartile in np.percentile(self.samples_ms, (25, 75))]


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    around: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext(),
    timer: Callable[[Callable[[], object]], float] = host_ms,
) -> dict[str, Timing]:
    """Call every function once per round. Each round starts with another one.

    Args:
        rounds: samples of each function.
        warmup: untimed rounds before these.
        around: a context entered before a function's time starts and left after it ends.
        timer: calls a function and returns its milliseconds.
    """
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        first = number % len(names) if names else 0
        for name in names[first:] + names[:first]:
            with around(name):
                elapsed = timer(functions[name])
            if number >= warmup:
                samples[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


class PhaseClock:
    """Splits steps into phases. Of nested phases, the outer one counts.

    On a GPU each phase waits for its own work, so phases that overlap in a step do not overlap
    here.
    """

    def __init__(self) -> None:
        self._steps: list[dict[str, float]] = []
        self._inside = False

    def begin_step(self) -> None:
        """Start a new step."""
        self._steps.append({})

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the block's time as `phase`."""
        if self._inside:
            yield
            return
        self._inside = True
        synchronise()
        started = time.perf_counter()
        try:
            yield
        finally:
            synchronise()
            step = self._steps[-1]
            step[phase] = step.get(phase, 0.0) + (time.perf_counter() - started) * 1e3
            self._inside = False

    def add(self, phase: str, seconds: float) -> None:
        """Count seconds of `phase` that were measured elsewhere."""
        step = self._steps[-1]
        step[phase] = step.get(phase, 0.0) + seconds * 1e3

    def medians(self, last: int) -> dict[str, float]:
        """Return the milliseconds per step of every phase: the median over the `last` steps."""
        steps = self._steps[-last:]
        phases = dict.fromkeys(phase for step in steps for phase in step)
        return {phase: median(step.get(phase, 0.0) for step in steps) for phase in phases}
