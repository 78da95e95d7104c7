"""Step times computed by hand, what is hidden, and how they grow."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from specache.config import Policy
from specache.errors import ConfigError
from specache.planning.roofline.compared_methods import methods
from specache.planning.roofline.kernel_costs import THIS_LIBRARY, KernelCounts
from specache.planning.roofline.step_time import WAITED_FOR, Roofline
from tests.planning.roofline.hand import DEVICE, MODEL, device, method

HAND = Roofline(DEVICE, MODEL)


def test_the_full_caches_step_matches_the_time_computed_by_hand():
    step = HAND.step(method("full"), 1000, 2)
    assert step.weights == pytest.approx(1e-3)
    assert step.compute == pytest.approx(2e-3)  # 500,000 numbers, a multiply-add each, 2 rows
    assert step.compute_hidden == pytest.approx(1e-3)
    assert step.scan == pytest.approx(512e-6)  # 2 x 1,000 tokens of 256 bytes
    assert step.attend == step.fetch == step.overhead == 0
    assert step.total == pytest.approx(2.512e-3)


def test_the_papers_step_matches_the_time_computed_by_hand():
    """1,024 tokens: 960 in 15 pages of 2,560 bytes, 64 in the residual."""
    step = HAND.step(method("paper-2"), 1024, 1)
    assert step.scan == pytest.approx(2 * 2 * 960 * 64 * 16 * 1e-9)  # keys and values, multiply and add, 4 rows padded to 16
    assert step.scan_bound == "matrix units"
    # 16-bit: 4 passes of 2 rows, 1 of the draft row, 3 of its mean; 2 heads, 1 KV head
    scores = 2 * 960 * (4 * 2 * 2 + 1 * 2 + 3 * 1)
    assert step.attend == pytest.approx((64 * 256 + scores + 2 * 64 * 256) * 1e-9)
    assert step.fetch == pytest.approx(int(64 * 256 * 0.47) * 1e-8)
    assert step.fetch_hidden == step.fetch
    assert step.total == pytest.approx(1e-3 + 1e-3 + step.scan + step.attend)


@pytest.mark.parametrize(
    ("figure", "bound", "seconds"),
    [
        ({"matrix_tflops": 1.0}, "unpacking", 3 * 2 * 960 * 64 / 0.5e9),
        ({"matrix_tflops": 1.0, "vector_tflops": 1.0}, "bandwidth", 15 * 2560e-9),
    ],
)
def test_the_scan_takes_as_long_as_its_slowest_part(figure, bound, seconds):
    step = Roofline(device(**figure), MODEL).step(method("paper-2"), 1024, 1)
    assert (step.scan_bound, step.scan) == (bound, pytest.approx(seconds))


def test_a_step_waits_only_for_the_part_of_a_prefetch_it_cannot_hide():
    slow = Roofline(device(link_gb_per_s=1e-4), MODEL).step(method("paper-2"), 1024, 1)
    rest = slow.weights + slow.compute - slow.compute_hidden + slow.scan + slow.attend
    assert slow.fetch > rest
    assert slow.fetch_hidden == pytest.approx(rest)
    assert slow.total == pytest.approx(slow.fetch)


@pytest.mark.parametrize(
    ("policy", "waited"), [("verified", WAITED_FOR), ("on-demand", 1.0), ("speculative", 0.0), ("previous", 0.0)]
)
def test_each_policy_waits_for_its_share_of_the_fetch(policy, waited):
    step = HAND.step(method("specache-2", policy=policy), 1024, 1)
    assert step.fetch - step.fetch_hidden == pytest.approx(waited * step.fetch)
    assert step.fetch > 0


def test_kivi_fetches_nothing_and_decodes_one_row():
    step = HAND.step(method("kivi-2"), 1024, 1)
    assert step.fetch == 0
    assert step.compute == pytest.approx(1e-3)
    assert step.attend == pytest.approx((128 * 256 + 2 * 896 * 4 * 2) * 1e-9)


def test_a_disk_needs_a_bandwidth_and_reads_whole_blocks():
    on_disk = method("specache-2", slow_tier="disk:/nowhere", top_k=64)
    with pytest.raises(ConfigError, match="disk_gb_per_s"):
        HAND.step(on_disk, 1024, 1)
    step = Roofline(device(disk_gb_per_s=0.001), MODEL).step(on_disk, 1024, 1)
    rows = int(64 * 256 * 0.47) // 256
    assert step.fetch == pytest.approx(rows * 4096 / 1e6, rel=0.02)


def test_half_the_efficiency_takes_twice_the_time():
    halved = replace(DEVICE.efficiency, memory=0.5)
    slow = Roofline(device(efficiency=halved), MODEL).step(method("full"), 1000, 2)
    assert slow.scan == pytest.approx(2 * 512e-6)
    assert slow.weights == pytest.approx(2e-3)


@pytest.mark.parametrize("key", ["full", "kivi-2", "kivi-1", "paper-2", "paper-1", "specache-2", "specache-1"])
def test_a_longer_context_or_larger_batch_takes_no_less_time(key):
    times = [HAND.step(method(key), tokens, 1).total for tokens in range(64, 20_000, 640)]
    batches = [HAND.step(method(key), 4096, batch).total for batch in range(1, 40)]
    assert times == sorted(times)
    assert batches == sorted(batches)


def test_compared_methods_share_top_k_and_differ_in_bits_and_residual():
    from specache.config import SpeCacheConfig

    found = {one.key: one for one in methods(SpeCacheConfig(top_k=32, bits=4).resolved("cuda"))}
    assert list(found) == ["full", "kivi-2", "kivi-1", "paper-2", "paper-1", "specache-4", "specache-2", "specache-1"]
    assert found["paper-1"].config.top_k == 32
    assert found["kivi-2"].config.residual == 128
    assert found["specache-2"].kernels == THIS_LIBRARY
    assert found["specache-2"].selecting_rows == found["specache-2"].rows == 2
    assert (found["paper-2"].rows, found["paper-2"].selecting_rows) == (2, 1)
    assert not found["kivi-2"].keeps_slow
    full = methods(SpeCacheConfig(policy=Policy.FULL).resolved("cuda"))
    assert [one.key for one in full] == ["full", "kivi-2", "kivi-1", "paper-2", "paper-1"]


def test_a_step_time_can_be_written_as_json():
    document = HAND.step(method("paper-2"), 1024, 1).to_dict()
    assert json.loads(json.dumps(document)) == document
    parts = ("weights", "compute", "scan", "attend", "fetch", "overhead")
    assert document["total_ms"] == pytest.approx(sum(document[f"{part}_ms"] for part in parts) - document["hidden_ms"])


def test_kernels_with_more_passes_take_longer():
    ours = method("specache-2")
    twice = replace(ours, kernels=KernelCounts(2, 8, 2, 2, 6))
    assert HAND.step(twice, 4096, 1).attend > 1.5 * HAND.step(ours, 4096, 1).attend
