"""`specache chat --session`: a conversation that goes on after a restart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.control import strip_control_codes

from specache import sessions
from specache.errors import SessionError
from specache.sessions import Session
from tests.cli.running import one_line, run, run_json

LOW_BIT = ("--residual", "64")  # so that a short conversation has low-bit pairs
FIRST, SECOND, THIRD = " ".join(["first"] * 30), "second", "third"


@pytest.fixture
def chat(tiny_folder: Path) -> tuple[str, ...]:
    return ("chat", "-m", str(tiny_folder), "-n", "8", "--dtype", "float32", "--threads", "1", "--top-k", "512", *LOW_BIT)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the default folder of sessions."""
    monkeypatch.setenv("SPECACHE_CACHE", str(tmp_path))
    return tmp_path / "sessions"


def reused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Record per later turn: (tokens already cached, tokens of the conversation)."""
    from specache.cli import conversation

    seen, real = [], conversation.answer

    def noted(loaded: Any, prompts: list[list[int]], *arguments: Any, **more: Any) -> Any:
        outcome = real(loaded, prompts, *arguments, **more)
        seen.append((outcome.reused_tokens, len(prompts[0])))
        return outcome

    monkeypatch.setattr(conversation, "answer", noted)
    return seen


def test_a_conversation_with_restarts_equals_one_without(chat, monkeypatch):
    whole = run(*chat, "--system", "be brief", stdin=f"{FIRST}\n{SECOND}\n{THIRD}\n").stdout
    turns = reused(monkeypatch)
    parts = [run(*chat, "--session", "talk", "--system", "be brief", stdin=f"{FIRST}\n").stdout]
    parts += [run(*chat, "--session", "talk", stdin=f"{message}\n").stdout for message in (SECOND, THIRD)]
    assert "".join(parts) == whole
    for there, total in turns[1:]:
        assert total - there < 40  # the new message and the template around it


def test_earlier_messages_are_shown_and_stored(chat, root):
    answer = run(*chat, "--session", "talk", stdin=f"{SECOND}\n").stdout.removesuffix("\n")
    again = run(*chat, "--session", "talk", stdin="/exit\n")
    assert f"> {SECOND}\n{strip_control_codes(answer)}\n" in again.stderr and again.stdout == ""
    assert sessions.show("talk").messages == 2
    assert "2 messages" in run("session", "show", "talk").stdout
    for _ in range(4):
        run(*chat, "--session", "talk", stdin=f"{'x' * 30}\n")
    last = one_line(run(*chat, "--session", "talk", stdin="").stderr)
    assert "[4 earlier messages]" in last and "xxx" in last and SECOND not in last


def test_a_long_message_is_shown_by_its_beginning(chat):
    run(*chat, "--session", "talk", stdin="a" * 401 + "\n")
    shown = one_line(run(*chat, "--session", "talk", stdin="").stderr)
    assert "[and 1 characters]" in shown


def test_a_fork_and_an_import_have_the_conversation(chat, tmp_path):
    run(*chat, "--session", "talk", stdin=f"{FIRST}\n")
    run("session", "fork", "talk", "fork")
    run("session", "export", "talk", tmp_path / "talk.tar")
    run("session", "import", tmp_path / "talk.tar", "copy")
    answers = {run(*chat, "--session", name, stdin=f"{SECOND}\n").stdout for name in ("talk", "fork", "copy")}
    assert len(answers) == 1
    assert {sessions.show(name).messages for name in ("talk", "fork", "copy")} == {4}


def test_what_generate_answered_is_the_beginning_of_a_conversation(chat, monkeypatch):
    generate = ("generate", *chat[1:], "--prompt", FIRST, "--session", "talk")
    first = run(*generate).stdout
    turns = reused(monkeypatch)
    second = run(*chat, "--session", "talk", stdin=f"{SECOND}\n").stdout
    assert first + second == run(*chat, stdin=f"{FIRST}\n{SECOND}\n").stdout
    assert turns[0][1] - turns[0][0] < 40


def test_a_session_of_raw_text_cannot_be_chatted_with(chat):
    generate = ("generate", *chat[1:], "--session", "talk", "--raw")
    run(*generate, "--prompt", FIRST)
    assert "holds a text and no conversation" in one_line(run(*chat, "--session", "talk", stdin="hello\n", code=2).stderr)
    assert run_json(*generate, "--prompt", FIRST)["session"]["reused_tokens"] == len(FIRST) - 1


def test_a_conversation_keeps_its_system_message(chat):
    run(*chat, "--session", "talk", "--system", "be brief", stdin=f"{SECOND}\n")
    run(*chat, "--session", "talk", "--system", "be brief", stdin=f"{SECOND}\n")
    refused = run(*chat, "--session", "talk", "--system", "be long", stdin=f"{SECOND}\n", code=2)
    assert "another system message" in one_line(refused.stderr)
    assert sessions.show("talk").messages == 5


def test_reset_starts_over_also_for_the_next_time(chat):
    fresh = run(*chat, "--system", "be brief", stdin=f"{SECOND}\n").stdout
    run(*chat, "--session", "talk", "--system", "be brief", stdin=f"{FIRST}\n/reset\n")
    shown = sessions.show("talk")
    assert (shown.tokens, shown.messages) == (0, 1)
    assert run(*chat, "--session", "talk", stdin=f"{SECOND}\n").stdout == fresh


def test_a_killed_program_loses_at_most_its_answer(chat, root, tmp_path, monkeypatch):
    """A process killed with -9 at the first new text: the message is restored, and its tokens are
    not read again.
    """
    program = """
