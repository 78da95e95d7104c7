"""Stored prefixes of tiny models, and answers over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import specache
from specache.engine.prefix_store import PrefixStore
from tests.sessions.sequences import gemma
from tests.tiny import llama, prompt

TIERS = ["ram", "ram-inplace", "disk"]
MODELS = {"dense": llama, "hybrid": gemma}
LEAST = 96  # R + g of `config`
NEW = 6


def config(tier: str = "ram-inplace", folder: Path | None = None, **changes: Any) -> specache.SpeCacheConfig:
    """Settings with 64 tokens in the residual, groups of 32, and 4 pairs swapped in."""
    settings: dict[str, Any] = {"bits": 2, "group_size": 32, "residual": 64, "top_k": 4, "prefill_chunk": 64}
    if tier == "disk":
        tier = f"disk:{folder}"
    return specache.SpeCacheConfig(**{**settings, "slow_tier": tier, **changes})


def text(length: int, seed: int = 0) -> list[int]:
    return prompt(length, seed)[0].tolist()


def branch(trunk: list[int], at: int, length: int, seed: int) -> list[int]:
    """A text of `length` tokens that begins with the first `at` of `trunk` and then differs."""
    rest = text(length - at, seed)
    if at < len(trunk):
        rest[0] = 2 + (trunk[at] - 1) % 95
    return trunk[:at] + rest


class Server:
    """Answers prompts one after the other over one cache and one store, as an engine would."""

    def __init__(self, model: Any, settings: specache.SpeCacheConfig, store: PrefixStore, strict: bool = True) -> None:
        self.model, self.store = model, store
        self.strict = strict  # False where a prefix may be removed between `match` and `take`
        self.base = specache.SpeCache(model, settings)
        self.reused: list[int] = []

    @property
    def used(self) -> int:
        """Bytes of fast memory in use."""
        return self.base.resources.budget.used

    def begin(self, ids: list[int], owner: str = "") -> specache.SpeCache:
        """Read a prompt, over the longest stored prefix."""
        cache = self.base.fork()
        expected = self.store.match(owner, ids)
        sequence = self.store.take(owner, ids, cache)
        self.reused.append(0 if sequence is None else sequence.length)
        self.store.count(self.reused[-1])
        assert self.reused[-1] < len(ids)
        assert self.reused[-1] == expected or not self.strict
        if sequence is not None:
            assert sequence.token_ids == ids[: sequence.length]
            cache.sequences = [sequence]
        specache.prefill(self.model, torch.tensor([ids]), cache=cache)
        self.store.add_running(owner, cache.sequences[0])
        return cache

    def go_on(self, cache: specache.SpeCache, ids: list[int]) -> tuple[list[int], Tensor]:
        """Return new tokens and their logits [NEW, V]."""
        return answer(self.model, cache, ids)

    def end(self, cache: specache.SpeCache, owner: str = "") -> None:
        """Give the sequence of an answer to the store."""
        (sequence,), cache.sequences = cache.sequences, []
        self.store.keep(owner, sequence)
        cache.close()

    def ask(self, ids: list[int], owner: str = "") -> tuple[list[int], Tensor]:
        """Answer a prompt from beginning to end."""
        cache = self.begin(ids, owner)
        result = self.go_on(cache, ids)
        self.end(cache, owner)
        return result

    def read(self, ids: list[int], owner: str = "") -> None:
        """Read a prompt and store it without an answer."""
        self.end(self.begin(ids, owner), owner)

    def close(self) -> None:
        self.store.close()
        self.base.close()


def answer(model: Any, cache: specache.SpeCache, ids: list[int]) -> tuple[list[int], Tensor]:
    output = specache.generate(
        model,
        torch.tensor([ids]),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[0, len(ids) :].tolist(), torch.cat(output.logits)


def fresh(model: Any, settings: specache.SpeCacheConfig, ids: list[int]) -> tuple[list[int], Tensor]:
    """Answer a prompt that is read from its beginning."""
    with specache.SpeCache(model, settings) as cache:
        return answer(model, cache, ids)
