"""The largest batches, the tipping points, and the paper's table."""

from __future__ import annotations

import json

import pytest
import torch

from specache.bench.published_shapes import planned_config
from specache.config import SpeCacheConfig
from specache.model.dimensions import ModelDimensions, dimensions_of, without_weights
from specache.planning.roofline.capacity import Capacity
from specache.planning.roofline.compared_methods import methods
from specache.planning.roofline.device_figures import GIB
from specache.planning.roofline.device_file import device_named
from specache.planning.roofline.step_time import Roofline
from specache.planning.roofline.summary import roofline_document
from specache.planning.roofline.tipping import first, tipping
from tests.planning.roofline.hand import MODEL, device, method


@pytest.fixture(scope="module")
def mistral() -> ModelDimensions:
    """Return the dimensions in float16, as in the paper."""
    return dimensions_of(without_weights(planned_config("mistral-7b"), torch.float16), device="cuda")


@pytest.fixture(scope="module")
def on_a6000(mistral: ModelDimensions) -> dict:
    gpu = device_named("a6000")
    compared = methods(SpeCacheConfig().resolved("cuda"))
    return roofline_document(Roofline(gpu, mistral), Capacity(gpu, mistral), compared, 32768, 1)


def best(document: dict, prefix: str, measure: str) -> float:
    return max(one["vs_full"][measure] for one in document["methods"] if one["method"].startswith(prefix))


def test_mistral_has_the_published_size(mistral):
    assert mistral.weight_bytes == pytest.approx(2 * 7.2417e9, rel=1e-3)
    assert sum(layer.row_bytes(2) for layer in mistral.layers) == 131072  # bytes per token


def test_the_papers_table_within_30_percent(on_a6000):
    """Mistral-7B-Instruct-v0.2 at 32,768 tokens on an A6000: up to 12 times the batch and 4.6 times
    the throughput.
    """
    assert best(on_a6000, "paper", "batch") == pytest.approx(12, rel=0.3)
    assert best(on_a6000, "paper", "tokens_per_s") == pytest.approx(4.6, rel=0.3)


def test_the_papers_fetches_are_hidden_behind_the_step(on_a6000):
    for one in on_a6000["methods"]:
        if one["method"].startswith("paper"):
            step = one["largest"]["step"]
            assert 0 < step["fetch_ms"] == step["fetch_hidden_ms"]


def test_the_comparison_can_be_written_as_json_with_stable_keys(on_a6000):
    assert json.loads(json.dumps(on_a6000)) == on_a6000
    assert set(on_a6000) == {"device", "usable_bytes", "methods"}
    for one in on_a6000["methods"]:
        assert set(one) == {*("method", "title", "bits", "policy", "kernels"), *("asked", "largest", "vs_full", "wins_from")}
        assert set(one["asked"]) == {
            *("batch", "weights_bytes", "fast_bytes", "static_bytes", "slow_bytes", "step", "tokens_per_s", "fits")
        }
        assert one["largest"]["tokens_per_s"] == pytest.approx(1e3 * one["largest"]["batch"] / one["largest"]["step"]["total_ms"])
    full = on_a6000["methods"][0]
    assert full["vs_full"] == {"batch": 1, "tokens_per_s": 1, "step": 1} and full["wins_from"] is None


@pytest.mark.parametrize("key", ["full", "kivi-1", "paper-2", "specache-2"])
@pytest.mark.parametrize("context", [300, 4096, 32768])
def test_the_largest_batch_is_the_largest(mistral, key, context):
    capacity, one = Capacity(device_named("a6000"), mistral), method(key)
    batch = capacity.largest_batch(one, context)
    assert capacity.fits(one, context, batch) and not capacity.fits(one, context, batch + 1)


def test_the_full_cache_takes_the_size_of_its_pairs_only(mistral):
    held = Capacity(device_named("a6000"), mistral).bytes(method("full"), 32768, 4)
    assert 4 * 131072 * 32768 <= held.fast < 1.05 * 4 * 131072 * 32768  # with what a pass needs
    assert held.slow == 0


def test_a_model_that_does_not_fit_has_batch_zero_and_no_throughput():
    capacity = Capacity(device(memory_gib=0.0005), MODEL)
    assert capacity.largest_batch(method("full"), 4096) == 0
    document = roofline_document(Roofline(capacity.device, MODEL), capacity, [method("full"), method("kivi-2")], 4096, 1)
    assert document["methods"][1]["largest"] == {"batch": 0, "tokens_per_s": None, "step": None}
    assert document["methods"][1]["vs_full"]["batch"] is None
    assert document["methods"][1]["asked"]["fits"] is False


def test_main_memory_limits_the_slow_tier():
    one, context = method("paper-2"), 65536
    free = Capacity(device(), MODEL)
    some = Capacity(device(host_memory_gib=3 * free.bytes(one, context, 1).slow / GIB), MODEL)
    assert some.largest_batch(one, context) == 3 < free.largest_batch(one, context)
    needed = free.bytes(one, context, 3)
    kept = Capacity(device(kind="cpu", memory_gib=(needed.weights + needed.fast + needed.slow + 1000) / GIB), MODEL)
    assert kept.largest_batch(one, context) == 3  # a processor's memory holds both tiers


@pytest.mark.parametrize(
    ("wins_from", "limit", "expected"), [(1, 10, 1), (7, 10, 7), (10, 10, 10), (11, 10, None), (1, 1, 1), (500, 1 << 26, 500)]
)
def test_first_returns_the_smallest_number_that_wins(wins_from, limit, expected):
    assert first(lambda number: number >= wins_from, limit) == expected


@pytest.mark.parametrize("key", ["kivi-2", "paper-1", "specache-2"])
def test_a_method_wins_from_its_tipping_point_on_and_not_before(mistral, key):
    gpu = device_named("l4")
    model, capacity, full, own = Roofline(gpu, mistral), Capacity(gpu, mistral), method("full"), method(key)
    found = tipping(model, capacity, full, own, 8192, 4)

    def wins(context: int, batch: int) -> bool:
        return model.step(own, context, batch).total * 1.01 < model.step(full, context, batch).total

    assert not wins(found.context - 64, 4) and all(wins(found.context + more, 4) for more in range(0, 6400, 640))
    assert all(wins(8192, found.batch + more) for more in range(0, 30, 3))


def test_a_tipping_point_comes_earlier_with_a_larger_batch(mistral):
    gpu = device_named("a6000")
    model, capacity, full, own = Roofline(gpu, mistral), Capacity(gpu, mistral), method("full"), method("specache-2")
    contexts = [tipping(model, capacity, full, own, 8192, batch).context for batch in (1, 2, 4, 8)]
    assert contexts == sorted(contexts, reverse=True)


def test_a_low_bit_method_never_wins_where_unpacking_is_slower_than_reading():
    slow = device(vector_tflops=1e-5)
    found = tipping(Roofline(slow, MODEL), Capacity(slow, MODEL), method("full"), method("kivi-2"), 4096, 1)
    assert found.context is None and found.batch is None
