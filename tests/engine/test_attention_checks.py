"""Arguments, masks and shapes of a model's attention are supported or refused, never ignored."""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

import pytest
import torch
import transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import specache
from specache.engine.attention_checks import check_arguments
from specache.model.dimensions import dimensions_of
from tests.engine.test_model_families import MOE, build, check
from tests.tiny import llama, prompt

POLICIES = ["full", "verified", "on-demand"]
LENGTH = 90  # three chunks of a prompt


def passing(model: Any, **arguments: Any) -> Any:
    """Have the attention layers get further keyword arguments; functions get the token count."""

    def add(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        n = kwargs["hidden_states"].shape[1]
        return args, {**kwargs, **{name: value(n) if callable(value) else value for name, value in arguments.items()}}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(add, with_kwargs=True)
    return model


def refused(model: Any, policy: str, match: str) -> None:
    config = specache.SpeCacheConfig(policy=policy, slow_tier="ram", group_size=16, residual=16, prefill_chunk=40)
    before = model.config._attn_implementation
    with specache.SpeCache(model, config) as cache:
        with pytest.raises(specache.UnsupportedModelError, match=match):
            specache.generate(model, prompt(LENGTH), past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert cache.get_seq_length() == 0
        assert cache.held_bytes() == 0
    assert model.config._attn_implementation == before


def equals_stock(model: Any, policy: str = "verified") -> None:
    ids = prompt(LENGTH)
    check(model, ids, torch.ones_like(ids), policy, "ram", new=6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["position_bias", "alibi", "indices", "block_indices", "a_new_idea"])
def test_an_attention_argument_without_support_is_refused_by_name(name, policy):
    refused(passing(llama(), **{name: torch.ones(1)}), policy, f"passes {name} to its attention")


def test_attention_arguments_without_effect_are_accepted():
    equals_stock(passing(llama(), deterministic=False, position_bias=None, output_attentions=False))


def alibi(n: int) -> torch.Tensor:
    distance = torch.arange(n)[:, None] - torch.arange(n)
    return (-0.1 * distance.float()).masked_fill(distance < 0, -torch.inf)[None, None]


def blocks_of_two(n: int) -> torch.Tensor:
    return (torch.arange(n)[:, None] // 2 >= torch.arange(n) // 2)[None, None]


def causal(n: int) -> torch.Tensor:
    return torch.ones(1, 1, n, n, dtype=torch.bool).tril()


def additive(n: int) -> torch.Tensor:
    return torch.full((1, 1, n, n), torch.finfo(torch.float32).min).triu(1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mask", [alibi, blocks_of_two])
def test_a_models_own_bias_or_mask_is_refused(mask, policy):
    refused(passing(llama(), attention_mask=mask), policy, "mask or a bias of its own")


@pytest.mark.parametrize("mask", [causal, additive])
def test_a_models_own_causal_mask_is_accepted(mask):
    ids = prompt(LENGTH)
    expected = llama().generate(ids, max_new_tokens=6, do_sample=False)
    config = specache.SpeCacheConfig(policy="verified", slow_tier="ram", residual=16, group_size=16, top_k=10**6, prefill_chunk=40)
    ours = specache.generate(passing(llama(), attention_mask=mask), ids, config=config, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours, expected)


def test_attention_to_later_tokens_is_refused():
    refused(passing(llama(), is_causal=False), "full", "later tokens")


def test_a_bidirectional_configuration_is_refused():
    refused(llama(is_causal=False), "full", "beyond causal attention")


def test_a_forward_without_keyword_arguments_is_refused():
    class Closed(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
            return super().forward(input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache)

    with pytest.raises(specache.UnsupportedModelError, match="Closed takes no further keyword arguments"):
        specache.SpeCache(Closed(llama().config))


def first_ten(batch: Any, head: Any, q: Any, kv: Any) -> Any:
    return kv < 10


def everything(batch: Any, head: Any, q: Any, kv: Any) -> Any:
    return kv >= 0


@pytest.mark.parametrize("policy", POLICIES)
def test_bidirectional_attention_within_a_prefix_is_refused(monkeypatch, policy):
    """As in PaliGemma, the prompt's first tokens attend to each other in both directions."""
    monkeypatch.setattr(
        modeling_llama, "create_causal_mask", partial(modeling_llama.create_causal_mask, or_mask_function=first_ten)
    )
    refused(llama(), policy, "asks for a mask beyond causal")


def test_a_mask_function_without_effect_is_accepted(monkeypatch):
    monkeypatch.setattr(
        modeling_llama, "create_causal_mask", partial(modeling_llama.create_causal_mask, and_mask_function=everything)
    )
    equals_stock(llama())


@pytest.mark.parametrize("policy", POLICIES)
def test_attention_dropout_in_training_mode_is_refused(policy):
    refused(llama(attention_dropout=0.1).train(), policy, r"training mode. Call model.eval\(\)")


def test_evaluation_mode_and_training_mode_without_dropout_equal_stock():
    equals_stock(llama(attention_dropout=0.1))
    equals_stock(llama().train())


@pytest.mark.parametrize("policy", POLICIES)
def test_a_router_with_jitter_equals_stock_in_evaluation_mode(policy):
    equals_stock(build("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.3}), policy)


MIMO = {
    "num_hidden_layers": 4, "head_dim": 24, "v_head_dim": 16, "sliding_window": 24, "n_routed_experts": 4,
    "layer_types": ["full_attention", "sliding_attention"] * 2, **MOE,
}  # fmt: skip


@pytest.mark.parametrize("policy", [*POLICIES, "speculative", "previous", "none"])
@pytest.mark.parametrize("value_dim", [16, 32])
def test_keys_and_values_of_different_sizes_are_refused_before_anything_runs(value_dim, policy):
    model = build("MiMoV2Flash", {**MIMO, "v_head_dim": value_dim})
    with pytest.raises(specache.UnsupportedModelError, match=f"keys of 24 and values of {value_dim} elements per head"):
        specache.SpeCache(model, specache.SpeCacheConfig(policy=policy))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("first", ["full_attention", "sliding_attention"])
def test_unsupported_head_sizes_are_refused_at_the_first_keys(monkeypatch, first, policy):
    monkeypatch.setattr("specache.model.info.differing_dims", lambda module: None)
    other = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}[first]
    refused(build("MiMoV2Flash", {**MIMO, "layer_types": [first, other] * 2}), policy, "keys of 24 and values of 16 elements")


SHAPES = {  # of queries, keys and values [B, H, n, D]
    "cross-attention": ((1, 4, 8, 16), (1, 2, 30, 16), (1, 2, 30, 16), "from 8 tokens to 30 others"),
    "keys of another batch": ((3, 4, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16), "from 8 tokens to 8 others"),
    "fewer value heads": ((1, 4, 8, 16), (1, 4, 8, 16), (1, 2, 8, 16), "4 query, 4 key and 2 value heads"),
    "groups that do not come out": ((1, 5, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16), "5 query, 2 key and 2 value heads"),
    "shorter queries": ((1, 4, 8, 8), (1, 4, 8, 16), (1, 4, 8, 16), "queries of 8, keys of 16"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_other_than_self_attention_are_refused(name):
    *shapes, match = SHAPES[name]
    with pytest.raises(specache.UnsupportedModelError, match=match):
        check_arguments(torch.nn.Identity(), *(torch.zeros(shape) for shape in shapes), {})


GEMMA4 = {
    "num_hidden_layers": 4, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
    "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
}  # fmt: skip


def gemma4(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Gemma4TextConfig(
        **{**sizes, **GEMMA4, **changes}, max_position_embeddings=1024, initializer_range=0.2, eos_token_id=None
    )
    model = transformers.Gemma4ForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("policy", ["full", "verified", "speculative", "on-demand", "previous"])
def test_layers_with_different_head_counts_and_sizes_equal_stock(policy):
    equals_stock(gemma4(), policy)


def test_layers_that_share_keys_and_values_are_refused():
    with pytest.raises(specache.UnsupportedModelError, match="shares keys and values"):
        specache.SpeCache(gemma4(num_kv_shared_layers=2))


def test_a_configuration_that_varies_by_layer_is_read_layer_by_layer():
    layers = dimensions_of(gemma4()).layers
    assert [(layer.query_heads, layer.kv_heads, layer.head_dim) for layer in layers] == [(4, 2, 16), (4, 1, 32)] * 2
    assert [layer.window for layer in layers] == [24, None] * 2


def sharper(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **more: Any) -> Any:
    """Compute eager attention with doubled scores."""
    return modeling_llama.eager_attention_forward(module, query, key, value, mask, 2 * scaling, **more)


def seen_prefix(*args: Any, **more: Any) -> Any:
    """Return the mask of `sdpa` with the first ten tokens visible to all."""
    mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **{**more, "allow_is_causal_skip": False})
    mask[..., :10] = True
    return mask


@pytest.mark.parametrize("policy", POLICIES)
def test_an_attention_function_that_the_user_registered_is_refused_by_name(policy):
    transformers.AttentionInterface.register("sharper", sharper)
    model = llama()
    model.set_attn_implementation("sharper")
    with pytest.raises(specache.UnsupportedModelError, match=r"computes its attention by .*\.sharper .*stock generate"):
        specache.generate(model, prompt(LENGTH), config=specache.SpeCacheConfig(policy=policy))
    model.set_attn_implementation("sdpa")
    equals_stock(model)


def test_a_wrapper_that_looks_like_the_function_inside_is_refused_by_its_own_name():
    """`functools.wraps` takes over the module and the name of what it wraps."""

    @wraps(ALL_ATTENTION_FUNCTIONS["sdpa"])
    def doubled(*arguments: Any, **more: Any) -> Any:
        out, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](*arguments, **more)
        return 2 * out, weights

    transformers.AttentionInterface.register("doubled", doubled)
    model = llama()
    model.set_attn_implementation("doubled")
    with pytest.raises(specache.UnsupportedModelError, match=r"by .*test_attention_checks.*\.doubled "):
        specache.SpeCache(model)


def test_an_attention_function_that_pytorch_decorates_is_refused_by_its_own_name():
    transformers.AttentionInterface.register("decorated", torch.no_grad()(sharper))
    model = llama()
    model.set_attn_implementation("decorated")
    with pytest.raises(specache.UnsupportedModelError, match=r"by .*test_attention_checks.*sharper "):
        specache.SpeCache(model)


def test_an_attention_function_that_is_set_between_two_answers_is_refused():
    transformers.AttentionInterface.register("sharper", sharper)
    model = llama()
    cache = specache.SpeCache(model)
    said = specache.generate(model, prompt(LENGTH), past_key_values=cache, max_new_tokens=2)
    model.set_attn_implementation("sharper")
    with pytest.raises(specache.UnsupportedModelError, match="sharper"):
        specache.generate(model, said, past_key_values=cache, max_new_tokens=2)


class Between(transformers.LogitsProcessor):
    """Does something between the second and the third token of an answer."""

    def __init__(self, act: Any) -> None:
        self._act, self._calls = act, 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self._calls += 1
        if self._calls == 3:
            self._act(input_ids)
        return scores


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("names", [["eager"], ["eager", "sdpa"]], ids=["for good", "and back"])
def test_an_attention_that_is_set_in_the_middle_of_an_answer_changes_nothing_of_it(names, policy):
    """Then the model attended by itself, to the one token of each step."""
    model, seen = llama(), []
    expected = model.generate(prompt(LENGTH), max_new_tokens=8, do_sample=False)

    def look(input_ids: Any) -> None:
        for name in names:
            model.set_attn_implementation(name)
            if name == "eager":
                seen.append(model(input_ids, output_attentions=True, use_cache=False).attentions)

    config = specache.SpeCacheConfig(policy=policy, slow_tier="ram", top_k=10**6)
    arguments = {"max_new_tokens": 8, "do_sample": False, "logits_processor": [Between(look)]}
    assert torch.equal(specache.generate(model, prompt(LENGTH), config=config, **arguments), expected)
    assert seen[0][0] is not None
    assert model.config._attn_implementation == names[-1]


def test_an_attention_function_that_is_set_in_the_middle_of_an_answer_is_refused():
    transformers.AttentionInterface.register("sharper", sharper)
    model = llama()
    cache = specache.SpeCache(model)
    act = Between(lambda input_ids: model.set_attn_implementation("sharper"))
    with pytest.raises(specache.UnsupportedModelError, match="sharper") as raised:
        specache.generate(model, prompt(LENGTH), past_key_values=cache, max_new_tokens=8, do_sample=False, logits_processor=[act])
    assert len(raised.value.new_token_ids[0]) == 3
    assert model.config._attn_implementation == "sharper"
    model.set_attn_implementation("sdpa")
    said = torch.cat([prompt(LENGTH), torch.tensor([list(raised.value.new_token_ids[0])])], 1)
    answer = specache.generate(model, said, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(answer, model.generate(prompt(LENGTH), max_new_tokens=8, do_sample=False))


def test_an_attention_that_is_set_after_the_last_token_stays():
    model = llama()
    act = Between(lambda input_ids: model.set_attn_implementation("eager"))
    specache.generate(model, prompt(LENGTH), config=specache.SpeCacheConfig(), max_new_tokens=3, logits_processor=[act])
    assert model.config._attn_implementation == "eager"


def test_a_mask_function_that_the_user_registered_is_refused(monkeypatch):
    transformers.AttentionMaskInterface.register("seen_prefix", seen_prefix)
    transformers.AttentionInterface.register("seen_prefix", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model = llama()
    model.set_attn_implementation("seen_prefix")
    with pytest.raises(specache.UnsupportedModelError, match=r"computes its mask by .*\.seen_prefix"):
        specache.SpeCache(model)


def test_eager_attention_that_was_replaced_is_refused(monkeypatch):
    model = llama()
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", sharper)
    equals_stock(model)  # it uses sdpa
    model.set_attn_implementation("eager")
    with pytest.raises(specache.UnsupportedModelError, match=r"\.sharper"):
        specache.SpeCache(model)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_every_attention_of_transformers_may_be_set(name):
    model = llama()
    expected = model.generate(prompt(LENGTH), max_new_tokens=6, do_sample=False)
    model.set_attn_implementation(name)
    config = specache.SpeCacheConfig(policy="on-demand", top_k=10**6)
    assert torch.equal(specache.generate(model, prompt(LENGTH), config=config, max_new_tokens=6, do_sample=False), expected)
