"""`slow_tier="auto"` keeps rows in memory if they fit, else on disk. A conversation may move."""

from __future__ import annotations

import errno
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import specache
from specache import SpeCache, SpeCacheConfig
from specache.engine import auto_tier
from specache.planning import working_set
from specache.platform import machine
from specache.tiers.disk import rows_folder
from specache.tiers.disk.rows_folder import FolderFacts
from specache.tiers.ram import RamTier
from tests.platform.test_budget import hybrid
from tests.tiny import llama, prompt, ragged

SHORT = {"group_size": 16, "residual": 16, "top_k": 8, "prefill_chunk": 64}
NEW = {"max_new_tokens": 8, "do_sample": False}
MUCH = 1 << 40

SetFree = Callable[[int | None], None]


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture
def set_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SetFree:
    """Set the free memory in bytes, and let rows on disk go to `tmp_path`, a disk with space."""
    monkeypatch.setenv("SPECACHE_CACHE", str(tmp_path))
    monkeypatch.setattr(auto_tier, "MARGIN_BYTES", 0)
    monkeypatch.setattr(auto_tier, "MARGIN_SHARE", 0.0)
    monkeypatch.setattr(machine, "mapped_bytes", lambda blocks: 0)
    monkeypatch.setattr(machine, "free_swap", lambda: MUCH)
    monkeypatch.setattr(working_set, "READ_BYTES", 4096)  # the real buffers exceed all that a tiny model holds
    monkeypatch.setattr(rows_folder, "folder_facts", lambda folder: FolderFacts(folder, tmp_path, "ext4", MUCH))

    def set_free(size: int | None) -> None:
        monkeypatch.setattr(machine, "available_memory", lambda: size)

    set_free(MUCH)
    return set_free


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Silence the warning that rows go to disk."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "slow_tier='auto'")
        yield


def config(**changes: Any) -> SpeCacheConfig:
    return SpeCacheConfig(**{**SHORT, **changes})


