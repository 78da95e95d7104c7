"""`specache generate --session` and `specache session`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from specache.config import SpeCacheConfig
from specache.errors import SessionError
from specache.sessions import Session
from tests.cli.running import one_line, run, run_json

DOCUMENT = "The report says that it rained on Monday. " * 9
SUMMARY_KEYS = {
    "name",
    "folder",
    "tokens",
    "bytes",
    "created",
    "saved",
    "finish_reason",
    "messages",
    "model",
    "dtype",
    "config",
    "decode_steps",
    "compiled_steps",
    "problem",
}


@pytest.fixture
def tiny(tiny_folder: Path) -> tuple[str, ...]:
    return ("generate", "-m", str(tiny_folder), "-n", "12", "--dtype", "float32", "--threads", "1", "--raw")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the default folder of sessions."""
    monkeypatch.setenv("SPECACHE_CACHE", str(tmp_path))
    return tmp_path / "sessions"


def test_the_document_has_more_low_bit_pairs_than_are_fetched():
    """Otherwise a session would be continued without its low-bit copy."""
    assert SpeCacheConfig().low_bit_length(len(DOCUMENT)) > SpeCacheConfig().top_k


def test_the_next_question_reads_only_the_question(tiny, root):
    first = run_json(*tiny, "--prompt", f"{DOCUMENT}Why?", "--session", "report")
    tokens = len(f"{DOCUMENT}Why?") + first["results"][0]["new_tokens"] - 1
    assert first["session"] == {"name": "report", "folder": str(root / "report"), "reused_tokens": 0, "tokens": tokens}
    second = run_json(*tiny, "--prompt", f"{DOCUMENT}Who?", "--session", "report")
    assert second["session"]["reused_tokens"] == len(f"{DOCUMENT}Wh")
    alone = run_json(*tiny, "--prompt", f"{DOCUMENT}Who?", "--slow-tier", "ram")
    assert second["results"] == alone["results"]
    assert "session" not in alone


def test_the_summary_reports_reused_tokens(tiny, root):
    run(*tiny, "--prompt", DOCUMENT, "--session", "report")
    result = run(*tiny, "--prompt", DOCUMENT, "--session", "report")
    text = one_line(result.stderr)
    assert f"session report: {len(DOCUMENT) - 1} prompt tokens were there already" in text
    assert "on disk" in text and "slow memory" not in text


def test_another_text_replaces_that_of_a_session_and_says_so(tiny, root):
    run(*tiny, "--prompt", DOCUMENT, "--session", "report")
    other = f"# {DOCUMENT[:40]}"
    result = run(*tiny, "--prompt", other, "--session", "report")
    assert "tokens begin this prompt, the rest is read again: the prompt is another one" in one_line(result.stderr)
    assert result.stdout == run(*tiny, "--prompt", other).stdout


