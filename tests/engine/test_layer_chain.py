"""All layers of a step in one call: the same bits as layer by layer, and whatever does not fit runs
layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import specache
from specache import reference
from specache.engine.attention_hook import attached, decode_forward
from specache.engine.compiled_layers import BlankPass
from specache.engine.traced import layer_chain, traced_layers, traced_pass
from specache.engine.traced.layer_chain import LayerChain
from specache.engine.traced.traced_layers import TracedLayers
from specache.errors import NonFiniteError
from specache.linear.weight_quant import WeightFormat, quantise_weights
from specache.platform import extension
from specache.tiers.disk import readers, tier_files
from specache.tiers.disk.probe import ReaderReport
from tests.engine.test_model_families import FAMILIES, build
from tests.tiny import llama, prompt, ragged

NEW = 30  # tokens: groups are quantised meanwhile
SETTINGS = {"policy": "on-demand", "slow_tier": "ram-inplace", "residual": 16, "group_size": 16, "top_k": 24}
pytestmark = pytest.mark.skipif(not extension.instruction_sets(), reason=f"no C++ kernels: {extension.IMPORT_ERROR}")


@pytest.fixture(autouse=True)
def through_io_uring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk only these reads run in chains, and a busy machine may measure others as faster."""
    try:
        readers.release(readers.lease("io_uring", False, 4096))
    except OSError as error:
        if "disk" in request.node.name:
            pytest.skip(f"no io_uring here: {error}")
        return
    monkeypatch.setattr(tier_files, "report_for", lambda folder: ReaderReport("io_uring", False, 4096))


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers each chain ran that was called."""
    ran: list[int] = []
    call = LayerChain.call

    def counted(self: LayerChain, *arguments: Any) -> Any:
        outcome = call(self, *arguments)
        ran.append(outcome[0])
        return outcome

    monkeypatch.setattr(LayerChain, "call", counted)
    return ran


def answer(model: Any, *lengths: int, cache: Any = None, tokens: int = NEW, **changes: Any) -> Any:
    """Return tokens, logits, and the cache of an answer."""
    ids, mask = ragged(*(lengths or (113,)))
    cache = specache.SpeCache(model, specache.SpeCacheConfig(**{**SETTINGS, **changes})) if cache is None else cache
    arguments = {"max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = specache.generate(model, ids, attention_mask=mask, past_key_values=cache, **arguments)
    return out.sequences, torch.stack(out.logits), cache


def one_by_one(model: Any, *lengths: int, **changes: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TracedLayers, "chain", lambda self, shape: None)
        return answer(model, *lengths, **changes)


def assert_as_one_by_one(model: Any, *lengths: int, **changes: Any) -> Any:
    expected, ours = one_by_one(model, *lengths, **changes), answer(model, *lengths, **changes)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    counted = ("rows_selected", "rows_ready", "bytes_fetched", "decode_steps", "traced_steps", "guess_rate")
    found, wanted = ours[2].stats(), expected[2].stats()
    assert {name: found[name] for name in counted} == {name: wanted[name] for name in counted}
    return ours


@pytest.mark.parametrize("tier", ["ram-inplace", "ram", "disk"])
@pytest.mark.parametrize("policy", ["on-demand", "verified"])
@pytest.mark.parametrize("lengths", [(113,), (60, 113, 90)])
def test_an_answer_has_the_bits_of_layers_one_by_one(tier, policy, lengths, chains, tmp_path):
    folder = {"slow_dir": str(tmp_path)} if tier == "disk" else {}
    assert_as_one_by_one(llama(), *lengths, policy=policy, slow_tier=tier, hot_set=0.5, **folder)
    assert len(chains) > NEW // 2 and set(chains) == {3}


@pytest.mark.parametrize("tier", ["ram-inplace", "ram", "disk"])
@pytest.mark.parametrize("policy", ["on-demand", "verified"])
def test_a_chain_that_fetches_everything_computes_what_the_reference_does(tier, policy, chains, tmp_path):
    """With fewer pairs the kernels' rounded queries may choose others than the reference."""
    folder = {"slow_dir": str(tmp_path)} if tier == "disk" else {}
    changes = {"policy": policy, "slow_tier": tier, "top_k": 10**6, **folder}
    model = llama()
    tokens, logits, _ = answer(model, **changes)
    expected = reference.generate(model, prompt(113), specache.SpeCacheConfig(**{**SETTINGS, **changes}), NEW)
    assert len(chains) > NEW // 2
    assert tokens[0, 113:].tolist() == expected.tokens
    assert (logits[:, 0] - expected.logits).abs().amax() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [None, WeightFormat.INT8, WeightFormat.INT4])
