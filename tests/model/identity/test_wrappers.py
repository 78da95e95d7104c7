"""A model and its wrappers count as one, whichever is passed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import specache
from specache.engine.attention_hook import attached
from specache.model.identity.wrappers import unwrapped
from tests.model.identity.two_turns import NEW, first_turn, second_turn, settings
from tests.tiny import llama, prompt

WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "compiled DataParallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "DataParallel of a compiled one": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}
wrappers = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@wrappers
def test_a_wrapper_and_its_model_continue_each_others_cache(wrap):
    model = llama()
    wrapped = wrap(model)
    assert unwrapped(wrapped) is model
    for first, second in ((model, wrapped), (wrapped, model), (wrapped, wrapped), (wrapped, wrap(model))):
        cache, said = first_turn(first)
        assert second_turn(second, cache, said)


@wrappers
def test_a_session_opens_for_the_model_and_for_its_wrapper(wrap, tmp_path):
    model = llama()
    for each in (wrap(model), model, wrap(model)):
        with specache.Session("s", each, settings(slow_tier="auto"), folder=tmp_path) as session:
            specache.generate(each, prompt(70), past_key_values=session.cache, **NEW)
            session.save()
            tokens = session.saved_tokens
    assert tokens == 73


@wrappers
def test_prefill_and_the_attention_setting_go_through_a_wrapper(wrap):
    model = llama()
    before = model.config._attn_implementation
    wrapped = wrap(model)
    with specache.SpeCache(model, settings()) as cache:
        specache.prefill(wrapped, prompt(40), cache=cache)
        assert cache.get_seq_length() == 40
    with attached(wrapped), attached(model):
        assert model.config._attn_implementation == "specache"
    assert model.config._attn_implementation == before


COMPILED_IN_PLACE = {
    "model.compile()": lambda model: model.compile(backend="eager"),
    "its forward": lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager")),
    "one layer": lambda model: model.model.layers.__setitem__(1, torch.compile(model.model.layers[1], backend="eager")),
}


@pytest.mark.parametrize("compile_it", COMPILED_IN_PLACE.values(), ids=COMPILED_IN_PLACE)
def test_a_model_compiled_in_place_answers_as_before(compile_it):
    model = llama()
    cache, said = first_turn(model)
    compile_it(model)
    assert second_turn(model, cache, said)


def test_sharded_wrappers_are_refused():
    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(specache.UnsupportedModelError, match="without FSDP"):
        specache.SpeCache(FullyShardedDataParallel())
