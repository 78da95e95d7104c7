"""Any order of requests, ends, evictions and restarts gives the answers of fresh prefills."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from specache.engine.prefix_store import PrefixStore
from tests.engine.prefixes import MODELS, TIERS, Server, branch, config, fresh, text
from tests.sessions.sequences import checkpoints_every

STEPS = 60


def family_of_texts(chance: random.Random) -> list[list[int]]:
    """Texts that branch off each other at places of all kinds."""
    texts = [text(330, seed=0)]
    for seed in range(1, 9):
        trunk = chance.choice(texts)
        at = chance.choice([1, 97, 160, 192, 255, 256, 257, len(trunk)])
        at = min(at, len(trunk))
        texts.append(branch(trunk, at, at + chance.randint(40, 330), seed))
    return [one for one in texts if len(one) < 1200]


class Random:
    """Does something to a server, at random."""

    def __init__(self, model: Any, settings: Any, root: Path | None, seed: int) -> None:
        self.chance = random.Random(seed)
        self.model, self.settings, self.root = model, settings, root
        self.texts = family_of_texts(self.chance)
        self.expected: dict[tuple[int, ...], list[int]] = {}
        self.running: list[tuple[Any, list[int], str]] = []
        self.open()

    def open(self) -> None:
        disk = {} if self.root is None else {"folder": self.root, "most_disk_bytes": 2_500_000}
        store = PrefixStore(self.model, self.settings, most_slow_bytes=3_000_000, **disk)
        self.server = Server(self.model, self.settings, store, strict=False)

    def step(self) -> None:
        action = self.chance.choice(["begin", "begin", "begin", "end", "end", "answer", "room", "restart"])
        if action == "begin" and len(self.running) < 4:
            ids, owner = self.chance.choice(self.texts), self.chance.choice(["a", "a", "b"])
            self.running.append((self.server.begin(ids, owner), ids, owner))
        elif action == "end" and self.running:
            cache, ids, owner = self.running.pop(self.chance.randrange(len(self.running)))
            assert self.server.go_on(cache, ids)[0] == self.right(ids)
            self.server.end(cache, owner)
        elif action == "answer" and self.running:  # ends without `keep`
            cache, ids, _ = self.running.pop()
            assert self.server.go_on(cache, ids)[0] == self.right(ids)
            cache.close()
        elif action == "room":
            self.server.store.make_room(self.chance.choice([0, 1, 200_000, 1 << 40]), self.chance.choice([0, 1, 1 << 40]))
        elif action == "restart" and self.chance.random() < 0.3:
            self.close()
            self.open()

    def right(self, ids: list[int]) -> list[int]:
        if tuple(ids) not in self.expected:
            self.expected[tuple(ids)] = fresh(self.model, self.settings, ids)[0]
        return self.expected[tuple(ids)]

    def close(self) -> None:
        for cache, _, _ in self.running:
            cache.close()
        self.running.clear()
        self.server.close()
        assert self.server.used == 0
        assert self.server.base.context.row_memory.used == 0
        if self.root is not None:
            files = {path.stat().st_ino: path.stat().st_blocks * 512 for path in self.root.glob("*/*")}
            assert sum(files.values()) <= 2_500_000


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("family", list(MODELS))
def test_random_requests(family, tier, tmp_path, monkeypatch):
    checkpoints_every(monkeypatch, 64)
    seed = sum(map(ord, family + tier)) + int(os.environ.get("SPECACHE_SEED", "0"))
    play = Random(MODELS[family](), config(tier, tmp_path / "slow"), tmp_path / "prefixes", seed)
    for _ in range(STEPS):
        play.step()
    play.close()