def needed(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> int:
    """Return the main memory that a generation needs with its rows there."""
    with SpeCache(model, config()) as cache:
        specache.generate(model, ids, attention_mask=mask, past_key_values=cache, **NEW)
        assert cache.tier_choice is not None
        return cache.tier_choice.needed_bytes


def answer(model: Any, ids: torch.Tensor, cache: SpeCache) -> list[int]:
    return specache.generate(model, ids, past_key_values=cache, **NEW)[0, ids.shape[1] :].tolist()


def test_rows_stay_in_memory_exactly_as_long_as_everything_fits(model, set_free):
    ids = prompt(300)
    enough = needed(model, ids)
    for free, tier, policy in ((enough, "ram-inplace", "on-demand"), (enough - 1, "disk", "verified")):
        set_free(free)
        with SpeCache(model, config()) as cache:
            answer(model, ids, cache)
            assert (cache.config.slow_tier, cache.config.policy) == (tier, policy)
            stats = cache.stats()
            assert stats["slow_tier"] == tier
            assert stats["slow_tier_choice"]["needed_bytes"] == enough and stats["slow_tier_choice"]["free_bytes"] == free


def test_planned_bytes_are_those_a_run_in_memory_holds(model, set_free):
    ids = prompt(300)
    with SpeCache(model, config()) as cache:
        answer(model, ids, cache)
        stats, layer = cache.stats(), cache.sequences[0].tier.rows(0).nbytes
        held = stats["slow_bytes"] + stats["fast_memory_peak_bytes"]
        assert held <= cache.tier_choice.needed_bytes <= held + layer + 0.1 * held


def test_rows_on_disk_give_the_answer_of_rows_in_memory(model, set_free):
    ids = prompt(300)
    in_memory = specache.generate(model, ids, config=config(), **NEW)
    set_free(0)
    on_disk = specache.generate(model, ids, config=config(), **NEW)
    assert torch.equal(in_memory, on_disk)


def test_new_tokens_count_as_well_as_the_prompt(model, set_free):
    ids = prompt(300)
    set_free(needed(model, ids))
    with SpeCache(model, config()) as cache:
        specache.generate(model, ids, past_key_values=cache, max_new_tokens=400, do_sample=False)
        assert cache.config.slow_tier == "disk"


def test_all_sequences_of_a_batch_count(model, set_free):
    ids, mask = ragged(300, 280)
    set_free(needed(model, ids[:1]))
    with SpeCache(model, config()) as cache:
        specache.generate(model, ids, attention_mask=mask, past_key_values=cache, **NEW)
        assert cache.config.slow_tier == "disk"


def test_going_to_disk_warns_once_and_staying_in_memory_never(model, set_free):
    enough = needed(model, prompt(300))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specache.generate(model, prompt(300), config=config(), **NEW)
    set_free(enough - 1)
    with warnings.catch_warnings(record=True) as seen, SpeCache(model, config()) as cache:
        warnings.simplefilter("always")
        answer(model, prompt(300), cache)
        answer(model, prompt(310), cache)
    (message,) = [str(warning.message) for warning in seen]
    assert f"{enough:,} bytes" in message and "slow_tier='ram-inplace'" in message and "\n" not in message


def test_a_prompt_so_short_that_a_disk_needs_more_memory_stays_in_memory(model, set_free, monkeypatch):
    monkeypatch.setattr(working_set, "READ_BYTES", 1 << 20)
    set_free(0)
    with SpeCache(model, config()) as cache:
        answer(model, prompt(300), cache)
        assert cache.config.slow_tier == "ram-inplace"


def test_rows_stay_in_memory_if_free_memory_is_unknown(model, set_free):
    set_free(None)
    with SpeCache(model, config()) as cache:
        answer(model, prompt(300), cache)
        assert cache.config.slow_tier == "ram-inplace" and cache.tier_choice.free_bytes is None


def test_closing_the_cache_removes_its_files(model, set_free, tmp_path):
    set_free(needed(model, prompt(300)) - 1)
    with SpeCache(model, config()) as cache:
        answer(model, prompt(300), cache)
        assert [path for path in tmp_path.rglob("*.rows")]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("policy", ["on-demand", "speculative", "previous", "none"])
def test_an_explicit_policy_is_kept(model, set_free, policy):
    with SpeCache(model, config(policy=policy)) as cache:
        answer(model, prompt(300), cache)
        enough = cache.tier_choice.needed_bytes
    set_free(enough - 1)
    with SpeCache(model, config(policy=policy)) as cache:
        answer(model, prompt(300), cache)
        assert (cache.config.slow_tier, cache.config.policy) == ("disk", policy)


@pytest.mark.parametrize("settings", [{"slow_tier": "ram-inplace"}, {"slow_tier": "ram"}, {"policy": "full"}])
def test_an_explicit_tier_is_used_however_little_memory_is_free(model, set_free, settings):
    set_free(0)
    with SpeCache(model, config(**settings)) as cache:
        before = cache.config
        answer(model, prompt(300), cache)
        assert cache.config == before and cache.tier_choice is None and cache.stats()["slow_tier_choice"] is None


def test_a_session_keeps_its_rows_in_its_own_folder(model, set_free, tmp_path):
    set_free(0)
    with specache.Session("mine", model, config(), folder=tmp_path / "sessions") as session:
        answer(model, prompt(300), session.cache)
        assert session.cache.config.slow_dir == str(tmp_path / "sessions" / "mine") and session.cache.tier_choice is None


def test_a_fork_keeps_the_tier_of_what_it_shares(model, set_free):
    with SpeCache(model, config()) as cache:
        first = answer(model, prompt(300), cache)
        with cache.fork() as fork:
            set_free(0)
            assert fork.config.slow_tier == "ram-inplace"
            longer = torch.cat([prompt(300), torch.tensor([first])], dim=1)
            answer(model, longer, fork)
            assert fork.config.slow_tier == "ram-inplace"


def test_prefill_chooses_the_tier_and_generate_keeps_it(model, set_free):
    set_free(needed(model, prompt(300)) // 2)
    with SpeCache(model, config()) as cache:
        specache.prefill(model, prompt(300), cache=cache)
        assert cache.config.slow_tier == "disk"
        set_free(MUCH)
        answer(model, prompt(300), cache)
        assert cache.config.slow_tier == "disk"


def test_the_caches_own_config_may_be_passed_again(model, set_free):
    set_free(needed(model, prompt(300)) - 1)
    with SpeCache(model, config()) as cache:
        specache.generate(model, prompt(300), past_key_values=cache, config=config(), **NEW)
        specache.generate(model, prompt(310), past_key_values=cache, config=config(), **NEW)
        specache.generate(model, prompt(310), past_key_values=cache, config=cache.config, **NEW)
        with pytest.raises(specache.UsageError, match="keeps the config"):
            specache.generate(model, prompt(310), past_key_values=cache, config=config(top_k=9), **NEW)


# A conversation that outgrows the memory


def conversation(model: Any, cache: SpeCache, turns: int, before_turn: Callable[[int], None] = lambda turn: None) -> list[int]:
    """Return the answers of several turns, each of 90 new tokens after the conversation so far."""
    text = prompt(150)
    answers: list[int] = []
    for turn in range(turns):
        before_turn(turn)
        answers += (new := answer(model, text, cache))
        text = torch.cat([text, torch.tensor([new]), prompt(90, seed=turn + 1)], dim=1)
    return answers


@pytest.mark.parametrize("make", [llama, hybrid])
@pytest.mark.parametrize("moves_at", [1, 2])
@pytest.mark.parametrize("code", ["rotated", "kivi"])
def test_a_conversation_that_outgrows_memory_moves_to_disk_with_the_same_answers(set_free, make, moves_at, code):
    model = make()
    with SpeCache(model, config(code=code)) as stays:
        expected = conversation(model, stays, 4)
    with SpeCache(model, config(code=code)) as cache:
        tiers = []

        def before_turn(turn: int) -> None:
            tiers.append(str(cache.config.slow_tier))
            set_free(MUCH if turn < moves_at else 100)

        assert conversation(model, cache, 4, before_turn) == expected
        assert tiers == ["ram-inplace"] * (moves_at + 1) + ["disk"] * (3 - moves_at)
        stats = cache.stats()
        assert stats["slow_tier"] == "disk" and stats["hit_rate"] is not None
        assert not isinstance(cache.sequences[0].tier, RamTier)


def test_bytes_already_held_are_not_counted_again(model, set_free):
    with SpeCache(model, config()) as cache:
        answer(model, prompt(900), cache)
        first = cache.tier_choice.needed_bytes
        longer = torch.cat([prompt(900), prompt(20, seed=1)], dim=1)
        answer(model, longer, cache)
        assert cache.tier_choice.needed_bytes < first


def test_every_sequence_of_a_batch_moves(model, set_free):
    ids, mask = ragged(200, 150)
    longer = torch.cat([ids, torch.stack([prompt(60, seed=7)[0], prompt(60, seed=8)[0]])], dim=1)
    longer_mask = torch.cat([mask, torch.ones(2, 60, dtype=torch.long)], dim=1)
    with SpeCache(model, config()) as cache:
        specache.generate(model, ids, attention_mask=mask, past_key_values=cache, **NEW)
        expected = specache.generate(model, longer, attention_mask=longer_mask, past_key_values=cache, **NEW)
    with SpeCache(model, config()) as cache:
        specache.generate(model, ids, attention_mask=mask, past_key_values=cache, **NEW)
        set_free(100_000)
        moved = specache.generate(model, longer, attention_mask=longer_mask, past_key_values=cache, **NEW)
        assert cache.config.slow_tier == "disk" and torch.equal(moved, expected)


def test_a_move_to_disk_that_fails_changes_nothing(model, set_free, monkeypatch, plain_reads):
    from specache.tiers.disk.row_file import RowFile

    longer = torch.cat([prompt(300), prompt(60, seed=1)], dim=1)
    with SpeCache(model, config()) as cache:
        answer(model, prompt(300), cache)
        expected = answer(model, longer, cache)
    with SpeCache(model, config()) as cache:
        answer(model, prompt(300), cache)
        before, used, tokens = cache.config, cache.resources.budget.used, list(cache.sequences[0].token_ids)
        calls = itertools.count()
        write = RowFile.write

        def full(self: RowFile, *arguments: Any) -> None:
            if next(calls) == 1:  # the second layer's rows cannot be written
                raise specache.SlowTierError(f"errno {errno.ENOSPC}")
            write(self, *arguments)

        set_free(100_000)
        with monkeypatch.context() as patch:
            patch.setattr(RowFile, "write", full)
            with pytest.raises(specache.SlowTierError, match="errno"):
                answer(model, longer, cache)
        assert cache.config == before and cache.resources.budget.used == used and cache.sequences[0].token_ids == tokens
        set_free(MUCH)
        assert answer(model, longer, cache) == expected


def test_a_move_that_exceeds_fast_memory_changes_nothing(model, set_free):
    longer = torch.cat([prompt(300), prompt(60, seed=1)], dim=1)
    with SpeCache(model, config()) as cache:
        answer(model, prompt(300), cache)
        budget, before = cache.resources.budget, cache.config
        used = budget.used
        budget.limit = used  # too little for a disk tier's read buffers and hot sets
        set_free(100_000)
        with pytest.raises(specache.FastMemoryError):
            answer(model, longer, cache)
        assert cache.config == before and budget.used == used
        budget.limit = None
        set_free(MUCH)
        answer(model, longer, cache)


# Where neither suffices


def test_too_little_memory_for_the_low_bit_copy_raises_with_advice(model, set_free, monkeypatch):
    set_free(1000)
    monkeypatch.setattr(machine, "free_swap", lambda: 0)
    with pytest.raises(specache.OutOfMemoryError, match=r"Even with the 16-bit pairs on disk .* slow_tier='disk:FOLDER'"):
        specache.generate(model, prompt(300), config=config(), **NEW)


def test_a_cache_folder_on_a_memory_file_system_is_skipped(model, set_free, monkeypatch, tmp_path):
    kinds = {tmp_path / "cache" / "rows": "tmpfs", tmp_path / "temporary": "ramfs", Path("/var/tmp"): "ext4"}
    monkeypatch.setenv("SPECACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rows_folder.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    facts = lambda folder: FolderFacts(folder, tmp_path, kinds[folder], MUCH)  # noqa: E731
    monkeypatch.setattr(rows_folder, "folder_facts", facts)
    assert rows_folder.choose_rows_folder(1000, make=False).folder == Path("/var/tmp")
    kinds[Path("/var/tmp")] = "tmpfs"
    set_free(100_000)
    with pytest.raises(specache.SlowTierError, match=r"on tmpfs, in memory itself.*ramfs.*SPECACHE_CACHE"):
        specache.generate(model, prompt(300), config=config(), **NEW)


def test_a_full_disk_is_skipped_and_named(set_free, monkeypatch, tmp_path):
    monkeypatch.setattr(rows_folder, "folder_facts", lambda folder: FolderFacts(folder, tmp_path, "ext4", 1 << 20))
    with pytest.raises(specache.SlowTierError, match=r"need 5,000,000 bytes.* has 1,048,576 bytes free"):
        rows_folder.choose_rows_folder(5_000_000)


def test_the_file_system_of_a_folder_is_that_of_the_innermost_mount(monkeypatch):
    mounts = [("/", "ext4"), ("/a b", "tmpfs"), ("/a b/c", "xfs"), ("/a b/c", "ramfs"), ("/ab", "nfs")]
    monkeypatch.setattr(rows_folder, "_mounts", lambda: mounts)
    monkeypatch.setattr(rows_folder.os.path, "realpath", str)
    kinds = {path: rows_folder.file_system_of(Path(path)) for path in ("/x", "/a b/x", "/a b/c", "/ab/c", "/a bc")}
    assert kinds == {"/x": "ext4", "/a b/x": "tmpfs", "/a b/c": "ramfs", "/ab/c": "nfs", "/a bc": "ext4"}


def test_this_systems_memory_file_system_is_recognised():
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm")
    assert rows_folder.file_system_of(Path("/dev/shm")) in rows_folder.IN_MEMORY
    assert rows_folder.file_system_of(Path(__file__)) is not None
