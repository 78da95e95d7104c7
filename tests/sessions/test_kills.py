"""kill -9 at any moment of saving leaves one of the complete states."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from specache.sessions import saving
from tests.sessions.sequences import checkpoints_every, gemma, llama, opened, prefill, prompt, settings, state

KILLS = 60
STEP = 40  # tokens between two saves
LONGEST = 600
TEXT = prompt(LONGEST)


def grow(root: Path, model: Any) -> None:
    """Continue the session forever: prefill, save, and sometimes cut it back."""
    with opened(root, model, settings()) as session:
        while True:
            if len(session.token_ids) == LONGEST:
                session.cut(STEP)
            prefill(session, model, TEXT[:, : len(session.token_ids) + STEP])
            session.save()


def killed(root: Path, model: Any, delay: float) -> None:
    """Run `grow` in a process that is killed after `delay` seconds."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"x")
        try:
            grow(root, model)
        finally:
            os._exit(1)
    os.read(ready, 1)
    os.close(ready)
    os.close(tell)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it ended by itself"


@pytest.mark.parametrize("family", ["dense", "hybrid"])
def test_a_kill_leaves_a_complete_state(tmp_path, monkeypatch, family):
    checkpoints_every(monkeypatch, 100)
    monkeypatch.setattr(saving, "LONGEST_CHAIN", 4)
    model = llama() if family == "dense" else gemma()
    fresh: dict[int, str] = {}
    chance = random.Random(0)
    lengths = []
    for kill in range(4 * KILLS):
        turn = kill // (KILLS // 2)
        if turn and len(set(lengths)) > 5:
            break  # a busy machine takes more of them, and longer ones, to come across as many states
        killed(tmp_path, model, chance.uniform(0.0, 0.25 * (1 + turn)))
        with opened(tmp_path, model, settings()) as session:
            length = len(session.token_ids)
            lengths.append(length)
            assert length % STEP == 0
            assert session.token_ids == TEXT[0, :length].tolist()
            found = state(session)
        if length not in fresh:
            fresh[length] = reference(tmp_path / "reference", model, length)
        assert found == fresh[length], f"kill {kill}"
    assert len(set(lengths)) > 5


def reference(root: Path, model: Any, length: int) -> str:
    """Return the state of a session that reached `length` without being killed."""
    with opened(root, model, settings(), f"to{length}") as session:
        for stop in range(STEP, length + 1, STEP):
            prefill(session, model, TEXT[:, :stop])
        return state(session)
