"""An edited or regenerated turn of a hybrid model: little is read again, and what follows is what a
fresh cache would say.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

import specache
from specache.cache.sizes import checkpoint_allowance
from specache.cache.window_checkpoints import COARSE, FINE, MemoryCheckpoints, Spacing
from specache.cache.window_layer import WindowLayer
from specache.platform.budget import ByteBudget
from tests.engine.test_model_families import FAMILIES, build
from tests.sessions.sequences import answer
from tests.tiny import prompt

EVERYTHING = 10**6
POLICIES = ("verified", "on-demand", "speculative", "previous", "full")


@pytest.fixture(scope="module")
def hybrid() -> Any:
    return build(*FAMILIES["gemma3"])  # windows of 24 tokens


def settings(**changes: Any) -> specache.SpeCacheConfig:
    return specache.SpeCacheConfig(**{"group_size": 16, "residual": 16, "top_k": EVERYTHING, "prefill_chunk": 100, **changes})


def edited(ids: torch.Tensor, kept: int, new: int = 5, seed: int = 1) -> torch.Tensor:
    """The first `kept` tokens, and others behind them."""
    return torch.cat([ids[:, :kept], prompt(new, seed=seed)], dim=1)


def read_again(model: Any, cache: specache.SpeCache, ids: torch.Tensor, **more: Any) -> tuple[int, torch.Tensor]:
    """Answer -> (first token that was read, logits)."""
    seen: list[int] = []
    _, logits = answer(model, cache, ids, progress=lambda done, total: seen.append(done), **more)
    return seen[0], logits


def fresh(model: Any, config: specache.SpeCacheConfig, ids: torch.Tensor) -> torch.Tensor:
    with specache.SpeCache(model, config) as cache:
        return answer(model, cache, ids)[1]


@pytest.fixture(scope="module")
def fresh_answers(hybrid) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """A policy's answers to prompts that are read for the first time, once for all tiers."""
    found: dict[tuple[Any, ...], torch.Tensor] = {}

    def answered(policy: str, ids: torch.Tensor) -> torch.Tensor:
        key = (policy, *ids[0].tolist())
        if key not in found:
            found[key] = fresh(hybrid, settings(policy=policy), ids)
        return found[key]

    return answered


@pytest.mark.parametrize("tier", ["ram", "ram-inplace", "disk"])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_edited_prompt_is_answered_as_a_new_one(hybrid, fresh_answers, tmp_path, policy, tier):
    place = f"disk:{tmp_path}" if tier == "disk" else tier
    config = settings(policy=policy, slow_tier=place) if policy != "full" else settings(policy=policy)
    ids = prompt(600)
    with specache.SpeCache(hybrid, config) as cache:
        answer(hybrid, cache, ids)
        for kept, seed in ((560, 1), (330, 2), (600, 3)):
            other = edited(ids, kept, seed=seed)
            start, logits = read_again(hybrid, cache, other)
            assert min(kept, 564) - FINE <= start
            assert (logits - fresh_answers(policy, other)).abs().max() < 1e-4
            ids = other if kept < 600 else ids


def test_a_regenerated_answer_reads_one_token(hybrid):
    with specache.SpeCache(hybrid, settings()) as cache:
        _, first = answer(hybrid, cache, prompt(600), new=40)
        start, again = read_again(hybrid, cache, prompt(600), new=40)
    assert start == 599
    assert (again - first).abs().max() < 1e-4


@pytest.mark.parametrize("chunk", [500, 4096])
def test_a_document_edited_anywhere_is_read_again_from_at_most_1024_tokens_before(chunk):
    """Also in the middle of a chunk: where a checkpoint lies does not depend on how the prompt was
    cut into passes.
    """
    model = build("Gemma3", {**FAMILIES["gemma3"][1], "max_position_embeddings": 8192})
    whole, config = prompt(5000), settings(prefill_chunk=chunk)
    with specache.SpeCache(model, config) as cache:
        specache.prefill(model, whole, cache=cache)
        lengths = cache.sequences[0].checkpoints.lengths
        for kept in (4990, 4200, 3000, 1100):
            other = edited(whole, kept)
            start, logits = read_again(model, cache, other)
            assert kept - (FINE if kept > 3100 else COARSE) <= start <= kept
            assert (logits - fresh(model, config, other)).abs().max() < 1e-3
            whole = other
    assert lengths == [1024, 2048, 3072, 3328, 3584, 3840, 4096, 4352, 4608, 4864, 5000]


