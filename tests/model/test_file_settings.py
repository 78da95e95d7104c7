"""Generation settings in a model's files, which the caller did not pass, are honoured or
replaced.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from string import printable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.pipelines import pipeline

import specache
from tests.tiny import llama, prompt

NEW = 8
IDS = prompt(50)
FULL = specache.SpeCacheConfig(policy="full")


def tuned(**settings: Any) -> Any:
    """Return a model whose generation_config has these settings."""
    model = llama()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


def call(way: str, model: Any, ids: torch.Tensor = IDS, **arguments: Any) -> Any:
    arguments = {"max_new_tokens": NEW, "config": FULL, **arguments}
    if way == "generate":
        return specache.generate(model, ids, **arguments)
    return model.generate(ids, custom_generate=specache.decode, **arguments)


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    return llama().generate(IDS, max_new_tokens=NEW, do_sample=False)


SILENT = {
    "no cache": {"use_cache": False},
    "another kind of cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "drafts": {"num_assistant_tokens": 7, "assistant_confidence_threshold": 0.1, "assistant_early_exit": 1},
    "hidden states that nobody sees": {"output_hidden_states": True, "output_attentions": True},
    "a length of its own": {"max_length": 4096},
}
TOLD = {
    "beams": ({"num_beams": 3}, "num_beams=3"),
    "beams with several answers": ({"num_beams": 3, "num_return_sequences": 3}, "num_beams=3"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
    "layers": ({"dola_layers": "low"}, "dola_layers='low'"),
}


@pytest.mark.parametrize("way", ["generate", "decode"])
@pytest.mark.parametrize("case", SILENT)
def test_a_files_setting_without_effect_on_the_output_is_replaced_silently(plain, way, case):
    model = tuned(**SILENT[case])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"specache\..*")
        assert call(way, model, do_sample=False).equal(plain)


@pytest.mark.parametrize("way", ["generate", "decode"])
@pytest.mark.parametrize("case", TOLD)
def test_a_files_setting_that_would_change_the_answer_is_replaced_with_a_warning(plain, way, case):
    settings, message = TOLD[case]
    with pytest.warns(UserWarning, match=message):
        assert call(way, tuned(**settings)).equal(plain)


@pytest.mark.parametrize("way", ["generate", "decode"])
def test_num_beams_of_the_files_does_not_repeat_the_prompts_of_a_batch(way):
    ids = torch.cat([prompt(30, 1), prompt(30, 2)])
    with pytest.warns(UserWarning, match="num_beams"):
        assert call(way, tuned(num_beams=3), ids).equal(llama().generate(ids, max_new_tokens=NEW, do_sample=False))


@pytest.mark.parametrize("way", ["generate", "decode"])
@pytest.mark.parametrize("settings", [{"use_cache": False}, {"output_hidden_states": True}, {"num_beams": 2}, {"use_mtp": True}])
@pytest.mark.parametrize("in_files", [False, True])
def test_the_same_setting_passed_by_the_caller_is_refused(way, settings, in_files):
    model = tuned(**settings) if in_files else llama()
    with pytest.raises(specache.UsageError, match=next(iter(settings))):
        call(way, model, **settings)


@pytest.mark.parametrize("way", ["generate", "decode"])
def test_a_generation_config_that_was_passed_is_typed_where_it_differs_from_the_files(way):
    for settings in ({"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}):
        with pytest.raises(specache.UsageError, match=next(iter(settings))):
            call(way, llama(), generation_config=GenerationConfig(**settings))


@pytest.mark.parametrize("way", ["generate", "decode"])
def test_a_copy_of_the_files_settings_is_not_typed(plain, way):
    model = tuned(use_cache=False)
    mine = copy.deepcopy(model.generation_config)
    mine.max_new_tokens = NEW
    assert call(way, model, generation_config=mine).equal(plain)


def test_a_model_saved_without_a_cache_runs_from_its_folder(plain, tmp_path):
    llama(use_cache=False, output_hidden_states=True).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for way in ("generate", "decode"):
        found = call(way, model)
        assert getattr(found, "sequences", found).equal(plain)


def test_a_pipeline_hands_on_the_files_settings_as_they_are(tmp_path):
    model = tuned(use_cache=False, prompt_lookup_num_tokens=2)
    tokenizer = letters()
    asked = {"max_new_tokens": NEW, "do_sample": False, "return_tensors": True}
    expected = pipeline("text-generation", llama(), tokenizer=tokenizer)("a b c", **asked)
    found = pipeline("text-generation", model, tokenizer=tokenizer)("a b c", custom_generate=specache.decode, config=FULL, **asked)
    assert found == expected


@pytest.mark.parametrize("way", ["generate", "decode"])
def test_output_fields_requested_by_the_files_are_returned(plain, way):
    model = tuned(return_dict_in_generate=True, output_scores=True)
    output = call(way, model)
    assert output.sequences.equal(plain) and len(output.scores) == NEW
    output.past_key_values.close()


@pytest.mark.parametrize("way", ["generate", "decode"])
def test_hidden_states_requested_by_the_files_are_omitted_with_a_warning(way):
    model = tuned(return_dict_in_generate=True, output_hidden_states=True)
    with pytest.warns(UserWarning, match="output_hidden_states"):
        output = call(way, model)
    assert output.hidden_states is None


def test_hidden_states_that_the_models_config_asks_for_are_not_held():
    model = llama(output_hidden_states=True, output_attentions=True, attn_implementation="eager")
    shapes: list[Any] = []
    model.model.register_forward_hook(lambda module, inputs, output: shapes.append((output.hidden_states, output.attentions)))
    call("generate", model).past_key_values.close()
    assert shapes and all(shape == (None, None) for shape in shapes)


def letters() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character."""
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(printable[:97])}, merges=[]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0", clean_up_tokenization_spaces=False)


