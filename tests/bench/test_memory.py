"""`bench memory`: a limit that the kernel enforces, and which method completes within it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from specache.bench import control_group, memory
from specache.bench.base import BenchContext
from specache.bench.child import Child, ChildEnded
from specache.bench.control_group import MemoryGroup
from specache.bench.memory import Memory
from specache.bench.shapes import RandomModel, Shape, Weights
from specache.errors import BenchmarkError, ConfigError
from specache.model.dimensions import dimensions_of
from tests.bench.memory_children import fail, hold
from tests.bench.tiny_shape import tiny_model

WIDE = Shape("wide", 2, 64, 96, 16, 16, 256, 97, 10_000.0, True)  # a small model with a large cache: 32 KB per token
MEGABYTE = 1 << 20


@pytest.fixture
def limits() -> None:
    try:
        with MemoryGroup() as group:
            group.limit(1 << 40)
    except BenchmarkError as error:
        pytest.skip(str(error))


def make_a_group_and_die(made: Connection) -> None:
    group = MemoryGroup()
    made.send((group.folder, group.folder.exists()))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_needs_more_is_killed_and_one_that_needs_less_is_not(limits):
    for size, lives in ((10 * MEGABYTE, True), (500 * MEGABYTE, False)):
        with MemoryGroup() as group, closing(Child(hold, size, group.entered())) as child:
            child.receive()
            group.forget_peak()
            group.limit(group.used + 100 * MEGABYTE)
            child.send(True)
            if lives:
                assert child.receive() == size
                assert size <= group.peak <= group.used + size
            else:
                with pytest.raises(ChildEnded) as ended:
                    child.receive()
                assert ended.value.exit_code == -9
        assert not group.folder.exists()


def test_a_limit_below_what_is_in_use_is_refused(limits):
    with MemoryGroup() as group, closing(Child(hold, 1, group.entered())) as child:
        child.receive()
        with pytest.raises(BenchmarkError, match="are in use"):
            group.limit(4096)


def test_the_group_of_a_process_that_was_killed_is_removed_by_the_next_one(limits):
    made, tell = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=make_a_group_and_die, args=(tell,))
    process.start()
    tell.close()
    left, existed = made.recv()  # asked by itself: once it has ended, any other process may remove the group
    process.join()
    assert existed and process.exitcode == -signal.SIGKILL
    with MemoryGroup() as mine:
        assert mine.folder.exists() and not left.exists()


def test_a_user_who_may_not_make_groups_gets_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(control_group, "HIERARCHY", tmp_path / "nowhere")
    with pytest.raises(BenchmarkError, match=r"needs control groups .* \(root\)"):
        MemoryGroup()


def test_an_error_in_the_child_process_is_reported():
    with closing(Child(fail, "the file is torn")) as child, pytest.raises(BenchmarkError, match="ValueError: the file is torn"):
        child.receive()


@pytest.mark.slow
def test_the_disk_tier_completes_where_the_ordinary_cache_is_killed(limits, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "BASELINES", 1)  # this process has read the files already
    benchmark = Memory(context=2400, times=2.0, short=500, chunk=128, steps=2, hot_set=0.02, top_k=16, dir=tmp_path)
    results = benchmark.run(BenchContext(RandomModel(WIDE, Weights.BF16))).results
    outcome = [(result["method"], result["context"], result["completed"]) for result in results]
    assert outcome == [("specache", 1000, True), ("specache", 2400, True), ("dynamic", 500, True), ("dynamic", 2400, False)]
    base, ours, fits, killed = results
    assert base["limit_bytes"] is None and ours["cache_bytes"] == 2400 * 2 * 2 * 16 * 256 * 2
    assert ours["limit_bytes"] == base["peak_bytes"] + ours["room_bytes"] and ours["cache_bytes"] >= 2 * ours["room_bytes"]
    assert ours["peak_bytes"] <= ours["limit_bytes"] and ours["ms_per_step"] > 0 and fits["ms_per_step"] > 0
    assert killed["ms_per_step"] is None and killed["read_tokens"] < 2400
    assert os.listdir(tmp_path) == []


def test_the_lower_of_two_peaks_is_the_base_of_the_limit(monkeypatch, tmp_path):
    dimensions = dimensions_of(tiny_model().load())
    peaks = iter([900, 700, 800, 800, 800])

    def measure(self: Memory, bench: BenchContext, folder: Path, method: str, context: int, limit: int | None) -> Any:
        return {"context": context, "limit_bytes": limit, "peak_bytes": next(peaks)}, dimensions

    monkeypatch.setattr(Memory, "_measure", measure)
    base, ours, *_ = Memory(context=2000, dir=tmp_path).run(BenchContext(tiny_model())).results
    assert base["peak_bytes"] == 700 and ours["limit_bytes"] == 700 + ours["room_bytes"]


def test_settings_that_cannot_be_measured_are_refused():
    with pytest.raises(ConfigError, match="--context must be more than 1,000"):
        Memory(context=1000)
    with pytest.raises(ConfigError, match="--times"):
        Memory(times=0.5)
