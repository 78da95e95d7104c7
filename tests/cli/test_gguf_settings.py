"""A GGUF file runs as the model that it describes: its RoPE scaling is applied, and no setting is
dropped.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    StableLmConfig,
    Starcoder2Config,
)

from specache.cli.gguf_settings import GgufSettingError, apply_settings

HEAD = 32


def written(folder: Path, fields: dict[str, Any], arch: str = "llama", **tensors: Any) -> Path:
    """Return a file that holds settings, and tensors of RoPE factors."""
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, arch)
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
    for key, value in fields.items():
        add[type(value)](f"{arch}.{key}", value)
    for name, values in tensors.items():
        writer.add_tensor(f"{name}.weight", np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def apply(settings: Any, path: Path) -> None:
    apply_settings(settings, gguf.GGUFReader(str(path), "r"))


def config(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": HEAD, "num_hidden_layers": 1, "intermediate_size": 64}
    rope = {"rope_type": "default", "rope_theta": 50_000.0}
    return LlamaConfig(**{**sizes, "vocab_size": 97, "max_position_embeddings": 1024, "rope_parameters": rope, **changes})


def frequencies(settings: Any) -> torch.Tensor:
    return LlamaForCausalLM(settings).model.rotary_emb.inv_freq


def plain() -> torch.Tensor:
    return frequencies(config())


def test_a_file_without_rope_scaling_is_unchanged(tmp_path):
    settings = config()
    apply(settings, written(tmp_path, {"rope.freq_base": 50_000.0, "rope.scaling.type": "none", "logit_scale": 1.0}))
    assert torch.equal(frequencies(settings), plain())
    assert settings.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize(
    "fields",
    [{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope.scaling.factor": 4.0}, {"rope.scale_linear": 4.0}],
)
def test_linear_scaling_divides_every_frequency(tmp_path, fields):
    settings = config()
    apply(settings, written(tmp_path, fields))
    torch.testing.assert_close(frequencies(settings), plain() / 4)


def test_yarn_scaling_equals_transformers_own(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 50_000.0, "factor": 4.0, "original_max_position_embeddings": 256}
    settings = config()
    fields = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 256}
    apply(settings, written(tmp_path, fields))
    assert torch.equal(frequencies(settings), frequencies(config(rope_parameters=yarn)))
    fields |= {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.attn_factor": 2.0}
    settings = config()
    apply(settings, written(tmp_path, fields))
    rotary = LlamaForCausalLM(settings).model.rotary_emb
    assert not torch.equal(rotary.inv_freq, frequencies(config(rope_parameters=yarn)))
    assert rotary.attention_scaling == pytest.approx(2 * (0.1 * math.log(4) + 1))


def test_factors_of_llama_3_are_recognised(tmp_path):
    llama3 = {"rope_type": "llama3", "rope_theta": 50_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 256
    wanted = frequencies(config(rope_parameters=llama3, max_position_embeddings=2048))
    settings = config(max_position_embeddings=2048)
    apply(settings, written(tmp_path, {}, rope_freqs=(plain() / wanted).tolist()))
    assert settings.rope_parameters["rope_type"] == "llama3"
    torch.testing.assert_close(frequencies(settings), wanted)


def test_unknown_rope_factors_apply_at_every_length(tmp_path):
    factors = torch.linspace(1, 8, HEAD // 2)
    settings = config()
    apply(settings, written(tmp_path, {}, rope_freqs=factors.tolist()))
    rotary = LlamaForCausalLM(settings).model.rotary_emb
    assert rotary.attention_scaling == 1.0
    torch.testing.assert_close(rotary.inv_freq, plain() / factors)
    for length in (1, 1024):  # the form in which it is said may change with the length; these factors do not
        cosine, _ = rotary(torch.zeros(1, 1, 1), torch.arange(length)[None])
        expected = (torch.arange(length)[:, None] * (plain() / factors)).cos()
        torch.testing.assert_close(cosine[0, :, : HEAD // 2], expected, atol=1e-4, rtol=0.0)


def test_long_and_short_factors_become_longrope(tmp_path):
    short, long = [1.0] * 16, [float(2 + i) for i in range(16)]
    settings = Phi3Config(hidden_size=64, num_attention_heads=2, max_position_embeddings=4096, pad_token_id=0)
    fields = {"rope.scaling.original_context_length": 512, "rope.scaling.attn_factor": 1.25}
    path = written(tmp_path, fields, "phi3", rope_factors_long=long, rope_factors_short=short)
    apply(settings, path)
    found = settings.rope_parameters
    assert (found["rope_type"], found["long_factor"], found["short_factor"]) == ("longrope", long, short)
    assert (found["original_max_position_embeddings"], found["attention_factor"]) == (512, 1.25)


def test_rope_scaling_of_a_hybrid_applies_to_full_attention_only(tmp_path):
    settings = Gemma3TextConfig(num_hidden_layers=6, hidden_size=64)
    before = {name: dict(each) for name, each in settings.rope_parameters.items()}
    apply(settings, written(tmp_path, {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}, "gemma3"))
    assert settings.rope_parameters["sliding_attention"] == before["sliding_attention"]
    full = settings.rope_parameters["full_attention"]
    assert (full["rope_type"], full["factor"]) == ("linear", 8.0)
    assert full["rope_theta"] == before["full_attention"]["rope_theta"]


def test_a_window_that_the_reader_drops_is_set(tmp_path):
    settings = Phi3Config(max_position_embeddings=4096, pad_token_id=0)
    apply(settings, written(tmp_path, {"attention.sliding_window": 2047}, "phi3"))
    assert settings.sliding_window == 2047
    settings = Phi3Config(max_position_embeddings=4096, pad_token_id=0)
    apply(settings, written(tmp_path, {"attention.sliding_window": 262_144}, "phi3"))
    assert settings.sliding_window is None


def test_a_base_of_rope_that_the_reader_drops_is_kept(tmp_path):
    settings = Starcoder2Config(bos_token_id=0, eos_token_id=0)
    apply(settings, written(tmp_path, {"rope.freq_base": 999_999.0}, "starcoder2"))
    assert settings.rope_parameters["rope_theta"] == 999_999.0


@pytest.mark.parametrize("turned", [8, 16])
def test_the_rotated_part_of_a_head_is_read_from_the_file(tmp_path, turned):
    settings = StableLmConfig(hidden_size=64, num_attention_heads=2)
    apply(settings, written(tmp_path, {"rope.dimension_count": turned}, "stablelm"))
    assert settings.rope_parameters["partial_rotary_factor"] == turned / 32


def test_phi_4_mini_rotates_three_quarters_of_a_head(tmp_path):
    settings = Phi3Config(hidden_size=3072, num_attention_heads=24, max_position_embeddings=131_072, pad_token_id=0)
    fields = {"rope.dimension_count": 96, "rope.scaling.original_context_length": 4096, "attention.sliding_window": 262_144}
    apply(settings, written(tmp_path, fields, "phi3", rope_factors_long=[2.0] * 48, rope_factors_short=[1.0] * 48))
    assert settings.rope_parameters["partial_rotary_factor"] == 0.75
    assert len(settings.rope_parameters["long_factor"]) == 48


def test_gpt_oss_keeps_its_own_yarn(tmp_path):
    settings, own = GptOssConfig(), GptOssConfig().rope_parameters
    fields = {"attention.key_length": 64, "attention.sliding_window": 128, "rope.freq_base": 150_000.0, "rope.dimension_count": 64}
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 32.0, "rope.scaling.original_context_length": 4096}
    apply(settings, written(tmp_path, {**fields, **yarn}, "gpt-oss"))
    assert {**own, **settings.rope_parameters} == own


def test_gemma_4_runs_as_it_is(tmp_path):
    """Its head sizes differ by layer, three quarters of its frequencies are zero, and its soft cap
    is not in the configuration.
    """
    settings, own = Gemma4TextConfig(num_hidden_layers=6), Gemma4TextConfig(num_hidden_layers=6).rope_parameters
    fields = {"attention.key_length": 512, "attention.sliding_window": 512, "rope.dimension_count": 512}
    bases = {"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "final_logit_softcapping": 30.0}
    apply(settings, written(tmp_path, {**fields, **bases}, "gemma4", rope_freqs=[1.0] * 64 + [1e30] * 192))
    assert settings.rope_parameters == own
    assert settings.final_logit_softcapping == 30.0
    with pytest.raises(GgufSettingError, match="only some frequencies"):
        apply(config(), written(tmp_path, {}, rope_freqs=[1.0] * 8 + [1e30] * 8))


@pytest.mark.parametrize(("layers", "scale"), [(26, 256), (46, 144)])
def test_gemma_2_has_its_soft_caps_and_its_scale_of_queries(tmp_path, layers, scale):
    settings = Gemma2Config(num_hidden_layers=layers, hidden_size=4608, num_attention_heads=32, head_dim=128)
    fields = {"attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0, "attention.key_length": 128}
    apply(settings, written(tmp_path, fields, "gemma2"))
    assert (settings.attn_logit_softcapping, settings.final_logit_softcapping) == (40.0, 20.0)
    assert settings.query_pre_attn_scalar == scale


@pytest.mark.parametrize(
    "fields",
    [
        {"rope.scaling.type": "spiral", "rope.scaling.factor": 2.0},
        {"attn_logit_softcapping": 50.0},
        {"attention.scale": 0.015625},
        {"logit_scale": 0.0625},
        {"attention.causal": False},
        {"attention.sliding_window": 128},
        {"attention.key_length": 64},
        {"attention.max_alibi_bias": 8.0},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_setting_that_the_configuration_cannot_express_is_refused_by_name(tmp_path, fields):
    with pytest.raises(GgufSettingError) as refused:
        apply(config(), written(tmp_path, fields))
    assert "original weights" in str(refused.value)
    name = next(iter(fields))
    assert name in str(refused.value) or "spiral" in str(refused.value) or "slides over 128" in str(refused.value)


def test_a_file_with_two_rope_scalings_is_refused(tmp_path):
    fields = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    with pytest.raises(GgufSettingError, match="twice"):
        apply(config(), written(tmp_path, fields, rope_freqs=[2.0] * 16))
