"""Inputs beside the prompt are accepted if they have no effect, else refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BatchEncoding,
    Cache,
    CLIPVisionConfig,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import specache
from tests.tiny import llama, prompt, ragged

NEW = 4
FULL = specache.SpeCacheConfig(policy="full")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def llava() -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_id=96, image_seq_length=4)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def qwen_vl() -> Any:
    torch.manual_seed(0)
    text = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)).eval()


@pytest.fixture(scope="module")
def gpt2() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=None, bos_token_id=1, pad_token_id=0)).eval()


WAYS = ("generate", "decode", "prefill")


def call(way: str, model: Any, ids: torch.Tensor, **arguments: Any) -> Any:
    """Generate by one of the three ways."""
    if way == "generate":
        return specache.generate(model, ids, max_new_tokens=NEW, do_sample=False, **arguments)
    if way == "decode":
        return model.generate(ids, custom_generate=specache.decode, max_new_tokens=NEW, do_sample=False, **arguments)
    with specache.SpeCache(model) as cache:
        return specache.prefill(model, ids, cache=cache, **arguments)


def stock(model: Any, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **arguments)


IDS = prompt(40)
CHANGES = {
    "positions of one's own": ("position_ids", torch.arange(40)[None] + 7),
    "embeddings": ("inputs_embeds", torch.zeros(1, 40, 64)),
    "labels": ("labels", IDS),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CHANGES)
def test_an_unsupported_model_input_is_refused_by_name(model, way, case):
    name, value = CHANGES[case]
    with pytest.raises(specache.UsageError, match=name):
        call(way, model, IDS, **{name: value})


@pytest.mark.parametrize("way", ["generate", "prefill"])
@pytest.mark.parametrize("name", ["cache_position", "head_mask", "encoder_outputs", "decoder_input_ids", "nonsense"])
def test_an_argument_that_the_model_does_not_know_is_refused_by_name(model, way, name):
    with pytest.raises(specache.UsageError, match=name):
        call(way, model, IDS, **{name: torch.ones(1)})


def test_stock_generate_still_refuses_what_it_does_not_know(model):
    with pytest.raises(ValueError, match="nonsense"):
        call("decode", model, IDS, nonsense=1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["pixel_values", "image_sizes", "vision_feature_layer", "mm_encoder_outputs"])
def test_images_are_refused_by_generate_decode_and_prefill(llava, way, name):
    value = -2 if name == "vision_feature_layer" else torch.randn(1, 3, 16, 16)
    with pytest.raises(specache.UsageError, match=name):
        call(way, llava, IDS, **{name: value})


@pytest.mark.parametrize("way", WAYS)
def test_images_of_a_model_with_positions_of_several_axes_are_refused(qwen_vl, way):
    with pytest.raises(specache.UsageError, match="image_grid_thw"):
        call(way, qwen_vl, IDS, image_grid_thw=torch.tensor([[1, 2, 2]]))


@pytest.mark.parametrize("way", ["generate", "decode"])
@pytest.mark.parametrize("which", ["llava", "qwen_vl"])
def test_text_through_a_vision_language_model_is_that_of_stock(request, which, way):
    model = request.getfixturevalue(which)
    ids, mask = ragged(40, 25)
    text = {"mm_token_type_ids": torch.zeros_like(ids)} if which == "qwen_vl" else {}
    text |= {"pixel_values": None} if way == "generate" else {}
    expected = stock(model, ids, attention_mask=mask)
    assert torch.equal(call(way, model, ids, attention_mask=mask, config=specache.SpeCacheConfig(policy="full"), **text), expected)


@pytest.mark.parametrize("way", WAYS)
def test_inputs_without_effect_are_accepted(model, way):
    ids, mask = ragged(40, 25)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as models' own code makes them; padding's do not matter
    nothing = {"position_ids": positions, "labels": None, "inputs_embeds": None, "logits_to_keep": 1}
    expected = stock(model, ids, attention_mask=mask)
    given = call(way, model, ids, attention_mask=mask, **nothing)
    assert way == "prefill" or torch.equal(given, expected)


def test_position_ids_of_new_tokens_count_from_the_full_text(model):
    new = prompt(8, 1)
    with specache.SpeCache(model) as cache:
        specache.prefill(model, IDS, cache=cache)
        arguments = {"attention_mask": torch.ones(1, 48, dtype=torch.long), "past_key_values": cache, "max_new_tokens": NEW}
        for positions in (torch.arange(8)[None], torch.arange(41, 49)[None]):
            with pytest.raises(specache.UsageError, match="40 to 47"):
                specache.generate(model, new, position_ids=positions, **arguments)
        positions = torch.arange(40, 48)[None]
        specache.generate(model, new, position_ids=positions, **arguments)


def test_segment_ids_of_zero_are_accepted_if_others_mark_images():
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    text = {**SIZES, "head_dim": 16, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
    config = Gemma3Config(text_config=text, vision_config={**vision, "patch_size": 4}, mm_tokens_per_image=4, image_token_index=96)
    gemma = Gemma3ForConditionalGeneration(config).eval()
    gemma.generation_config.eos_token_id = None
    zeros = torch.zeros_like(IDS)
    expected = stock(gemma, IDS, token_type_ids=zeros)
    for way in ("generate", "decode"):
        full = specache.SpeCacheConfig(policy="full")
        assert torch.equal(call(way, gemma, IDS, token_type_ids=zeros, config=full), expected)
        with pytest.raises(specache.UsageError, match="token_type_ids"):
            call(way, gemma, IDS, token_type_ids=zeros + 1)


@pytest.mark.parametrize("way", WAYS)
def test_segment_ids_of_zero_are_refused_if_the_model_embeds_them(gpt2, way):
    zeros = torch.zeros_like(IDS)
    assert not torch.equal(stock(gpt2, IDS, token_type_ids=zeros), stock(gpt2, IDS))  # they are no default there
    with pytest.raises(specache.UsageError, match="token_type_ids"):
        call(way, gpt2, IDS, token_type_ids=zeros)


def test_a_mask_of_four_dimensions_is_refused(model):
    with pytest.raises(specache.UsageError, match="attention_mask"):
        call("generate", model, IDS, attention_mask=torch.ones(1, 1, 40, 40))


NOT_MASKS = {
    "shorter than the prompt": (torch.ones(1, 30, dtype=torch.long), "30 columns"),
    "of another batch": (torch.ones(2, 40, dtype=torch.long), "shape"),
    "additive": (torch.full((1, 40), -1e4), "1 for tokens"),
    "a list": ([[1] * 40], "a list"),
}


@pytest.mark.parametrize("case", NOT_MASKS)
def test_an_invalid_mask_is_refused(model, case):
    mask, message = NOT_MASKS[case]
    for way in ("generate", "prefill"):
        with pytest.raises(specache.UsageError, match=message):
            call(way, model, IDS, attention_mask=mask)


NOT_PROMPTS = {
    "a batch encoding": (BatchEncoding({"input_ids": IDS}), r"\*\*inputs"),
    "a dict": ({"input_ids": IDS}, r"\*\*inputs"),
    "lists": (IDS.tolist(), "torch.tensor"),
    "an array": (np.ones((1, 4), dtype=np.int64), "from_numpy"),
    "a text": ("Hello", "tokenizer"),
    "one dimension": (IDS[0], r"input_ids\[None\]"),
    "three dimensions": (IDS[None], "shape"),
    "floats": (IDS.float(), "float32"),
    "booleans": (IDS > 3, "bool"),
    "no rows": (IDS[:0], "empty"),
    "no columns": (IDS[:, :0], "empty"),
    "beyond the vocabulary": (torch.tensor([[5, 97, 5]]), "97 at position 1"),
    "negative": (torch.tensor([[5, 5, -1]]), "-1 at position 2"),
}


@pytest.mark.parametrize("case", NOT_PROMPTS)
def test_an_invalid_prompt_is_refused_with_what_to_pass(model, case):
    value, message = NOT_PROMPTS[case]
    for way in ("generate", "prefill"):
        with pytest.raises(specache.UsageError, match=message):
            call(way, model, value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_token_ids_of_any_integer_dtype_are_accepted(model, dtype):
    ids = IDS.to(dtype)
    assert torch.equal(call("generate", model, ids, config=specache.SpeCacheConfig(policy="full")), stock(model, ids))


def test_padding_may_be_any_token(model):
    ids, mask = ragged(40, 25)
    expected = call("generate", model, ids, attention_mask=mask)[:, 40:]
    ids[mask == 0] = -100
    assert torch.equal(specache.generate(model, ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)[:, 40:], expected)


def test_input_ids_and_inputs_are_the_same_argument(model):
    expected = stock(model, IDS)
    config = specache.SpeCacheConfig(policy="full")
    assert torch.equal(specache.generate(model, inputs=IDS, max_new_tokens=NEW, do_sample=False, config=config), expected)
    decoded = model.generate(inputs=IDS, custom_generate=specache.decode, max_new_tokens=NEW, do_sample=False, config=config)
    assert torch.equal(decoded, expected)
    with specache.SpeCache(model) as cache:
        specache.prefill(model, inputs=IDS, cache=cache)
        assert cache.get_seq_length() == 40
        with pytest.raises(specache.UsageError, match="two names"):
            specache.prefill(model, IDS, inputs=IDS, cache=cache)
    with pytest.raises(specache.UsageError, match="two names"):
        specache.generate(model, IDS, inputs=IDS)


def test_padding_is_inferred_by_prefill_as_by_generate(model):
    ids, mask = ragged(40, 25)
    with specache.SpeCache(model) as cache:
        specache.prefill(model, ids, cache=cache)
        assert [sequence.length for sequence in cache.sequences] == mask.sum(1).tolist()


def test_another_decoding_loop_is_refused(model):
    with pytest.raises(specache.UsageError, match="custom_generate"):
        specache.generate(model, IDS, custom_generate=specache.decode)


class Waiting:
    """A streamer whose text another thread may wait for."""

    def __init__(self) -> None:
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        self.ended += 1


def test_decode_called_directly_is_refused(model):
    with pytest.raises(specache.UsageError, match="custom_generate=specache"):
        specache.decode(model, IDS)


@pytest.mark.parametrize("way", WAYS)
def test_empty_position_ids_are_refused(model, way):
    with pytest.raises(specache.UsageError, match="position_ids must be a tensor"):
        call(way, model, IDS, position_ids=torch.zeros(0, 40, dtype=torch.long))


def test_a_cache_refuses_a_config_of_another_type(model):
    with pytest.raises(specache.UsageError, match="not a value of type dict"):
        specache.SpeCache(model, {"policy": "full"})


@pytest.mark.parametrize("way", ["generate", "decode"])
def test_a_config_of_another_type_is_refused(model, way):
    with pytest.raises(specache.UsageError, match=r"config must be a specache\.SpeCacheConfig, not a dict"):
        call(way, model, IDS, config={"policy": "full"})


@pytest.mark.parametrize("way", ["generate", "decode"])
@pytest.mark.parametrize("arguments", [{"labels": IDS}, {"num_beams": 2}, {"output_attentions": True}, {}])
def test_a_refused_call_ends_its_streamer(model, way, arguments):
    streamer = Waiting()
    try:
        call(way, model, IDS, streamer=streamer, **arguments)
    except specache.UsageError:
        assert arguments
    assert streamer.ended == 1


@pytest.mark.parametrize("typed", ["an argument", "a GenerationConfig"])
def test_padding_is_inferred_from_the_calls_own_pad_token_as_in_stock(typed):
    model = llama(pad_token_id=None)
    ids, mask = ragged(40, 25)
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    arguments = settings if typed == "an argument" else {"generation_config": GenerationConfig(**settings)}
    expected = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(specache.generate(model, ids, config=FULL, **arguments), expected)
    assert torch.equal(model.generate(ids, custom_generate=specache.decode, config=FULL, **arguments), expected)


def test_nothing_is_padding_if_the_calls_end_token_is_the_pad_token(model):
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], 1)
    everything = stock(model, ids, attention_mask=torch.ones_like(ids), eos_token_id=[5, 0])
    for ends in ([5, 0], torch.tensor([5, 0])):
        assert torch.equal(call("generate", model, ids, config=FULL, eos_token_id=ends), everything)


def test_pad_tokens_inside_a_text_are_text_for_generate_decode_and_prefill(model):
    ids = IDS.clone()
    ids[0, 10] = 0
    expected = stock(model, ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(call("generate", model, ids, config=FULL), expected)
    assert torch.equal(call("decode", model, ids, config=FULL), expected)


def test_prefill_refuses_other_models_and_caches(model):
    with pytest.raises(specache.UsageError, match="must be a SpeCache, not a DynamicCache"):
        specache.prefill(model, IDS, cache=DynamicCache())
    with specache.SpeCache(model) as cache:
        specache.prefill(model, IDS, cache=cache)
        with pytest.raises(specache.UnsupportedModelError, match="str is not a transformers model"):
            specache.prefill("a name", IDS, cache=cache)


@pytest.mark.parametrize("name", sorted(name for name in dir(Cache) if not name.startswith("_")))
def test_what_only_transformers_cache_has_says_what_to_do_instead(name):
    with specache.SpeCache(llama()) as cache:
        if hasattr(cache, name):
            return
        with pytest.raises(AttributeError, match="pass the shorter text" if name == "crop" else r"Call specache\.generate"):
            getattr(cache, name)


def test_a_name_that_nobody_has_is_missing_as_usual():
    with specache.SpeCache(llama()) as cache, pytest.raises(AttributeError, match="'SpeCache' object has no attribute 'leng'"):
        cache.leng  # noqa: B018


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 2}, {"assistant_model": None}])
def test_stock_decoding_over_a_cache_is_refused_with_the_call_to_use(arguments):
    model = llama()
    if "assistant_model" in arguments:
        arguments = {"assistant_model": llama(seed=1)}
    with pytest.raises(specache.UsageError, match=r"Call specache\.generate"):
        model.generate(prompt(20), past_key_values=specache.SpeCache(model), max_new_tokens=2, **arguments)
