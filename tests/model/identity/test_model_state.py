"""A cache is continued only by the model that filled it, whatever happened to the model in
between.
"""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

import specache
from tests.engine.test_model_families import FAMILIES, build
from tests.model.identity.two_turns import NEW, adapted, first_turn, second_turn, settings
from tests.tiny import llama, prompt

OTHER_SEED = {"seed": 1}


def projection(model: Any) -> nn.Parameter:
    return model.model.layers[1].mlp.down_proj.weight


def one_training_step(model: Any) -> None:
    ids = prompt(10)
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


CHANGES = {
    "a weight is scaled": (lambda m: projection(m).mul_(1.01), "other values"),
    "one element is written": (lambda m: projection(m).view(-1)[1234].add_(1), "other values"),
    "a weight is scaled through .data": (lambda m: projection(m).data.mul_(1.01), "other values"),
    ".data is assigned": (lambda m: setattr(projection(m), "data", projection(m).data * 1.01), "other values"),
    "a token's embedding is written through .data": (lambda m: m.model.embed_tokens.weight.data[3].add_(1), "other values"),
    "other weights are loaded": (lambda m: m.load_state_dict(llama(seed=1).state_dict()), "other values"),
    "the vocabulary grows": (lambda m: m.resize_token_embeddings(104, mean_resizing=False), "embed"),
    "a submodule is replaced": (lambda m: setattr(m.model.layers[1], "mlp", copy.deepcopy(m.model.layers[0].mlp)), "layers.1.mlp"),
    "an activation is replaced": (lambda m: setattr(m.model.layers[1].mlp, "act_fn", nn.GELU()), "GELU"),
    "a norm's epsilon changes": (lambda m: setattr(m.model.norm, "variance_epsilon", 1e-2), "variance_epsilon"),
    "RoPE's frequencies change": (lambda m: m.model.rotary_emb.inv_freq.mul_(2), "inv_freq"),
    "RoPE changes in the configuration": (lambda m: m.config.rope_parameters.update(rope_theta=5.0), "rope"),
    "it is cast": (lambda m: m.bfloat16(), "bfloat16"),
}


@pytest.mark.parametrize(("change", "description"), CHANGES.values(), ids=CHANGES)
def test_a_changed_model_is_refused_with_what_changed(change, description):
    model = llama()
    cache, said = first_turn(model)
    with torch.no_grad():
        change(model)
    with pytest.raises(specache.UsageError, match=rf"(?s)model changed.*{description}.*new SpeCache"):
        second_turn(model, cache, said)


class Once:
    """A streamer that acts once, when the third token comes."""

    def __init__(self, action: Any) -> None:
        self.action, self.calls = action, 0

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls == 3:
            self.action()

    def end(self) -> None:
        pass


DURING_A_RUN = ["a weight is scaled", "a weight is scaled through .data", ".data is assigned", "a submodule is replaced",
                "an activation is replaced", "RoPE changes in the configuration"]  # fmt: skip


@pytest.mark.parametrize("change", DURING_A_RUN)
def test_a_change_by_a_streamer_while_the_model_runs_is_detected(change):
    model = llama()
    change, description = CHANGES[change]

    def act():
        with torch.no_grad():
            change(model)

    cache = specache.SpeCache(model, settings())
    said = specache.generate(model, prompt(150), past_key_values=cache, streamer=Once(act), **NEW)
    with pytest.raises(specache.UsageError, match=rf"(?s)model changed.*{description}.*new SpeCache"):
        second_turn(model, cache, said)


def test_a_training_step_is_detected():
    model = llama()
    cache, said = first_turn(model)
    one_training_step(model)
    with pytest.raises(specache.UsageError, match="model changed"):
        second_turn(model, cache, said)


