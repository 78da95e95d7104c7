"""`slow_tier="auto"` under a kernel's memory limit, which kills a process on the wrong tier."""

from __future__ import annotations

from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

import specache
from specache.bench.child import Child
from specache.bench.control_group import MemoryGroup
from specache.bench.shapes import RandomModel, Shape, Weights
from specache.engine.auto_tier import main_memory_bytes, with_margin
from specache.errors import BenchmarkError
from specache.planning.footprint import PlannedSequence
from specache.planning.plan import plan
from specache.platform import heap

WIDE = Shape("wide", 4, 64, 96, 16, 16, 64, 97, 10_000.0, True)  # a small model with a large cache: 32 KB per token
TOKENS, NEW = 2000, 4
SPARE = 32 << 20  # what a process takes besides, from one prompt to the next


@pytest.fixture
def limits() -> None:
    try:
        with MemoryGroup() as group:
            group.limit(1 << 40)
    except BenchmarkError as error:
        pytest.skip(str(error))


def answer_twice(connection: Connection, source: RandomModel) -> None:
    """Send (bytes needed in memory, bytes of the rows), then the chosen tier per message."""
    heap.keep_small()
    torch.set_num_threads(1)
    model = source.load()
    ids = torch.tensor([source.prompt(TOKENS, None, 0)])
    generate(model, ids[:, :300])  # libraries load what they need
    with specache.SpeCache(model) as cache:
        load = PlannedSequence(TOKENS, NEW - 1)
        planned = plan(cache.resources.dimensions, cache.config, [load])
        connection.send((main_memory_bytes(cache.resources.dimensions, planned, [load]), planned.slow))
    for _ in range(2):
        connection.recv()
        connection.send(generate(model, ids))


def generate(model: Any, ids: torch.Tensor) -> tuple[str, list[int]]:
    with specache.SpeCache(model) as cache:
        cache.on_disk_chosen = lambda choice: None
        output = specache.generate(model, ids, past_key_values=cache, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        return str(cache.config.slow_tier), output[0, ids.shape[1] :].tolist()


def test_rows_go_to_disk_if_half_fit_and_stay_in_memory_if_all_fit(limits, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECACHE_CACHE", str(tmp_path))
    source = RandomModel(WIDE, Weights.FP32)
    with MemoryGroup() as group, closing(Child(answer_twice, source, group.entered())) as child:
        needed, rows = child.receive()
        group.forget_peak()
        group.limit(group.used + needed - rows // 2)
        child.send(True)
        tier, tokens = child.receive()
        assert tier == "disk"
        group.limit(1 << 40)
        group.forget_peak()
        group.limit(group.used + with_margin(needed) + SPARE)
        child.send(True)
        assert child.receive() == ("ram-inplace", tokens)
    assert not [path for path in Path(tmp_path).rglob("*") if path.is_file()]