def test_a_conversation_goes_back_to_any_of_its_turns(hybrid):
    with specache.SpeCache(hybrid, settings()) as cache:
        ids, ends = prompt(300), []
        for turn in range(4):
            ends.append(ids.shape[1])
            ids, _ = answer(hybrid, cache, ids)
            ids = torch.cat([ids, prompt(60, seed=turn + 5)], dim=1)
        for kept in reversed(ends):
            start, _ = read_again(hybrid, cache, edited(ids, kept))
            assert kept - FINE <= start <= kept


def test_a_long_answer_can_be_cut_in_its_middle(hybrid):
    with specache.SpeCache(hybrid, settings()) as cache:
        ids, _ = answer(hybrid, cache, prompt(100), new=330)
        start, logits = read_again(hybrid, cache, edited(ids, 400))
        assert start == 256
    assert (logits - fresh(hybrid, settings(), edited(ids, 400))).abs().max() < 1e-3


def test_sequences_of_a_batch_go_back_each_for_itself(hybrid):
    ids = torch.cat([prompt(400), prompt(400, seed=1)])
    with specache.SpeCache(hybrid, settings()) as cache:
        answer(hybrid, cache, ids)
        other = torch.cat([edited(ids[:1], 380), edited(ids[1:], 380, seed=7)])
        start, logits = read_again(hybrid, cache, other)
        assert start == 256
    assert (logits - fresh(hybrid, settings(), other)).abs().max() < 1e-4


@pytest.mark.parametrize("policy", ["verified", "full"])
def test_forks_go_back_without_each_other(hybrid, policy):
    ids, config = prompt(500), settings(policy="verified")
    with specache.SpeCache(hybrid, config) as cache:
        specache.prefill(hybrid, ids, cache=cache)
        copy = cache.fork(policy=policy)
        first = read_again(hybrid, cache, edited(ids, 450))
        second = read_again(hybrid, copy, edited(ids, 480, seed=2))
        copy.close()
    assert (first[0], second[0]) == (256, 256)
    assert (first[1] - fresh(hybrid, config, edited(ids, 450))).abs().max() < 1e-4
    assert (second[1] - fresh(hybrid, config, edited(ids, 480, seed=2))).abs().max() < 1e-4


def test_a_prefill_that_stops_in_the_middle_goes_back_and_on(hybrid):
    ids, config = prompt(600), settings()

    def stop(done: int, total: int) -> None:
        if done >= 450:
            raise KeyboardInterrupt

    with specache.SpeCache(hybrid, config) as cache:
        answer(hybrid, cache, ids)
        with pytest.raises(KeyboardInterrupt):
            specache.prefill(hybrid, edited(ids, 300, 300), cache=cache, progress=stop)
        assert 256 <= cache.sequences[0].length <= 300
        assert max(cache.sequences[0].checkpoints.lengths) <= cache.sequences[0].length
        start, logits = read_again(hybrid, cache, edited(ids, 290))
    assert start == 256
    assert (logits - fresh(hybrid, config, edited(ids, 290))).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_other_hybrid_models_go_back_to_checkpoints(family):
    model, config = build(*FAMILIES[family]), settings()
    with specache.SpeCache(model, config) as cache:
        answer(model, cache, prompt(600))
        start, logits = read_again(model, cache, edited(prompt(600), 555))
    assert start == 512
    assert (logits - fresh(model, config, edited(prompt(600), 555))).abs().max() < 1e-4


