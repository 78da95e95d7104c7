"""`bench prefill`: each implementation prefills the same prompt in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

from specache.bench.base import BenchContext
from specache.bench.prefill import Prefill
from specache.bench.prefill_worker import DYNAMIC, SPECACHE, Job, Worker, prefiller, read_with_dynamic_cache
from specache.bench.shapes import RandomModel
from specache.config import SpeCacheConfig
from specache.errors import BenchmarkError, ConfigError
from tests.bench.tiny_shape import tiny_model
from tests.tiny import llama, prompt


def test_chunks_fill_the_ordinary_cache_as_one_pass_does():
    model, ids = llama(), prompt(150)
    chunked, _ = read_with_dynamic_cache(model, ids, 64)
    whole = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=whole, use_cache=True)
    for one, other in zip(chunked.layers, whole.layers, strict=True):
        assert one.keys.shape[2] == 150 and torch.allclose(one.keys, other.keys, atol=1e-5)


@pytest.mark.parametrize("impl", [SPECACHE, DYNAMIC])
def test_a_reading_has_a_time_and_a_peak(impl):
    reading = prefiller(Job(tiny_model(), impl, SpeCacheConfig(prefill_chunk=64), 200, 1, 0)).prefill()
    assert reading.seconds > 0 and reading.peak_bytes >= reading.idle_bytes * 0.9 > 0


def test_the_two_processes_are_interleaved():
    results = Prefill(context=260, chunk=128, repeat=2).run(BenchContext(tiny_model())).results
    ours, stock = results
    assert (ours["impl"], stock["impl"]) == ("specache", "dynamic")
    assert ours["vs_dynamic"] == pytest.approx(stock["seconds"] / ours["seconds"]) and stock["vs_dynamic"] == 1
    assert ours["tokens_per_s"] == pytest.approx(260 / ours["seconds"]) and ours["peak_bytes"] > 10**7


@dataclass(frozen=True)
class Broken(RandomModel):
    """A model that cannot be loaded."""

    def load(self) -> None:
        raise ValueError("the file is torn")


def test_an_error_in_the_child_process_is_reported():
    source = tiny_model()
    broken = Broken(source.shape, source.weights)
    with pytest.raises(BenchmarkError, match="the file is torn"):
        Worker(Job(broken, SPECACHE, SpeCacheConfig(), 64, 1, 0))


def test_settings_that_cannot_be_measured_are_refused():
    with pytest.raises(ConfigError, match="--chunk"):
        Prefill(chunk=0)
