"""Benchmarks on a GPU, as far as they can be tested without one."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from specache.bench import compare, compute_device, environment, kernel_backends
from specache.bench.base import BenchContext
from specache.bench.compare import Measured, Skipped
from specache.bench.contenders import Contender
from specache.bench.memory import Memory
from specache.bench.offloaded import OffloadedContender
from specache.bench.plain_read import LargeArray
from specache.bench.timing import PhaseClock, interleaved
from specache.cli import console
from specache.errors import ConfigError
from tests.bench.tiny_shape import tiny_model, tiny_workload
from tests.cli.running import one_line, run


@pytest.fixture
def waits(monkeypatch) -> list[str]:
    """Record events in order, with CUDA reported as in use."""
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    return events


def test_timings_start_and_stop_while_the_gpu_is_idle(waits):
    interleaved({"step": lambda: waits.append("step")}, rounds=2, warmup=0)
    assert waits == ["wait", "step", "wait"] * 2
    array = LargeArray(1 << 10)
    waits.clear()
    array.read()
    assert waits == ["wait", "wait"]


def test_a_phase_waits_once_before_and_once_after(waits):
    clock = PhaseClock()
    clock.begin_step()
    with clock("outer"), clock("inner"):
        waits.append("kernel")
    assert waits == ["wait", "kernel", "wait"]


def test_no_synchronisation_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: pytest.fail("this would start CUDA"))
    interleaved({"step": lambda: None}, rounds=1)
    compute_device.release_memory()


@pytest.mark.parametrize("name", ["decode", "paper"])
def test_cuda_without_a_gpu_is_a_usage_error(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = one_line(run("bench", name, "--shape", "tiny", "--device", "cuda", code=console.EXIT_USAGE).stderr)
    assert "--device cuda" in said and "--device cpu" in said


def test_quantised_weights_are_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = one_line(run("bench", "decode", "--shape", "tiny", "--weights", "int8", code=console.EXIT_USAGE).stderr)
    assert "--weights int8 is for the CPU" in said


def test_bench_memory_is_refused_on_a_gpu():
    with pytest.raises(ConfigError, match="--device cpu"):
        Memory().run(BenchContext(tiny_model(), device="cuda"))


def test_reported_kernels_are_those_of_the_device(monkeypatch):
    monkeypatch.setattr(kernel_backends.triton, "unsupported_reason", lambda: None)
    monkeypatch.delenv(kernel_backends.VARIABLE, raising=False)
    assert kernel_backends.available_on("cuda") == ["torch", "triton"]
    assert kernel_backends.layers_on("cuda") == ["torch", "static"]
    assert set(kernel_backends.active_on("cuda").values()) == {"triton"}
    monkeypatch.setenv(kernel_backends.VARIABLE, "torch")
    assert set(kernel_backends.active_on("cuda").values()) == {"torch"}
    monkeypatch.setattr(kernel_backends.triton, "unsupported_reason", lambda: "none here")
    assert kernel_backends.available_on("cuda") == kernel_backends.layers_on("cuda") == ["torch"]
    assert environment.describe()["machine"]["gpu"] is None


class Fake(Contender):
    """Fits or runs out of memory, as its name says."""

    cache = "none"

    def __init__(self, impl: str, needed_bytes: int, host_bytes: int = 0) -> None:
        self.impl, self.needed_bytes, self.host_bytes = impl, needed_bytes, host_bytes

    def prepare(self) -> None:
        Fake.filled.append(self.impl)
        if self.impl == "huge" or len(Fake.filled) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def step(self) -> None:
        pass

    def close(self) -> None:
        if self.impl in Fake.filled:
            Fake.filled.remove(self.impl)

    filled: list[str] = []  # noqa: RUF012


@pytest.fixture
def gpu_workload(monkeypatch):
    """Return a workload on a pretended GPU with 1 GB free, with 2 GB of main memory."""
    work = tiny_workload()
    monkeypatch.setattr(work, "info", type("Info", (), {"device": torch.device("cuda"), "dtype": work.info.dtype})())
    monkeypatch.setattr(compare, "memory", lambda: {"usable_bytes": 2 * 10**9})
    monkeypatch.setattr(compare, "free_bytes", lambda name: 10**9)
    Fake.filled.clear()
    return work


def test_gpu_memory_and_main_memory_are_separate_limits(gpu_workload):
    fits, wide, rows = Fake("fits", 10**8, 10**9), Fake("wide", 5 * 10**9), Fake("rows", 10**8, 5 * 10**9)
    outcome = compare.compare(gpu_workload, [fits, wide, rows], 1, lambda said: None)
    assert isinstance(outcome[fits], Measured)
    assert isinstance(outcome[wide], Skipped) and "5.0 GB of GPU memory, 1.0 GB are free" in outcome[wide].reason
    assert isinstance(outcome[rows], Skipped) and "5.0 GB of main memory, 2.0 GB are free" in outcome[rows].reason


def test_out_of_gpu_memory_is_tried_alone_and_then_skipped(gpu_workload):
    a, b, huge = Fake("a", 1), Fake("b", 1), Fake("huge", 1)
    outcome = compare.compare(gpu_workload, [a, b, huge], 1, lambda said: None)
    assert [isinstance(outcome[one], Measured) for one in (a, b, huge)] == [True, True, False]
    assert not outcome[a].interleaved and outcome[huge] == Skipped("the GPU's memory ran out (CUDA out of memory)")


class FakeEvent:
    """A CUDA event that is recorded in a list, and times that grow by one per record."""

    record_of: ClassVar[list[object]] = []

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = len(self.record_of)
        self.record_of.append(self)

    def synchronize(self) -> None:
        self.record_of.append("waited")

    def elapsed_time(self, end: FakeEvent) -> float:
        return float(end.at - self.at)


def test_a_gpus_own_time_begins_while_it_is_busy(monkeypatch):
    """The host queues everything behind work that is not timed, and waits once, at the end."""
    done: list[object] = []
    monkeypatch.setattr(FakeEvent, "record_of", done)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("idle"))
    elapsed = compute_device.gpu_ms(lambda: done.append("work"), before=lambda: done.append("before"))
    kinds = ["event" if isinstance(one, FakeEvent) else one for one in done]
    assert kinds == ["idle", "before", "event", "work", "event", "waited"]
    assert elapsed == 2.0


def test_a_timer_may_be_chosen():
    found = interleaved({"a": lambda: None}, rounds=3, timer=lambda function: 7.0)
    assert found["a"].samples_ms == (7.0, 7.0, 7.0)


def test_the_offloaded_cache_needs_a_gpu():
    with pytest.raises(ConfigError, match="--device cuda"):
        OffloadedContender(tiny_workload())
