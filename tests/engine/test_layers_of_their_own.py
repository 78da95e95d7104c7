"""Layers that do not share the model's configuration: copies, and layers of another model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import specache
from tests.tiny import llama, prompt

IDS = prompt(80)
NEW = {"max_new_tokens": 8, "do_sample": False}


def settings(policy: str) -> specache.SpeCacheConfig:
    return specache.SpeCacheConfig(group_size=16, residual=16, top_k=10**6, policy=policy)


def one_more_layer(model: Any) -> None:
    layers = model.model.layers
    layers.insert(2, copy.deepcopy(layers[1]))
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(layers)


CHANGES = {
    "a layer is copied": lambda m: m.model.layers.__setitem__(1, copy.deepcopy(m.model.layers[1])),
    "all layers are copied": lambda m: setattr(m.model, "layers", copy.deepcopy(m.model.layers)),
    "a layer is repeated": one_more_layer,
    "a layer is another model's": lambda m: m.model.layers.__setitem__(1, llama(seed=4).model.layers[1]),
}


@pytest.mark.parametrize("policy", ["on-demand", "full"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_copied_layers_answer_as_stock_and_are_left_as_they_were(change, policy):
    model = llama()
    change(model)
    before = [layer.self_attn.config._attn_implementation for layer in model.model.layers]
    expected = model.generate(IDS, **NEW)
    assert torch.equal(specache.generate(model, IDS, config=settings(policy), **NEW), expected)
    assert [layer.self_attn.config._attn_implementation for layer in model.model.layers] == before
    assert torch.equal(model.generate(IDS, **NEW), expected)


class OwnAttention(nn.Module):
    """Attention that does not ask transformers for its function."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.old = old

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, None]:
        batch, tokens, _ = hidden_states.shape
        projections = (self.old.q_proj, self.old.k_proj, self.old.v_proj)
        query, keys, values = (each(hidden_states).view(batch, tokens, -1, 16).transpose(1, 2) for each in projections)
        out = scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
        return self.old.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1)), None


@pytest.mark.parametrize("policy", ["on-demand", "full"])
def test_a_layer_that_attends_by_itself_is_refused(policy):
    model = llama()
    model.model.layers[1].self_attn = OwnAttention(model.model.layers[1].self_attn)
    with pytest.raises(specache.UnsupportedModelError, match=r"Layer 1 .*did not use specache's attention.*stock generate"):
        specache.generate(model, IDS, config=settings(policy), **NEW)
