"""A session that is saved, closed and reopened equals a sequence that never stopped."""

from __future__ import annotations

import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import specache
from specache import sessions
from specache.errors import SessionError, UsageError
from specache.sessions import saving
from specache.sessions.manifest import Rendering
from tests.sessions.sequences import (
    NEW,
    answer,
    checkpoints_every,
    everything,
    gemma,
    llama,
    opened,
    prefill,
    prompt,
    settings,
    state,
)
from tests.tiers.tier_rows import nothing_left
from tests.tiny import FETCHING

POLICIES = (*FETCHING, "none")
EVERYTHING = 10**6


@pytest.fixture(scope="module")
def hybrid() -> Any:
    return gemma()


def files(root: Path, pattern: str = "*", name: str = "one") -> list[str]:
    return sorted(path.name for path in (root / name).glob(pattern))


def conversation(model: Any, cache: Any, turns: int, ids: torch.Tensor, between: Any = lambda cache: cache) -> list[Any]:
    """Run turns of 40 new tokens and an answer each; `between` may replace the cache."""
    said = []
    for turn in range(turns):
        ids, logits = answer(model, cache, ids)
        said.append((ids[0].tolist(), logits))
        cache = between(cache)
        ids = torch.cat([ids, prompt(40, seed=turn + 1)], dim=1)
    return said


def compare(model: Any, root: Path, config: specache.SpeCacheConfig, length: int, turns: int) -> None:
    with specache.SpeCache(model, specache.SpeCacheConfig(**{**config.to_dict(), "slow_tier": "ram"})) as cache:
        expected = conversation(model, cache, turns, prompt(length))
    session = opened(root, model, config)

    def restart(_: Any) -> specache.SpeCache:
        nonlocal session
        session.save()
        session.close()
        session = opened(root, model)
        return session.cache

    found = conversation(model, session.cache, turns, prompt(length), restart)
    session.close()
    for (tokens, logits), (mine, mine_logits) in zip(expected, found, strict=True):
        assert mine == tokens
        assert (mine_logits - logits).abs().max() < 1e-5


def test_a_session_says_how_many_of_its_steps_ran_compiled(tmp_path, model):
    session = opened(tmp_path, model, settings())
    ids, _ = answer(model, session.cache, prompt(100))
    session.cache.sequences[0].compiled_steps = 3  # as if compiled
    session.save()
    session.close()
    session = opened(tmp_path, model)
    answer(model, session.cache, torch.cat([ids, prompt(5)], dim=1))
    session.save()
    session.close()
    shown = sessions.show("one", tmp_path)
    assert (shown.decode_steps, shown.compiled_steps) == (2 * (NEW - 1), 3)