NO_CHANGES = {
    "nothing": lambda m: None,
    "eval()": lambda m: m.eval(),
    "train()": lambda m: m.train(),
    "gradient checkpointing": lambda m: m.gradient_checkpointing_enable(),
    "another attention implementation": lambda m: m.set_attn_implementation("eager"),
    "frozen weights": lambda m: m.requires_grad_(False),
    "to the same device": lambda m: m.to("cpu"),
    "to the same dtype": lambda m: m.float(),
    "tied again": lambda m: m.tie_weights(),
    "a weight moved": lambda m: setattr(projection(m), "data", projection(m).data.clone()),
    "equal weights are loaded": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
    "equal weights are assigned": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
    "stock generates in between": lambda m: m.generate(prompt(30), **NEW),
    "a token ends texts": lambda m: setattr(m.config, "eos_token_id", 7),
}


@pytest.mark.parametrize("change", NO_CHANGES.values(), ids=NO_CHANGES)
def test_a_change_without_effect_on_numbers_continues_the_cache(change):
    model = llama()
    cache, said = first_turn(model)
    change(model)
    assert second_turn(model.eval(), cache, said)


def test_restored_weights_continue_the_cache():
    model = llama()
    first = copy.deepcopy(model.state_dict())
    cache, said = first_turn(model)
    model.load_state_dict(llama(seed=1).state_dict())
    with pytest.raises(specache.UsageError, match="other values"):
        second_turn(model, cache, said)
    model.load_state_dict(first)
    assert second_turn(model, cache, said)


@pytest.mark.parametrize("freed", [True, False])
def test_another_object_continues_only_with_equal_weights(freed):
    model = llama()
    cache, said = first_turn(model)
    if freed:
        del model
        gc.collect()
    with pytest.raises(specache.UsageError, match="another model"):
        second_turn(llama(seed=1), cache, said)
    assert second_turn(llama(), cache, said)


def test_a_fork_refuses_a_changed_model():
    model = llama()
    cache, said = first_turn(model)
    fork = cache.fork()
    with torch.no_grad():
        projection(model).mul_(2)
    with pytest.raises(specache.UsageError, match="model changed"):
        second_turn(model, fork, said)


def test_an_empty_cache_takes_any_model_of_its_dimensions():
    with specache.SpeCache(llama(), settings()) as cache:
        with pytest.raises(specache.UsageError, match="dimensions"):
            specache.generate(llama(num_hidden_layers=2), prompt(20), past_key_values=cache, **NEW)
        other = llama(seed=1)
        said = specache.generate(other, prompt(70), past_key_values=cache, **NEW)
        assert second_turn(other, cache, said)


def test_the_cache_returned_by_generate_refuses_a_changed_model():
    model = llama()
    output = specache.generate(model, prompt(70), config=settings(), return_dict_in_generate=True, **NEW)
    with torch.no_grad():
        projection(model).mul_(2)
    with pytest.raises(specache.UsageError, match="model changed"):
        second_turn(model, output.past_key_values, output.sequences)


def test_a_change_of_inference_tensors_is_detected_by_samples():
    with torch.inference_mode():
        model = llama()
    cache, said = first_turn(model)
    assert second_turn(model, cache, said)
    with torch.inference_mode():
        projection(model).mul_(1.01)
    with pytest.raises(specache.UsageError, match="other values"):
        second_turn(model, cache, said)


@pytest.mark.parametrize("family", ["llama-dynamic-rope", "phi3-longrope-short"])
def test_length_dependent_rope_frequencies_are_not_a_change(family):
    model = build(*FAMILIES[family])
    with specache.SpeCache(model, settings()) as cache:
        said = specache.generate(model, prompt(30), past_key_values=cache, **NEW)
        model.generate(prompt(60), **NEW)
        specache.generate(model, torch.cat([said, prompt(3)], dim=1), past_key_values=cache, **NEW)


# Adapters, by the names that peft uses


def test_only_the_active_adapter_continues_the_cache():
    model = llama()
    layers = adapted(model, "a", "b")
    cache, said = first_turn(model)
    for layer in layers:
        layer.active_adapters = ["b"]
    with pytest.raises(specache.UsageError, match="adapter 'a' then and runs with the adapter 'b'"):
        second_turn(model, cache, said)
    for layer in layers:
        layer.active_adapters = ["a"]
    assert second_turn(model, cache, said)


