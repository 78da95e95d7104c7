"""A single note tells the user what is read again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from specache.cli.models import Dtype, load
from specache.sessions import Session
from tests.cli.running import one_line, run
from tests.cli.tiny_chat import byte_tokenizer

FIRST, OTHER = "the first prompt " * 6, "quite another text " * 6
SYSTEM_LAST = (  # as Mistral's: the system message stands in the last message of the user
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}"
    "{% else %}<{{ m.role }}>{% if loop.last %}{{ ns.system }} {% endif %}{{ m.content }}<end>{% endif %}{% endfor %}<assistant>"
)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the default folder of sessions."""
    monkeypatch.setenv("SPECACHE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sessions"


@pytest.fixture
def options(tiny_folder: Path) -> tuple[str, ...]:
    return ("-m", str(tiny_folder), "-n", "4", "--dtype", "float32", "--threads", "1", "--residual", "64")


def notes(stderr: str) -> list[str]:
    """Return the lines about stored tokens."""
    return [line for line in stderr.splitlines() if "stored" in line or "read again" in line or "begin this prompt" in line]


@pytest.mark.parametrize("begins", ["", FIRST[:30]], ids=["with nothing of it", "like it"])
def test_another_prompt_for_a_session_is_one_line(options, begins):
    run("generate", *options, "--session", "s", "--prompt", FIRST)
    lines = notes(run("generate", *options, "--session", "s", "--prompt", begins + OTHER).stderr)
    assert len(lines) == 1 and lines[0].startswith("session s: only ") and lines[0].endswith("the prompt is another one.")


def test_a_raw_text_and_a_conversation_differ_by_their_prompt_and_not_by_a_system_message(options):
    run("generate", *options, "--session", "s", "--system", "Be brief.", "--prompt", FIRST)
    for other in (("--raw",), ("--system", "Be brief.")):
        (line,) = notes(run("generate", *options, "--session", "s", *other, "--prompt", OTHER).stderr)
        assert line.endswith("the prompt is another one.")


def test_no_further_note_follows_a_drop(options, root):
    result = run("chat", *options, "--session", "s", stdin=f"{FIRST}\nsecond question\n/drop 1\nthird\n/drop 1\n")
    lines = notes(result.stderr)
    assert len(lines) == 2 and all("is read again with the next message" in line for line in lines)
    assert notes(run("chat", *options, "--session", "s", stdin="fourth\n").stderr) == []
    assert notes(run("chat", *options, stdin=f"{FIRST}\nsecond question\n/drop 1\nthird\nfourth\n").stderr) == lines[:1]


@pytest.mark.parametrize("system", [(), ("--system", "Be brief, and polite, and right.")], ids=["alone", "with a system message"])
def test_a_session_whose_turns_are_all_dropped_goes_on(options, root, system):
    run("chat", *options, "--session", "s", *system, stdin=f"{FIRST}\n/drop\n")
    result = run("chat", *options, "--session", "s", stdin="and now?\n")
    assert notes(result.stderr) == []
    assert result.stdout == run("chat", *options, *system, stdin="and now?\n").stdout


def test_a_dropped_sessions_stored_tokens_begin_its_conversation(options, root, tiny_folder):
    system = "Be brief, and polite, and right. " * 7
    run("chat", *options, "--session", "s", "--system", system, stdin=f"{FIRST}\nsecond\n/drop 1\n")
    loaded = load(str(tiny_folder), dtype=Dtype.FLOAT32)
    with Session("s", loaded.model) as session:
        text = f"<system>{system}<end><user>second<end><assistant>"
        assert text.startswith(loaded.tokenizer.decode(session.token_ids))
        assert [message["content"] for message in session.messages][:2] == [system, "second"]


def test_a_template_that_writes_the_conversation_otherwise_each_turn_is_said_in_our_words(options, tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = SYSTEM_LAST
    tokenizer.save_pretrained(folder)
    system = "Be brief, and polite, and right. " * 2
    result = run("chat", "-m", folder, *options[2:], "--system", system, stdin="first question\nsecond question\n")
    (line,) = notes(result.stderr)
    assert "stored tokens begin this prompt" in line and "torch" not in one_line(result.stderr)
