"""A tiny model and saved sessions, made once per file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.sessions.sequences import llama, opened, prefill, prompt, settings, state


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    """Return a folder with session `one` (300 tokens) and another one, to be copied."""
    root = tmp_path_factory.mktemp("sessions")
    for name, seed in (("one", 0), ("another", 1)):
        with opened(root, model, settings(), name) as session:
            prefill(session, model, prompt(300, seed))
            session.save()
    return root


@pytest.fixture(scope="module")
def saved_state(made: Path, model: Any) -> str:
    with opened(made, model) as session:
        return state(session)


@pytest.fixture
def root(tmp_path: Path, made: Path) -> Path:
    shutil.copytree(made, tmp_path / "sessions")
    return tmp_path / "sessions"
