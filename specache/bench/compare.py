"""Time several implementations: interleaved if all fit into memory, else one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from specache.bench.base import Log
from specache.bench.compute_device import CUDA, free_bytes, release_memory
from specache.bench.contenders import Contender
from specache.bench.environment import gigabytes
from specache.bench.timing import Timing, interleaved
from specache.bench.workload import Workload
from specache.platform.machine import memory
from specache.platform.out_of_memory import is_out_of_memory

WARMUP_STEPS = 2


@dataclass(frozen=True)
class Measured:
    """The measurements of one implementation.

    Attributes:
        interleaved: whether it was timed in the same rounds as the others.
        phases: milliseconds per step (see `Contender.phases`).
    """

    timing: Timing
    interleaved: bool
    phases: dict[str, float] | None = None


@dataclass(frozen=True)
class Skipped:
    """The reason why an implementation was not measured."""

    reason: str


Evict = Callable[[], object]  # called before every step, outside of its time


def compare(
    work: Workload, contenders: Sequence[Contender], steps: int, log: Log, phase_steps: int = 0, evict: Evict = lambda: None
) -> dict[Contender, Measured | Skipped]:
    """Time `steps` steps of every implementation that fits into memory.

    Args:
        phase_steps: further steps, in which the phases of an implementation are recorded.
        evict: empties the caches before a step.
    """
    free = _FreeMemory(work)
    outcome: dict[Contender, Measured | Skipped] = {}
    fitting = []
    for contender in contenders:
        if shortage := free.shortage([contender]):
            outcome[contender] = Skipped(shortage)
        else:
            fitting.append(contender)
    for group in [fitting] if free.shortage(fitting) is None else [[contender] for contender in fitting]:
        outcome |= _run_or_skip(work, group, steps, log, phase_steps, evict)
    return {contender: outcome[contender] for contender in contenders}


class _FreeMemory:
    """Free memory before anything is filled, where the model computes and in main memory."""

    def __init__(self, work: Workload) -> None:
        self._drawn = work.drawn_bytes
        on_gpu = work.info.device.type == CUDA
        self._host_free: int | None = memory()["usable_bytes"]
        self._free = free_bytes(CUDA) if on_gpu else self._host_free
        self._name = "GPU memory" if on_gpu else "memory"

    def shortage(self, contenders: Sequence[Contender]) -> str | None:
        """Say which memory is too small for all of them together, or return `None` if they fit."""
        needed = self._drawn + sum(contender.needed_bytes for contender in contenders)
        host = sum(contender.host_bytes for contender in contenders)
        for size, free, name in ((needed, self._free, self._name), (host, self._host_free, "main memory")):
            if free is not None and size > free:
                return f"needs {gigabytes(size)} of {name}, {gigabytes(free)} are free"
        return None


def _run_or_skip(
    work: Workload, group: Sequence[Contender], steps: int, log: Log, phase_steps: int, evict: Evict
) -> dict[Contender, Measured | Skipped]:
    """Run a group, or its members one by one if a GPU's memory runs out.

    A member whose memory runs out on its own is skipped.
    """
    try:
        return _run(work, group, steps, log, phase_steps, evict)
    except Exception as error:
        if work.info.device.type != CUDA or not is_out_of_memory(error):
            raise
        reason = f"the GPU's memory ran out ({str(error).partition('.')[0]})"
    release_memory()
    if len(group) == 1:
        return {group[0]: Skipped(reason)}
    alone = [_run_or_skip(work, [contender], steps, log, phase_steps, evict) for contender in group]
    return {contender: measured for one in alone for contender, measured in one.items()}


def _run(
    work: Workload, group: Sequence[Contender], steps: int, log: Log, phase_steps: int, evict: Evict
) -> dict[Contender, Measured | Skipped]:
    try:
        for contender in group:
            if contender.needed_bytes:
                log(f"{work.batch} x {work.context:,} tokens: filling {contender.impl}")
            contender.prepare()
        work.drop_rows()
        log(f"{work.batch} x {work.context:,} tokens: decoding")
        named = {f"{number} {contender.impl}": contender for number, contender in enumerate(group)}

        @contextmanager
        def around(name: str) -> Iterator[None]:
            with named[name].ready():
                evict()
                yield

        timings = interleaved({name: c.step for name, c in named.items()}, steps, WARMUP_STEPS, around)
        return {
            contender: Measured(timings[name], len(group) > 1, contender.phases(phase_steps, evict) if phase_steps else None)
            for name, contender in named.items()
        }
    finally:
        for contender in group:
            contender.close()
