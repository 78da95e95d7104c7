"""Tiny configurations of transformers' model families: the defaults, with every size made small.

A setting per layer (`layer_types`, `mlp_layer_types`, ...) keeps each of its kinds.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from transformers import PreTrainedConfig

LAYERS = 4
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FULL_ATTENTION = {"sliding_window": None}  # by default every layer has a sliding window
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SIZES: dict[str, Any] = {
    "initializer_range": 0.2,
    "init_std": 0.2,
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), 97),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "emb_dim", "embedding_dim"), 64),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "lru_width", "attention_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_blocks",), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "d_head", "kv_channels", "swa_head_dim", "attention_head_size"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "rotary_dim", "d_rel"), 16),
    "v_head_dim": 8,  # differs from the keys' if the family allows it
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "dff"), 96),
    **dict.fromkeys(("d_inner", "n_inner"), 96),
    **dict.fromkeys(("ffn_hidden_size", "feed_forward_size", "dense_intermediate_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "zero_expert_num"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size", "local_attention"), 24),
    **dict.fromkeys(("attention_chunk_size", "keep_window_size"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 512),
    "context_length": 512,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    "qk_head_dim": 16,
    **dict.fromkeys(("index_head_dim",), 16),
    **dict.fromkeys(("index_n_heads", "index_topk", "index_topk_blocks"), 2),
    "index_block_size": 16,
    **dict.fromkeys(("floor_scale", "log_scaling_n_floor"), 32),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "embed_dim", "adapter_in_dim", "adapter_out_dim"), 64),
    "depth": 2,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 32),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    "mamba_d_ssm": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "sep_token_id": None,
    "num_nextn_predict_layers": 0,
    "hidden_size_per_layer_input": 8,
    "adapter_rank": 8,
    "router_hidden_size": 16,
    "use_cache": True,
    "is_decoder": True,
}  # fmt: skip
DOTS3_SLIDING = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 16,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
LATENT = {"head_dim": 8, "num_key_value_heads": 4}
MROPE = {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}
# What a family needs beside the sizes, by model type.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"patch_size": 4, "encoder_hash_byte_group_vocab": 97},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {**LATENT, **{f"swa_{name}": value for name, value in DOTS3_SLIDING.items()}},
    "doge": FULL_ATTENTION,
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32]},
    "gemma3n_text": {"intermediate_size": [96] * LAYERS, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * LAYERS},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "glm4v_text": MROPE,
    "glm4v_moe_text": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
    "glm_ocr_text": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (LAYERS // 2), "mamba_d_head": 32},
    "hrm_text": {"num_hidden_layers": 1, "num_layers_per_stack": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * (LAYERS // 2), "index_n_heads": 2},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)},
    "ministral3": FULL_ATTENTION,
    "mistral": FULL_ATTENTION,
    "mixtral": FULL_ATTENTION,
    "modernbert-decoder": {"sep_token_id": 3, "cls_token_id": 3},
    "moshi": {"sliding_window": 512},
    "phi3": FULL_ATTENTION,
    "phi4_multimodal": FULL_ATTENTION,
    "phimoe": FULL_ATTENTION,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "paddleocr_vl_text": MROPE,
    "qwen2_5_omni_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "qwen2_vl_text": MROPE,
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32], "hidden_size": 64},
    "roc_bert": {"pronunciation_vocab_size": 97, "shape_vocab_size": 97, "pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "starcoder2": FULL_ATTENTION,
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Return a family's configuration, made small. Errors of transformers are raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return config_class(**_settings(config_class, SPECIAL.get(config_class.model_type, {})))


def _settings(config_class: type[PreTrainedConfig], special: dict[str, Any]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(config_class)}
    settings = {name: value for name, value in SIZES.items() if name in fields}
    if "kv_lora_rank" in fields:
        settings |= LATENT
    try:
        default = config_class()
    except Exception:
        return settings | special
    settings |= _layouts(default, fields, special.get("num_hidden_layers", LAYERS))
    for name in config_class.sub_configs:
        part = vars(default).get(name)
        if isinstance(part, PreTrainedConfig):
            settings[name] = _settings(type(part), SPECIAL.get(part.model_type, {}))
            settings[name]["model_type"] = part.model_type
    return settings | special


def _layouts(default: PreTrainedConfig, fields: set[str], count: int) -> dict[str, Any]:
    """Return the lists with an entry per layer: each kind of the family's defaults in turn."""
    layers = next((getattr(default, name) for name in LAYER_COUNTS if hasattr(default, name)), 0)
    layouts = {}
    for name in fields:
        value = vars(default).get(name)  # attributes that vary by layer raise
        if isinstance(value, list) and layers and len(value) == layers:
            kinds = list(dict.fromkeys(tuple(v) if isinstance(v, list) else v for v in value))
            layouts[name] = [kinds[i % len(kinds)] for i in range(count)]
    return layouts
