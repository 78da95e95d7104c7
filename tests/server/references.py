"""What a server must answer: the same model in this process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

import specache
from specache.cli.models import Dtype, LoadedModel, load
from specache.templates.template import ChatTemplate


@cache
def loaded(name: str, dtype: Dtype = Dtype.FLOAT32) -> LoadedModel:
    """Return a model, in float32 by default."""
    return load(name, dtype=dtype)


def chat_ids(name: str, text: str) -> list[int]:
    """Return the tokens of a conversation of one message."""
    template = ChatTemplate(loaded(name).tokenizer)
    return template.encode(template.ask(text))


def answer_ids(name: str, ids: list[int], tokens: int, dtype: Dtype = Dtype.FLOAT32, **arguments: Any) -> list[int]:
    """Return what `specache.generate` answers to a prompt."""
    model = loaded(name, dtype).model
    out = specache.generate(model, torch.tensor([ids]), max_new_tokens=tokens, **arguments)
    return out[0, len(ids) :].tolist()


def answer(name: str | Path, text: str, tokens: int, **arguments: Any) -> str:
    """Return the text of what `specache.generate` answers to a message, greedily by default."""
    ids = answer_ids(str(name), chat_ids(str(name), text), tokens, **{"do_sample": False, **arguments})
    decoded: str = loaded(str(name)).tokenizer.decode(ids, skip_special_tokens=True)
    return decoded


@torch.no_grad()
def log_probabilities(name: str | Path, ids: list[int], dtype: Dtype = Dtype.FLOAT32) -> torch.Tensor:
    """Return the stock model's log-probabilities [len(ids), vocabulary]; row i is of i + 1."""
    logits = loaded(str(name), dtype).model(torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits.float(), -1)
