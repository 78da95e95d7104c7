"""Adapters with peft itself, if it is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

import specache
from specache.model.identity.wrappers import unwrapped
from tests.model.identity.two_turns import NEW, first_turn, second_turn, settings
from tests.tiny import llama, prompt, ragged

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}
    return peft.LoraConfig(**{"task_type": "CAUSAL_LM", **sizes, **more})


def with_lora(*more: str, model: Any = None, **options: Any) -> Any:
    made = peft.get_peft_model(model or llama(), lora(**options))
    for name in more:
        made.add_adapter(name, lora())
    return made.eval()


def scale(model: Any, factor: float) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", factor)


WAYS = {
    "itself": lambda m: m,
    "the model in it": lambda m: m.base_model.model,
    "its tuner": lambda m: m.base_model,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "in DataParallel": nn.DataParallel,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_peft_model_continues_whether_wrapped_or_not(way, tmp_path):
    model = with_lora()
    assert unwrapped(way(model)) is model.base_model.model
    cache, said = first_turn(model)
    assert second_turn(way(model), cache, said)
    assert torch.equal(said, model.generate(input_ids=prompt(70), **NEW))
    for each in (model, way(model)):
        with specache.Session("s", each, settings(slow_tier="auto"), folder=tmp_path) as session:
            specache.generate(each, prompt(70), past_key_values=session.cache, **NEW)
            session.save()


OTHERS = {
    "dora": {"use_dora": True},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "trainable tokens": {"trainable_token_indices": [1, 2]},
    "an embedding": {"target_modules": ["embed_tokens", "v_proj"]},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_other_kinds_of_adapters_continue_and_are_refused_without(options):
    model = with_lora(**options)
    cache, said = first_turn(model)
    assert second_turn(model, cache, said)
    with model.disable_adapter(), pytest.raises(specache.UsageError, match="no active adapter"):
        second_turn(model, cache, said)
    assert second_turn(model, cache, said)


CHANGES = {
    "switched": (lambda m: m.set_adapter("b"), "'b' now"),
    "both active": (lambda m: m.base_model.set_adapter(["default", "b"]), "'b' and the adapter 'default' now"),
    "merged": (lambda m: m.merge_adapter(), "merged"),
    "scaled": (lambda m: scale(m, 3.0), "scales"),
    "deleted": (lambda m: m.delete_adapter("default"), "'b' now"),
    "unloaded": (lambda m: m.unload(), "no active adapter now"),
    "merged and unloaded": (lambda m: m.merge_and_unload(), "no active adapter now"),
}


@pytest.mark.parametrize(("change", "description"), CHANGES.values(), ids=CHANGES)
def test_changed_adapters_are_refused(change, description):
    model = with_lora("b")
    inner = unwrapped(model)
    cache, said = first_turn(model)
    change(model)
    with pytest.raises(specache.UsageError, match=description):
        second_turn(inner, cache, said)


def test_switching_back_continues():
    model = with_lora("b")
    cache, said = first_turn(model)
    model.set_adapter("b")
    model.add_adapter("c", lora())
    model.set_adapter("default")
    model.delete_adapter("b")
    assert second_turn(model, cache, said)


def test_adapters_added_through_transformers_are_detected():
    model = llama()
    model.add_adapter(lora(), adapter_name="x")
    model.add_adapter(lora(), adapter_name="y")
    model.set_adapter("x")
    cache, said = first_turn(model.eval())
    model.set_adapter("y")
    with pytest.raises(specache.UsageError, match="'x' then and runs with the adapter 'y'"):
        second_turn(model, cache, said)
    model.set_adapter("x")
    assert second_turn(model, cache, said)


def test_a_session_belongs_to_the_adapter_that_filled_it(tmp_path):
    model = with_lora("b")

    def turn(name: str) -> None:
        with specache.Session(name, model, settings(slow_tier="auto"), folder=tmp_path) as session:
            model.set_adapter("b")  # after it was opened, before anything is in it
            specache.generate(model, prompt(70), past_key_values=session.cache, **NEW)
            model.set_adapter("default")
            session.save()

    turn("s")
    with pytest.raises(specache.SessionError, match="was made with the adapter b, and this model runs with the adapter default"):
        specache.Session("s", model, folder=tmp_path)
    model.set_adapter("b")
    specache.Session("s", model, folder=tmp_path).close()
    with model.disable_adapter(), pytest.raises(specache.SessionError, match="runs with no adapter"):
        specache.Session("s", model, folder=tmp_path)


def test_a_model_without_its_adapter_opens_the_sessions_of_the_bare_model(tmp_path):
    with specache.Session("s", llama(), settings(slow_tier="auto"), folder=tmp_path) as session:
        specache.generate(llama(), prompt(70), past_key_values=session.cache, **NEW)
        session.save()
    model = with_lora()
    with model.disable_adapter():
        specache.Session("s", model, folder=tmp_path).close()
    with pytest.raises(specache.SessionError, match="adapter default"):
        specache.Session("s", model, folder=tmp_path)


PROMPTS = {"prompt tuning": "PromptTuningConfig", "prefix tuning": "PrefixTuningConfig", "p-tuning": "PromptEncoderConfig"}


@pytest.mark.parametrize("kind", PROMPTS.values(), ids=PROMPTS)
def test_learned_prompts_are_refused_until_they_are_disabled(kind, tmp_path):
    model = peft.get_peft_model(llama(), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    requests = (
        lambda: specache.SpeCache(model),
        lambda: specache.generate(model, prompt(20), **NEW),
        lambda: specache.generate(torch.compile(model, backend="eager"), prompt(20), **NEW),
        lambda: model.generate(input_ids=prompt(20), custom_generate=specache.decode, **NEW),
        lambda: specache.Session("s", model, folder=tmp_path),
    )
    for request in requests:
        with pytest.raises(specache.UnsupportedModelError, match="learned vectors"):
            request()
    with model.disable_adapter():
        cache, said = first_turn(model)
    with pytest.raises(specache.UnsupportedModelError, match="learned vectors"):
        second_turn(model, cache, said)


def test_adapters_of_one_call_are_refused_and_leave_nothing():
    model = with_lora("b")
    for generate in (
        lambda: specache.generate(model, prompt(20), adapter_names=["b"], **NEW),
        lambda: model.generate(input_ids=prompt(20), adapter_names=["b"], custom_generate=specache.decode, **NEW),
    ):
        with pytest.raises(specache.UsageError, match="adapter_names"):
            generate()
    expected = model.generate(input_ids=prompt(20), **NEW)
    assert torch.equal(specache.generate(model, prompt(20), **NEW), expected)


def test_activated_lora_is_refused():
    with pytest.raises(specache.UsageError, match="alora_invocation_tokens"):
        specache.generate(with_lora(alora_invocation_tokens=[3, 4]), prompt(20), **NEW)


def test_adapters_of_one_call_are_refused_also_over_a_cache_that_is_filled():
    model = with_lora()
    cache, said = first_turn(model)
    with pytest.raises(specache.UsageError, match="adapter_names= chooses adapters for one call"):
        model.generate(input_ids=said, custom_generate=specache.decode, past_key_values=cache, adapter_names=["__base__"], **NEW)
    assert second_turn(model, cache, said)


def test_settings_that_lie_on_the_wrapper_are_those_of_the_files():
    model = with_lora(model=llama(pad_token_id=None))
    model.generation_config = GenerationConfig(num_beams=3, pad_token_id=0)
    ids, mask = ragged(40, 25)
    said = specache.generate(model, ids, config=specache.SpeCacheConfig(policy="full"), **NEW)
    assert torch.equal(said, model.generate(input_ids=ids, attention_mask=mask, num_beams=1, **NEW))
    model.base_model.model.generation_config = GenerationConfig()
    with specache.SpeCache(model) as cache:
        specache.prefill(model, ids, cache=cache)
        assert [sequence.length for sequence in cache.sequences] == [40, 25]
