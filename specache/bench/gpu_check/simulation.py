"""Decode steps as on a GPU, on whatever device the check runs; and how many graphs they replay.

With `--device cpu` the static buffers, queues and captures of a GPU are simulated, as in the tests:
by the simulators of `tests/device/`, where the source tree is there, else without graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from specache.bench import kernel_backends
from specache.bench.gpu_check.checks import PartRun, on_gpu
from specache.cache import resources
from specache.device.graph import Graphs, Replay, Run, graphs_for
from specache.engine import static_decoder
from specache.linear import native_products
from specache.tiers.row_memory import RowMemory
from specache.tiers.streams import InlineStreams

SLOWER = (
    "without static buffers",
    "could not be captured",
    "PyTorch operations",
    "do not serve",
    "are not captured",
    "ordinary memory",
)


@dataclass
class Steps:
    """What decode steps did.

    Attributes:
        captures: graphs that were captured; replays: how often they ran.
    """

    captures: int = 0
    replays: int = 0


class _Counting:
    """Graphs that count."""

    def __init__(self, graphs: Graphs, steps: Steps) -> None:
        self._graphs, self._steps = graphs, steps

    def capture(self, run: Run) -> tuple[Replay, Tensor]:
        replay, result = self._graphs.capture(run)
        self._steps.captures += 1

        def counted() -> None:
            self._steps.replays += 1
            replay()

        return counted, result


@contextmanager
def as_on_a_gpu(part: PartRun) -> Iterator[Steps]:
    """Decode over static buffers inside the block, on a CPU too; count captures and replays."""
    steps, before = Steps(), static_decoder.SETTINGS
    make = graphs_for if on_gpu(part) else _simulated_graphs(part)

    def counting(device: torch.device) -> Graphs | None:
        graphs = make(device)
        return None if graphs is None else _Counting(graphs, steps)

    settings = replace(before, graphs=counting)
    with ExitStack() as stack:
        if not on_gpu(part):
            settings = replace(settings, streams=lambda device: InlineStreams(), capacity_step=64, devices=("cpu",))
            stack.enter_context(_replaced(resources, "RowMemory", partial(RowMemory, block_tokens=None)))
            stack.enter_context(_replaced(native_products, "instruction_set", lambda: None))
            stack.enter_context(exactly())
        stack.enter_context(_replaced(static_decoder, "SETTINGS", settings))
        yield steps


def exactly() -> AbstractContextManager[None]:
    """Compute with PyTorch's kernels inside the block: the C++ kernels of a CPU round queries."""
    return kernel_backends.using(kernel_backends.PLAIN)


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _simulated_graphs(part: PartRun) -> Any:
    """Return a maker of simulated graphs, or of none."""
    if part.tree is not None:
        return lambda device: import_module("tests.device.simulated_graph").SimulatedGraphs()
    part.note("The simulator of CUDA graphs is part of the tests, which are not here: steps run without graphs.")
    return lambda device: None
