"""A model that is changed while programs of its layers exist: between answers and within one."""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.models.llama import modeling_llama

import specache
from specache.engine.traced import traced_layers
from specache.platform import extension
from tests.tiny import llama, prompt

SETTINGS = {"policy": "on-demand", "slow_tier": "ram-inplace", "residual": 16, "group_size": 16, "top_k": 10**6}
pytestmark = pytest.mark.skipif(not extension.instruction_sets(), reason=f"no C++ kernels: {extension.IMPORT_ERROR}")


class Calling:
    """A streamer that calls a function at its n-th token."""

    def __init__(self, function: Any, n: int) -> None:
        self.function, self.left = function, n

    def put(self, value: Tensor) -> None:
        if self.left == 0:
            self.function()
        self.left -= 1

    def end(self) -> None:
        pass


def answer(model: Any, change: Any = None, at: int = 8) -> tuple[Tensor, Tensor, int]:
    cache = specache.SpeCache(model, specache.SpeCacheConfig(**SETTINGS))
    streamer = {} if change is None else {"streamer": Calling(lambda: change(model), at)}
    arguments = {"max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = specache.generate(model, prompt(113), past_key_values=cache, **arguments, **streamer)
    return out.sequences, torch.stack(out.logits), cache.stats()["traced_steps"]


def eager(*arguments: Any) -> tuple[Tensor, Tensor, int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traced_layers, "begin_answer", lambda model: None)
        return answer(*arguments)


def assert_equal(ours: Any, expected: Any) -> None:
    assert torch.equal(ours[0], expected[0]) and (ours[1] - expected[1]).abs().amax() < 1e-3


class Wrapped(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs) * 1.2


def forward_in_place(model: Any) -> None:
    layer = model.model.layers[1]
    old = layer.forward
    layer.forward = lambda *args, **kwargs: old(*args, **kwargs).mul_(1.5)


def own_forward(model: Any) -> None:
    layer = model.model.layers[1]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs) * 1.5


def up(model: Any) -> Any:
    return model.model.layers[1].mlp.up_proj


CHANGES = {
    "a weight": lambda model: setattr(up(model), "weight", nn.Parameter(up(model).weight * 1.5)),
    "a weight's memory": lambda model: setattr(up(model).weight, "data", up(model).weight.data * 1.5),
    "a module": lambda model: setattr(model.model.layers[1].mlp, "up_proj", copy.deepcopy(model.model.layers[0].mlp.up_proj)),
    "a hook": lambda model: model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 0.5),
    "a setting": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.5),
    "an instance's forward": lambda model: setattr(model.model.layers[1].mlp, "forward", lambda x: x),
    "a method": lambda model: setattr(model.model.layers[1].mlp.act_fn, "forward", lambda x: x * 0.5),
    "a layer's forward": own_forward,
    "a layer's forward, in place": forward_in_place,
    "a layer": lambda model: model.model.layers.__setitem__(1, copy.deepcopy(model.model.layers[0])) or number(model),
    "a layer wrapped": lambda model: model.model.layers.__setitem__(1, Wrapped(model.model.layers[1])),
    "the last layer wrapped": lambda model: model.model.layers.__setitem__(2, Wrapped(model.model.layers[2])),
}


def number(model: Any) -> None:
    model.model.layers[1].self_attn.layer_idx = 1


@torch.no_grad()
@pytest.mark.parametrize("at", [0, 1, 8])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_replaced_in_the_middle_of_an_answer_counts_from_the_next_step(change, at):
    expected, ours = (run(llama(), CHANGES[change], at) for run in (eager, answer))
    assert_equal(ours, expected)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_replaced_between_answers_counts(change):
    model = llama()
    answer(model)
    kept = [*model.model.layers]  # a layer that is replaced may live on
    CHANGES[change](model)
    assert_equal(answer(model), eager(model))
    assert kept


def halved_rotation(patch: pytest.MonkeyPatch) -> None:
    rotate = modeling_llama.apply_rotary_pos_emb
    patch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda query, *more: rotate(query * 0.5, *more))


def halved_forward(patch: pytest.MonkeyPatch) -> None:
    forward = modeling_llama.LlamaMLP.forward
    patch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: forward(self, x) * 0.5)


PATCHES = {
    "a function of the model's file": halved_rotation,
    "a class's forward": halved_forward,
    "a function of PyTorch": lambda patch: patch.setattr(functional, "silu", lambda x, inplace=False: torch.relu(x)),
}


@pytest.mark.parametrize("name", PATCHES)
def test_somebody_elses_functions_are_called(name):
    model = llama()
    before = answer(model)
    with pytest.MonkeyPatch.context() as patch:
        PATCHES[name](patch)
        ours = answer(model)
        assert_equal(ours, eager(model))
    assert ours[2] == 0 and not torch.equal(ours[1], before[1])
    again = answer(model)
    assert_equal(again, before)
    assert again[2] > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b, c: a.update(x=object()),
        lambda a, b, c: a.pop("x"),
        lambda a, b, c: a.update(more=1),
        lambda a, b, c: c.update(x=1),
        lambda a, b, c: (b.update(y=a.pop("y")), b.move_to_end("y", last=False)),  # the same objects in the same order
        lambda a, b, c: a.update(y=a["x"]),
    ],
)
def test_every_kind_of_replacement_in_dictionaries_is_seen(change):
    values = [object() for _ in range(4)]
    mappings: list[Any] = [dict(zip("xy", values[:2], strict=True)), OrderedDict(zip("xz", values[2:], strict=True)), {}]
    sizes, seen = [*map(len, mappings)], [value for mapping in mappings for value in mapping.values()]
    assert extension.native.hold(mappings, sizes, seen)
    change(*mappings)
    assert not extension.native.hold(mappings, sizes, seen)


def test_a_forward_of_a_class_is_called_in_every_step(monkeypatch):
    called, forward = [], modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: called.append(1) or forward(self, x))
    answer(llama())
    assert len(called) == 3 * 16


@torch.no_grad()
def test_programs_do_not_read_weights_that_are_gone():
    """A weight that was another one only while an answer ran, and was recorded there."""
    model = llama()
    own = up(model).weight
    answer(model, lambda model: setattr(up(model), "weight", nn.Parameter(own * 1.5)), 1)
    up(model).weight = own
    gc.collect()
    others = [torch.full_like(own, 7.0) for _ in range(50)]  # in their place
    assert_equal(answer(model), eager(model))
    assert others


class Halving(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        return out * 0.5 if function is functional.silu else out


def test_modes_that_see_operations_keep_a_step_eager():
    model = llama()
    before = answer(model)
    with Halving():
        assert_equal(answer(model), eager(model))
        assert answer(model)[2] == 0
    assert_equal(answer(model), before)


def test_a_first_answer_in_inference_mode_is_recorded():
    model = llama()
    with torch.inference_mode():
        ours = answer(model)
    assert ours[2] > 0
    assert_equal(ours, eager(model))


def test_layers_whose_numbers_are_exchanged_use_their_own_keys():
    model = llama()
    answer(model)
    first, second = (model.model.layers[i].self_attn for i in (1, 2))
    first.layer_idx, second.layer_idx = 2, 1
    assert_equal(answer(model), eager(model))
