"""Parameters that are parametrised inside a pass, as peft does for `target_parameters`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import specache
from tests.tiny import llama, prompt

SETTINGS = {"group_size": 16, "residual": 16, "top_k": 10**6}


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


@pytest.mark.parametrize("policy", ["on-demand", "full"])
def test_a_weight_that_is_parametrised_inside_the_pass_answers_as_stock(policy):
    model = llama()
    mlp = model.model.layers[1].mlp
    mlp.register_forward_pre_hook(
        lambda module, inputs: parametrize.register_parametrization(module.down_proj, "weight", Doubled()) and None
    )
    mlp.register_forward_hook(
        lambda module, inputs, output: (
            parametrize.remove_parametrizations(module.down_proj, "weight", leave_parametrized=False) and None
        )
    )
    ids = prompt(80)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    settings = specache.SpeCacheConfig(**SETTINGS, policy=policy)
    assert torch.equal(specache.generate(model, ids, config=settings, **options), model.generate(input_ids=ids, **options))


@pytest.mark.parametrize("policy", ["on-demand", "full"])
def test_adapters_of_single_parameters_answer_as_stock(policy):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["down_proj.weight"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), config).eval()
    ids = prompt(80)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    settings = specache.SpeCacheConfig(**SETTINGS, policy=policy)
    assert torch.equal(specache.generate(model, ids, config=settings, **options), model.generate(input_ids=ids, **options))
