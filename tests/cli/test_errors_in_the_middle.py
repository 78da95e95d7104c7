"""An error during an answer: the partial answer is printed and kept, and the error follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specache import sessions
from specache.cli import console
from specache.errors import SessionError
from specache.kernels import dispatch
from specache.kernels.torch.layer_step import TorchLayerStep
from specache.sessions import Session
from tests.cli.running import one_line, run, run_json

PROMPT = "What is it? " * 30
TOKENS = 5


@pytest.fixture
def tiny(tiny_folder: Path) -> tuple[str, ...]:
    return ("generate", "-m", str(tiny_folder), "-n", "12", "--dtype", "float32", "--threads", "1", "--prompt", PROMPT)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_kernels: None) -> Path:
    """Return the default folder of sessions."""
    monkeypatch.setenv("SPECACHE_CACHE", str(tmp_path))
    return tmp_path / "sessions"


def break_after(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Make every step after so many tokens of an answer run out of memory."""
    from specache.cli.streaming import AnswerRecorder

    put, attend, there = AnswerRecorder.put, TorchLayerStep.attend_fetched, [0]

    def putting(self: AnswerRecorder, value: torch.Tensor) -> None:
        put(self, value)
        there[0] = len(self.token_ids[0]) if self.token_ids else 0

    def attending(*arguments: Any) -> Any:
        if there[0] >= tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return attend(*arguments)

    monkeypatch.setattr(AnswerRecorder, "put", putting)
    monkeypatch.setattr(TorchLayerStep, "attend_fetched", attending)


def test_the_answer_so_far_comes_first_and_the_error_last(tiny, monkeypatch):
    whole = run_json(*tiny)["results"][0]
    with monkeypatch.context() as patch:
        break_after(patch, TOKENS)
        streamed = run(*tiny, code=console.EXIT_ERROR)
        printed = run(*tiny, "--json", code=console.EXIT_ERROR)
    document = json.loads(printed.stdout)
    result = document["results"][0]
    assert result["token_ids"] == whole["token_ids"][:TOKENS] and result["finish_reason"] == "error"
    assert streamed.stdout == result["text"] + "\n"
    assert document["error"].startswith("Out of memory") and "5 new tokens" in document["error"]
    for said in (streamed.stderr, printed.stderr):
        last = one_line(said.rpartition("error: ")[2])
        assert last.startswith("Out of memory in main memory, after 5 new tokens") and "--prefill-chunk 256 (needs" in last
        assert "Traceback" not in said
    assert "fast memory" in streamed.stderr


def test_freeing_the_hot_set_is_one_plain_line(tiny, monkeypatch):
    fetched = (*tiny, "--slow-tier", "ram", "--hot-set", "0.5", "--top-k", "8", "--group-size", "16", "--residual", "16")
    whole = run(*fetched).stdout
    attend, calls = TorchLayerStep.attend_fetched, []

    def once(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 20:
            raise MemoryError
        return attend(*arguments)

    monkeypatch.setattr(TorchLayerStep, "attend_fetched", once)
    result = run(*fetched)
    assert result.stdout == whole
    assert "warning: Out of memory in a decode step: the hot sets (" in result.stderr
    assert "With --hot-set 0.0 there is none" in one_line(result.stderr) and "RuntimeWarning" not in result.stderr


def test_an_error_before_the_first_token_is_the_error_alone(tiny, monkeypatch):
    def failing(*arguments: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(dispatch, "quantise", failing)
    result = run(*tiny, "--json", code=console.EXIT_ERROR)
    assert result.stdout == "" and "before the first new token" in one_line(result.stderr)


def test_a_session_keeps_the_partial_answer_and_continues(tiny, monkeypatch):
    session = (*tiny, "--raw", "--session", "report", "--top-k", "512")
    whole = run_json(*tiny, "--raw", "--top-k", "512", "--slow-tier", "ram")["results"][0]
    with monkeypatch.context() as patch:
        break_after(patch, TOKENS)
        half = json.loads(run(*session, "--json", code=console.EXIT_ERROR).stdout)
    assert half["session"]["tokens"] == len(PROMPT) + TOKENS - 1
    assert sessions.show("report").tokens == len(PROMPT) + TOKENS - 1
    again = run_json(*session)
    assert again["results"][0]["token_ids"] == whole["token_ids"]
    assert again["session"]["reused_tokens"] == len(PROMPT) - 1


def test_an_answer_that_cannot_be_saved_is_printed(tiny, monkeypatch):
    save, calls = Session.save, []

    def failing(session: Session) -> None:
        calls.append(1)
        if len(calls) == 2:  # the first is after the prompt
            raise SessionError("no room")
        save(session)

    answer = run(*tiny, "--slow-tier", "ram").stdout
    monkeypatch.setattr(Session, "save", failing)
    result = run(*tiny, "--session", "report", code=console.EXIT_ERROR)
    assert result.stdout == answer
    assert result.stderr.endswith("error: no room\n")
    with monkeypatch.context() as patch:
        calls.clear()
        break_after(patch, TOKENS)
        both = one_line(run(*tiny, "--session", "other", code=console.EXIT_ERROR).stderr)
    assert "Out of memory" in both and both.endswith("no room")


def test_a_conversation_keeps_the_partial_answer(tiny_folder, monkeypatch):
    chat = ("chat", "-m", str(tiny_folder), "-n", "12", "--dtype", "float32", "--threads", "1", "--session", "talk")
    break_after(monkeypatch, TOKENS)
    result = run(*chat, stdin="first " * 40 + "\n")
    said = one_line(result.stderr)
    assert result.stdout.endswith("\n") and len(result.stdout) > 1
    assert "error: Out of memory" in said and "5 tokens, cut by the error" in said
    assert sessions.show("talk").messages == 2
    assert "Not answered" not in run(*chat, stdin="").stderr
