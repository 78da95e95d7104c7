"""Which stream CUDA's graphs are captured on, and what a capture leaves behind, without a GPU."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from specache.device import graph
from specache.device.graph import CudaGraphs

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


class Stream:
    def __init__(self, device: torch.device) -> None:
        self.device = device


class FakeCuda:
    """The current stream, and the captures that were begun.

    As PyTorch's, a capture that fails does not set its stream back.
    """

    def __init__(self) -> None:
        self.default = self.current = Stream(FIRST)
        self.captures: list[Stream] = []

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, _graph: object, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        before, self.current = self.current, stream
        self.captures.append(stream)
        yield
        self.current = before


class Graph:
    def replay(self) -> None:
        pass


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    for name, value in {"Stream": Stream, "CUDAGraph": Graph, "graph_pool_handle": object}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "graph", fake.graph)
    graph._capture_stream.cache_clear()
    yield fake
    graph._capture_stream.cache_clear()


def result() -> torch.Tensor:
    return torch.zeros(1)


def test_a_step_is_captured_on_a_stream_of_its_device(cuda):
    for device in (FIRST, SECOND, FIRST):
        CudaGraphs(device).capture(result)
    assert [stream.device for stream in cuda.captures] == [FIRST, SECOND, FIRST]
    assert cuda.captures[0] is cuda.captures[2]  # cuBLAS keeps memory for each stream


def test_a_failed_capture_leaves_stream_and_collector_as_they_were(cuda):
    def fail() -> torch.Tensor:
        assert cuda.current.device == SECOND
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaGraphs(SECOND).capture(fail)
    assert cuda.current is cuda.default
    assert gc.isenabled()


def test_no_garbage_is_collected_during_a_capture(cuda):
    """A cache that is freed waits for the GPU."""
    collects: list[bool] = []

    def run() -> torch.Tensor:
        collects.append(gc.isenabled())
        return result()

    CudaGraphs(FIRST).capture(run)
    gc.disable()
    try:
        CudaGraphs(FIRST).capture(run)
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert collects == [False, False]


def test_threads_capture_one_after_the_other(cuda):
    inside, go_on, overlapped = threading.Event(), threading.Event(), threading.Event()

    def first() -> torch.Tensor:
        inside.set()
        assert go_on.wait(60)
        return result()

    def second() -> torch.Tensor:
        if not go_on.is_set():
            overlapped.set()
        return result()

    threads = [threading.Thread(target=CudaGraphs(FIRST).capture, args=(run,)) for run in (first, second)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    assert not overlapped.wait(0.2)
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert len(cuda.captures) == 2
