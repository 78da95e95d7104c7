"""Models that SpeCache does not support are refused with the reason and leave nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import specache
from specache.model.info import check_one_gpu
from tests.engine.test_model_families import LATENT, SIZES, build
from tests.our_threads import our_new_threads
from tests.tiny import llama, prompt

MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32}
DEEPSEEK = {**LATENT, "q_lora_rank": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Jamba": ("Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}, "recurrent"),
    "Bamba": ("Bamba", {"attn_layer_indices": [1], **MAMBA}, "recurrent"),
    "Zamba": ("Zamba", {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2}, "recurrent"),
    "Zamba 2": ("Zamba2", {"layer_types": ["linear_attention", "hybrid"], "mamba_ngroups": 1}, "recurrent"),
    "Falcon H1": ("FalconH1", {**MAMBA, "mamba_d_ssm": 128}, "recurrent"),
    "Qwen3-Next": ("Qwen3Next", {"head_dim": 16, "num_hidden_layers": 4}, "recurrent"),
    "Granite 4": ("GraniteMoeHybrid", {"layer_types": ["mamba", "attention"], **MAMBA}, "recurrent"),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of kind conv"),
    "Mamba 2": ("Mamba2", {"num_heads": 8, "head_dim": 16, "expand": 2}, "recurrent"),
    "RWKV": ("Rwkv", {}, "recurrent"),
    "DeepSeek V3": ("DeepseekV3", DEEPSEEK, "latent attention"),
    "DeepSeek V3.2": ("DeepseekV32", DEEPSEEK, "latent attention"),
    "an encoder": ("Roberta", {}, "later tokens"),
    "an attention of its own": ("Bloom", {"n_head": 4}, "attention interface"),
}


@pytest.mark.parametrize("layout", ["to_sparse_csr", "to_sparse", "to_mkldnn"])
def test_weights_that_are_not_dense_are_refused_by_name(layout):
    model = llama()
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = torch.nn.Parameter(getattr(linear.weight.detach(), layout)(), requires_grad=False)
    with pytest.raises(specache.UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj\.weight .*not dense.*to_dense"):
        specache.generate(model, prompt(8), max_new_tokens=2)


def test_a_model_on_several_gpus_is_refused(monkeypatch):
    """As device_map="auto" loads it. Parts in main memory, which are loaded when they run, count
    for nothing.
    """

    def on(*devices: str) -> None:
        weights = [SimpleNamespace(device=torch.device(device), dtype=torch.float32) for device in devices]
        monkeypatch.setattr(model, "parameters", lambda: iter(weights))

    model = llama()
    on("cuda:0", "meta", "cuda:1", "cuda:1")
    with pytest.raises(specache.UnsupportedModelError, match=r"spread over cuda:0, cuda:1, .*device_map"):
        specache.SpeCache(model)
    on("cuda:1", "meta", "cpu", "cuda:1")
    check_one_gpu(model)


def check_nothing_is_left(model: Any) -> None:
    assert model.config._attn_implementation != "specache"
    assert not our_new_threads()


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_a_growing_kv_cache_is_refused(name):
    kind, changes, reason = REFUSED[name]
    with torch.device("meta"):
        model = build(kind, changes)
    with pytest.raises(specache.UnsupportedModelError, match=reason) as refused:
        specache.generate(model, prompt(8), max_new_tokens=2)
    assert type(model).__name__ in str(refused.value)
    check_nothing_is_left(model)


@pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_an_encoder_decoder_is_refused(kind):
    sizes = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 16, "d_ff": 32, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(vocab_size=97, **sizes, **heads))
    with pytest.raises(specache.UnsupportedModelError, match=f"{kind} is an encoder-decoder"):
        specache.generate(model, prompt(8), max_new_tokens=2)
    check_nothing_is_left(model)


@pytest.mark.parametrize(("kind", "window"), [("Mistral", 4096), ("Phi3", 2047)])
def test_a_model_with_only_sliding_windows_is_refused(kind, window):
    """The sizes are those of Mistral 7B v0.1 (its family's defaults) and Phi-3-mini-4k."""
    sizes = {name: value for name, value in SIZES.items() if name != "max_position_embeddings"}
    changes = {} if kind == "Mistral" else {"sliding_window": window}
    config = getattr(transformers, f"{kind}Config")(**sizes, **changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with pytest.raises(specache.UnsupportedModelError, match=f"Every layer of {kind}ForCausalLM slides over {window} tokens"):
        specache.generate(model, prompt(8), max_new_tokens=2)
    check_nothing_is_left(model)


@pytest.mark.parametrize(("kind", "reason"), [("Nemotron", "drops extra arguments"), ("DiffLlama", "attends twice")])
def test_a_model_that_bypasses_or_repeats_attention_is_refused_when_it_runs(kind, reason):
    """The configuration does not show it, and the answer would be wrong silently."""
    model = build(kind, {})
    with specache.SpeCache(model) as cache:
        with pytest.raises(specache.UnsupportedModelError, match=reason):
            specache.generate(model, prompt(40), past_key_values=cache, max_new_tokens=2)
        assert cache.stats()["total_bytes"] == 0
    check_nothing_is_left(model)
