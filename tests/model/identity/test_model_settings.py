"""The configuration fields that keys and values depend on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from specache.model.identity.model_settings import conflict, relevant_settings
from tests.engine.test_model_families import FAMILIES, build
from tests.sessions.sequences import gemma
from tests.tiny import llama

NO_MATTER = {
    "a_field_of_the_next_release": False,
    "use_fused_norm_kernel": None,
    "attention_dropout": 0.1,
    "eos_token_id": 5,
    "pad_token_id": 4,
    "image_token_index": 3,
    "id2label": {0: "x", 1: "y", 2: "z"},
    "use_cache": False,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.2,
    "initializer_range": 0.5,
    "max_position_embeddings": 1 << 20,  # says nothing to ordinary RoPE
    "residual_multiplier": 1.0,  # a field that a later release could add
    "torch_dtype": "float16",
    "_name_or_path": "elsewhere",
}
MATTER = {
    "rms_norm_eps": 1e-3,
    "hidden_act": "gelu",
    "head_dim": 8,
    "num_key_value_heads": 1,
    "sliding_window": 16,
    "layer_types": ["sliding_attention"],
    "attention_bias": True,
    "attn_logit_softcapping": 20.0,
    "query_pre_attn_scalar": 7,
    "residual_multiplier": 0.5,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "partial_rotary_factor": 0.5,
    "no_rope_layers": [1, 0, 1],
    "attention_multiplier": 0.2,
}


@pytest.mark.parametrize("name", NO_MATTER)
def test_labels_and_runtime_settings_are_ignored(name):
    model = llama()
    before = relevant_settings(model)
    setattr(model.config, name, NO_MATTER[name])
    assert relevant_settings(model) == before


@pytest.mark.parametrize("name", MATTER)
def test_fields_that_a_layer_computes_with_are_relevant(name):
    model = llama()
    before = relevant_settings(model)
    setattr(model.config, name, MATTER[name])
    assert relevant_settings(model) != before


ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_theta": 5e5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


@pytest.mark.parametrize("parameters", ROPES.values(), ids=ROPES)
def test_every_parameter_of_rope_is_relevant(parameters):
    model = llama()
    before = relevant_settings(model)
    model.config.rope_parameters = {**model.config.rope_parameters, **parameters}
    assert relevant_settings(model) != before


def test_rope_parameters_are_equal_in_every_releases_form():
    def rope(**fields: Any) -> Any:
        text = SimpleNamespace(to_dict=lambda: fields)
        config = SimpleNamespace(get_text_config=lambda decoder: text)
        return relevant_settings(SimpleNamespace(config=config))["rope"]

    inside = rope(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    assert inside == rope(rope_theta=10000, rope_scaling={"type": "linear", "factor": 4})
    assert inside == rope(rope_theta=10000, rope_scaling={"type": "linear", "rope_type": "linear", "factor": 4})
    assert inside == rope(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0, "a_new_one": None})
    assert inside != rope(rope_theta=10000)
    partial = rope(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5})
    assert partial == rope(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}, partial_rotary_factor=0.5)
    assert partial == rope(rope_theta=1e4, partial_rotary_factor=0.5) != rope(rope_theta=1e4)


def test_the_trained_length_is_relevant_for_length_dependent_rope():
    model = build(*FAMILIES["llama-dynamic-rope"])
    before = relevant_settings(model)
    model.config.max_position_embeddings *= 2
    assert relevant_settings(model) != before


def test_windows_and_soft_caps_of_a_hybrid_model_are_relevant():
    found = relevant_settings(gemma())
    assert {"layer_types", "sliding_window", "attn_logit_softcapping", "query_pre_attn_scalar", "rms_norm_eps"} <= found.keys()


def test_a_field_of_only_one_release_conflicts_only_if_first_tokens_may_not_reveal_it():
    before = {"hidden_act": "silu", "num_hidden_layers": 2}
    assert conflict(before, {**before, "swiglu_limit": 7}) is None and conflict({**before, "swiglu_limit": 7}, before) is None
    assert conflict(before, {**before, "hidden_act": "gelu"}) == "hidden_act was silu and is gelu"
    for name in ("sliding_window", "attention_chunk_size", "attn_temperature_tuning"):
        assert conflict(before, {**before, name: 600}) == f"{name} was None and is 600"