def test_a_fork_of_a_session_goes_back_without_its_files(hybrid, tmp_path):
    ids = prompt(600)
    with specache.Session("one", hybrid, settings(), folder=tmp_path) as session:
        specache.prefill(hybrid, ids, cache=session.cache)
        session.save()
        copy = session.cache.fork()
        session.cut(0)
        session.save()
        start, logits = read_again(hybrid, copy, edited(ids, 560))
        copy.close()
    assert start == 512
    assert (logits - fresh(hybrid, settings(), edited(ids, 560))).abs().max() < 1e-4


# Memory


def test_a_machine_without_memory_for_a_copy_answers_without_one(hybrid, monkeypatch):
    def fail(*args: Any) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(WindowLayer, "ring_at", fail)
    with specache.SpeCache(hybrid, settings()) as cache:
        _, logits = answer(hybrid, cache, prompt(600))
        assert cache.sequences[0].checkpoints.lengths == []
        start, _ = read_again(hybrid, cache, edited(prompt(600), 560))
    assert start == 0
    assert (logits - fresh(hybrid, settings(), prompt(600))).abs().max() == 0


def test_statistics_count_checkpoints(hybrid):
    with specache.SpeCache(hybrid, settings()) as cache:
        specache.prefill(hybrid, prompt(600), cache=cache)
        stats, kept = cache.stats(), cache.sequences[0].checkpoints
        assert kept.lengths == [256, 512, 600]
        assert stats["checkpoint_bytes"] == 3 * stats["window_bytes"] == kept.nbytes
        assert cache.resources.budget.spare == kept.nbytes
        loads = [specache.planning.footprint.PlannedSequence(600)]
        assert specache.planning.plan.plan(cache.resources.dimensions, cache.config, loads).checkpoints == kept.nbytes
        parts = ("fast_bytes", "slow_bytes", "hot_bytes", "window_bytes", "checkpoint_bytes")
        assert stats["total_bytes"] == sum(stats[name] for name in parts)
    assert cache.resources.budget.spare == cache.resources.budget.used == 0


def test_checkpoints_never_make_a_request_fail_that_fits_without_them(hybrid):
    """The least fast memory that is enough is what it would be without checkpoints; with a little
    less it is refused.
    """
    ids, config = prompt(600), settings()
    loads = [specache.planning.footprint.PlannedSequence(600, 9)]
    with specache.SpeCache(hybrid, config) as cache:
        expected = answer(hybrid, cache, ids)[0]
        needed = specache.planning.plan.plan(cache.resources.dimensions, cache.config, loads).fast
    with specache.SpeCache(hybrid, settings(fast_memory=needed)) as cache:
        assert torch.equal(answer(hybrid, cache, ids)[0], expected)
        budget = cache.resources.budget
        assert budget.used + budget.spare <= needed
        assert torch.equal(answer(hybrid, cache, ids)[0], expected)
    with pytest.raises(specache.FastMemoryError), specache.SpeCache(hybrid, settings(fast_memory=needed - 1)) as cache:
        answer(hybrid, cache, ids)


def test_spare_bytes_go_when_they_are_needed_and_no_sooner():
    class Holder:
        def __init__(self) -> None:
            self.claims: list[Any] = []

        def give_up(self, size: int) -> None:
            while self.claims and size > 0:
                size -= self.claims.pop().size

    budget, holder = ByteBudget(100), Holder()
    holder.claims = [budget.claim_spare(20, holder) for _ in range(5)]
    assert budget.claim_spare(1, holder) is None
    claim = budget.claim(30, "things")
    assert (budget.used, budget.spare, budget.peak) == (30, 60, 30)
    with pytest.raises(specache.FastMemoryError):
        budget.take(80, "more things")
    assert budget.spare == 60
    claim.release()
    del holder
    assert (budget.used, budget.spare) == (0, 0)


def test_a_fork_on_another_thread_takes_none_away_while_one_is_looked_up(monkeypatch):
    budget = ByteBudget(1000)
    checkpoints = MemoryCheckpoints(Spacing(24, 24), budget)
    for tokens in (100, 200, 300):
        checkpoints.take(tokens, {0: torch.full((10,), float(tokens))})
    other = threading.Thread(target=budget.take, args=(950, "things of the fork"))
    best = Spacing.best

    def interrupted(spacing: Spacing, lengths: list[int], length: int) -> int | None:
        index = best(spacing, lengths, length)
        other.start()
        other.join(0.2)
        return index

    monkeypatch.setattr(Spacing, "best", interrupted)
    found = checkpoints.newest(300)
    other.join()
    assert found is not None and found[0] == found[1][0][0] == 300
    assert checkpoints.lengths == [300] and budget.used == 950