def test_list_show_fork_and_rm_manage_sessions(tiny, root):
    assert "no sessions" in run("session", "list").stderr
    assert run_json("session", "list") == {"sessions": []}
    run(*tiny, "--prompt", DOCUMENT, "--session", "one", "--bits", "1")
    run("session", "fork", "one", "two")
    listed = run_json("session", "list")["sessions"]
    assert [entry["name"] for entry in listed] == ["one", "two"]
    assert set(listed[0]) == SUMMARY_KEYS
    shown = run_json("session", "show", "two")
    assert (shown["tokens"], shown["config"]["bits"], shown["finish_reason"]) == (len(DOCUMENT) + 11, 1, "length")
    assert "two" in run("session", "list").stdout
    assert "LlamaForCausalLM, float32" in run("session", "show", "two").stdout
    run("session", "rm", "one")
    assert [entry["name"] for entry in run_json("session", "list")["sessions"]] == ["two"]
    assert run_json(*tiny, "--prompt", DOCUMENT, "--session", "two")["session"]["reused_tokens"] == len(DOCUMENT) - 1
    run("session", "rm", "two")
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("arguments", [("export", "mine", "-"), ("import", "-", "mine")])
def test_an_export_is_no_stream(root, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    assert "must be a file, not '-'" in one_line(run("session", *arguments, code=2).stderr)
    assert not (tmp_path / "-").exists()


def test_an_exported_session_can_be_imported(tiny, root, tmp_path):
    run(*tiny, "--prompt", DOCUMENT, "--session", "one")
    run("session", "export", "one", tmp_path / "one.tar")
    run("session", "import", tmp_path / "one.tar", "copy", "--session-dir", tmp_path / "elsewhere")
    document = run_json(*tiny, "--prompt", DOCUMENT, "--session", "copy", "--session-dir", tmp_path / "elsewhere")
    assert document["session"]["reused_tokens"] == len(DOCUMENT) - 1
    assert "there already" in one_line(run("session", "export", "one", tmp_path / "one.tar", code=1).stderr)


def test_a_session_keeps_its_settings_unless_others_are_typed(tiny, root):
    run(*tiny, "--prompt", DOCUMENT, "--session", "one", "--bits", "1", "--top-k", "5", "--group-size", "32")
    config = run_json(*tiny, "--prompt", DOCUMENT, "--session", "one")["config"]
    assert (config["bits"], config["top_k"], config["group_size"], config["slow_tier"]) == (1, 5, 32, "disk")
    assert run_json(*tiny, "--prompt", DOCUMENT, "--session", "one", "--top-k", "9")["config"]["top_k"] == 9
    error = one_line(run(*tiny, "--prompt", DOCUMENT, "--session", "one", "--bits", "2", code=1).stderr)
    assert "made with bits 1 and is opened with bits 2" in error
    assert "--bits 1" in error


def test_the_slow_tiers_folder_holds_its_sessions(tiny, root, tmp_path):
    run(*tiny, "--prompt", DOCUMENT, "--session", "one", "--slow-tier", f"disk:{tmp_path / 'rows'}")
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["one"]
    assert list((tmp_path / "rows" / "one").glob("*.rows"))
    assert run_json("session", "list", "--session-dir", tmp_path / "rows")["sessions"][0]["name"] == "one"


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--session", "../x"], "cannot name a session", 2),
        (["--session", "a/b"], "cannot name a session", 2),
        (["--session-dir", "x"], "--session-dir needs --session", 2),
        (["--session", "a", "--slow-tier", "ram"], "not for sessions", 2),
        (["--session", "a", "--policy", "full"], "not for sessions", 2),
        (["--session", "a", "--slow-tier", "disk:x", "--session-dir", "y"], "name two folders", 2),
    ],
)
def test_contradicting_options_are_refused(tiny, root, arguments, message, code):
    assert message in one_line(run(*tiny, "--prompt", "hello", *arguments, code=code).stderr)
    assert not root.exists() or list(root.iterdir()) == []


