"""Input of `specache chat`: quotes, files, commands, a full conversation, and Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from specache import sessions
from specache.cli import conversation as conversation_module
from specache.cli.chat_input import file_and_message
from specache.cli.console import PrefillProgress, interrupts_deferred
from specache.cli.prompts import PromptError
from specache.sessions import Session
from tests.cli.running import one_line, run
from tests.cli.tiny_chat import POSITIONS


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the default folder of sessions."""
    monkeypatch.setenv("SPECACHE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sessions"


@pytest.fixture
def chat(tiny_folder: Path) -> tuple[str, ...]:
    return ("chat", "-m", str(tiny_folder), "-n", "4", "--dtype", "float32")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """Return the conversations that the model was asked to continue."""
    seen: list[list[dict[str, str]]] = []
    real = conversation_module.Conversation.say

    def noted(self: Any, text: str, *arguments: Any, **more: Any) -> Any:
        seen.append([*self.messages, {"role": "user", "content": text}])
        return real(self, text, *arguments, **more)

    monkeypatch.setattr(conversation_module.Conversation, "say", noted)
    return seen


def messages(asked: list[list[dict[str, str]]]) -> list[str]:
    return [one[-1]["content"] for one in asked]


def test_quotes_make_lines_one_message(chat, asked):
    run(*chat, stdin='"""first\n\n  second\n/exit"""\n"""one line"""\n"""\nalone\n"""\nplain\n')
    assert messages(asked) == ["first\n\n  second\n/exit", "one line", "alone", "plain"]


def test_quotes_that_do_not_end_send_nothing(chat, asked):
    said = one_line(run(*chat, stdin='"""begun\nand never ended\n').stderr)
    assert not asked and 'error: the message that began with """ is not ended' in said


def test_a_file_goes_in_front_of_a_message(chat, asked, tmp_path):
    (tmp_path / "a file.txt").write_bytes(b"\xef\xbb\xbfits text\r\n/exit\r\n")
    file = tmp_path / "a file.txt"
    run(*chat, stdin=f"/file {file}\nwhat is it?\n/file '{file}' and now?\n/file {file}\n\n/file {file}\n")
    text = "its text\n/exit"
    assert messages(asked) == [f"{text}\n\nwhat is it?", f"{text}\n\nand now?", text, text]


def test_a_file_that_is_no_text_is_refused_and_the_conversation_goes_on(chat, asked, tmp_path):
    (tmp_path / "binary").write_bytes(b"\0\1\2")
    said = one_line(run(*chat, stdin=f"/file {tmp_path}/binary\n/file {tmp_path}/none\n/file\nhello\n").stderr)
    assert messages(asked) == ["hello"]
    assert "NUL byte" in said and "cannot read" in said and "/file needs the path" in said


@pytest.mark.parametrize(
    ("arguments", "path", "message"),
    [("a.txt", "a.txt", ""), ("a.txt b c", "a.txt", "b c"), (r"a\ b.txt c", "a b.txt", "c"), ('"a b" it\'s', "a b", "it's")],
)
def test_the_path_of_a_file_may_be_quoted(arguments, path, message):
    assert file_and_message(arguments) == (Path(path), message)
    with pytest.raises(PromptError):
        file_and_message(" ")


def test_help_lists_every_command_and_so_does_an_unknown_one(chat, asked):
    for entered in ("/help", "/dance"):
        said = one_line(run(*chat, stdin=f"{entered}\n").stderr)
        assert all(command in said for command in ('"""', "/file PATH", "/drop [N]", "/reset", "/stats", "/exit", "Ctrl-C"))
    assert not asked
    explained = one_line(run("chat", "--help").stdout)
    assert all(command in explained for command in ('"""', "/file PATH", "/drop", "/reset", "/stats", "/exit", "Ctrl-C", "paste"))


def test_a_full_conversation_says_what_to_do_and_goes_on_without_its_oldest_turns(chat, asked):
    fill = "\n".join(f"{letter * 140}" for letter in "abcd")  # the fourth finds no room
    result = run(*chat, "--system", "be brief", stdin=f"{fill}\n/drop 2\nand now?\n/stats\n")
    said = one_line(result.stderr)
    assert said.count("error: ") == 1
    assert "error: The conversation is full: with this message it has" in said and "/drop" in said and "/reset" in said
    assert "The 2 oldest turns are forgotten. The rest (" in said and "is read again" in said
    kept = [(message["role"], message["content"][:3]) for message in asked[-1]]
    assert kept[:2] == [("system", "be "), ("user", "ccc")] and kept[-1] == ("user", "and")
    assert [message["role"] for message in asked[-1]] == ["system", "user", "assistant", "user"]


def test_a_conversation_goes_on_after_a_drop_as_if_it_had_begun_there(chat, asked, tiny_folder):
    dropped = run(*chat, stdin="first\nsecond\nthird\n/drop\nfourth\n").stdout
    kept = asked[-1]
    assert [one["content"] for one in kept if one["role"] == "user"] == ["third", "fourth"]
    alone = run(*chat, stdin="third\nfourth\n").stdout
    assert len(asked[-1]) == len(kept) and dropped.count("\n") >= 4 and alone
    assert run(*chat, stdin="/drop\n").stderr.count("error: there is no turn to drop") == 1
    assert "from 1 to 1, got 'all'" in one_line(run(*chat, stdin="hello\n/drop all\n").stderr)


def test_a_message_that_is_too_long_by_itself_is_not_the_conversations_fault(chat):
    said = one_line(run(*chat, stdin=f"hello\n{'y' * POSITIONS}\nagain\n").stderr)
    assert "error: The prompt has" in said and "The conversation is full" not in said


def test_an_answer_that_reaches_the_last_position_says_so(tiny_folder):
    said = one_line(run("chat", "-m", tiny_folder, "--dtype", "float32", stdin="x" * (POSITIONS - 20) + "\n").stderr)
    assert "cut at the model's last position: /drop makes room" in said


@contextlib.contextmanager
def ctrl_c_in(monkeypatch: pytest.MonkeyPatch, cls: type, method: str, on_call: int = 1) -> Iterator[list[int]]:
    """Press Ctrl-C when a method is called the `on_call`th time; the method then runs."""
    real, calls = getattr(cls, method), list[int]()

    def pressing(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == on_call:
            signal.raise_signal(signal.SIGINT)
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cls, method, pressing)
        yield calls


def test_ctrl_c_before_the_answer_takes_the_message_back(chat, asked, monkeypatch):
    with ctrl_c_in(monkeypatch, PrefillProgress, "__call__", on_call=3):
        result = run(*chat, "--session", "talk", stdin="first\nsecond\nthird\n/exit\n")
    assert one_line(result.stderr).count("The message is taken back") == 1
    assert [one["content"] for one in asked[-1] if one["role"] == "user"] == ["first", "third"]
    assert sessions.show("talk").messages == 4
    assert "Not answered" not in run(*chat, "--session", "talk", stdin="third\n").stderr


@pytest.mark.parametrize("save", [1, 2])  # after the prompt; after the answer
def test_ctrl_c_while_saving_waits_for_the_save_and_the_session_goes_on(chat, asked, monkeypatch, save):
    with ctrl_c_in(monkeypatch, Session, "save", on_call=save):
        result = run(*chat, "--session", "talk", stdin="first\nsecond\n")
    assert messages(asked) == ["first", "second"] and "Traceback" not in result.stderr
    answered = 2 if save == 2 else 1
    assert sessions.show("talk").messages == 2 * answered
    assert run(*chat, "--session", "talk", stdin="third\n").stdout.endswith("\n")
    assert sessions.show("talk").messages == 2 * answered + 2


def test_ctrl_c_is_deferred_once():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        done.append("went on")
        signal.raise_signal(signal.SIGINT)
        done.append("never")
    with pytest.raises(KeyboardInterrupt), interrupts_deferred():
        signal.raise_signal(signal.SIGINT)
        done.append("to the end")
    assert done == ["went on", "to the end"]
    with interrupts_deferred():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