def test_bytes_of_checkpoints_are_bounded(hybrid):
    class Large(Spacing):
        pass

    with specache.SpeCache(hybrid, settings()) as cache:
        dimensions = cache.resources.dimensions
        specache.prefill(hybrid, prompt(900), cache=cache)
        kept = cache.sequences[0].checkpoints
        one = kept.nbytes // len(kept.lengths)
        kept._thin(900, 2 * one)
        assert kept.lengths == [512, 900]
    rows = sum(layer.row_bytes(dimensions.itemsize) for layer in dimensions.full_layers)
    assert checkpoint_allowance(dimensions, 10**9, 1) == 10**9 * rows // 2
    assert checkpoint_allowance(dimensions, 100, 1) == 16 * checkpoint_allowance(dimensions, 100, 16)


# Where they are


@pytest.mark.parametrize("window", [24, 512, 1024, 4096])
def test_gaps_are_a_window_or_1024_tokens_and_smaller_near_the_end(window):
    spacing, lengths = Spacing(window, window), []
    for total in (*range(700, 30_000, 700), 30_001):
        lengths += spacing.due_in_prompt(lengths[-1] if lengths else 0, total, total)
        while (index := spacing.dispensable(lengths, total)) is not None:
            del lengths[index]
        edges = [0, *lengths]
        assert max(b - a for a, b in pairwise(edges)) <= max(window, 1024)
        assert lengths[-1] == total
    assert len(lengths) <= 30_001 // (max(window, 1024) // 2) + 20


def test_a_checkpoint_serves_what_its_ring_still_holds():
    spacing = Spacing(24, 48)
    assert [spacing.reach(100, length) for length in (98, 99, 100, 101)] == [None, 99, 100, 100]
    assert [spacing.reach(20, length) for length in (5, 20, 30)] == [5, 20, 20]
    assert spacing.reach(30, 5) is None  # the shorter window has lost its first tokens
    assert spacing.best([20, 100, 200], 99) == 1
    assert spacing.best([100], 50) is None


def test_a_ring_gives_back_one_token_and_not_two():
    layer = WindowLayer(0, 8, torch.zeros(1, 0, 4), ByteBudget())
    rows = torch.randn(1, 30, 4)
    layer.store(rows, rows)
    assert layer.can_truncate(29) and not layer.can_truncate(28)
    layer.truncate(29)
    assert not layer.can_truncate(28)  # the slot of the token that went held the one that is needed now
    assert not layer.fork().can_truncate(28)
    layer.store(rows[:, :1], rows[:, :1])
    assert layer.can_truncate(29)


def test_a_ring_after_an_undone_pass_gives_back_none():
    layer = WindowLayer(0, 8, torch.zeros(1, 0, 4), ByteBudget())
    rows = torch.randn(1, 30, 4)
    layer.store(rows, rows)
    layer.store(rows[:, :1], rows[:, :1])
    layer.undo(30)
    assert layer.length == 30
    assert not layer.can_truncate(29)


def test_two_cuts_of_one_token_are_answered_as_a_new_prompt(hybrid):
    ids = prompt(300)
    with specache.SpeCache(hybrid, settings()) as cache:
        specache.prefill(hybrid, ids, cache=cache)
        for length in (299, 298):
            cache.sequences[0].truncate(length)
        other = torch.cat([ids[:, :298], prompt(5, seed=1)], dim=1)
        again = answer(hybrid, cache, other)
    with specache.SpeCache(hybrid, settings()) as cache:
        new = answer(hybrid, cache, other)
    assert again[0].equal(new[0])
    torch.testing.assert_close(again[1], new[1], rtol=1e-4, atol=1e-4)
