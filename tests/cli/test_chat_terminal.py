"""`specache chat` in a terminal, as a person uses it: pasting, Ctrl-C, a conversation that has
filled the model.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from specache import sessions
from tests.cli.terminal import CTRL_C, CTRL_D, MARKS_PASTES, UNMARKS_PASTES, Terminal

readline = pytest.importorskip("readline")

ANSWERED = "tokens per second]"
PAGE = "a poem:\n\n  its second line\n/exit\nits last line"
pytestmark = pytest.mark.skipif("libedit" in (readline.__doc__ or ""), reason=f"{sys.executable} edits lines with libedit")


@pytest.fixture
def chat(tiny_folder: Path) -> tuple[str | Path, ...]:
    return ("chat", "-m", tiny_folder, "--dtype", "float32", "--session", "talk")


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, str]:
    return {"SPECACHE_CACHE": str(tmp_path), "COLUMNS": "200"}


def test_a_pasted_page_is_one_message_ctrl_c_drops_a_line_and_another_terminal_goes_on(chat, cache, tmp_path):
    with Terminal(*chat, "-n", "3", **cache) as terminal:
        terminal.wait_for("\n> ")
        assert MARKS_PASTES in terminal.seen
        terminal.paste(PAGE)
        terminal.press("\r")
        terminal.wait_for(ANSWERED)
        terminal.wait_for("\n> ")
        terminal.press("half a line")
        terminal.wait_for("half a line")
        terminal.interrupt_waiting()
        terminal.wait_for("Ctrl-C again")
        terminal.wait_for("\n> ")
        terminal.press('"""two\r')
        terminal.wait_for(". ")
        terminal.press('lines"""\r')
        terminal.wait_for(ANSWERED)
        terminal.wait_for("\n> ")
        terminal.interrupt_waiting()
        terminal.wait_for("\n> ")
        terminal.interrupt_waiting()  # the second in a row
        assert terminal.exit_code() == 0
        assert terminal.seen.rfind(UNMARKS_PASTES) > terminal.seen.rfind(MARKS_PASTES)
        assert "Traceback" not in terminal.seen
    assert sessions.show("talk", tmp_path / "sessions").messages == 4
    with Terminal(*chat, "-n", "3", term="dumb", **cache) as terminal:  # one that knows no marks is not sent them
        terminal.wait_for("lines")
        terminal.wait_for("\n> ")
        earlier = re.sub(r"\r|\x1b\[[0-9;]*m", "", terminal.seen)  # what was said is shown again
        assert f"> {PAGE}\n" in earlier and "> two\nlines\n" in earlier and "half a line" not in earlier
        terminal.press("one line\r")
        terminal.wait_for(ANSWERED)
        terminal.wait_for("> ")
        terminal.press(CTRL_D)
        assert terminal.exit_code() == 0
        assert "\x1b[?2004" not in terminal.seen
    assert sessions.show("talk", tmp_path / "sessions").messages == 6


def test_ctrl_c_stops_an_answer_and_a_full_conversation_offers_to_go_on(chat, cache, tmp_path):
    with Terminal(*chat, **cache) as terminal:
        terminal.wait_for("\n> ")
        terminal.press("first " * 20 + "\r")
        terminal.wait_for(UNMARKS_PASTES)  # the line was taken: from here on Ctrl-C is for what follows
        terminal.press(CTRL_C)
        terminal.wait_for("\n> ")  # after reading, answering or saving: the conversation goes on
        terminal.press("/drop\r")
        terminal.wait_for("\n> ")
        terminal.press("a" * 150 + "\r")
        terminal.wait_for(ANSWERED)
        terminal.wait_for("\n> ")
        terminal.press("b" * 150 + "\r")
        assert "error: " in terminal.wait_for("Drop the oldest turn and go on? [Y/n] ")
        terminal.press("\r")
        terminal.wait_for("The oldest turn is forgotten.")
        terminal.wait_for(ANSWERED)
        terminal.wait_for("\n> ")
        terminal.press("/exit\r")
        assert terminal.exit_code() == 0
        assert "Traceback" not in terminal.seen
    assert sessions.show("talk", tmp_path / "sessions").messages == 2
