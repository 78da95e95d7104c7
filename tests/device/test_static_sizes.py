"""What a static batch claims of fast memory is what it allocates, and what the roofline planner
says without one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import specache
from specache.device.batch import DeviceBatch
from specache.device.static_sizes import batch_bytes, row_room
from specache.engine import static_decoder
from specache.model.dimensions import dimensions_of
from specache.planning.footprint import CacheFootprint, PlannedSequence
from specache.planning.plan import plan
from specache.planning.roofline.capacity import Capacity
from specache.planning.roofline.compared_methods import Method
from specache.planning.roofline.device_file import known_devices
from specache.planning.roofline.kernel_costs import THIS_LIBRARY
from specache.planning.roofline.static_step import static_step_bytes
from specache.tiers.layer_rows import GrowingRows
from tests.device.static_running import answer, config, static_steps
from tests.engine.test_model_families import FAMILIES, build
from tests.tiny import llama, prompt

pytestmark = pytest.mark.usefixtures("torch_kernels")


@pytest.fixture
def batches(monkeypatch):
    """Every static batch that is made, and the budget it was made with."""
    made = []
    init = DeviceBatch.__init__

    def noted(self, sequences, settings, size, streams, budget):
        init(self, sequences, settings, size, streams, budget)
        made.append((self, budget))

    monkeypatch.setattr(DeviceBatch, "__init__", noted)
    return made


LONG = {"long_top_k": 20, "long_from": 100}


def own_tensors(batch: DeviceBatch) -> list[torch.Tensor]:
    """Those that only the batch holds, but for residuals and hot sets."""
    tensors = [batch.inputs._buffer, batch.lengths, batch.hits, batch.counters.totals]
    tensors += [batch._addresses, batch.finite]
    for buffers in batch._buffers.values():
        tensors += buffers.tensors
    for state in batch.layers.values():
        tensors += [state.next_positions, state.used_positions]
        tensors += [] if state.row_fetcher is None else [state.row_fetcher._ahead, state.row_fetcher._ahead_slots]
        tensors += [] if state.key_scales is None else [state.key_scales]
    return tensors


@pytest.mark.parametrize("code", ["kivi", "rotated"])
@pytest.mark.parametrize(
    ("lengths", "changes"),
    [
        ((150, 97), {}),
        ((60,), {"top_k": 3, "hot_set": 0.3}),
        ((80, 80, 80), {"policy": "on-demand"}),
        ((150, 97), {"long_top_k": 20, "long_from": 100}),
    ],
)
def test_a_batch_claims_what_it_allocates(monkeypatch, batches, code, lengths, changes):
    settings = config(code=code, **changes)
    with static_steps(monkeypatch):
        answer(llama(num_hidden_layers=2), settings, lengths, 4)
    batch, budget = batches[0]
    assert batch._claim.budget is budget
    assert batch._claim.size == sum(tensor.nbytes for tensor in own_tensors(batch))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "changes", [{}, {"top_k": 3, "hot_set": 0.3}, {"code": "kivi", "policy": "on-demand"}, {"policy": "none"}, LONG]
)
def test_the_planner_counts_the_same(monkeypatch, batches, family, changes):
    """Of a batch of equal sequences that are as long as they were planned."""
    settings, length = config(**changes), 180
    model = build(*FAMILIES[family])
    ids = torch.cat([prompt(length), prompt(length, seed=1)])
    with static_steps(monkeypatch, capacity_step=4096):
        cache = specache.SpeCache(model, settings)
        specache.generate(model, ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
    batch = batches[0][0]
    dimensions = cache.resources.dimensions
    held = batch._claim.size + sum(rows.hot.nbytes for rows in batch._fetchers)
    ordinary = 2 * CacheFootprint(dimensions, cache.config, 2, batch.top_k).first_step(PlannedSequence(length)).hot_set
    assert static_step_bytes(dimensions, cache.config, length, 2) == held - ordinary


def test_methods_without_such_a_step_need_nothing_for_it(monkeypatch, batches):
    settings = config()
    with static_steps(monkeypatch):
        cache = answer(llama(num_hidden_layers=2), settings, (150,), 2).past_key_values
    gpu = Capacity(next(iter(known_devices().values())), cache.resources.dimensions)
    own, paper = Method("own", "own", cache.config, True, THIS_LIBRARY), Method("paper", "paper", cache.config, True)
    assert gpu.bytes(own, 150, 1).static > 0
    assert gpu.bytes(paper, 150, 1).static == 0
    assert gpu.bytes(own, settings.residual + settings.group_size - 1, 1).static == 0


def test_sizes_are_additive():
    """Twice the layers of one shape share one step's buffers."""
    one, two, other = (batch_bytes(shapes, 0, 3, 8, 128, 2, 2) for shapes in ([(2, 64)], [(2, 64)] * 2, [(2, 64), (4, 64)]))
    shared = batch_bytes([(2, 64)] * 3, 0, 3, 8, 128, 2, 2) - two
    assert two - one == shared < other - one


def test_a_prompts_rows_have_room_for_its_batch_from_the_start(monkeypatch):
    """So they are not copied to larger memory when the first step attaches the sequence."""
    model, grown = llama(), []
    make_room = GrowingRows.make_room

    def watched(self: GrowingRows, start: int, stop: int, expected: int = 0) -> None:
        before = self.capacity
        make_room(self, start, stop, expected)
        if before and self.capacity > before:
            grown.append((before, self.capacity))

    monkeypatch.setattr(GrowingRows, "make_room", watched)
    with static_steps(monkeypatch) as steps:
        answer(model, config(), (90,), 20)
    assert steps and not grown
    settings = config().resolved("cuda")
    assert row_room(settings, 90, 64) >= 90 + 20
    assert row_room(settings, 90) == 4096 + settings.residual + settings.group_size


def test_a_plan_for_a_gpu_counts_the_room_of_the_rows():
    dimensions = replace(dimensions_of(llama()), device="cuda")
    settings = config().resolved("cuda")
    slow = plan(dimensions, settings, [PlannedSequence(90, 20)]).slow
    assert slow == row_room(settings, 110) * sum(layer.row_bytes(dimensions.itemsize) for layer in dimensions.full_layers)


def test_more_heads_than_a_grid_has_take_the_ordinary_step(monkeypatch):
    model = llama()
    monkeypatch.setattr(static_decoder, "HEADS_OF_BATCH", 2 * 2 - 1)  # two sequences of two heads are one too many
    with static_steps(monkeypatch) as steps:
        answer(model, config(), (90,), 4)
        assert steps
        steps.clear()
        answer(model, config(), (90, 80), 4)
        assert not steps
