"""How long a sequence may be: RoPE scaling makes it longer than `max_position_embeddings`, a
learned table has an end.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import specache
from specache.cli.models import LoadedModel
from specache.engine.answer_length import answer_limit
from specache.eval.tasks.base import TaskModel
from specache.model.dimensions import dimensions_of
from specache.model.info import inspect_model
from specache.model.positions import max_positions
from tests.engine.test_model_families import build, check
from tests.tiny import llama, prompt

ORIGINAL = 64
THETA = {"rope_theta": 1e4}
STRETCHED: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", **THETA, "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn that says no original": {"rope_type": "yarn", **THETA, "factor": 4.0},
    "yarn with its own attention factor": {"rope_type": "yarn", **THETA, "factor": 4.0, "attention_factor": 1.3},
    "linear": {"rope_type": "linear", **THETA, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", **THETA, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}  # fmt: skip


def stretched(name: str, stated: int = ORIGINAL) -> Any:
    return llama(max_position_embeddings=stated, rope_parameters=dict(STRETCHED[name]))


@pytest.mark.parametrize("policy", ["full", "verified"])
@pytest.mark.parametrize("name", STRETCHED)
def test_prompts_up_to_the_stretched_length_equal_stock(name, policy):
    ids = prompt(4 * ORIGINAL - 8)
    check(stretched(name), ids, torch.ones_like(ids), policy, "ram", new=8)


@pytest.mark.parametrize("name", STRETCHED)
def test_a_prompt_longer_than_the_stretched_length_is_refused(name):
    with pytest.raises(specache.UsageError, match=r"257 tokens but the model has positions for 256"):
        specache.generate(stretched(name), prompt(257), max_new_tokens=2)


@pytest.mark.parametrize("name", STRETCHED)
def test_a_length_that_is_stretched_already_is_not_stretched_again_where_the_original_is_stated(name):
    entry = {**STRETCHED[name], "original_max_position_embeddings": ORIGINAL}
    assert max_positions(llama(max_position_embeddings=256, rope_parameters=entry)) == 256
    assert max_positions(llama(max_position_embeddings=2048, rope_parameters=entry)) == 2048


def test_partial_rotary_rope_is_stretched():
    entry = {"rope_type": "yarn", **THETA, "factor": 4.0, "partial_rotary_factor": 0.5}
    model = build("Phi", {"max_position_embeddings": ORIGINAL, "rope_parameters": entry})
    ids = prompt(200)
    check(model, ids, torch.ones_like(ids), "verified", "ram", new=8)


def test_a_rope_scaling_entry_of_the_old_style_is_read():
    model = llama(max_position_embeddings=ORIGINAL)
    model.config.rope_parameters = None
    model.config.rope_scaling = {"type": "yarn", "factor": 2.0}
    assert max_positions(model) == 2 * ORIGINAL


def test_rope_entries_per_kind_of_layer_are_read():
    entries = {"full_attention": STRETCHED["linear"], "sliding_attention": {"rope_type": "default", **THETA}}
    model = build("Gemma3", {**GEMMA3, "rope_parameters": entries})
    assert max_positions(model) == 4 * ORIGINAL
    ids = prompt(200)
    check(model, ids, torch.ones_like(ids), "verified", "ram", new=8)


GEMMA3 = {
    "num_hidden_layers": 4, "head_dim": 16, "sliding_window": 100, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2,
    "max_position_embeddings": ORIGINAL,
}  # fmt: skip


def test_a_window_longer_than_the_unstretched_positions_still_slides():
    """64 positions, a window of 100, stretched to 256: the window is shorter than the sequences."""
    entries = {"full_attention": STRETCHED["linear"], "sliding_attention": STRETCHED["linear"]}
    windows = inspect_model(build("Gemma3", {**GEMMA3, "rope_parameters": entries})).windows
    assert set(windows) == {None, 100}


def test_dynamic_scaling_has_no_longest_sequence():
    model = llama(max_position_embeddings=ORIGINAL, rope_parameters={"rope_type": "dynamic", **THETA, "factor": 2.0})
    assert max_positions(model) is None
    ids = prompt(5 * ORIGINAL)
    check(model, ids, torch.ones_like(ids), "on-demand", "ram", new=4)


def test_a_model_that_adds_no_positions_has_no_longest_sequence():
    with torch.device("meta"):
        jamba = build("Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1})
        bloom = build("Bloom", {"n_head": 4})
    assert jamba.config.max_position_embeddings == 1024
    assert max_positions(jamba) is None
    assert max_positions(bloom) is None


def test_library_commands_planner_and_evaluation_agree_on_the_positions():
    model = stretched("yarn")
    loaded = LoadedModel(model, None, "tiny")
    assert loaded.max_positions == TaskModel(model, None, "tiny").max_positions == 4 * ORIGINAL
    assert inspect_model(model).max_positions == dimensions_of(model).max_positions == 4 * ORIGINAL
    assert answer_limit(None, loaded.max_positions, 4 * ORIGINAL - 10).new_tokens == 10


def gpt2(positions: int = 64) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": positions, "initializer_range": 0.2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, eos_token_id=None, bos_token_id=1)).eval()


def opt(positions: int = 64) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 32}
    config = transformers.OPTConfig(vocab_size=97, max_position_embeddings=positions, init_std=0.2, eos_token_id=None, **sizes)
    model = transformers.OPTForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


LEARNED = {"gpt2": gpt2, "opt": opt}


@pytest.mark.parametrize("policy", ["full", "verified", "speculative", "on-demand", "previous"])
@pytest.mark.parametrize("family", LEARNED)
def test_a_learned_table_of_positions_is_used_to_its_end(family, policy):
    ids = prompt(54)
    check(LEARNED[family](), ids, torch.ones_like(ids), policy, "ram", new=11)  # the last token is not fed


@pytest.mark.parametrize("family", LEARNED)
def test_a_prompt_past_the_learned_table_is_refused(family):
    with pytest.raises(specache.UsageError, match="65 tokens but the model has positions for 64"):
        specache.generate(LEARNED[family](), prompt(65), max_new_tokens=2)


@pytest.mark.parametrize("policy", ["full", "verified", "speculative", "on-demand", "previous"])
@pytest.mark.parametrize("family", LEARNED)
def test_new_tokens_past_the_learned_table_end_in_an_error_that_has_what_was_generated(family, policy):
    model = LEARNED[family]()
    with pytest.raises(IndexError):
        model.generate(prompt(54), max_new_tokens=20, do_sample=False)
    expected = model.generate(prompt(54), max_new_tokens=11, do_sample=False)[0, 54:].tolist()
    config = specache.SpeCacheConfig(policy=policy, slow_tier="ram", top_k=10**6, group_size=16, residual=16)
    with specache.SpeCache(model, config) as cache:
        with pytest.raises(specache.UsageError, match="learned positions end at 64") as caught:
            specache.generate(model, prompt(54), past_key_values=cache, max_new_tokens=20, do_sample=False)
        assert caught.value.new_token_ids == [expected]
        assert cache.get_seq_length() == 64
        ids = torch.cat([prompt(54), torch.tensor([expected[:5]])], dim=1)  # the cache can still be used
        again = specache.generate(model, ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert again[0, 54:].tolist() == expected[:10]


def test_rope_scaling_does_not_extend_a_learned_table():
    model = gpt2()
    model.config.rope_scaling = {"type": "linear", "factor": 4.0}
    assert max_positions(model) == 64


@pytest.mark.parametrize("new", [30, 60])
def test_generating_past_a_window_that_was_kept_whole_is_refused_instead_of_wrong(new):
    """Every layer slides over 80 tokens, as many as there are positions: full attention, as long as
    no text is longer.
    """
    model = build("Mistral", {"sliding_window": 80, "max_position_embeddings": 80})
    ids = prompt(50)
    if new == 30:
        return check(model, ids, torch.ones_like(ids), "verified", "ram", new=new)
    with pytest.raises(specache.UsageError, match="slides from 80 tokens on"):
        specache.generate(model, ids, max_new_tokens=new, do_sample=False)
