"""Forward hooks of the user see the passes that stock generate runs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import specache
from tests.tiny import llama, prompt, ragged

NEW = {"max_new_tokens": 10, "do_sample": False}
POLICIES = ["on-demand", "verified", "speculative"]


def settings(policy: str, **changes: Any) -> specache.SpeCacheConfig:
    sizes = {"top_k": 10**6, "group_size": 16, "residual": 16, "slow_tier": "ram"}
    return specache.SpeCacheConfig(policy=policy, **{**sizes, **changes})


def steering_of_the_last_token(module: Any, inputs: Any, output: Tensor) -> Tensor:
    """Add a direction to the last token's state, which is the only one while stock decodes."""
    direction = torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(1))
    output = output.clone()
    output[:, -1] += direction
    return output


def steering_of_the_prompt(module: Any, inputs: Any, output: Tensor) -> Tensor:
    """Add a direction to all tokens of a pass of several, which stock has for the prompt only."""
    if output.shape[1] == 1:
        return output
    return output + torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(1))


WAYS = [
    (steering_of_the_last_token, "hook"),
    (steering_of_the_last_token, "decorated hook"),
    (steering_of_the_last_token, "decorated forward"),
    (steering_of_the_last_token, "decorated class"),
    (steering_of_the_last_token, "class with a __call__"),
    (steering_of_the_last_token, "forward around which accelerate has hooks"),
    (steering_of_the_last_token, "hook of accelerate"),
    (steering_of_the_last_token, "wrapper"),
    (steering_of_the_prompt, "replaced forward"),
]


class Wrapped(nn.Module):
    """Stands in place of a layer, whose output it changes."""

    def __init__(self, layer: nn.Module, change: Any) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, *args: Any, **more: Any) -> Any:
        return self.change(self, args, self.layer(*args, **more))


class OfAccelerate(ModelHook):  # type: ignore[misc] # accelerate has no types
    """A hook of the user's that accelerate runs."""

    def __init__(self, change: Any) -> None:
        self.change = change

    def post_forward(self, module: Any, output: Any) -> Any:
        return self.change(module, (), output)


def steered_class(kind: Any, change: Any) -> Any:
    """Return a class whose forward PyTorch decorates, as many write it."""

    class Steered(kind):  # type: ignore[misc]
        @torch.no_grad()
        def forward(self, *args: Any, **more: Any) -> Any:
            return change(self, args, super().forward(*args, **more))

    return Steered


def called_class(kind: Any, change: Any) -> Any:
    """Return a class that changes the result around all that PyTorch runs when it is called."""

    class Called(kind):  # type: ignore[misc]
        def __call__(self, *args: Any, **more: Any) -> Any:
            return change(self, args, super().__call__(*args, **more))

    return Called


def put_on(model: Any, hook: Any, way: str) -> Any:
    layer = model.model.layers[1]
    if way == "hook":
        layer.register_forward_hook(hook)
    elif way == "decorated hook":
        layer.register_forward_hook(torch.no_grad()(hook))
    elif way == "hook of accelerate":
        add_hook_to_module(layer.mlp, OfAccelerate(hook))
    elif way == "class with a __call__":
        layer.mlp.__class__ = called_class(type(layer.mlp), hook)
    elif way == "decorated class":
        layer.mlp.__class__ = steered_class(type(layer.mlp), hook)
    elif way == "wrapper":
        model.model.layers[1].mlp = Wrapped(layer.mlp, hook)
    else:
        inner = layer.forward
        layer.forward = lambda *args, **more: hook(layer, args, inner(*args, **more))
        if way == "decorated forward":
            layer.forward = torch.inference_mode()(layer.forward)
        elif way == "forward around which accelerate has hooks":
            add_hook_to_module(layer, ModelHook())
    return model


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("steering", "way"), WAYS)
def test_a_hook_that_steers_by_place_answers_as_stock(steering, way, policy):
    model = put_on(llama(), steering, way)
    plain = llama().generate(prompt(150), **NEW)
    expected = model.generate(prompt(150), **NEW)
    assert not torch.equal(expected, plain)
    assert torch.equal(specache.generate(model, prompt(150), config=settings(policy), **NEW), expected)


