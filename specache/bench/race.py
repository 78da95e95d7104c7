"""Contenders against each other: side by side where all of them fit into memory, else one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from specache.bench.base import Say
from specache.bench.contenders import Contender
from specache.bench.machine import gigabytes
from specache.bench.timing import Timing, interleaved
from specache.bench.workload import Workload
from specache.machine import memory

WARMUP_STEPS = 2


@dataclass(frozen=True)
class Measured:
    """One contender's step.

    Attributes:
        interleaved: whether it was timed in the same rounds as the others.
        phases: milliseconds per step (see `Contender.phases`).
    """

    timing: Timing
    interleaved: bool
    phases: dict[str, float] | None = None


@dataclass(frozen=True)
class Skipped:
    """Why a contender was not measured."""

    reason: str


def race(
    work: Workload, contenders: Sequence[Contender], steps: int, say: Say, phase_steps: int = 0
) -> dict[Contender, Measured | Skipped]:
    """Time `steps` steps of every contender that fits into memory.

    Args:
        phase_steps: further steps, in which a contender's phases are recorded.
    """
    free = memory()["usable_bytes"]
    outcome: dict[Contender, Measured | Skipped] = {}
    fitting = []
    for contender in contenders:
        needed = contender.needed_bytes + work.drawn_bytes
        if free is not None and needed > free:
            outcome[contender] = Skipped(f"needs {gigabytes(needed)} of memory, {gigabytes(free)} are free")
        else:
            fitting.append(contender)
    together = free is None or sum(contender.needed_bytes for contender in fitting) + work.drawn_bytes <= free
    for group in [fitting] if together else [[contender] for contender in fitting]:
        outcome |= _run(work, group, steps, say, phase_steps)
    return {contender: outcome[contender] for contender in contenders}


def _run(work: Workload, group: Sequence[Contender], steps: int, say: Say, phase_steps: int) -> dict[Contender, Measured | Skipped]:
    try:
        for contender in group:
            if contender.needed_bytes:
                say(f"{work.batch} x {work.context:,} tokens: filling {contender.impl}")
            contender.prepare()
        work.drop_rows()
        say(f"{work.batch} x {work.context:,} tokens: decoding")
        named = {f"{number} {contender.impl}": contender for number, contender in enumerate(group)}

        def around(name: str) -> AbstractContextManager[None]:
            return named[name].ready()

        timings = interleaved({name: c.step for name, c in named.items()}, steps, WARMUP_STEPS, around)
        return {
            contender: Measured(timings[name], len(group) > 1, contender.phases(phase_steps) if phase_steps else None)
            for name, contender in named.items()
        }
    finally:
        for contender in group:
            contender.close()