import os, signal, sys
from specache.cli import chat
from specache.cli.main import app
if sys.argv[1] == "kill":
    chat.write = lambda text: os.kill(os.getpid(), signal.SIGKILL)
app(sys.argv[2:])
"""
    run(*chat, "--session", "talk", stdin=f"{SECOND}\n")
    command = [sys.executable, "-c", program, "kill", *chat, "--session", "talk"]
    killed = subprocess.run(command, input=f"{FIRST}\n", text=True, capture_output=True, env={**os.environ}, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    turns = reused(monkeypatch)
    again = run(*chat, "--session", "talk", stdin=f"{FIRST}\n")
    assert "Not answered: first first" in one_line(again.stderr)
    assert turns[0][0] == turns[0][1] - 1
    assert again.stdout == run(*chat, stdin=f"{SECOND}\n{FIRST}\n").stdout.partition("\n")[2]
    assert sessions.show("talk").messages == 4


def test_a_save_that_fails_is_reported_and_tried_again(chat, monkeypatch):
    save, calls = Session.save, []

    def fail_once_after_an_answer(session: Session) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise SessionError("no room")
        save(session)

    expected = run(*chat, stdin=f"{FIRST}\n{SECOND}\n").stdout
    monkeypatch.setattr(Session, "save", fail_once_after_an_answer)
    result = run(*chat, "--session", "talk", stdin=f"{FIRST}\n{SECOND}\n")
    assert "no room" in one_line(result.stderr)
    assert result.stdout.split() == expected.split()
    assert sessions.show("talk").messages == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--session", "a/b"], "cannot name a session"),
        (["--session-dir", "x"], "--session-dir needs --session"),
        (["--session", "a", "--policy", "full"], "not for sessions"),
    ],
)
def test_contradicting_options_are_refused(chat, arguments, message):
    assert message in one_line(run(*chat, *arguments, stdin="hello\n", code=2).stderr)


def test_a_session_keeps_its_settings(chat, tmp_path):
    run(*chat, "--session", "talk", "--session-dir", tmp_path / "here", "--bits", "1", stdin=f"{SECOND}\n")
    again = run(*chat, "--session", "talk", "--slow-tier", f"disk:{tmp_path / 'here'}", stdin="/stats\n")
    assert "1-bit" in again.stderr
    assert sessions.show("talk", tmp_path / "here").config["bits"] == 1  # type: ignore[index]