ADAPTER_CHANGES = {
    "disabled": (lambda layer: setattr(layer, "disable_adapters", True), "no active adapter"),
    "merged": (lambda layer: layer.merge(), "merged"),
    "scaled": (lambda layer: layer.scaling.update(a=1.0), "scales"),
    "trained": (lambda layer: layer.lora_B["a"].weight.data.mul_(2), "lora_B.a.weight has other values"),
}


@pytest.mark.parametrize(("change", "description"), ADAPTER_CHANGES.values(), ids=ADAPTER_CHANGES)
def test_a_changed_adapter_is_refused(change, description):
    model = llama()
    layers = adapted(model, "a")
    cache, said = first_turn(model)
    change(layers[1])
    with pytest.raises(specache.UsageError, match=description):
        second_turn(model, cache, said)


def test_inactive_adapters_may_be_added_and_removed():
    model = llama()
    layers = adapted(model, "a", "b")
    cache, said = first_turn(model)
    for layer in layers:
        del layer.lora_A["b"], layer.lora_B["b"]
        layer.add("c")
    layers[0].lora_B["c"].weight.data.mul_(2)
    assert second_turn(model, cache, said)


def test_a_changed_number_in_a_users_module_is_detected():
    class Scaled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.enabled = inner, True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * (1.5 if self.enabled else 1.0)

    model = llama()
    attention = model.model.layers[0].self_attn
    attention.v_proj = Scaled(attention.v_proj)
    cache, said = first_turn(model)
    assert second_turn(model, cache, said)
    attention.v_proj.enabled = False
    with pytest.raises(specache.UsageError, match=r"v_proj\.enabled was True and is False"):
        second_turn(model, cache, said)


class Steered(nn.Module):
    """A layer in a wrapper of the user's, which holds vectors, and records what it saw."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.vector = torch.zeros(64)
        self.named: dict[str, torch.Tensor] = {}
        self.control = Control()
        self.last: torch.Tensor | None = None
        self.seen: list[torch.Tensor] = []

    def forward(self, *args: Any, **more: Any) -> torch.Tensor:
        out = self.inner(*args, **more) + self.vector + sum(self.named.values())
        out = out if self.control.vector is None else out + self.control.vector
        self.last = out
        self.seen.append(out)
        return out


class Control:
    def __init__(self, vector: torch.Tensor | None = None) -> None:
        self.vector = vector


STEERING = {
    "vector": lambda layer: setattr(layer, "vector", torch.ones(64)),
    "vector in place": lambda layer: layer.vector.add_(1),
    "vector in place, uncounted": lambda layer: layer.vector.data.add_(1),
    "named": lambda layer: layer.named.update(happy=torch.ones(64)),
    "control": lambda layer: setattr(layer, "control", Control(torch.ones(64))),
    "control, in its attribute": lambda layer: setattr(layer.control, "vector", torch.ones(64)),
}


def steered() -> tuple[Any, Any]:
    model = llama()
    model.model.layers[1] = Steered(model.model.layers[1])
    return model, model.model.layers[1]


@pytest.mark.parametrize("change", STEERING)
def test_a_changed_vector_that_a_users_module_holds_is_detected(change):
    model, layer = steered()
    cache, said = first_turn(model)
    assert second_turn(model, cache, said)
    STEERING[change](layer)
    with pytest.raises(
        specache.UsageError, match=rf"layers\.1\.{change.partition(' ')[0].strip(',')} was .* and is float32 \[64\]"
    ):
        second_turn(model, cache, said)


def test_what_a_users_module_records_may_be_dropped():
    model, layer = steered()
    cache, said = first_turn(model)
    layer.last = None
    layer.seen.clear()
    assert second_turn(model, cache, said)


def test_an_equal_vector_in_place_of_another_continues_the_cache():
    model, layer = steered()
    layer.control = Control(torch.ones(64))
    cache, said = first_turn(model)
    layer.control = Control(torch.ones(64))
    assert second_turn(model, cache, said)