def test_a_batch_is_refused(tiny, root, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    files = ("--prompt-file", tmp_path / "a.txt") * 2
    assert "2 prompts" in one_line(run(*tiny, *files, "--session", "a", code=2).stderr)


@pytest.mark.parametrize("command", [("show", "x"), ("fork", "x", "y"), ("rm", "x"), ("export", "x", "y.tar")])
def test_a_missing_session_is_an_error_of_every_command(root, command):
    assert "no session 'x'" in one_line(run("session", *command, code=1).stderr)


def test_another_model_is_refused(tiny, root, tmp_path):
    from tests.cli.tiny_chat import byte_tokenizer
    from tests.tiny import llama

    run(*tiny, "--prompt", DOCUMENT, "--session", "one")
    other = llama(seed=5, vocab_size=len(byte_tokenizer()), max_position_embeddings=512)
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    command = ["generate", "-m", tmp_path / "other", "--dtype", "float32", "--prompt", DOCUMENT, "--session", "one"]
    assert "belongs to a LlamaForCausalLM" in one_line(run(*command, code=1).stderr)


def test_ctrl_c_keeps_the_partial_answer_in_the_session(tiny, root, monkeypatch):
    from specache.cli.streaming import AnswerRecorder

    put = AnswerRecorder.put

    def interrupt_after_three(self: AnswerRecorder, value: Any) -> None:
        put(self, value)
        if self.token_ids and len(self.token_ids[0]) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(AnswerRecorder, "put", interrupt_after_three)
    run(*tiny, "--prompt", DOCUMENT, "--session", "one", code=130)
    shown = run_json("session", "show", "one")
    assert shown["tokens"] == len(DOCUMENT) + 2 and shown["finish_reason"] == "interrupted"


def test_a_save_that_fails_is_reported(tiny, root, monkeypatch):
    def fail(session: Session) -> None:
        raise SessionError("no room")

    monkeypatch.setattr(Session, "save", fail)
    assert "no room" in one_line(run(*tiny, "--prompt", DOCUMENT, "--session", "one", code=1).stderr)


def test_a_killed_program_loses_at_most_its_answer(tiny, root):
    """A process killed with -9 while it answers; the next one does not read the prompt again."""
    command = [sys.executable, "-m", "specache.cli.main", *tiny, "--prompt", DOCUMENT, "--session", "one", "-n", "200"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    manifest = root / "one" / "session.json"
    deadline = time.monotonic() + 300
    while not manifest.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads(manifest.read_text())["body"]["tokens"] >= len(DOCUMENT)
    document: dict[str, Any] = run_json(*tiny, "--prompt", DOCUMENT, "--session", "one")
    assert document["session"]["reused_tokens"] == len(DOCUMENT) - 1
    assert document["results"] == run_json(*tiny, "--prompt", DOCUMENT, "--slow-tier", "ram")["results"]


def test_missing_sessions_and_files_are_reported(tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder")
    refused = run("session", "list", "--session-dir", str(file), code=1)
    assert "Not a directory" in refused.stderr and "Traceback" not in refused.stderr
    missing = run("session", "import", str(tmp_path / "none.tar"), "new", "--session-dir", str(tmp_path / "root"), code=1)
    assert "There is no file" in missing.stderr and "start again" not in missing.stderr


def test_one_session_that_is_not_there_keeps_no_other_from_being_removed(tiny, root):
    """`rm one nope two` removed `one`, said that there is no `nope`, and left `two`."""
    for name in ("one", "two", "three"):
        run(*tiny, "--prompt", "hello", "--session", name)
    refused = run("session", "rm", "one", "nope", "../three", "two", "one", code=2)
    assert "'nope'" in refused.stderr and "'../three'" in refused.stderr and "'one'" not in refused.stderr
    assert [one["name"] for one in run_json("session", "list")["sessions"]] == ["three"]


# Repair


def damage(root: Path, pattern: str) -> None:
    path = next((root / "one").glob(pattern))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 8
    path.write_bytes(data)


def test_a_damaged_session_is_repaired_and_continues(tiny, root):
    model = tiny[2]
    first = run_json(*tiny, "--prompt", DOCUMENT, "--session", "one")
    assert "nothing is damaged" in run("session", "repair", "one").stdout
    for pattern in ("*.rows", "tail-*", "pages-*", "session.json"):
        damage(root, pattern)
        broken = run_json("session", "repair", "one", "--check", code=1)
        assert broken["damages"] and not broken["mended"]
        report = run_json("session", "repair", "one", "-m", model, "--dtype", "float32", "--threads", "1")
        assert report["mended"] and report["needs_model"] == (pattern != "session.json")
        assert run_json("session", "repair", "one", "--check")["damages"] == []
        again = run_json(*tiny, "--prompt", DOCUMENT, "--session", "one")
        assert (again["results"], again["session"]["reused_tokens"]) == (first["results"], len(DOCUMENT) - 1)


def test_a_repair_says_what_it_did_and_what_it_needs(tiny, root):
    run(*tiny, "--prompt", DOCUMENT, "--session", "one")
    damage(root, "tail-*")
    error = one_line(run(*tiny, "--prompt", DOCUMENT, "--session", "one", code=1).stderr)
    assert "specache session repair" in error
    assert "with the model: -m MODEL" in one_line(run("session", "repair", "one", "--check", code=1).stdout)
    assert "name it (-m MODEL)" in one_line(run("session", "repair", "one", code=1).stderr)
    said = one_line(run("session", "repair", "one", "-m", tiny[2], "--dtype", "float32").stdout)
    assert "tail-" in said and "one is mended" in said and "were read again" in said
    damage(root, "tail-*")
    damage(root, "tokens-*")
    assert "cannot be mended" in one_line(run("session", "repair", "one", "-m", tiny[2], code=1).stderr)
    assert "no session 'two'" in one_line(run("session", "repair", "two", code=1).stderr)