@pytest.mark.parametrize("code", ["kivi", "rotated"])
def test_every_dtype_and_weight_format_runs_in_chains(dtype, weights, code, chains):
    model = llama().to(dtype)
    if weights is not None:
        quantise_weights(model, weights)
    assert_as_one_by_one(model, code=code, policy="verified", slow_tier="ram", bits=1)
    assert len(chains) > NEW // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_have_the_same_bits(family, chains):
    model = build(*FAMILIES[family])
    expected, ours = one_by_one(model), answer(model)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
    assert chains or family not in ("llama", "qwen3", "mistral")


@pytest.mark.parametrize("policy", ["speculative", "previous", "none"])
def test_policies_that_take_several_calls_per_layer_do_not_chain(policy, chains):
    answer(llama(), policy=policy, slow_tier="ram")
    assert not chains


def test_a_step_without_attention_runs_in_a_chain_too(chains):
    """With which benchmarks measure what a step takes beside its attention."""
    model = llama()
    ids, positions = prompt(1), torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad(), attached(model):
        layers = traced_layers.begin_answer(model)
        logits = [decode_forward(model, ids, positions, BlankPass(), layers=layers) for _ in range(3)]
    assert chains == [3, 3]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[1], logits[2])


def test_a_short_prompt_chains_once_its_residual_is_observed(chains):
    assert_as_one_by_one(llama(), 5, tokens=60, code="rotated")
    assert 0 < len(chains) < 60


def test_another_cache_and_another_thread_use_the_same_chain(chains):
    model = llama()
    answer(model)
    known = traced_layers.layers_of(model)._chains
    before = dict(known)
    assert_as_one_by_one(model, 40, policy="verified", slow_tier="ram")
    assert all(known[shape] is chain for shape, chain in before.items())


def layer_of(model: Any) -> nn.Module:
    return model.model.layers[1]


def on_a_layer(hook: Any, model: Any) -> Any:
    return layer_of(model).register_forward_hook(hook)


def on_all_modules(hook: Any, model: Any) -> Any:
    layer = type(layer_of(model))
    return nn.modules.module.register_module_forward_hook(
        lambda module, args, out: hook(module, args, out) if type(module) is layer else None
    )


@pytest.mark.parametrize("register", [on_a_layer, on_all_modules])
def test_a_hook_is_noticed_in_the_middle_of_an_answer(register, chains):
    """Also one that changes hidden states in place."""

    def steer(module: nn.Module, args: Any, out: Any) -> None:
        (out[0] if isinstance(out, tuple) else out).mul_(2)

    class Hooking:
        """A streamer that registers a hook at the sixth token."""

        def __init__(self, model: Any) -> None:
            self.model, self.ran, self.handle = model, [], None

        def put(self, value: Tensor) -> None:
            self.ran.append(len(chains))
            if len(self.ran) == 6:
                self.handle = register(steer, self.model)

        def end(self) -> None:
            self.handle.remove()

    def streamed(chained: bool) -> tuple[Tensor, list[int]]:
        model = llama()
        cache, hooking = specache.SpeCache(model, specache.SpeCacheConfig(**SETTINGS)), Hooking(model)
        with pytest.MonkeyPatch.context() as patch:
            if not chained:
                patch.setattr(TracedLayers, "chain", lambda self, shape: None)
            ids = prompt(60)
            return specache.generate(
                model, ids, past_key_values=cache, max_new_tokens=12, do_sample=False, streamer=hooking
            ), hooking.ran

    expected, _ = streamed(chained=False)
    assert not chains
    found, ran = streamed(chained=True)
    assert torch.equal(found, expected)
    assert 0 < ran[-1] == ran[5], "no chain after the hook"


