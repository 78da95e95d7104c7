"""Compiled decode steps: eager's tokens from one graph for all layers, at any length and size.

Most tests trace the graphs and run them as they are (PyTorch's backend `eager`), which takes no
compiler.
"""

from __future__ import annotations

import itertools
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import specache
from specache.engine import compiled_layers
from specache.engine.attention_hook import attached
from specache.errors import ConfigError, NonFiniteError, UnsupportedModelError
from specache.linear.weight_quant import WeightFormat, quantise_weights
from tests.engine.test_model_families import FAMILIES, build
from tests.model.identity.two_turns import adapted
from tests.tiny import llama, prompt, ragged

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
NEW = 20


def answer(model: Any, policy: str, *lengths: int, top_k: int = 8) -> Any:
    ids, mask = ragged(*lengths)
    config = specache.SpeCacheConfig(policy=policy, slow_tier="ram", residual=16, group_size=16, top_k=top_k)
    arguments = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return specache.generate(model, ids, attention_mask=mask, config=config, **arguments)


def assert_equal(ours: Any, eager: Any) -> None:
    assert torch.equal(ours.sequences, eager.sequences)
    assert (torch.stack(ours.logits) - torch.stack(eager.logits)).abs().max() < 1e-3


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No graphs of earlier tests, none that are compiled to C++, and an empty cache folder."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setenv("SPECACHE_CACHE", str(tmp_path))
    monkeypatch.setattr(compiled_layers.torch, "compile", partial(with_eager_backend, torch.compile))


def with_eager_backend(real: Any, function: Any, options: Any, recompile_limit: int) -> Any:
    return real(function, backend="eager", recompile_limit=recompile_limit)


def graphs() -> int:
    """Return the number of compiled graphs. Fail on a graph break, which would hide one."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def test_all_layers_of_a_ragged_batch_of_any_size_are_one_graph(fresh):
    eager = answer(llama(num_hidden_layers=4), "on-demand", 113, 150)
    model = llama(num_hidden_layers=4)
    specache.compile_decode(model)
    assert_equal(answer(model, "on-demand", 113, 150), eager)
    assert graphs() == 2  # one for several sequences, and one for when the other has ended
    answer(model, "on-demand", 40, 70, 130, 9)
    answer(model, "on-demand", 90)
    assert graphs() == 2


def test_draft_tokens_need_one_graph_per_number_of_tokens(fresh):
    eager = answer(llama(num_hidden_layers=2), "verified", 113)
    model = llama(num_hidden_layers=2)
    specache.compile_decode(model)
    assert_equal(answer(model, "verified", 113), eager)
    assert graphs() == 2  # pre-decoding has one token, a step two


def test_statistics_say_which_steps_were_compiled_and_policy_full_stays_eager(fresh):
    model = llama(num_hidden_layers=2)
    steps = [answer(model, "on-demand", 80)]
    specache.compile_decode(model)
    steps += [answer(model, policy, 80) for policy in ("on-demand", "full")]
    stats = [one.past_key_values.stats() for one in steps]
    assert [one["decode_steps"] for one in stats] == [NEW - 1] * 3
    assert [one["compiled_steps"] for one in stats] == [0, NEW - 1, 0]
    sequence = steps[1].past_key_values.sequences[0]
    assert (sequence.decode_steps, sequence.compiled_steps) == (NEW - 1, NEW - 1)


def test_a_model_shared_by_an_engine_that_is_attached_compiles_its_next_answers(fresh):
    model = llama(num_hidden_layers=2)
    with attached(model):
        specache.compile_decode(model)
        stats = answer(model, "on-demand", 80).past_key_values.stats()
    assert stats["compiled_steps"] == NEW - 1 and graphs() == 1
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


@pytest.mark.parametrize("weights", [WeightFormat.INT8, WeightFormat.INT4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantised_weights_compile_into_one_graph_too(fresh, weights, dtype):
    models = [llama(num_hidden_layers=2).to(dtype), llama(num_hidden_layers=2).to(dtype)]
    for model in models:
        quantise_weights(model, weights)
    specache.compile_decode(models[1])
    assert_equal(answer(models[1], "on-demand", 80), answer(models[0], "on-demand", 80))
    assert graphs() == 1


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])  # soft caps and sliding windows, sinks and experts
def test_compiled_softcaps_windows_sinks_and_experts_give_eagers_tokens(fresh, family):
    eager = answer(build(*FAMILIES[family]), "on-demand", 60, 90)
    model = build(*FAMILIES[family])
    specache.compile_decode(model)
    assert_equal(answer(model, "on-demand", 60, 90), eager)
    assert 2 <= graphs() <= 4  # sliding and full layers may differ


def test_a_compiled_step_follows_adapters_and_weights(fresh):
    """The model is compiled through a wrapper, and the model and the wrapper are passed in turn."""
    model = llama(num_hidden_layers=2)
    layers = adapted(model, "a", "b")
    wrapper = torch._dynamo.optimize("eager")(model)
    specache.compile_decode(wrapper)

    def activate(name: str) -> None:
        for layer in layers:
            layer.active_adapters = [name]

    changes = (
        lambda: None,
        lambda: activate("b"),
        lambda: layers[0].scaling.update(b=5.0),
        lambda: layers[1].base_layer.weight.data.mul_(3),
        lambda: setattr(layers[0], "base_layer", torch.nn.Linear(64, 32, bias=False)),
        lambda: activate("a"),
    )
    answers = []
    for change in changes:
        change()
        for each in (model, wrapper):
            ours = answer(each, "on-demand", 80, top_k=10**6)  # exact
            expected = model.generate(
                prompt(80), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            assert (ours.logits[1] - expected.logits[1]).abs().max() < 1e-3
        answers.append(ours.logits[1])
    assert counters["stats"]["unique_graphs"] > 1
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(answers))


def test_errors_inside_a_compiled_pass_keep_their_type(fresh, monkeypatch):
    model = llama(num_hidden_layers=2)
    specache.compile_decode(model)
    answer(model, "on-demand", 80)

    def fails(self: Any, *arguments: Any) -> None:
        raise NonFiniteError("infinity")

    monkeypatch.setattr("specache.engine.forward_pass.DecodePass.attention", fails)
    with pytest.raises(NonFiniteError, match="infinity"):
        answer(model, "on-demand", 80)


def test_a_layer_that_attends_twice_is_refused(fresh):
    model = llama(num_hidden_layers=2)
    attention = model.model.layers[1].self_attn
    once = attention.forward

    def twice(*arguments: Any, **settings: Any) -> Any:
        once(*arguments, **settings)
        return once(*arguments, **settings)

    attention.forward = twice
    specache.compile_decode(model)
    with pytest.raises(UnsupportedModelError, match="attends twice"):
        answer(model, "on-demand", 80)


def test_models_that_cannot_be_compiled_are_refused_with_the_reason(monkeypatch):
    with pytest.raises(ConfigError, match="dynamic RoPE"):
        specache.compile_decode(build(*FAMILIES["llama-dynamic-rope"]))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"neither g\+\+ nor clang\+\+"):
        specache.compile_decode(llama())
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(ConfigError, match="no icpx"):
        specache.compile_decode(llama())
