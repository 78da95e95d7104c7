"""Decode steps over static buffers equal the ordinary ones, and give the sequences back as those
would have left them.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import pytest
import torch

import specache
from specache import reference
from specache.cache.cache_context import CacheContext
from specache.device import page_kernels
from specache.device.step import StaticPass
from specache.engine import static_decoder
from specache.errors import NonFiniteError
from specache.tiers.main_memory import MainMemory
from specache.tiers.pinned import PinnedPool, pageable
from specache.tiers.streams import Queue
from tests.cache.test_invariants import a_code_turned, run
from tests.device.simulated import SimulatedStreams, orders
from tests.device.simulated_graph import SimulatedGraphs
from tests.device.static_running import answer, assert_equal, config, continued, static_steps
from tests.engine.test_model_families import DYNAMIC, FAMILIES, LONGROPE, build
from tests.tiny import FETCHING, llama, prompt, ragged

pytestmark = pytest.mark.usefixtures("torch_kernels")
POLICIES = (*FETCHING, "none")
LONGER = {"long_top_k": 20, "long_from": 64}  # both sequences select more pairs in the end


@pytest.fixture(scope="module")
def model():
    return llama(num_hidden_layers=2)


@pytest.fixture(scope="module")
def ordinary(model):
    """An ordinary answer to (150, 97) tokens, once for all orders of the static steps' queues."""
    return lru_cache(lambda settings, new: answer(model, settings, (150, 97), new))


@pytest.mark.parametrize("code", ["kivi", "rotated"])
@pytest.mark.parametrize("policy", POLICIES)
def test_static_steps_give_the_ordinary_tokens_and_logits(model, monkeypatch, policy, code):
    """Sequences of different lengths quantise groups, evict slots and outgrow the buffers."""
    settings = config(policy=policy, code=code)
    eager = answer(model, settings, (150, 97), 40)
    with static_steps(monkeypatch) as steps:
        static = answer(model, settings, (150, 97), 40)
    assert_equal(static, eager)
    assert steps == [2] * 39


@pytest.mark.parametrize("policy", FETCHING)
def test_a_sequence_that_becomes_long_beside_a_longer_one_gives_the_ordinary_tokens_and_logits(model, monkeypatch, policy):
    settings = config(policy=policy, long_top_k=24, long_from=100)
    eager = answer(model, settings, (150, 97), 40)
    with static_steps(monkeypatch) as steps:
        static = answer(model, settings, (150, 97), 40)
    assert_equal(static, eager)
    assert steps == [2] * 39


@pytest.mark.parametrize("code", ["kivi", "rotated"])
@pytest.mark.parametrize("policy", POLICIES)
def test_logits_equal_the_references(model, monkeypatch, policy, code):
    settings = config(policy=policy, code=code, prefill_chunk=4096)
    expected = reference.generate(model, prompt(150), settings, 40)
    with static_steps(monkeypatch) as steps, specache.SpeCache(model, settings) as cache:
        tokens, logits, _ = run(model, prompt(150), settings, 40, expected.tokens, cache)
        turned = a_code_turned(cache, expected)
    assert tokens == expected.tokens and steps == [1] * 39
    assert (logits - expected.logits).abs().max() < (5e-3 if turned else 1e-3)


@pytest.mark.parametrize(
    "changes", [{"bits": 4, "group_size": 32, "residual": 7}, {"bits": 1, "hot_set": 0.0}, {"top_k": 10**6}, LONGER]
)
def test_static_steps_equal_the_ordinary_ones_in_other_layouts(model, monkeypatch, changes):
    settings = config(**changes)
    eager = answer(model, settings, (100, 60), 20)
    with static_steps(monkeypatch) as steps:
        static = answer(model, settings, (100, 60), 20)
    assert_equal(static, eager)
    assert steps


