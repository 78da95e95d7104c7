"""The choice of `--slow-tier auto` is reported in one line and in JSON, and in `plan` and
`doctor`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specache.engine import auto_tier
from specache.planning import working_set
from specache.platform import machine
from specache.tiers.disk import rows_folder
from specache.tiers.disk.rows_folder import FolderFacts
from tests.cli.running import one_line, run, run_json

PROMPT = "What is it? " * 30


@pytest.fixture
def tiny(tiny_folder: Path) -> tuple[str, ...]:
    return ("-m", str(tiny_folder), "--dtype", "float32", "--group-size", "16", "--residual", "16", "--top-k", "8")


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make memory too small for the rows; a disk's buffers, larger than everything a tiny model
    needs, are ignored.
    """
    monkeypatch.setenv("SPECACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "available_memory", lambda: 100_000)
    monkeypatch.setattr(machine, "free_swap", lambda: 1 << 40)
    monkeypatch.setattr(machine, "mapped_bytes", lambda blocks: 0)
    monkeypatch.setattr(working_set, "READ_BYTES", 4096)
    monkeypatch.setattr(rows_folder, "DISK_RESERVE", 0)


@pytest.fixture
def much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 40)


def generate(*arguments: str | Path, **more):
    return run("generate", "-n", "4", "--threads", "1", "--prompt", PROMPT, *arguments, **more)


def test_with_too_little_memory_generate_goes_to_disk_and_says_so_in_one_line(tiny, little_memory, tmp_path):
    result = generate(*tiny)
    said = [line for line in result.stderr.splitlines() if line.startswith("slow tier auto")]
    assert len(said) == 1 and "100.0 kB are free" in said[0] and str(tmp_path / "cache" / "rows") in said[0]
    assert "on disk" in one_line(result.stderr.replace(said[0], ""))  # in the statistics
    assert not list(tmp_path.rglob("*.rows"))


def test_with_room_generate_says_nothing_of_tiers_and_answers_the_same(tiny, much_memory, little_memory, monkeypatch):
    on_disk = generate(*tiny)
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 40)
    in_memory = generate(*tiny)
    assert "slow tier auto" not in in_memory.stderr and in_memory.stdout == on_disk.stdout


def test_json_has_the_tier_the_bytes_and_the_reason(tiny, little_memory):
    document = json.loads(generate(*tiny, "--json").stdout)
    assert document["config"]["slow_tier"] == document["stats"]["slow_tier"] == "disk"
    choice = document["stats"]["slow_tier_choice"]
    assert choice["slow_tier"] == "disk" and choice["free_bytes"] == 100_000 < choice["needed_bytes"]
    assert choice["disk_bytes"] > 0 and choice["disk_free_bytes"] > 0 and "are free" in choice["reason"]


@pytest.mark.parametrize("tier", ["ram", "ram-inplace"])
def test_an_explicit_tier_is_used_without_a_note(tiny, little_memory, tier):
    document = generate(*tiny, "--slow-tier", tier, "--json")
    assert "slow tier auto" not in document.stderr
    stats = json.loads(document.stdout)["stats"]
    assert stats["slow_tier"] == tier and stats["slow_tier_choice"] is None


def test_a_session_stays_in_its_folder_without_a_note(tiny, little_memory):
    result = generate(*tiny, "--session", "mine")
    assert "slow tier auto" not in result.stderr


def test_chat_says_once_that_a_conversation_goes_to_disk(tiny, little_memory):
    result = run("chat", *tiny, "-n", "4", stdin=f"{PROMPT}\nand more\n/stats\n")
    assert result.stderr.count("slow tier auto") == 1 and "slow tier disk" in one_line(result.stderr)


def test_where_no_disk_has_room_the_error_says_what_to_do(tiny, little_memory, monkeypatch, tmp_path):
    monkeypatch.setattr(rows_folder, "folder_facts", lambda folder: FolderFacts(folder, tmp_path, "tmpfs", 1 << 40))
    said = one_line(generate(*tiny, code=1).stderr)
    assert "is on tmpfs, in memory itself" in said and "SPECACHE_CACHE" in said and "--slow-tier disk:FOLDER" in said


def test_plan_says_what_auto_would_take_here(tiny_folder, much_memory, little_memory, monkeypatch):
    arguments = ("plan", "-m", tiny_folder, "--context", "400", "--group-size", "16", "--residual", "16", "--top-k", "8")
    chosen = json.loads(run(*arguments, "--json", "-").stdout)["auto_tier"]
    assert chosen["slow_tier"] == "disk" and chosen["needed_bytes"] > chosen["free_bytes"] == 100_000
    assert "--slow-tier auto here, now: 16-bit pairs on disk" in one_line(run(*arguments).stdout)
    assert json.loads(run(*arguments, "--slow-tier", "ram", "--json", "-").stdout)["auto_tier"] is None
    monkeypatch.setattr(machine, "available_memory", lambda: 1 << 40)
    assert json.loads(run(*arguments, "--json", "-").stdout)["auto_tier"]["slow_tier"] == "ram-inplace"


def test_a_plan_promises_no_disk_where_generate_would_refuse(tiny_folder, little_memory, monkeypatch):
    monkeypatch.setattr(machine, "free_swap", lambda: 0)
    arguments = ("plan", "-m", tiny_folder, "--context", "400", "--group-size", "16", "--residual", "16", "--top-k", "8")
    assert "Even with the 16-bit pairs on disk" in json.loads(run(*arguments, "--json", "-").stdout)["auto_tier"]["error"]
    said = one_line(run(*arguments).stdout)
    assert "--slow-tier auto here, now: Even with the 16-bit pairs on disk this needs" in said and "100,000 are free" in said


def test_a_plan_for_another_machine_says_nothing_of_this_one(little_memory):
    arguments = ("plan", "--shape", "smollm2-135m", "--dtype", "float16", "--context", "4096", "--gpu", "a6000")
    assert json.loads(run(*arguments, "--json", "-").stdout)["auto_tier"] is None


def test_doctor_shows_the_facts_that_auto_decides_by(little_memory, monkeypatch, tmp_path):
    facts = run_json("doctor")["auto_tier"]
    assert facts["in_memory_up_to_bytes"] == 0 and facts["else_on_disk_in"] == str(tmp_path / "cache" / "rows")
    assert facts["free_bytes"] > 0 and facts["missing"] is None
    assert not (tmp_path / "cache" / "rows").exists()
    free = 1 << 34
    monkeypatch.setattr(machine, "available_memory", lambda: free)
    most = run_json("doctor")["auto_tier"]["in_memory_up_to_bytes"]
    assert free - 4096 < auto_tier.with_margin(most) <= free


def test_doctor_warns_where_auto_could_not_go_to_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(rows_folder, "folder_facts", lambda folder: FolderFacts(folder, tmp_path, "tmpfs", 1 << 40))
    problems = run_json("doctor")["problems"]
    assert any("--slow-tier auto" in problem["what"] and "tmpfs" in problem["advice"] for problem in problems)
