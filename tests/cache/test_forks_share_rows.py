"""Forks of a cache in main memory share a prompt's 16-bit rows, and answer as if they did not."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import specache
from specache.planning.footprint import PlannedSequence
from specache.planning.plan import plan
from specache.tiers.row_memory import BLOCK_TOKENS
from tests.engine.test_model_families import FAMILIES, build
from tests.tiny import llama, prompt

GREEDY = {"max_new_tokens": 12, "do_sample": False}
SMALL = {"residual": 16, "group_size": 16, "top_k": 8, "prefill_chunk": 100}
LENGTH = 2 * BLOCK_TOKENS + 40
TIERS = pytest.mark.parametrize("tier", ["ram-inplace", "ram"])
KINDS = pytest.mark.parametrize("kind", ["llama", "hybrid"])


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {"llama": llama(), "hybrid": build(*FAMILIES["gemma3"])}


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def filled(model: Any, tier: str, ids: Tensor, **changes: Any) -> specache.SpeCache:
    cache = specache.SpeCache(model, specache.SpeCacheConfig(slow_tier=tier, **SMALL, **changes))
    specache.prefill(model, ids, cache=cache)
    return cache


def block_bytes(cache: specache.SpeCache) -> int:
    """The bytes of one block in every layer."""
    model = cache.resources.dimensions
    return BLOCK_TOKENS * sum(layer.row_bytes(model.itemsize) for layer in model.full_layers)


def asked(ids: Tensor, question: int) -> Tensor:
    return torch.cat([ids, prompt(9, seed=question)], dim=1)


@KINDS
@TIERS
def test_many_questions_about_one_prompt_are_answered_as_alone(models, tier, kind):
    model, ids = models[kind], prompt(LENGTH)
    expected = []
    for question in range(4):
        with filled(model, tier, ids) as alone:
            expected.append(specache.generate(model, asked(ids, question), past_key_values=alone, **GREEDY))
    with filled(model, tier, ids) as cache:
        used, block = cache.context.row_memory, block_bytes(cache)
        assert used.used == cache.stats()["slow_bytes"] == 3 * block
        forks = [cache.fork() for _ in range(4)]
        assert used.used == 3 * block
        for question, fork in enumerate(forks):
            answer = specache.generate(model, asked(ids, question), past_key_values=fork, **GREEDY)
            assert torch.equal(answer, expected[question])
            assert used.used == (3 + question + 1) * block
            assert fork.stats()["slow_bytes"] == 3 * block
        for order in (2, 0, 1):  # dropped in any order
            forks[order].close()
        assert used.used == 4 * block
        del fork
        forks.clear()
        assert used.used == 3 * block
    assert used.used == 0


@TIERS
def test_a_prompt_may_be_dropped_while_forks_go_on(models, tier):
    model, ids = models["llama"], prompt(LENGTH)
    cache = filled(model, tier, ids)
    fork, other = cache.fork(), cache.fork()
    memory, block = cache.context.row_memory, block_bytes(cache)
    expected = specache.generate(model, asked(ids, 1), past_key_values=other, **GREEDY)
    other.close()
    cache.close()
    assert memory.used == 3 * block
    assert torch.equal(specache.generate(model, asked(ids, 1), past_key_values=fork, **GREEDY), expected)
    assert memory.used == 3 * block  # it had the last block alone
    del fork
    assert memory.used == 0


@TIERS
def test_a_cut_fork_frees_its_blocks_and_leaves_the_origin_as_it_was(models, tier):
    model, ids = models["llama"], prompt(LENGTH)
    with filled(model, tier, ids) as cache, cache.fork() as fork:
        memory, block = cache.context.row_memory, block_bytes(cache)
        expected = specache.generate(model, asked(ids, 1), past_key_values=cache.fork(), **GREEDY)
        fork.sequences[0].truncate(100)
        assert fork.stats()["slow_bytes"] == block and memory.used == 3 * block
        specache.generate(model, asked(ids[:, :100], 2), past_key_values=fork, **GREEDY)
        assert memory.used == 4 * block
        assert torch.equal(specache.generate(model, asked(ids, 1), past_key_values=cache, **GREEDY), expected)


@KINDS
@TIERS
def test_answers_to_one_prompt_share_its_rows_as_planned(models, tier, kind):
    model, ids, new = models[kind], prompt(LENGTH), 2 * BLOCK_TOKENS
    config = specache.SpeCacheConfig(slow_tier=tier, **SMALL)
    with specache.SpeCache(model, config) as cache:
        torch.manual_seed(0)
        settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 60, "min_new_tokens": 60}
        specache.generate(model, ids, past_key_values=cache, **settings)
        stored = max(sequence.length for sequence in cache.sequences)
        batch = [PlannedSequence(LENGTH, stored - LENGTH, twin=i > 0) for i in range(3)]
        planned = plan(cache.resources.dimensions, cache.config, batch)
        assert planned.slow == cache.stats()["slow_bytes"] == cache.context.row_memory.used == 5 * block_bytes(cache)
        batch = [PlannedSequence(LENGTH, new, twin=i > 0) for i in range(3)]
        assert plan(cache.resources.dimensions, cache.config, batch).slow == (5 + 2 * 2 + 2) * block_bytes(cache)


@pytest.mark.parametrize("before", ["ram-inplace", "ram"])
def test_a_fork_within_main_memory_shares_rows_with_its_origin(models, before):
    after = {"ram": "ram-inplace", "ram-inplace": "ram"}[before]
    with filled(models["llama"], before, prompt(LENGTH)) as cache, cache.fork(slow_tier=after) as fork:
        assert fork.config.slow_tier == after
        assert cache.context.row_memory.used == 3 * block_bytes(cache)


@TIERS
def test_requests_that_fork_one_prompt_run_on_threads_of_their_own(models, tier):
    model, ids = models["llama"], prompt(LENGTH)
    with filled(model, tier, ids) as cache:
        memory, held = cache.context.row_memory, cache.context.row_memory.used
        alone = [specache.generate(model, asked(ids, q), past_key_values=cache.fork(), **GREEDY) for q in range(3)]
        assert memory.used == held
        forks = [cache.fork() for _ in range(3)]

        def run(question: int) -> Tensor:
            return specache.generate(model, asked(ids, question), past_key_values=forks[question], **GREEDY)

        with ThreadPoolExecutor(3) as threads:
            answers = list(threads.map(run, range(3)))
        assert all(torch.equal(*pair) for pair in zip(answers, alone, strict=True))
        forks.clear()
        assert memory.used == held
