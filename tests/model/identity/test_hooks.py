"""A cache that hooks and replaced forwards continue which did not fill it: with a warning."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch

from tests.model.identity.hook_changes import CHANGES, steer
from tests.model.identity.two_turns import first_turn, second_turn
from tests.tiny import llama


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_hook_or_forward_with_which_the_cache_was_not_filled_is_warned_of(change):
    model = llama()
    cache, said = first_turn(model)
    change(model)
    with pytest.warns(UserWarning, match=r"(hook|forward).*layers\.1.*new SpeCache"):
        second_turn(model, cache, said)


@pytest.mark.parametrize("name", ["forward", "__call__"])
def test_what_was_replaced_in_a_class_is_detected(name, monkeypatch):
    model = llama()
    cache, said = first_turn(model)
    kind = type(model.model.layers[1].mlp)
    old = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, hidden: old(self, hidden) * 1.5)
    with pytest.warns(UserWarning, match=f"a {name} of its class"):
        second_turn(model, cache, said)


@pytest.mark.parametrize("strength", [0.5, torch.full((64,), 0.5)])
def test_the_same_hook_put_on_again_is_the_same_and_one_of_another_strength_is_warned_of(strength):
    model = llama()
    handle = steer(model, strength)
    cache, said = first_turn(model)
    handle.remove()
    handle = steer(model, strength)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*hook")
        assert second_turn(model, cache, said)
    handle.remove()
    steer(model, strength * 2)
    with pytest.warns(UserWarning, match="hook"):
        second_turn(model, cache, said)


def test_a_decorated_hook_of_another_strength_is_warned_of():
    """The function inside the decorator is what encloses the strength."""

    def decorated(strength: float) -> Any:
        return torch.no_grad()(lambda module, inputs, output: output * strength)

    model = llama()
    mlp = model.model.layers[1].mlp
    handle = mlp.register_forward_hook(decorated(1.5))
    cache, said = first_turn(model)
    handle.remove()
    handle = mlp.register_forward_hook(decorated(1.5))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*hook")
        assert second_turn(model, cache, said)
    handle.remove()
    mlp.register_forward_hook(decorated(3.0))
    with pytest.warns(UserWarning, match="hook"):
        second_turn(model, cache, said)


def test_a_hook_that_records_outputs_continues():
    model = llama()
    last, kept = None, []

    def record(module: Any, inputs: Any, output: Any) -> None:
        nonlocal last
        last = output
        kept.append(output)

    model.model.layers[1].mlp.register_forward_hook(record)
    cache, said = first_turn(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*hook")
        assert second_turn(model, cache, said)
    assert last is not None


def with_hooks_that_enclose_it() -> Any:
    model = llama()
    part = functools.partial(lambda inside, output: output, model)
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: part(output))
    mlp = model.model.layers[0].mlp
    bound = mlp.forward
    mlp.forward = lambda hidden: bound(hidden)
    return model


def test_what_is_noted_of_hooks_keeps_no_model_alive():
    model = with_hooks_that_enclose_it()
    cache, _ = first_turn(model)
    alive = weakref.ref(model)
    del model
    gc.collect()  # its hooks are cycles of their own
    assert alive() is None and cache.get_seq_length() > 0
