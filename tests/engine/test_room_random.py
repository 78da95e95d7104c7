"""Random requests in little memory: one that was admitted never fails for a lack of it."""

from __future__ import annotations

import random
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
import torch

import specache
from specache.engine.engine import Engine
from specache.engine.handle import Handle
from specache.engine.prefix_reuse import PrefixReuse
from specache.engine.prefix_store import PrefixStore
from specache.errors import ConfigError, FastMemoryError, UsageError
from tests.engine import serving
from tests.sessions.sequences import gemma
from tests.tiny import llama, prompt

MODELS = {"dense": cache(llama), "hybrid": cache(gemma)}
FAILED_BEFORE = [47, 53]


def prompts(chance: random.Random) -> torch.Tensor:
    """One to four prompts that begin with the same document, of which some are equal."""
    document = prompt(300, chance.randint(0, 2))[:, : chance.choice([0, 40, 150, 260, 300])]
    own, rows = chance.choice([1, 5, 17, 40, 90]), []
    for _ in range(chance.choice([1, 1, 2, 3, 4])):
        rows.append(torch.cat([document, prompt(own, chance.randint(0, 3) + 50)], dim=1))
    return torch.cat(rows)


class Engines:
    """One or two engines over one memory, with stored prefixes; one prompt is read at a time."""

    def __init__(self, chance: random.Random) -> None:
        self.model: Any = MODELS[chance.choice(["dense", "dense", "hybrid"])]()
        changes = {
            "policy": chance.choice(["verified", "on-demand", "previous", "none", "full"]),
            "slow_tier": chance.choice(["ram", "ram", "ram-inplace"]),
            "hot_set": chance.choice([0.0, 0.05, 0.1, 1 << 18, 1 << 20]),
            "prefill_chunk": chance.choice([16, 32, 64]),
        }
        limit = int(chance.choice([1.0, 1.2, 1.5, 2.0, 3.0, 5.0]) * chance.choice([330_000, 600_000, 1_000_000]))
        config = serving.settings(fast_memory=limit, **changes)
        self.store = PrefixStore(self.model, config)
        self.all = [Engine(self.model, config)]
        self.room = self.all[0].room
        self.room.prefixes = self.store
        if chance.random() < 0.4:
            other: dict[str, Any] = chance.choice([{"top_k": 8}, {"policy": "on-demand"}, {"policy": "none"}])
            with suppress(ConfigError, UsageError):
                self.all.append(self.all[0].beside(**other))
        self.queue: list[tuple[Engine, Any]] = []
        self.owner: dict[Handle, Engine] = {}

    def ask(self, chance: random.Random) -> None:
        """Queue a request, unless it can never fit."""
        engine, ids, answers = chance.choice(self.all), prompts(chance), chance.choice([1, 1, 2, 3])
        options = {"do_sample": True, "seed": 1} if answers > 1 else {"do_sample": False}
        new = chance.randint(1, 20)
        request = specache.make_request(self.model, ids, max_new_tokens=new, num_return_sequences=answers, **options)
        request.chunk = None
        try:
            self.room.check_alone(engine.cache, engine.cache.config, request, engine.chunk)
        except FastMemoryError:
            return
        self.queue.append((engine, request))

    def step(self, handles: list[Handle]) -> None:
        if self.queue and not any(engine.has_prompt for engine in self.all):
            engine, request = self.queue.pop(0)
            handles.append(engine.add(request, None, PrefixReuse(self.store, "", self.room)))
            self.owner[handles[-1]] = engine
        for engine in self.all:
            ended = sum(handle.done for handle in handles)
            if engine.has_work:
                engine.step()
            if sum(handle.done for handle in handles) > ended:
                for other in self.all:
                    other.retry()

    @property
    def used(self) -> int:
        return self.all[0].cache.resources.budget.used

    def close(self) -> None:
        for engine in reversed(self.all):
            engine.close()
        self.store.close()


@pytest.mark.parametrize("seed", [*FAILED_BEFORE, *range(24)])
def test_an_admitted_request_never_fails_for_a_lack_of_memory(seed):
    """Prompts that fork each other, several answers, hot sets that share bytes."""
    chance = random.Random(seed)
    engines, handles, todo = Engines(chance), list[Handle](), chance.randint(2, 7)
    for _ in range(2000):
        if todo and chance.random() < 0.25:
            todo -= 1
            engines.ask(chance)
        if handles and chance.random() < 0.01:
            handle = chance.choice(handles)
            engines.owner[handle].abort(handle)
        engines.step(handles)
        if not todo and not engines.queue and all(handle.done for handle in handles):
            break
    assert all(handle.done for handle in handles)
    assert [handle.error for handle in handles if handle.error is not None] == []
    engines.close()
    assert engines.used == 0
