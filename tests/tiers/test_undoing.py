"""A failed pass is undone completely: the first error is raised, even if undoing fails too, and
there are no leftovers.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import Any

import pytest
import torch

import specache
from specache.engine.attention_hook import attached
from specache.errors import NonFiniteError, SlowTierError
from specache.kernels import dispatch
from specache.tiers.disk import aligned_io, scratch
from specache.tiers.disk.disk_tier import DiskTier
from tests.cache.test_invariants import run, settings
from tests.tiers.faults import Steps, failing
from tests.tiers.tier_rows import nothing_left
from tests.tiny import FETCHING, prompt

POLICIES = (*FETCHING, "none")
PROMPT, STEPS = 230, 27  # two groups are quantised on the way
RETIRING = [i for i in range(STEPS) if (PROMPT + i + 1 - 16) % 16 == 0]


class FailingQuantisation:
    """Fails while groups are quantised: in layer `number` of the step, before or after its codes
    are written.
    """

    def __init__(self, number: int, error: type[BaseException], *, after: bool) -> None:
        self._left = number
        self._error = error
        self._after = after
        self._quantise = dispatch.quantise
        self.failed = False

    def __call__(self, *arguments: Any) -> None:
        fails = self._left == 0
        self._left -= 1
        if fails and not self._after:
            self.failed = True
            raise self._error("first")
        self._quantise(*arguments)
        if fails:
            self.failed = True
            raise self._error("first")


def empty(cache: specache.SpeCache) -> bool:
    pools = cache.resources._pools.values()
    return cache.get_seq_length() == 0 and cache.resources.budget.used == 0 and not any(pool.pages_in_use for pool in pools)


@pytest.mark.parametrize("code", ["rotated", "kivi"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_that_fails_while_quantising_groups_can_be_repeated(model, tmp_path, monkeypatch, policy, code):
    config = settings(policy=policy, code=code, slow_tier=f"disk:{tmp_path}")
    undisturbed = Steps(model, config, PROMPT)
    expected = [undisturbed.step(i) for i in range(STEPS)]
    undisturbed.cache.close()
    disturbed = Steps(model, config, PROMPT)
    failed = []
    for i in range(STEPS):
        for number in range(3):
            for error in (NonFiniteError, KeyboardInterrupt):
                for after in (False, True):
                    if i not in RETIRING:
                        continue
                    broken = FailingQuantisation(number, error, after=after)
                    with monkeypatch.context() as patch:
                        patch.setattr(dispatch, "quantise", broken)
                        with pytest.raises(error):
                            disturbed.step(i)
                    assert broken.failed
                    assert {layer.length for layer in disturbed.cache.sequences[0].layers.values()} == {PROMPT + i}
                    failed.append(i)
        assert torch.equal(disturbed.step(i), expected[i])
    assert len(failed) == 12 * len(RETIRING) > 12
    disturbed.cache.close()


@pytest.mark.parametrize("second", [SlowTierError, MemoryError, RuntimeError, KeyboardInterrupt])
def test_a_second_error_while_undoing_a_step_does_not_hide_the_first(model, tmp_path, monkeypatch, second):
    """The rows of a group that was quantised already are read back, and that fails too."""
    config = settings(policy="verified", slow_tier=f"disk:{tmp_path}")
    expected = run(model, prompt(PROMPT), config)[0]
    run(model, prompt(PROMPT), config, new=1)
    with nothing_left(tmp_path):
        steps = Steps(model, config, PROMPT)
        for i in range(RETIRING[0]):
            steps.step(i)

        def unreadable(*_: Any) -> Any:
            raise second("second")

        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "quantise", FailingQuantisation(1, NonFiniteError, after=False))
            patch.setattr(DiskTier, "read", unreadable)
            with pytest.raises(NonFiniteError, match="first"):
                steps.step(RETIRING[0])
        assert empty(steps.cache)
        tokens = specache.generate(model, prompt(PROMPT), past_key_values=steps.cache, max_new_tokens=40, do_sample=False)
        assert tokens[0, PROMPT:].tolist() == expected
        steps.cache.close()


@pytest.mark.parametrize("second", [SlowTierError, MemoryError, RuntimeError, KeyboardInterrupt])
def test_a_second_error_while_undoing_a_prefill_does_not_hide_the_first(model, tmp_path, monkeypatch, second):
    config = settings(policy="verified", slow_tier=f"disk:{tmp_path}", residual=64)
    expected = run(model, prompt(600), config)[0]
    with nothing_left(tmp_path), specache.SpeCache(model, config) as cache:
        specache.prefill(model, prompt(600)[:, :300], cache=cache)
        write, calls = aligned_io.write_at, []

        def dies(*arguments: Any) -> int:
            calls.append(arguments)
            if len(calls) <= 6:
                return write(*arguments)
            monkeypatch.setattr(DiskTier, "read", unreadable)
            return failing(errno.ENOSPC)()

        def unreadable(*_: Any) -> Any:
            raise second("second")

        with monkeypatch.context() as patch:
            patch.setattr(aligned_io, "write_at", dies)
            with pytest.raises(SlowTierError, match="No space left"):
                specache.prefill(model, prompt(600), cache=cache)
        assert empty(cache)
        monkeypatch.undo()
        tokens = specache.generate(model, prompt(600), past_key_values=cache, max_new_tokens=40, do_sample=False)
        assert tokens[0, 600:].tolist() == expected


def test_a_failed_step_is_undone_in_every_sequence_of_a_batch(model, tmp_path, monkeypatch):
    """Also if one of them cannot be undone, and is emptied."""
    config = settings(policy="on-demand", slow_tier=f"disk:{tmp_path}")
    steps = Steps(model, config, PROMPT)
    steps.cache.sequences.append(steps.cache.repeat(steps.cache.sequences[0]))
    first, second = steps.cache.sequences
    undone: list[int] = []

    def unreadable(tier: DiskTier, *arguments: Any) -> Any:
        undone.append(1)
        raise MemoryError

    def both(i: int) -> torch.Tensor:
        with torch.no_grad(), attached(model):
            return steps.decoder.step(steps.cache.sequences, [5 + i, 5 + i], None).real

    for i in range(RETIRING[0]):
        both(i)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "quantise", FailingQuantisation(4, NonFiniteError, after=False))
        patch.setattr(first.tier, "read", lambda *arguments: unreadable(first.tier, *arguments), raising=False)
        with pytest.raises(NonFiniteError, match="first"):
            both(RETIRING[0])
    assert undone
    assert first.length == 0
    length = PROMPT + RETIRING[0]
    assert second.length == length and {layer.length for layer in second.layers.values()} == {length}
    steps.cache.close()


def test_files_that_cannot_be_removed_are_removed_by_the_next_program(model, tmp_path, monkeypatch):
    config = settings(policy="verified", slow_tier=f"disk:{tmp_path}")
    run(model, prompt(100), config, new=1)
    unlink = os.unlink

    def refuse(path: Any, **more: Any) -> None:
        if str(path).endswith(".rows"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unlink(path, **more)

    cache = specache.SpeCache(model, config)
    specache.prefill(model, prompt(300), cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        cache.close()
    assert empty(cache)
    assert len(list(tmp_path.rglob("*.rows"))) == 3
    scratch.remove_abandoned(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_memory_is_freed_while_a_background_read_still_runs(model, tmp_path, monkeypatch, tier):
    """Clearing a sequence does not wait for a thread's discarded reads, and their memory counts as
    free at once.
    """
    on_disk = tier == "disk"
    steps = Steps(model, settings(policy="speculative", slow_tier=f"disk:{tmp_path}" if on_disk else "ram"), PROMPT)
    kind = type(steps.cache.sequences[0].tier)
    gather, held, go = kind.gather, threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        if threading.current_thread().name.startswith("specache-prefetch"):
            held.set()
            assert go.wait(60)
        return gather(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "gather", slow)
        for i in range(STEPS):
            steps.step(i)
            if any(layer.row_fetcher._prefetch is not None for layer in steps.cache.sequences[0].layers.values()):
                break
        try:
            assert held.wait(60)  # before the next step would read it itself, or wait for it
            used = steps.cache.resources.budget.used
            steps.cache.sequences[0].clear()
            assert used and not steps.cache.resources.budget.used
        finally:
            go.set()
    steps.cache.close()
