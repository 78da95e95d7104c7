"""Model families against the stock cache: padded batches, hybrids and RoPE switches."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers

import specache
from tests.tiny import llama, prompt

NEW = 24
LENGTHS = (150, 90, 33)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
HYBRID = {"num_hidden_layers": 4, "head_dim": 16, "sliding_window": 24}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 100,
}

LONGROPE_SHORT = {
    "sliding_window": None,
    "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 512},
    "original_max_position_embeddings": 512,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 2,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-multi-head": ("Llama", {"num_key_value_heads": 4}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-dynamic-rope": ("Llama", {"rope_parameters": DYNAMIC}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-long-window": ("Mistral", {"sliding_window": 4096}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 16, **MOE}),
    "gemma2": ("Gemma2", {**HYBRID, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3", {**HYBRID, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3-longrope-short": ("Phi3", LONGROPE_SHORT),
    "gpt-oss": ("GptOss", {**HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": PLAIN}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 4}),
}  # fmt: skip


def build(kind: str, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    name = "Gemma3ForCausalLM" if kind == "Gemma3" else f"{kind}ForCausalLM"
    config_name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
    settings = {**SIZES, **changes}
    model = getattr(transformers, name)(getattr(transformers, config_name)(**settings)).eval()
    if settings.get("attn_logit_softcapping"):
        model.set_attn_implementation("eager")  # before 5.23 stock takes sdpa, which leaves out the softcap
    model.generation_config.eos_token_id = None
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return three left-padded prompts of different lengths."""
    ids = torch.zeros(3, max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, -length:] = prompt(length, seed=row + 1)
        mask[row, -length:] = 1
    return ids, mask


def outputs(generate: Any, ids: torch.Tensor, mask: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    output = generate(ids, attention_mask=mask, do_sample=False, return_dict_in_generate=True, output_logits=True, **arguments)
    if isinstance(output.past_key_values, specache.SpeCache):
        output.past_key_values.close()
    return output.sequences, torch.stack(output.logits)


def recomputed(model: Any, ids: torch.Tensor, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return greedy tokens and logits without any cache: every token runs the full text."""
    logits = []
    for _ in range(new):
        with torch.no_grad():
            logits.append(model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].float())
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return ids, torch.stack(logits)


def forgets_at_a_rope_switch(model: Any) -> bool:
    """Return whether stock `generate` drops the cache at a RoPE switch, in this release."""
    prepare = inspect.getsource(type(model).prepare_inputs_for_generation)
    return "past_key_values = None" in prepare and "next_sequence_length" not in prepare


def check(model: Any, ids: torch.Tensor, mask: torch.Tensor, policy: str, tier: str, new: int = NEW) -> None:
    if len(ids) == 1 and forgets_at_a_rope_switch(model):
        expected, expected_logits = recomputed(model, ids, new)
    else:
        expected, expected_logits = outputs(model.generate, ids, mask, max_new_tokens=new)
    config = specache.SpeCacheConfig(policy=policy, slow_tier=tier, top_k=10**6, group_size=16, residual=16, prefill_chunk=40)
    before = model.config._attn_implementation
    tokens, logits = outputs(lambda *a, **k: specache.generate(model, *a, config=config, **k), ids, mask, max_new_tokens=new)
    assert model.config._attn_implementation == before
    assert torch.equal(tokens, expected)
    assert (logits - expected_logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("policy", "tier"),
    [("full", "ram"), ("verified", "ram"), ("speculative", "ram"), ("on-demand", "ram-inplace"), ("previous", "ram")],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch_equals_the_stock_cache(family, policy, tier):
    check(build(*FAMILIES[family]), *batch(), policy, tier)


@pytest.mark.parametrize("policy", ["full", "verified", "speculative", "on-demand"])
@pytest.mark.parametrize("length", [60, 92, 100, 101, 140])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_around_a_rope_switch_each_sequence_equals_stock(kind, length, policy):
    if kind == "dynamic":
        model = build("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 100})
    else:
        changes = {"sliding_window": None, "rope_parameters": LONGROPE, "original_max_position_embeddings": 100}
        model = build("Phi3", changes)
    ids = prompt(length)
    check(model, ids, torch.ones_like(ids), policy, "ram")


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_batch_around_a_rope_switch_equals_each_prompt_alone(kind):
    if kind == "dynamic":
        model = build("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 100})
    else:
        changes = {"sliding_window": None, "rope_parameters": LONGROPE, "original_max_position_embeddings": 100}
        model = build("Phi3", changes)
    config = specache.SpeCacheConfig(policy="verified", slow_tier="ram", top_k=8, group_size=16, residual=16)
    ids, mask = batch()
    together = specache.generate(model, ids, attention_mask=mask, config=config, max_new_tokens=NEW, do_sample=False)
    for row, length in enumerate(LENGTHS):
        alone = specache.generate(model, ids[row : row + 1, -length:], config=config, max_new_tokens=NEW, do_sample=False)
        assert together[row, -NEW:].tolist() == alone[0, -NEW:].tolist()


@pytest.mark.parametrize("way", ["edited", "a session that was cut"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_text_truncated_to_before_a_rope_switch_equals_stock(kind, way, tmp_path):
    """Keys stored beyond the switch have other frequencies, also those before it."""
    if kind == "dynamic":
        model = build("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 100})
    else:
        changes = {"sliding_window": None, "rope_parameters": LONGROPE, "original_max_position_embeddings": 100}
        model = build("Phi3", changes)
    config = specache.SpeCacheConfig(policy="verified", top_k=10**6, group_size=16, residual=16)
    greedy = {"max_new_tokens": NEW, "do_sample": False}
    ids = prompt(140)
    text = torch.cat([ids[:, :70], prompt(5, seed=3)], dim=1)
    with specache.Session("one", model, config, folder=tmp_path) as session:
        specache.generate(model, ids, past_key_values=session.cache, **greedy)
        if way != "edited":
            session.cut(72)
        answer = specache.generate(model, text, past_key_values=session.cache, **greedy)
    assert torch.equal(answer, model.generate(text, **greedy))


REFUSED = {
    "all layers slide": ("Mistral", {"sliding_window": 24}, "Every layer"),
    "latent attention": ("DeepseekV2", LATENT, "latent"),
    "state space": ("Mamba", {}, "state-space|attention"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_models_are_refused_with_the_reason(name):
    kind, changes, reason = REFUSED[name]
    with torch.device("meta"):
        model = build(kind, changes)
    with pytest.raises(specache.UnsupportedModelError, match=reason):
        specache.SpeCache(model)


def test_an_encoder_decoder_is_refused():
    config = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(specache.UnsupportedModelError, match="encoder-decoder"):
        specache.SpeCache(transformers.T5ForConditionalGeneration(config))


def test_the_users_attention_setting_is_restored_after_an_error():
    model = llama()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(specache.NonFiniteError, match="keys of layer 1"):
        specache.generate(model, prompt(50), max_new_tokens=4, do_sample=False)
    assert model.config._attn_implementation == "eager"
