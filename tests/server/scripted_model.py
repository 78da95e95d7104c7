"""A model that answers with a given text, token by token, and calls tools in the form of Hermes."""

from __future__ import annotations

from typing import Any

import torch

from tests.server.tool_models import HERMES, HERMES_MARKERS, HERMES_WRITTEN
from tests.templates.tokenizers import byte_level
from tests.tiny import llama

END = "<|im_end|>"


def scripted(*texts: str, positions: int = 8192) -> tuple[Any, Any]:
    """Return a model whose every answer to a conversation is these texts, and its tokenizer.

    Each text is one token and follows the one before it, whatever was before that: the model's
    layers add nothing to the embedding of the last token. The first follows the end of the prompt.
    No text may stand twice. Grammars know texts of ASCII alone.
    """
    script = [*texts, END]
    assert len(set(script)) == len(script)
    tokenizer = byte_level(HERMES, HERMES_MARKERS, END, tuple(dict.fromkeys([*HERMES_WRITTEN, *texts])))
    model = llama(
        vocab_size=len(tokenizer), hidden_size=128, max_position_embeddings=positions, eos_token_id=tokenizer.eos_token_id
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    ids = [tokenizer.convert_tokens_to_ids(text) for text in script]
    before = [tokenizer("\n", add_special_tokens=False)["input_ids"][-1], *ids[:-1]]  # the prompt ends with a new line
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight[:, : len(script)] = 0
        model.lm_head.weight.zero_()
        for place, (last, following) in enumerate(zip(before, ids, strict=True)):
            model.model.embed_tokens.weight[last] = 0
            model.model.embed_tokens.weight[last, place] = 1
            model.lm_head.weight[following, place] = 10
    return model, tokenizer
