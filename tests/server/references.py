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
def loaded(name: str) -> LoadedModel:
    """Return a model in float32."""
    return load(name, dtype=Dtype.FLOAT32)


def chat_ids(name: str, text: str) -> list[int]:
    """Return the tokens of a conversation of one message."""
    template = ChatTemplate(loaded(name).tokenizer)
    return template.encode(template.ask(text))


def answer_ids(name: str, ids: list[int], tokens: int, **arguments: Any) -> list[int]:
    """Return what `specache.generate` answers to a prompt."""
    model = loaded(name).model
    out = specache.generate(model, torch.tensor([ids]), max_new_tokens=tokens, **arguments)
    return out[0, len(ids) :].tolist()


def answer(name: str | Path, text: str, tokens: int, **arguments: Any) -> str:
    """Return the text of what `specache.generate` answers to a message, greedily by default."""
    ids = answer_ids(str(name), chat_ids(str(name), text), tokens, **{"do_sample": False, **arguments})
    decoded: str = loaded(str(name)).tokenizer.decode(ids, skip_special_tokens=True)
    return decoded


@torch.no_grad()
def log_probabilities(name: str | Path, ids: list[int]) -> torch.Tensor:
    """Return the stock model's log-probabilities [len(ids), vocabulary]; row i is of i + 1."""
    logits = loaded(str(name)).model(torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits.float(), -1)
