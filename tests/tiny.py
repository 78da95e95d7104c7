"""Tiny seeded models whose logits are spread, so that a wrong cache shows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specache.config import Policy

torch.set_num_threads(1)  # many tiny operations: a second thread only waits

FETCHING = [str(policy) for policy in Policy if policy.fetches]


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Llama with grouped queries, 3 layers, fp32, which never ends a text by itself."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "eos_token_id": None,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [1, length]."""
    return torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(seed))


def ragged(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A left-padded batch and its mask."""
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = prompt(length, seed=row)
        mask[row, width - length :] = 1
    return ids, mask