def test_outputs_that_were_asked_for_once_keep_no_answer_from_chaining(chains):
    """transformers' hooks stay on the layers after such a call, and do nothing."""
    model = llama()
    before, _, _ = answer(model)
    ran = len(chains)
    hidden = model(prompt(9), output_hidden_states=True, output_attentions=True).hidden_states
    layer = model.model.layers[1]
    assert len(hidden) == 4 and layer._forward_hooks and layer.self_attn._forward_hooks
    after, _, cache = answer(model)
    assert torch.equal(after, before)
    assert len(chains) == 2 * ran and cache.stats()["traced_steps"] == cache.stats()["decode_steps"]
    assert all(torch.equal(*pair) for pair in zip(model(prompt(9), output_hidden_states=True).hidden_states, hidden, strict=True))


def test_layers_whose_results_are_changed_on_the_way_do_not_chain(chains):
    model = llama()
    model.model.layers[1].register_forward_hook(lambda module, args, out: out * 1.5)
    assert_as_one_by_one(model)
    assert not chains


def test_a_chain_that_the_models_code_leaves_runs_again_layer_by_layer(chains):
    """A layer that is called with something else, after a chain was made."""
    model = llama()
    expected = one_by_one(model)
    cache = specache.SpeCache(model, specache.SpeCacheConfig(**SETTINGS))
    answer(model)
    with pytest.MonkeyPatch.context() as patch:
        made = len(chains)
        patch.setattr(layer_chain, "same", lambda some, others: False)
        patch.setattr(traced_pass, "same", lambda some, others: False)
        found = answer(model, cache=cache)
    assert len(chains) == made + 1, "it is given up for the model"
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_a_model_that_leaves_layers_out_runs_layer_by_layer(chains):
    model = llama()
    answer(model)
    assert chains
    made = len(chains)

    model.model.layers = nn.ModuleList(list(model.model.layers)[:2])
    model.config.num_hidden_layers = 2
    assert_as_one_by_one(model)
    assert set(chains[made:]) <= {2}


def test_keys_that_are_not_finite_are_refused_and_nothing_is_stored(chains):
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("inf")
    cache = specache.SpeCache(model, specache.SpeCacheConfig(**SETTINGS))
    texts: list[list[int]] = []

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        texts.append(ids[0].tolist())
        return scores if len(texts) < 9 else torch.where(torch.arange(scores.shape[-1]) == 5, 1e3, scores.nan_to_num())

    ids = prompt(60).where(prompt(60) != 5, 6)
    with pytest.raises(NonFiniteError, match="layer 0"):
        specache.generate(model, ids, past_key_values=cache, max_new_tokens=20, do_sample=False, logits_processor=[force])
    assert len(texts) == 9 and chains[-1] == 0
    assert cache.sequences[0].token_ids == texts[-1]
    assert {layer.length for layer in cache.sequences[0].layers.values()} == {len(texts[-1])}


def test_rows_that_cannot_be_read_from_disk_are_reported_as_layer_by_layer(chains, tmp_path, monkeypatch):
    model = llama()
    settings = {**SETTINGS, "slow_tier": "disk", "slow_dir": str(tmp_path), "hot_set": 0.0}
    expected = one_by_one(model, tokens=20, **settings)
    cache = specache.SpeCache(model, specache.SpeCacheConfig(**settings))
    call = LayerChain.call
    failed: list[int] = []

    def failing(self: LayerChain, *arguments: Any) -> Any:
        if len(failed) < 3 and len(chains) % 4 == 3:
            failed.append(1)
            call(self, *arguments)
            return 1, -2, [(0, 0, 0, 0.0)], 0.0
        return call(self, *arguments)

    monkeypatch.setattr(LayerChain, "call", failing)
    found = answer(model, tokens=20, cache=cache)
    assert len(failed) == 3
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
