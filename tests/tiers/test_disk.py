"""The disk tier holds the same rows as the RAM tier, whatever is written, cut, forked, saved and
reopened.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import specache
from specache.errors import ConfigError, SlowTierError
from specache.tiers.disk import disk_tier as disk
from specache.tiers.disk import row_reads
from specache.tiers.disk.disk_tier import DiskTier
from specache.tiers.ram import RamTier
from tests.cache.test_invariants import FETCHING, run, settings
from tests.tiers.tier_rows import everything, fill, nothing_left, pairs, random_rows, row_file
from tests.tiny import prompt

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def agree(disk: DiskTier, ram: RamTier, heads: int, length: int, seed: int) -> None:
    """Compare all rows by `read`, a range of them, and a sample with repetitions by `gather`."""
    if length == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    assert torch.equal(everything(disk, 0, heads, length), everything(ram, 0, heads, length))
    start, stop = sorted(torch.randint(0, length + 1, (2,), generator=generator).tolist())
    for mine, other in zip(disk.read(0, start, stop), ram.read(0, start, stop), strict=True):
        assert torch.equal(mine, other)
    count = int(torch.randint(1, 80, (1,), generator=generator))
    where = torch.randint(0, heads, (count,), generator=generator), torch.randint(0, length, (count,), generator=generator)
    assert torch.equal(disk.gather(0, *where), ram.gather(0, *where))


STEPS = st.lists(
    st.tuples(st.sampled_from(["append", "append", "one", "cut", "fork", "reopen"]), st.integers(1, 150), st.floats(0, 1)),
    min_size=1,
    max_size=8,
)


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dim=st.sampled_from([32, 64, 80, 128, 256]), heads=st.integers(1, 4), dtype=st.sampled_from(DTYPES), steps=STEPS)
def test_disk_and_ram_tiers_hold_the_same_rows(tmp_path, dim, heads, dtype, steps):
    here, ram = DiskTier(tmp_path, temporary=False), RamTier(in_place=False)
    length = 0
    left: list[tuple[DiskTier, RamTier, int]] = []  # fork parents, which later steps must not change
    for number, (step, count, share) in enumerate(steps):
        if step in ("append", "one"):
            rows = random_rows(heads, 1 if step == "one" else count, dim, dtype, seed=number)
            here.write(0, length, *rows)
            ram.write(0, length, *rows)
            length += rows[0].shape[1]
        elif step == "cut":
            length = int(length * share)
            here.truncate(0, length)
        elif step == "fork":
            left.append((here, ram, length))
            here, ram = here.fork(), ram.fork()
        elif not here.temporary:
            saved = here.extents(), here.tails()
            here.close()
            here = DiskTier.open(tmp_path, *saved)
        agree(here, ram, heads, length, number)
    for one, other, tokens in [*left, (here, ram, length)]:
        agree(one, other, heads, tokens, 99)
        one.close()


def test_files_are_append_only_and_a_saved_state_stays_valid(tmp_path):
    tier = DiskTier(tmp_path, temporary=False)
    keys, values = fill(tier, 200)
    saved, before = (tier.extents(), tier.tails()), row_file(tier).read_bytes()
    tier.write(0, 70, *random_rows(2, 130, 32, torch.bfloat16, seed=9))  # other tokens, from the middle of a block on
    assert row_file(tier).read_bytes()[: len(before)] == before
    earlier = DiskTier.open(tmp_path, *saved)
    assert torch.equal(everything(earlier, 0, 2, 200), torch.cat([keys, values], dim=-1))
    tier.close()
    earlier.close()


def test_truncating_within_the_tail_reads_nothing_from_disk(tmp_path, monkeypatch):
    tier = DiskTier(tmp_path)
    fill(tier, 100)
    monkeypatch.setattr(row_reads, "read", None)
    tier.truncate(0, 64)
    tier.write(0, 64, *random_rows(2, 30, 32, torch.bfloat16))
    tier.close()


def test_a_tier_and_its_fork_write_to_different_files(tmp_path):
    tier = DiskTier(tmp_path, temporary=False)
    fill(tier, 130)
    shared = tier.extents()[0][0].segment
    other = tier.fork()
    for one, seed in ((tier, 1), (other, 2)):
        one.write(0, 130, *random_rows(2, 70, 32, torch.bfloat16, seed))
    mine, theirs = tier.extents()[0], other.extents()[0]
    assert mine[0] == theirs[0]
    assert mine[0].segment == shared
    assert len({shared, mine[1].segment, theirs[1].segment}) == 3
    tier.close()
    assert torch.equal(everything(other, 0, 2, 200)[:, 130:], torch.cat(random_rows(2, 70, 32, torch.bfloat16, 2), dim=-1))
    other.close()
    assert len(list(tmp_path.glob("*.rows"))) == 2  # the session's files stay, the temporary fork's are removed


def test_a_layers_last_rows_stay_in_memory_and_are_counted(tmp_path):
    tier = DiskTier(tmp_path)
    fill(tier, 64 + 10)
    block = -(-2 * 64 * (128 + 8) // 4096) * 4096
    assert tier.tail_bytes == 2 * 64 * 128  # room for a whole block
    assert tier.nbytes == block + tier.tail_bytes
    assert row_file(tier).stat().st_size == block
    tier.close()
    assert tier.nbytes == tier.tail_bytes == 0


def test_reading_a_long_range_takes_a_bounded_buffer(tmp_path, monkeypatch):
    monkeypatch.setattr(row_reads, "READ_BYTES", 100_000)
    monkeypatch.setattr(disk, "WRITE_BYTES", 100_000)
    tier = DiskTier(tmp_path)
    keys, values = fill(tier, 3_000)
    assert torch.equal(everything(tier, 0, 2, 3_000), torch.cat([keys, values], dim=-1))
    assert torch.equal(tier.gather(0, *pairs(2, torch.arange(3_000))), torch.cat([keys, values], dim=-1).flatten(0, 1))
    assert 0 < tier._files.reader().buffers.nbytes <= 131_072  # a buffer that was too small is freed
    tier.close()


def test_rows_outside_the_sequence_are_refused(tmp_path):
    tier = DiskTier(tmp_path)
    fill(tier, 100)
    for position in (-1, 100):
        with pytest.raises(IndexError):
            tier.gather(0, torch.tensor([0]), torch.tensor([position]))
    with pytest.raises(IndexError):
        tier.read(0, 50, 101)
    with pytest.raises(ValueError, match="hole"):
        tier.write(0, 101, *random_rows(2, 1, 32, torch.bfloat16))
    tier.close()
    with pytest.raises(SlowTierError, match="layer 0"):
        tier.read(0, 0, 1)


def test_files_are_private_and_gone_after_close(tmp_path):
    folder = tmp_path / "new" / "rows"
    tier = DiskTier(folder)
    fill(tier, 100)
    path = row_file(tier)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == stat.S_IMODE(folder.stat().st_mode) == 0o700
    tier.close()
    assert not list(folder.iterdir())
    fill(tier, 70)  # a tier may be used again
    assert torch.equal(everything(tier, 0, 2, 70)[:, :1, :32], fill(RamTier(False), 70)[0][:, :1])
    tier.close()
    assert not list(folder.iterdir())


def test_closing_leaves_no_thread_no_file_and_no_descriptor(tmp_path):
    fill(tier := DiskTier(tmp_path), 10)  # measures the file system once
    tier.close()
    with nothing_left(tmp_path):
        tier = DiskTier(tmp_path)
        fill(tier, 300)
        other = tier.fork()
        other.write(0, 300, *random_rows(2, 100, 32, torch.bfloat16))
        other.gather(0, *pairs(2, torch.arange(0, 400, 7)))
        tier.close()
        assert list(tmp_path.iterdir())  # the fork still needs them
        other.close()


def test_a_garbage_collected_tier_leaves_no_files_threads_or_descriptors(tmp_path):
    fill(tier := DiskTier(tmp_path), 10)
    tier.close()
    with nothing_left(tmp_path):
        before = threading.enumerate()
        tier = DiskTier(tmp_path)
        fill(tier, 300)
        tier.read(0, 0, 300)
        del tier
        gc.collect()
        for thread in threading.enumerate():  # nobody has waited for them
            if thread not in before:
                thread.join(60)


def script(folder: Any, end: str) -> subprocess.CompletedProcess[str]:
    code = f"""
        import os, signal, torch
        from specache.tiers.disk.disk_tier import DiskTier
        tier = DiskTier({str(folder)!r})
        tier.write(0, 0, torch.ones(2, 100, 32), torch.ones(2, 100, 32))
        {end}
    """
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)


def test_a_program_that_ends_without_closing_leaves_nothing(tmp_path):
    assert script(tmp_path, "pass").returncode == 0
    assert not list(tmp_path.iterdir())


def test_what_a_killed_program_left_is_removed_by_the_next(tmp_path):
    assert script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)").returncode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.rows"))) == 1
    tier = DiskTier(tmp_path)
    fill(tier, 100)
    assert list(tmp_path.rglob("*.rows")) == [row_file(tier)]
    second = DiskTier(tmp_path)  # and what is in use stays
    fill(second, 100)
    assert len(list(tmp_path.rglob("*.rows"))) == 2
    tier.close()
    second.close()


def test_a_second_sync_without_new_rows_syncs_no_file(tmp_path, monkeypatch):
    tier = DiskTier(tmp_path, temporary=False)
    fill(tier, 100)
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    tier.sync()
    tier.sync()
    assert len(synced) == 1
    tier.close()


# Whole generations


@pytest.mark.parametrize("policy", [*FETCHING, "none", "full"])
def test_ram_and_disk_give_the_same_tokens(model, tmp_path, policy):
    ram = run(model, prompt(230), settings(policy=policy, slow_tier="ram"))
    disk = run(model, prompt(230), settings(policy=policy, slow_tier=f"disk:{tmp_path}"))
    assert disk[0] == ram[0]
    assert torch.equal(disk[1], ram[1])
    assert (disk[2]["slow_bytes"] > 0) == (policy != "full")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hot_set", [0.0, 1.0])
def test_a_left_padded_batch_with_equal_prompts_on_disk_equals_ram(model, tmp_path, hot_set):
    ids = torch.cat([prompt(150, 1), prompt(150, 1), prompt(150, 2)])
    mask = torch.ones_like(ids)
    mask[2, :60] = 0
    answers = [
        specache.generate(
            model,
            ids,
            attention_mask=mask,
            config=settings(policy="verified", slow_tier=tier, hot_set=hot_set, residual=0),
            max_new_tokens=40,
            do_sample=False,
        )
        for tier in ("ram", f"disk:{tmp_path}")
    ]
    assert torch.equal(*answers)
    assert not list(tmp_path.iterdir())


def test_a_cache_on_disk_is_continued_cut_and_forked(model, tmp_path):
    expected, got = [], []
    for tier, answers in (("ram", expected), (f"disk:{tmp_path}", got)):
        with specache.SpeCache(model, settings(slow_tier=tier)) as cache:
            for ids in (prompt(150), torch.cat([prompt(150)[:, :90], prompt(100, 5)], dim=1)):
                answers.append(specache.generate(model, ids, past_key_values=cache, max_new_tokens=20, do_sample=False).tolist())
            with cache.fork(bits=4) as fork:
                ids = torch.tensor(answers[-1])
                answers.append(specache.generate(model, ids, past_key_values=fork, max_new_tokens=20, do_sample=False).tolist())
    assert got == expected


# Settings


def test_slow_tier_disk_folder_sets_slow_dir():
    config = specache.SpeCacheConfig(slow_tier="disk:/some/where")
    assert (config.slow_tier, config.slow_dir) == (specache.SlowTierKind.DISK, "/some/where")
    assert specache.SpeCacheConfig(slow_tier="disk", slow_dir="/some/where") == config
    assert specache.SpeCacheConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert config.resolved("cpu").policy is specache.Policy.VERIFIED
    assert config.resolved("cpu").slow_dir == "/some/where"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slow_tier": "disk"}, "disk:FOLDER"),
        ({"slow_tier": "disk:"}, "disk:FOLDER"),
        ({"slow_tier": "ram:/x"}, "takes no folder"),
        ({"slow_tier": "ram", "slow_dir": "/x"}, "takes no folder"),
        ({"slow_tier": "disk:/x", "slow_dir": "/y"}, "two folders"),
        ({"slow_tier": "tape:/x"}, "must be one of auto, ram-inplace, ram, disk"),
    ],
)
def test_a_contradicting_slow_tier_folder_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        specache.SpeCacheConfig(**arguments)


def test_rows_are_taken_in_any_memory_layout(tmp_path):
    tier = DiskTier(tmp_path)
    keys, values = random_rows(2, 150, 32, torch.bfloat16)
    odd = [rows.permute(2, 1, 0).contiguous().permute(2, 1, 0) for rows in (keys, values)]  # no dimension is contiguous
    for start, stop in ((0, 128), (128, 129), (129, 150)):
        tier.write(0, start, odd[0][:, start:stop], odd[1][:, start:stop])
    assert torch.equal(everything(tier, 0, 2, 150), torch.cat([keys, values], dim=-1))
    tier.close()