@pytest.mark.parametrize(("order", "seed"), orders(seeds=1))
def test_missing_rows_may_come_on_the_copy_queue(model, ordinary, monkeypatch, order, seed):
    settings = config(cuda_reads="copy", hot_set=0.0)
    eager = ordinary(settings, 12)
    streams = SimulatedStreams(order, seed)
    run, on_the_copy_queue = streams.run, []

    def noted(queue, work):
        on_the_copy_queue.append(queue is Queue.COPY and work.__name__ == "_read_missing")
        run(queue, work)

    monkeypatch.setattr(streams, "run", noted)
    with static_steps(monkeypatch, streams=lambda device: streams):
        static = answer(model, settings, (150, 97), 12)
    assert_equal(static, eager)
    assert any(on_the_copy_queue)


@pytest.mark.parametrize("kind", ["gemma2", "gpt-oss"])
def test_soft_caps_and_sinks_give_the_ordinary_tokens(monkeypatch, kind):
    family, changes = FAMILIES[kind]
    model = build(family, {**changes, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
    eager = answer(model, config(), (60,), 12)
    with static_steps(monkeypatch) as steps:
        static = answer(model, config(), (60,), 12)
    assert_equal(static, eager)
    assert steps


@pytest.mark.parametrize(("order", "seed"), orders(seeds=2))
def test_the_copy_queue_may_be_early_or_late(model, ordinary, monkeypatch, order, seed):
    """Also with rows that are still on their way to the slow tier."""
    settings = config()
    eager = ordinary(settings, 20)
    streams = SimulatedStreams(order, seed)
    memory = MainMemory(streams, PinnedPool(block_bytes=1 << 20, allocate=pageable))
    monkeypatch.setattr(CacheContext, "new_tier", lambda context: memory.new_tier())
    with static_steps(monkeypatch, streams=lambda device: streams):
        static = answer(model, settings, (150, 97), 20)
    assert_equal(static, eager)


@pytest.mark.parametrize(("lengths", "served"), [((60,), 23), ((92,), 21), ((101, 140), 23), ((80, 140), 4)])
def test_long_rope_on_either_side_of_its_switch(monkeypatch, lengths, served):
    """At 100 tokens a sequence is prefilled anew. While a batch has sequences on both sides, its
    steps are the ordinary ones.
    """
    changes = {"sliding_window": None, "rope_parameters": LONGROPE, "original_max_position_embeddings": 100}
    model = build("Phi3", changes)
    eager = answer(model, config(), lengths, 24)
    with static_steps(monkeypatch, graphs=lambda device: SimulatedGraphs()) as steps:
        static = answer(model, config(), lengths, 24)
    assert_equal(static, eager)
    assert len(steps) == served


def test_with_dynamic_rope_steps_are_the_ordinary_ones(monkeypatch):
    model = build("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 100})
    eager = answer(model, config(), (90,), 24)
    with static_steps(monkeypatch) as steps, pytest.warns(RuntimeWarning, match="with dynamic RoPE every position"):
        static = answer(model, config(cuda_graph=True), (90,), 24)
    assert_equal(static, eager)
    assert steps == []


def test_a_short_sequence_begins_with_ordinary_steps(model, monkeypatch):
    """A sequence without fixed key scales cannot use static buffers yet."""
    settings = config()
    eager = answer(model, settings, (20,), 40)
    with static_steps(monkeypatch) as steps:
        static = answer(model, settings, (20,), 40)
    assert_equal(static, eager)
    assert steps == [1] * (39 - (16 + 16 - 20))


@pytest.mark.parametrize("policy", POLICIES)
def test_statistics_are_the_ordinary_ones(model, monkeypatch, policy):
    """Of one sequence: the slots of a batch's hot set are shared out evenly, those of ordinary
    steps by length.

    A batch begins without the rows of pre-decoding, and fetches those of its selection once more.
    """
    eager = answer(model, config(policy=policy), (150,), 20).past_key_values.stats()
    with static_steps(monkeypatch, capacity_step=256):
        static = answer(model, config(policy=policy), (150,), 20).past_key_values.stats()
    for name in ("rows_selected", "guess_rate", "fast_bytes"):
        assert static[name] == eager[name], name
    once_more = 2 * 2 * 8 * 2 * 16 * 4  # layers, heads, pairs, keys and values, channels, bytes
    assert eager["bytes_fetched"] <= static["bytes_fetched"] <= eager["bytes_fetched"] + 2 * once_more
    if policy == "none":
        assert static["rows_selected"] == static["bytes_fetched"] == 0
    if policy == "on-demand":
        assert static["rows_ready"] == eager["rows_ready"]


@pytest.mark.parametrize("policy", POLICIES)
def test_detached_sequences_have_their_whole_state(model, monkeypatch, policy):
    """A conversation goes on with ordinary steps, on a fork too, as if there had been no others."""
    settings = config(policy=policy)
    with static_steps(monkeypatch):
        static = answer(model, settings, (150, 97), 25)
    eager = answer(model, settings, (150, 97), 25)
    for one, other in zip(static.past_key_values.sequences, eager.past_key_values.sequences, strict=True):
        assert one.token_ids == other.token_ids
        for index, layer in one.compressed.items():
            assert layer.length == other.layers[index].length == one.length
            for ours, theirs in zip(one.tier.read(index, 0, one.length), other.tier.read(index, 0, one.length), strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer.residual_keys, other.layers[index].residual_keys, atol=1e-5, rtol=1e-5)
    for ours, theirs in ((static.past_key_values.fork(), eager.past_key_values.fork()), (static, eager)):
        caches = [getattr(each, "past_key_values", each) for each in (ours, theirs)]
        assert_equal(
            continued(model, caches[0], static.sequences, (150, 97), 12),
            continued(model, caches[1], eager.sequences, (150, 97), 12),
        )


def test_sequences_that_end_leave_the_batch(model, monkeypatch):
    settings = config()
    ends = int(answer(model, settings, (150, 97), 12).sequences[1, -1])
    eager = answer(model, settings, (150, 97), 40, eos_token_id=ends)
    with static_steps(monkeypatch, graphs=lambda device: SimulatedGraphs()) as steps:
        static = answer(model, settings, (150, 97), 40, eos_token_id=ends)
    assert_equal(static, eager)
    assert {1, 2} == set(steps)


class _Spoiled(Exception):
    pass


@pytest.mark.parametrize("policy", ["verified", "speculative"])
@pytest.mark.parametrize("failing", [2, 9])  # the step that is captured, and one that is replayed
def test_a_step_that_is_not_finite_leaves_the_sequences_as_they_were(model, monkeypatch, policy, failing):
    def fails_and_goes_on():
        weight, calls = model.model.layers[1].self_attn.v_proj.weight, []
        sound = weight.detach().clone()

        def spoil():
            calls.append(None)
            if len(calls) == failing:
                weight.data.fill_(torch.nan)

        cache = specache.SpeCache(model, config(policy=policy))
        try:
            with pytest.raises(NonFiniteError, match="layer 1") as raised:
                continued(model, cache, ids, (150, 97), 20, before_token=spoil)
        finally:
            weight.data.copy_(sound)
        kept = raised.value.new_token_ids
        assert [len(each) for each in kept] == [failing] * 2
        assert all(sequence.length == length + failing - 1 for sequence, length in zip(cache.sequences, (150, 97), strict=True))
        return continued(model, cache, torch.cat([ids, torch.tensor(kept)], dim=1), (150, 97), 10)

    ids, _ = ragged(150, 97)
    eager = fails_and_goes_on()
    with static_steps(monkeypatch, graphs=lambda device: SimulatedGraphs()) as steps:
        static = fails_and_goes_on()
    assert len(steps) == failing - 1 + 9
    assert_equal(static, eager)


@pytest.mark.parametrize("policy", ["verified", "speculative"])
def test_an_exception_in_the_middle_of_a_step_undoes_it(model, monkeypatch, policy):
    """Compared with ordinary steps that fail at the same place."""

    def fails_and_goes_on(owner, name, at):
        whole, calls = getattr(owner, name), []

        def fails_once(*arguments):
            calls.append(None)
            if len(calls) == at:  # after the first layer of a step
                raise _Spoiled
            return whole(*arguments)

        cache = specache.SpeCache(model, config(policy=policy))
        specache.prefill(model, prompt(150), cache=cache)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails_once)
            with pytest.raises(_Spoiled):
                continued(model, cache, prompt(150), (150,), 20)
        ids = torch.tensor([[*cache.sequences[0].token_ids, 5]])
        return continued(model, cache, ids, (ids.shape[1],), 10)

    with static_steps(monkeypatch) as steps:
        static = fails_and_goes_on(StaticPass, "attention", 12)
    eager = fails_and_goes_on(specache.engine.forward_pass.DecodePass, "attention", 14)  # pre-decoding too
    assert steps
    assert_equal(static, eager)


def test_without_room_steps_are_the_ordinary_ones(model, monkeypatch):
    eager = answer(model, config(), (150,), 10)
    with specache.SpeCache(model, config()) as cache:
        specache.prefill(model, prompt(150), cache=cache)
        specache.generate(model, prompt(150), past_key_values=cache, max_new_tokens=10, do_sample=False)
        needed = cache.stats()["fast_memory_peak_bytes"]
    with static_steps(monkeypatch, capacity_step=1 << 16) as steps, pytest.warns(RuntimeWarning, match="without static buffers"):
        static = answer(model, config(fast_memory=needed + 1000), (150,), 10)
    assert_equal(static, eager)
    assert steps == []


@pytest.mark.parametrize("where", ["score", "attend"])
def test_out_of_memory_leaves_the_ordinary_steps(model, monkeypatch, where):
    eager = answer(model, config(), (100,), 12)
    works, calls = getattr(page_kernels.TorchPages, where), []

    def fails_late(*arguments):
        calls.append(where)
        if len(calls) == 8:  # the second layer of the fourth step
            raise torch.OutOfMemoryError("CUDA out of memory")
        return works(*arguments)

    monkeypatch.setattr(page_kernels.TorchPages, where, fails_late)
    with static_steps(monkeypatch) as steps, pytest.warns(RuntimeWarning, match="its static buffers were freed"):
        static = answer(model, config(), (100,), 12)
    assert_equal(static, eager)
    assert len(steps) == 3 and len(calls) == 8


def test_no_memory_for_the_buffers_leaves_the_ordinary_steps(model, monkeypatch):
    def refused(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    eager = answer(model, config(), (100,), 6)
    monkeypatch.setattr("specache.device.batch.page_kernels", refused)
    with static_steps(monkeypatch) as steps, pytest.warns(RuntimeWarning, match="without static buffers"):
        static = answer(model, config(), (100,), 6)
    assert_equal(static, eager)
    assert steps == []


def test_a_kernel_that_cannot_be_built_leaves_the_ordinary_steps(model, monkeypatch):
    class Unbuilt(Exception):
        pass

    def score(*arguments):
        raise Unbuilt("ptxas")

    eager = answer(model, config(), (100,), 6)
    monkeypatch.setattr(page_kernels, "build_errors", lambda device: (Unbuilt,))
    monkeypatch.setattr(page_kernels.TorchPages, "score", score)
    with static_steps(monkeypatch) as steps, pytest.warns(RuntimeWarning, match="could not be built"):
        static = answer(model, config(), (100,), 6)
    assert_equal(static, eager)
    assert steps == []


def test_what_is_not_served_is_named_where_it_was_asked_for(model, monkeypatch, tmp_path):
    settings = config(slow_tier=f"disk:{tmp_path}", cuda_graph=True)
    with static_steps(monkeypatch) as steps, pytest.warns(RuntimeWarning, match="slow tier 'disk'"):
        answer(model, settings, (60,), 5).past_key_values.close()
    assert steps == []


def test_what_static_steps_do_not_support_runs_on_pytorch_and_says_so_once(model, monkeypatch, tmp_path):
    settings = config(slow_tier=f"disk:{tmp_path}")
    static_decoder._warn_once.cache_clear()  # another test may have been told
    with static_steps(monkeypatch) as steps:
        with pytest.warns(RuntimeWarning, match="PyTorch operations, slower .*: the 16-bit pairs are in slow tier 'disk'"):
            answer(model, settings, (90,), 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            answer(model, settings, (90,), 4)
            answer(model, config(policy="full"), (90,), 4)
    assert steps == []


def test_on_a_cpu_a_graph_that_was_asked_for_is_refused_by_name(model):
    with pytest.warns(RuntimeWarning, match="cuda_graph is on, but decode steps are not captured: the model is on 'cpu'"):
        answer(model, config(cuda_graph=True), (60,), 3)