def test_a_hook_that_steers_by_place_answers_as_stock_in_a_batch():
    model = put_on(llama(), steering_of_the_last_token, "hook")
    ids, mask = ragged(150, 90)
    expected = model.generate(ids, attention_mask=mask, **NEW)
    assert torch.equal(specache.generate(model, ids, attention_mask=mask, config=settings("verified"), **NEW), expected)


def test_a_hook_that_steers_by_place_answers_as_stock_over_a_session(tmp_path):
    """A session's pairs are on the disk, where draft tokens are decoded beside the real ones."""
    model = put_on(llama(), steering_of_the_last_token, "hook")
    with specache.Session("one", model, specache.SpeCacheConfig(top_k=10**6), folder=tmp_path) as session:
        answer = specache.generate(model, prompt(150), past_key_values=session.cache, **NEW)
    assert torch.equal(answer, model.generate(prompt(150), **NEW))


def test_a_hook_records_one_token_per_step_and_no_draft_tokens():
    model, seen = llama(), []
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    specache.generate(model, prompt(150), config=settings("verified"), **NEW)
    assert seen == [150] + [1] * 9


def test_a_hook_for_all_modules_counts_too():
    seen = []

    def record(module: Any, inputs: Any, output: Any) -> None:
        if type(module).__name__ == "LlamaMLP":
            seen.append(output.shape[1])

    hook = torch.nn.modules.module.register_module_forward_hook(record)
    try:
        specache.generate(llama(), prompt(150), config=settings("verified"), **NEW)
    finally:
        hook.remove()
    assert seen == [150] * 3 + [1] * 27


def test_draft_tokens_are_decoded_again_once_the_hook_is_gone():
    model = llama()
    hook = model.model.layers[1].register_forward_hook(steering_of_the_last_token)
    specache.generate(model, prompt(150), config=settings("verified"), **NEW)
    hook.remove()
    cache = specache.SpeCache(model, settings("verified"))
    specache.generate(model, prompt(150), past_key_values=cache, **NEW)
    assert cache.counters.drafts > 0


def test_a_prompt_that_hooks_see_in_chunks_warns_and_one_chunk_answers_as_stock():
    model = put_on(llama(), steering_of_the_last_token, "hook")
    with pytest.warns(UserWarning, match=r"hooks or modules of yours get .* 150 tokens in chunks of 40.*prefill_chunk_size"):
        specache.generate(model, prompt(150), config=settings("on-demand", prefill_chunk=40), **NEW)
    config = settings("on-demand", prefill_chunk=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = specache.generate(model, prompt(150), config=config, prefill_chunk_size=150, **NEW)
    assert torch.equal(answer, model.generate(prompt(150), **NEW))


def test_a_layer_in_a_wrapper_is_steered_as_by_stock():
    """Scripts for steering vectors wrap layers so."""
    model = llama()
    model.model.layers[1] = Wrapped(model.model.layers[1], steering_of_the_last_token)
    answer = specache.generate(model, prompt(150), config=settings("verified"), **NEW)
    assert torch.equal(answer, model.generate(prompt(150), **NEW))


def test_a_model_of_a_class_of_the_users_is_decoded_beside_drafts():
    class Mine(LlamaForCausalLM):
        def forward(self, *args: Any, **more: Any) -> Any:
            return super().forward(*args, **more)

    model = llama()
    model.__class__ = Mine
    cache = specache.SpeCache(model, settings("verified"))
    answer = specache.generate(model, prompt(150), past_key_values=cache, **NEW)
    assert cache.counters.drafts > 0
    assert torch.equal(answer, model.generate(prompt(150), **NEW))
