"""peft's `target_parameters`: adapters on parameters, which it parametrises inside a pass."""

from __future__ import annotations

import pytest
import torch

import specache
from tests.tiny import llama, prompt

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("policy", ["on-demand", "full"])
def test_adapters_of_single_parameters_answer_as_stock(policy):
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["down_proj.weight"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), config).eval()
    ids = prompt(80)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    settings = specache.SpeCacheConfig(group_size=16, residual=16, top_k=10**6, policy=policy)
    assert torch.equal(specache.generate(model, ids, config=settings, **options), model.generate(input_ids=ids, **options))
