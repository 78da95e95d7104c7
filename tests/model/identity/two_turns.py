"""A conversation of two turns over one cache, and a layer with adapters like peft's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import specache
from tests.tiny import prompt

NEW = {"max_new_tokens": 4, "do_sample": False}


def settings(**changes: Any) -> specache.SpeCacheConfig:
    """Return settings that fetch all rows, so that a continued answer equals a fresh one."""
    return specache.SpeCacheConfig(**{"top_k": 4096, "residual": 32, "group_size": 32, "slow_tier": "ram", **changes})


def first_turn(model: Any) -> tuple[specache.SpeCache, Tensor]:
    """Return a cache that a model filled, and the conversation so far."""
    cache = specache.SpeCache(model, settings())
    return cache, specache.generate(model, prompt(70), past_key_values=cache, **NEW)


def second_turn(model: Any, cache: specache.SpeCache, conversation: Tensor) -> bool:
    """Continue and return True if the answer equals that of a fresh cache."""
    ids = torch.cat([conversation, prompt(5, seed=1)], dim=1)
    answer = specache.generate(model, ids, past_key_values=cache, **NEW)
    return torch.equal(answer, specache.generate(model, ids, config=settings(), **NEW))


class AdaptedLinear(nn.Module):
    """A linear layer with low-rank adapters, under the names that peft uses."""

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("scaling",)

    def __init__(self, base: nn.Linear, *adapters: str) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.active_adapters, self.merged_adapters, self.disable_adapters = list(adapters[:1]), list[str](), False
        for name in adapters:
            self.add(name)

    # as in peft, properties of the class
    active_adapters: Any = None
    disable_adapters: Any = None

    def add(self, name: str) -> None:
        self.lora_A[name] = nn.Linear(self.base_layer.in_features, 4, bias=False)
        self.lora_B[name] = nn.Linear(4, self.base_layer.out_features, bias=False)
        self.scaling[name] = 2.0

    def merge(self) -> None:
        for name in self.active_adapters:
            self.base_layer.weight.data += self.scaling[name] * self.lora_B[name].weight.data @ self.lora_A[name].weight.data
            self.merged_adapters.append(name)

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        for name in [] if self.disable_adapters or self.merged_adapters else self.active_adapters:
            out = out + self.scaling[name] * self.lora_B[name](self.lora_A[name](x))
        return out


def adapted(model: Any, *adapters: str) -> list[AdaptedLinear]:
    """Add adapters to the value projections of a model, the first one active, and return the
    adapted layers.
    """
    torch.manual_seed(0)
    made = []
    for layer in model.model.layers:
        layer.self_attn.v_proj = AdaptedLinear(layer.self_attn.v_proj, *adapters)
        made.append(layer.self_attn.v_proj)
    return made