def test_stop_strings_of_the_files_stop_where_there_is_a_tokenizer(plain):
    tokenizer = letters()
    stop = "".join(tokenizer.convert_ids_to_tokens(plain[0, 52:54].tolist()))
    model = tuned(stop_strings=[stop])
    expected = model.generate(IDS, max_new_tokens=NEW, tokenizer=tokenizer)
    assert expected.shape[1] < 58
    assert call("generate", model, tokenizer=tokenizer).equal(expected)
    config = GenerationConfig(stop_strings=[stop], max_new_tokens=NEW)
    assert specache.generate(llama(), IDS, generation_config=config, tokenizer=tokenizer, config=FULL).equal(expected)


def test_stop_strings_of_the_files_without_a_tokenizer_are_missed_with_a_warning(plain):
    with pytest.warns(UserWarning, match="stop_strings.*tokenizer"):
        assert call("generate", tuned(stop_strings=["aa"])).equal(plain)
    with pytest.raises(specache.UsageError, match="tokenizer"):
        call("generate", llama(), generation_config=GenerationConfig(stop_strings=["aa"]))


def test_a_short_max_length_of_the_files_leaves_room_for_an_answer(plain):
    with pytest.warns(UserWarning, match="max_length=20"):
        found = specache.generate(tuned(max_length=20), IDS, config=FULL)
    assert found.shape[1] == 70 and found[:, :58].equal(plain)
    with pytest.raises(specache.UsageError, match="max_length=20"):
        specache.generate(llama(), IDS, max_length=20)
    assert specache.generate(tuned(max_length=54), IDS, config=FULL).shape[1] == 54


def test_token_healing_of_the_files_is_not_applied(plain):
    with pytest.warns(UserWarning, match="token_healing"):
        assert call("generate", tuned(token_healing=True)).equal(plain)
    with pytest.raises(specache.UsageError, match="heal_tokens"):
        call("generate", llama(), token_healing=True)


def test_several_answers_typed_need_sampling_where_the_files_beams_are_gone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(specache.UsageError, match="do_sample"):
            call("generate", tuned(num_beams=3), num_return_sequences=2)
        assert call("generate", tuned(num_beams=3), num_return_sequences=2, do_sample=True).shape[0] == 2


def test_a_cache_is_continued_although_the_files_name_a_cache_implementation():
    model = tuned(cache_implementation="static")
    with specache.SpeCache(model) as cache:
        first = specache.generate(model, IDS, past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert specache.generate(model, first, past_key_values=cache, max_new_tokens=4, do_sample=False).shape[1] == 58


def test_a_folder_with_settings_is_read_as_it_is(tmp_path: Path, plain):
    model = llama()
    model.save_pretrained(tmp_path)
    GenerationConfig(use_cache=False, num_beams=2, max_length=60, pad_token_id=0).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="num_beams=2"):
        assert specache.generate(loaded, IDS, config=FULL)[:, :58].equal(plain)
