"""A mask with fewer columns than tokens is refused, also through stock generate."""

from __future__ import annotations

import pytest
import torch

import specache
from tests.tiny import llama, prompt


def test_a_mask_shorter_than_the_prompt_is_refused_by_decode_too():
    model, ids = llama(), prompt(40)
    with pytest.raises(specache.UsageError, match="30 columns for 40 tokens"):
        model.generate(ids, attention_mask=torch.ones_like(ids)[:, :30], custom_generate=specache.decode, max_new_tokens=4)