@pytest.mark.parametrize("code", ["rotated", "kivi"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_conversation_with_restarts_equals_one_without(tmp_path, model, policy, code):
    compare(model, tmp_path, settings(policy=policy, code=code), 150, 3)


@pytest.mark.parametrize("length", [3, 20, 33, 64, 129])
def test_a_short_conversation_with_restarts_equals_one_without(tmp_path, model, length):
    compare(model, tmp_path, settings(policy="verified"), length, 3)


@pytest.mark.parametrize("policy", ["verified", "on-demand"])
def test_a_hybrid_models_conversation_with_restarts_equals_one_without(tmp_path, hybrid, policy):
    compare(hybrid, tmp_path, settings(policy=policy), 150, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_with_restarts_equal_those_without(tmp_path, dtype):
    compare(llama().to(dtype), tmp_path, settings(policy="verified", group_size=64, residual=64), 200, 2)


def test_opening_a_session_restores_every_byte(tmp_path, hybrid):
    with opened(tmp_path, hybrid, settings()) as session:
        answer(hybrid, session.cache, prompt(170))
        session.save()
        saved = state(session)
    with opened(tmp_path, hybrid) as session:
        assert state(session) == saved
        assert session.saved_tokens == len(session.token_ids) == 170 + NEW - 1


def test_only_what_a_prompt_adds_is_prefilled(tmp_path, model):
    with opened(tmp_path, model, settings()) as session:
        assert prefill(session, model, prompt(200)) == [0, 70, 140, 200]
        session.save()
    longer = torch.cat([prompt(200), prompt(100, seed=5)], dim=1)
    with opened(tmp_path, model) as session:
        assert prefill(session, model, longer) == [200, 270, 300]
    other = torch.cat([prompt(200)[:, :150], prompt(60, seed=6)], dim=1)
    with opened(tmp_path, model) as session:
        assert prefill(session, model, other) == [150, 210]


def test_a_save_writes_only_what_is_new(tmp_path, model):
    with opened(tmp_path, model, settings()) as session:
        prefill(session, model, prompt(1000))
        session.save()
        before = {name: (tmp_path / "one" / name).stat().st_mtime_ns for name in files(tmp_path, "pages-*")}
        prefill(session, model, torch.cat([prompt(1000), prompt(100, seed=1)], dim=1))
        session.save()
        after = {name: (tmp_path / "one" / name).stat() for name in files(tmp_path, "pages-*")}
    (first,) = before
    assert after.pop(first).st_mtime_ns == before[first]
    (new,) = after.values()
    assert new.st_size < (tmp_path / "one" / first).stat().st_size / 5


def test_a_reopened_session_appends_to_its_row_files(tmp_path, model):
    length = 100
    for turn in range(4):
        with opened(tmp_path, model, settings()) as session:
            prefill(session, model, prompt(1000)[:, : length + 100 * turn])
            session.save()
    assert len(files(tmp_path, "*.rows")) == 3  # one per layer


def test_many_saves_leave_few_files(tmp_path, model, monkeypatch):
    monkeypatch.setattr(saving, "LONGEST_CHAIN", 3)
    counts = []
    with opened(tmp_path, model, settings()) as session:
        for length in range(100, 1100, 100):
            prefill(session, model, prompt(1100)[:, :length])
            session.save()
            counts.append(len(files(tmp_path, "pages-*")))
            assert len(files(tmp_path, "tail-*")) == 1
        saved = state(session)
    assert max(counts) == 3
    assert counts.count(1) > 2
    with opened(tmp_path, model) as session:
        assert state(session) == saved


# Cutting


@pytest.mark.parametrize("code", ["rotated", "kivi"])
def test_a_cut_session_is_a_fresh_prefill_of_what_is_left(tmp_path, model, code):
    config = settings(code=code)
    with opened(tmp_path, model, config, "fresh") as session:
        prefill(session, model, prompt(210))
        fresh = state(session)
    with opened(tmp_path, model, config) as session:
        prefill(session, model, torch.cat([prompt(210), prompt(200, seed=3)], dim=1))
        session.save()
        assert session.cut(210) == 210
        assert state(session) == fresh
        session.save()
    with opened(tmp_path, model) as session:
        assert state(session) == fresh


def test_a_session_continues_after_cuts_at_any_length(tmp_path, model):
    config = settings(top_k=EVERYTHING, policy="on-demand")
    with opened(tmp_path, model, config) as session:
        answer(model, session.cache, prompt(333))
        session.save()
    short = prompt(333)[:, :187]
    with specache.SpeCache(model, config) as cache:
        tokens, logits = answer(model, cache, short)
    with opened(tmp_path, model) as session:
        session.cut(187)
        session.save()
    with opened(tmp_path, model) as session:
        mine, mine_logits = answer(model, session.cache, short)
    assert mine.tolist() == tokens.tolist()
    assert (mine_logits - logits).abs().max() < 1e-4


def test_a_negative_cut_is_refused_and_forgets_nothing(tmp_path, model):
    with opened(tmp_path, model, settings()) as session:
        prefill(session, model, prompt(80))
        with pytest.raises(specache.UsageError, match="number of tokens to keep, at least 0, not -1"):
            session.cut(-1)  # not the last token, as in transformers' Cache.crop
        assert len(session.token_ids) == session.cut(10**6) == 80


def test_a_session_cut_to_nothing_is_empty(tmp_path, model):
    with opened(tmp_path, model, settings()) as session:
        prefill(session, model, prompt(200))
        session.save()
        assert session.cut(0) == 0
        session.save()
        assert files(tmp_path) == ["lock", "session.json", "session.json.copy"]
    with opened(tmp_path, model) as session:
        assert session.token_ids == []
        assert prefill(session, model, prompt(80)) == [0, 70, 80]


@pytest.mark.parametrize("restart", [False, True])
def test_a_hybrid_goes_back_to_its_last_checkpoint(tmp_path, hybrid, monkeypatch, restart):
    checkpoints_every(monkeypatch, 140)
    whole = prompt(700)
    session = opened(tmp_path, hybrid, settings())
    answer(hybrid, session.cache, whole)
    assert [one.tokens for one in session.cache.sequences[0].checkpoints.kept] == [140, 280, 420, 560, 700]
    if restart:
        session.save()
        session.close()
        session = opened(tmp_path, hybrid)
    other = torch.cat([whole[:, :450], prompt(90, seed=9)], dim=1)
    assert prefill(session, hybrid, other) == [420, 490, 540]
    assert [one.tokens for one in session.cache.sequences[0].checkpoints.kept] == [140, 280, 420, 540]
    _, logits = answer(hybrid, session.cache, other)
    with specache.SpeCache(hybrid, settings(slow_tier="ram", policy="verified")) as cache:
        _, expected = answer(hybrid, cache, other)
    assert (logits - expected).abs().max() < 1e-3
    assert session.cut(450) == 420
    session.close()


def test_a_checkpoint_of_tokens_that_were_replaced_is_forgotten(tmp_path, hybrid, monkeypatch):
    checkpoints_every(monkeypatch, 140)
    first, second = prompt(400), torch.cat([prompt(400)[:, :200], prompt(300, seed=2)], dim=1)
    with opened(tmp_path, hybrid, settings()) as session:
        prefill(session, hybrid, first)
        session.save()
        prefill(session, hybrid, second)
        session.save()
        assert len(files(tmp_path, "windows-*")) == len(session.cache.sequences[0].checkpoints.kept)
        assert session.cut(300) == 280
        mine = everything(session)
    with opened(tmp_path, hybrid, settings(), "fresh") as session:
        prefill(session, hybrid, second)
        session.cut(300)
        for name, tensor in everything(session).items():
            assert torch.allclose(mine[name].float(), tensor.float(), atol=1e-3), name


# What a session is beside its state


def test_unsaved_tokens_are_lost_and_the_saved_state_is_intact(tmp_path, model):
    with opened(tmp_path, model, settings()) as session:
        prefill(session, model, prompt(200))
        session.save()
        saved = state(session)
    for _ in range(2):
        with opened(tmp_path, model) as session:
            assert state(session) == saved
            prefill(session, model, prompt(900, seed=1))
            answer(model, session.cache, torch.cat([prompt(200), prompt(500, seed=1)], dim=1))
    with opened(tmp_path, model) as session:
        assert state(session) == saved


def test_a_session_that_was_never_saved_leaves_no_folder(tmp_path, model):
    with opened(tmp_path, model, settings()) as session:
        prefill(session, model, prompt(200))
    assert list(tmp_path.iterdir()) == []


def test_closing_a_session_leaves_no_threads_or_descriptors(tmp_path, model):
    with opened(tmp_path, model, settings(policy="verified")) as session:
        answer(model, session.cache, prompt(200))
        session.save()
    with nothing_left(tmp_path / "other"):
        for _ in range(2):
            with opened(tmp_path, model) as session:
                answer(model, session.cache, prompt(220))
                session.save()
        forgotten = opened(tmp_path, model)
        prefill(forgotten, model, prompt(210))
        del forgotten
        import gc

        gc.collect()
        with opened(tmp_path, model):
            pass


def test_files_are_private_to_the_user(tmp_path, hybrid, monkeypatch):
    checkpoints_every(monkeypatch, 100)
    with opened(tmp_path / "made", hybrid, settings()) as session:
        prefill(session, hybrid, prompt(300))
        session.save()
        session.fork("two")
    for path in (tmp_path / "made").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o700
    assert files(tmp_path / "made", "windows-*")


def test_a_batch_is_refused(tmp_path, model):
    with opened(tmp_path, model, settings()) as session:
        prefill(session, model, prompt(100))
        before = state(session)
        for more in ({}, {"num_return_sequences": 2, "do_sample": True}):
            ids = prompt(100) if more else prompt(100).repeat(2, 1)
            with pytest.raises(UsageError, match="one sequence"):
                specache.generate(model, ids, past_key_values=session.cache, max_new_tokens=3, **more)
        with pytest.raises(UsageError, match="one sequence"):
            specache.prefill(model, prompt(100).repeat(2, 1), cache=session.cache)
        assert state(session) == before


def test_a_closed_session_says_so(tmp_path, model):
    session = opened(tmp_path, model, settings())
    session.close()
    session.close()
    for use in (session.save, lambda: session.cut(3), lambda: session.token_ids, lambda: session.cache):
        with pytest.raises(SessionError, match="closed"):
            use()


def test_a_session_keeps_its_own_settings_where_the_caller_leaves_them_open(tmp_path, model):
    """Its residual may be the default of an earlier release."""
    ids = prompt(300)
    with specache.Session("old", model, specache.SpeCacheConfig(residual=64, top_k=64), folder=tmp_path) as session:
        specache.prefill(model, ids, cache=session.cache)
        session.save()
    for config in (None, specache.SpeCacheConfig(), specache.SpeCacheConfig(hot_set=0.5)):
        with specache.Session("old", model, config, folder=tmp_path) as session:
            assert (session.cache.config.residual, session.cache.config.top_k) == (64, 64)
            assert session.saved_tokens == 300
    with specache.Session("old", model, specache.SpeCacheConfig(top_k=9), folder=tmp_path) as session:
        assert (session.cache.config.residual, session.cache.config.top_k, session.cache.config.long_top_k) == (64, 9, 9)
    with specache.Session("old", model, specache.SpeCacheConfig(long_top_k=300), folder=tmp_path) as session:
        assert (session.cache.config.top_k, session.cache.config.long_top_k) == (64, 300)
    with pytest.raises(specache.SessionError, match="made with residual 64 and is opened with residual 128"):
        specache.Session("old", model, specache.SpeCacheConfig(residual=128), folder=tmp_path)


def test_settings_are_kept_but_those_of_a_step_may_change(tmp_path, model):
    with opened(tmp_path, model, settings(bits=1, top_k=5, policy="speculative")) as session:
        prefill(session, model, prompt(100))
        session.save()
    with opened(tmp_path, model) as session:
        assert (session.cache.config.bits, session.cache.config.top_k, session.cache.config.policy) == (1, 5, "speculative")
    with opened(tmp_path, model, settings(bits=1, top_k=9)) as session:
        assert session.cache.config.top_k == 9


def test_an_emptied_session_has_no_low_bit_copy_and_takes_another(tmp_path, model):
    with opened(tmp_path, model, settings(bits=1)) as session:
        prefill(session, model, prompt(100))
        session.save()
    with pytest.raises(specache.SessionError, match=r"with bits 2.* Use bits=1, or"):
        opened(tmp_path, model, settings(bits=2))
    with opened(tmp_path, model) as session:
        session.cut(0)
        session.save()
    with opened(tmp_path, model, settings(bits=2)) as session:
        prefill(session, model, prompt(100))
        session.save()
    with opened(tmp_path, model) as session:
        assert (session.cache.config.bits, session.saved_tokens) == (2, 100)


def test_safetensors_reads_the_snapshots(tmp_path, hybrid):
    from safetensors.torch import load_file

    with opened(tmp_path, hybrid, settings()) as session:
        prefill(session, hybrid, prompt(200))
        session.save()
    (tail,) = (tmp_path / "one").glob("tail-*")
    assert load_file(tail)["token_ids"].tolist() == prompt(200)[0].tolist()


def test_a_fork_of_the_cache_keeps_unsaved_blocks_intact(tmp_path, model):
    """It shares blocks that the session's next user would overwrite if they were not in use."""
    with opened(tmp_path, model, settings()) as session:
        prefill(session, model, prompt(200))
        session.save()
        prefill(session, model, torch.cat([prompt(200), prompt(300, seed=1)], dim=1))
        other = session.cache.fork()
    rows = other.sequences[0].tier.read(0, 0, 500)
    with opened(tmp_path, model) as session:
        prefill(session, model, torch.cat([prompt(200), prompt(300, seed=2)], dim=1))
        session.save()
        assert not torch.equal(session.cache.sequences[0].tier.read(0, 0, 500)[0], rows[0])
    for mine, before in zip(other.sequences[0].tier.read(0, 0, 500), rows, strict=True):
        assert torch.equal(mine, before)
    other.close()


def test_a_fork_of_the_cache_keeps_its_blocks_if_another_process_opens_the_session(tmp_path, model):
    with opened(tmp_path, model, settings()) as session:
        prefill(session, model, prompt(200))
        session.save()
        prefill(session, model, torch.cat([prompt(200), prompt(300, seed=1)], dim=1))
        other = session.cache.fork()
    rows = other.sequences[0].tier.read(0, 0, 500)
    code = f"""
        import torch
        from pathlib import Path
        from tests.sessions.sequences import llama, opened, prefill, prompt
        model = llama()
        with opened(Path({str(tmp_path)!r}), model) as session:
            prefill(session, model, torch.cat([prompt(200), prompt(300, seed=2)], dim=1))
            session.save()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=Path(__file__).parents[2])
    assert len(files(tmp_path, "*-L000.rows")) == 2
    for mine, before in zip(other.sequences[0].tier.read(0, 0, 500), rows, strict=True):
        assert torch.equal(mine, before)
    other.close()


@pytest.mark.parametrize("family", ["dense", "hybrid"])
def test_tokens_that_replace_saved_ones_are_saved(tmp_path, model, hybrid, family):
    chosen = model if family == "dense" else hybrid
    other = torch.cat([prompt(300)[:, :210], prompt(200, seed=8)], dim=1)
    with opened(tmp_path, chosen, settings()) as session:
        prefill(session, chosen, prompt(300))
        session.save()
        prefill(session, chosen, other)
        session.save()
        new = state(session)
    with opened(tmp_path, chosen) as session:
        assert session.token_ids == other[0].tolist()
        assert state(session) == new
        mine = everything(session)
    with opened(tmp_path, chosen, settings(), "fresh") as session:
        prefill(session, chosen, other)
        for name, tensor in everything(session).items():
            assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize(
    "said",
    [
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        [{"role": "assistant", "content": None}],
        [{"role": "user"}],
        ["Hi"],
    ],
)
def test_messages_that_could_not_be_read_again_are_refused_and_nothing_is_lost(tmp_path, model, said):
    with opened(tmp_path, model, settings()) as session:
        prefill(session, model, prompt(100))
        session.save()
        session.messages = said
        with pytest.raises(UsageError, match=r"session\.messages"):
            session.save()
        session.messages = [{"role": "user", "content": "Hi"}]
        session.rendering = Rendering("yesterday", "", {})
        with pytest.raises(UsageError, match=r"session\.rendering"):
            session.save()
        session.rendering = Rendering("2026-01-02", "", {"tools": {1, 2}})
        with pytest.raises(UsageError, match="JSON"):
            session.save()
    with opened(tmp_path, model) as session:
        assert len(session.token_ids) == 100 and session.messages == [] and session.rendering is None


def test_a_token_that_was_cut_before_saving_is_not_cut_again_from_a_window(tmp_path, hybrid):
    """The window lost a token for the one that was cut, so that one more needs a checkpoint."""
    ids = prompt(300)
    with opened(tmp_path, hybrid, settings()) as session:
        specache.prefill(hybrid, ids, cache=session.cache)
        assert session.cut(299) == 299
        session.save()
    other = torch.cat([ids[:, :298], prompt(5, seed=1)], dim=1)
    with opened(tmp_path, hybrid) as session:
        assert session.token_ids == ids[0, :299].tolist()
        again = answer(hybrid, session.cache, other)
    with specache.SpeCache(hybrid, settings()) as cache:
        new = answer(hybrid, cache, other)
    assert again[0].equal(new[0])
    torch.testing.assert_close(again[1], new[1], rtol=1e-4, atol=1e-4)
