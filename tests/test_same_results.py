"""The recorder of a refactoring: the same code gives the same results, and whatever differs is
said."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import same_results
from benchmarks.same_results import Recording, app, difference, every_case, report

CASE = "session llama-kivi-1"


def recording(dtype: torch.dtype = torch.float32) -> Recording:
    """One run of two sequences, three tokens each behind prompts of four."""
    made = Recording(surroundings={"torch": "1"})
    tokens = torch.arange(14).view(2, 7)
    logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))
    made.add("a / b", dtype, tokens, logits, {"rows_ready": 3, "waits": 1, "read_s": 0.5, "guess_rate": 0.25, "slow_tier": "ram"})
    return made


def said(before: Recording, after: Recording, with_counts: bool = False) -> tuple[bool, str]:
    """Whether all is the same, and what is printed."""
    out = io.StringIO()
    return report(before, after, with_counts, Console(file=out, width=200)), out.getvalue()


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def _settings_of_this_process_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_results, "prepare", lambda: None)


def test_every_case_has_a_name_of_its_own():
    names = [case.name for case in every_case(smollm2=True, compiled=True)]
    assert len(names) == len(set(names))


def test_a_recording_is_read_as_it_was_written(tmp_path):
    recording().save(tmp_path / "file.safetensors")
    read = Recording.load(tmp_path / "file.safetensors")
    assert read.counts == {"a / b": {"rows_ready": 3, "guess_rate": 0.25}}
    assert said(recording(), read) == (True, said(recording(), recording())[1])


@pytest.mark.parametrize(
    ("change", "same"), [(0.0, True), (1e-6, True), (1e-4, False), (float("nan"), False), (float("inf"), False)]
)
def test_logits_may_differ_by_their_tolerance(change, same):
    after = recording()
    after.tensors["a / b/logits"][1, 2] *= 1 + change
    assert said(recording(), after)[0] is same


def test_a_coarser_dtype_has_a_wider_tolerance():
    before, after = recording(torch.bfloat16), recording(torch.bfloat16)
    after.tensors["a / b/logits"] *= 1 + 2**-8
    assert said(before, after)[0]


def test_another_token_is_another_result_and_logits_behind_it_do_not_count():
    after = recording()
    after.tensors["a / b/tokens"][1, 5] = 0
    after.tensors["a / b/logits"][:, 2] = 0
    found = difference(recording(), after, "a / b")
    assert (found.token, found.logits, found.matters) == (5, 0.0, True)


@pytest.mark.parametrize("shape", [(2, 6), (2, 9), (3, 7)])
def test_other_numbers_of_tokens_are_another_result(shape):
    after = recording()
    after.tensors["a / b/tokens"] = torch.arange(shape[0] * shape[1]).view(shape)
    assert difference(recording(), after, "a / b").matters


def test_counts_decide_only_where_they_are_asked_to():
    after = recording()
    after.counts["a / b"]["rows_ready"] = 4
    same, printed = said(recording(), after)
    assert same and "rows_ready 3 -> 4" in printed
    assert not said(recording(), after, with_counts=True)[0]


def test_what_is_missing_new_or_failed_is_said():
    before, after = recording(), recording()
    before.add("gone", torch.float32, torch.zeros(1, 2))
    after.add("came", torch.float32, torch.zeros(1, 2))
    after.surroundings = {"torch": "2"}
    same, printed = said(before, after)
    assert not same
    assert "not run again (1):\n  gone" in printed and "New, not in the recording (1):\n  came" in printed
    assert "torch was 1, is 2" in printed
    after = recording()
    assert said(recording(), after)[0]
    after.failed["c"] = "SessionError: why"
    assert not said(recording(), after)[0] and "c: SessionError: why" in said(recording(), after)[1]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recording of one session, and the folder where the session lies."""
    root = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(same_results, "prepare", lambda: None)
        done = invoke("record", root / "file.safetensors", "--sessions", root / "sessions", "--only", CASE)
    assert done.exit_code == 0, done.output
    return root / "file.safetensors", root / "sessions"


def test_the_same_code_gives_the_same_results_and_leaves_the_sessions_as_they_are(recorded):
    file, sessions = recorded
    before = {path: path.read_bytes() for path in sessions.rglob("*") if path.is_file()}
    done = invoke("compare", file, "--sessions", sessions, "--counts")
    assert done.exit_code == 0, done.output
    assert "11 runs compared: everything is the same" in done.output
    assert before == {path: path.read_bytes() for path in sessions.rglob("*") if path.is_file()}
    assert invoke("record", file, "--sessions", sessions, "--only", CASE).exit_code == 2  # not empty


def test_a_recording_that_differs_or_a_session_that_cannot_be_opened_is_an_error(recorded, tmp_path):
    file, sessions = recorded
    perturbed = copy.deepcopy(Recording.load(file))
    perturbed.tensors[f"{CASE}, from before / goes on/logits"][0, 1, 3] += 1e-2
    perturbed.save(tmp_path / "perturbed.safetensors")
    done = invoke("compare", tmp_path / "perturbed.safetensors", "--sessions", sessions)
    assert done.exit_code == 1 and f"differ (1):\n  {CASE}, from before / goes on" in done.output
    done = invoke("compare", file, "--sessions", tmp_path)
    assert done.exit_code == 1 and f"{CASE}, from before: FileNotFoundError" in done.output
