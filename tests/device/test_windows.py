"""Hybrid models: static steps compute sliding-window layers as ordinary steps do."""

from __future__ import annotations

import pytest
import torch

import specache
from specache.attention.decode import StepKind
from specache.device.windows import hidden_slots
from specache.errors import NonFiniteError
from tests.device.simulated_graph import SimulatedGraphs
from tests.device.static_running import answer, assert_equal, config, continued, static_steps
from tests.engine.test_model_families import FAMILIES, build
from tests.tiny import ragged

pytestmark = pytest.mark.usefixtures("torch_kernels")
LENGTHS, NEW = (60, 40), 30  # past the window, which is of 24 tokens; the ring wraps around once more


@pytest.fixture(scope="module", params=["gemma3", "gemma2", "gpt-oss"])
def hybrid(request):
    """Without and with soft caps; with sinks."""
    return build(*FAMILIES[request.param])


@pytest.mark.parametrize("policy", ["verified", "on-demand", "previous"])
def test_static_steps_with_windows_give_the_ordinary_tokens_and_logits(hybrid, monkeypatch, policy):
    settings = config(policy=policy)
    eager = answer(hybrid, settings, LENGTHS, NEW)
    # Gemma 2 creates a host scalar in every step, which the simulation takes for a device tensor
    graphs = None if hybrid.config.model_type == "gemma2" else SimulatedGraphs()
    with static_steps(monkeypatch, graphs=lambda device: graphs) as steps:
        static = answer(hybrid, settings, LENGTHS, NEW)
    assert_equal(static, eager)
    assert steps == [2] * (NEW - 1)
    assert graphs is None or graphs.replays


@pytest.mark.parametrize("policy", ["verified", "on-demand"])
def test_steps_before_a_window_is_full_equal_the_ordinary_ones(monkeypatch, policy):
    """A ring that has never been filled, and one that is while the batch decodes."""
    family, changes = FAMILIES["gemma3"]
    model = build(family, {**changes, "sliding_window": 64})
    eager = answer(model, config(policy=policy), (45, 34), 40)
    with static_steps(monkeypatch) as steps:
        static = answer(model, config(policy=policy), (45, 34), 40)
    assert_equal(static, eager)
    assert steps


@pytest.mark.parametrize("fills", [True, False])
def test_steps_under_autocast_give_the_ordinary_tokens(monkeypatch, fills):
    """Queries and values are bfloat16 there, keys float32; the cache may be filled outside."""
    model, (ids, _) = build(*FAMILIES["gemma3"]), ragged(*LENGTHS)

    def begun_and_continued():
        cache = specache.SpeCache(model, config())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fills):
            begun = continued(model, cache, ids, LENGTHS, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return continued(model, cache, begun.sequences, LENGTHS, 8)

    eager = begun_and_continued()
    with static_steps(monkeypatch) as steps:
        static = begun_and_continued()
    assert_equal(static, eager, limit=0.02)
    assert steps


def test_detached_sequences_have_their_whole_state(hybrid, monkeypatch):
    """A conversation goes on with ordinary steps, on a fork too, as if there had been no others."""
    settings = config()
    with static_steps(monkeypatch):
        static = answer(hybrid, settings, LENGTHS, NEW)
    eager = answer(hybrid, settings, LENGTHS, NEW)
    for one, other in zip(static.past_key_values.sequences, eager.past_key_values.sequences, strict=True):
        for index, layer in one.sliding.items():
            assert layer.length == other.sliding[index].length == one.length
            torch.testing.assert_close(layer.ring, other.sliding[index].ring, atol=1e-5, rtol=1e-5)
    caches = [each.past_key_values for each in (static, eager)]
    for ours, theirs in ([cache.fork() for cache in caches], caches):
        assert_equal(continued(hybrid, ours, static.sequences, LENGTHS, 8), continued(hybrid, theirs, eager.sequences, LENGTHS, 8))


@pytest.mark.parametrize("failing", [2, 9])
def test_a_step_that_is_not_finite_leaves_the_windows_as_they_were(hybrid, monkeypatch, failing):
    sliding = next(index for index, kind in enumerate(hybrid.config.layer_types) if kind == "sliding_attention")

    def fails_and_goes_on():
        weight, calls = hybrid.model.layers[sliding].self_attn.v_proj.weight, []
        sound = weight.detach().clone()

        def spoil():
            calls.append(None)
            if len(calls) == failing:
                weight.data.fill_(torch.nan)

        cache = specache.SpeCache(hybrid, config())
        try:
            with pytest.raises(NonFiniteError, match=f"layer {sliding}") as raised:
                continued(hybrid, cache, ids, LENGTHS, 20, before_token=spoil)
        finally:
            weight.data.copy_(sound)
        assert all(sequence.length == length + failing - 1 for sequence, length in zip(cache.sequences, LENGTHS, strict=True))
        return continued(hybrid, cache, torch.cat([ids, torch.tensor(raised.value.new_token_ids)], dim=1), LENGTHS, 10)

    ids, _ = ragged(*LENGTHS)
    eager = fails_and_goes_on()
    graphs = None if hybrid.config.model_type == "gemma2" else SimulatedGraphs()
    with static_steps(monkeypatch, graphs=lambda device: graphs) as steps:
        static = fails_and_goes_on()
    assert len(steps) == failing - 1 + 9
    assert_equal(static, eager)


@pytest.mark.parametrize("kind", [StepKind.SINGLE, StepKind.PAIR])
@pytest.mark.parametrize("window", [1, 2, 5])
def test_queries_see_exactly_their_window(kind, window):
    """Every position against a list of what each slot holds."""
    positions = torch.arange(3 * window + 2)
    hidden = hidden_slots(positions, window, kind)
    for position in positions.tolist():
        holds = {token % window: token for token in range(max(0, position + 1 - window), position + 1)}
        for row in range(kind.queries):
            at = position + row
            seen = {slot for slot, token in holds.items() if at - window < token <= at}
            seen |= {window} if row else set()
            assert (~hidden[position, 0, 0, row if kind is StepKind.PAIR else 0]).nonzero().flatten().tolist() == sorted(seen)
