"""Decode steps one by one, and calls that fail, for tests that disturb them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

import specache
from specache.engine.attention_hook import attached
from specache.engine.decoder import Decoder
from tests.tiny import prompt


def failing(code: int) -> Callable[..., int]:
    def fail(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    return fail


class Steps:
    """A cache after its prompt, decoded step by step."""

    def __init__(self, model: Any, config: specache.SpeCacheConfig, length: int) -> None:
        self.cache = specache.SpeCache(model, config)
        self.model = model
        self.decoder = Decoder(model, self.cache)
        specache.prefill(model, prompt(length), cache=self.cache)
        if config.policy.drafts:
            with torch.no_grad(), attached(model):
                self.decoder.pre_decode(self.cache.sequences, [5])

    def step(self, number: int) -> torch.Tensor:
        """Return the logits [V] of the real row."""
        draft = [7 + number % 50] if self.cache.config.policy.drafts else None
        with torch.no_grad(), attached(self.model):
            return self.decoder.step(self.cache.sequences, [5 + number % 60], draft).real[0]
