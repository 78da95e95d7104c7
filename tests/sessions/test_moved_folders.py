"""A session's folder that is moved or replaced while the session is open."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specache.errors import SessionError
from tests.sessions.sequences import opened, prefill, prompt, settings, state


@pytest.fixture
def saved(tmp_path: Path, model: Any) -> str:
    """Create session `one` of 300 tokens in `tmp_path` and return its state."""
    with opened(tmp_path, model, settings()) as session:
        prefill(session, model, prompt(300))
        session.save()
        return state(session)


def longer(tokens: int) -> torch.Tensor:
    return torch.cat([prompt(300), prompt(tokens - 300, 1)], dim=1)


def state_of(root: Path, model: Any, name: str = "one") -> str:
    with opened(root, model, name=name) as session:
        return state(session)


def test_a_backup_put_in_place_of_an_open_session_stays_whole(tmp_path, model, saved):
    shutil.copytree(tmp_path / "one", tmp_path / "backup")
    with opened(tmp_path, model) as session:
        prefill(session, model, longer(600))
        session.save()
        prefill(session, model, longer(800))
        shutil.rmtree(tmp_path / "one")
        shutil.copytree(tmp_path / "backup", tmp_path / "one")
        with pytest.raises(SessionError, match=r"'one', .* was moved, replaced or removed while it was open\. Nothing was written"):
            session.save()
    assert state_of(tmp_path, model) == saved


def test_a_session_that_took_the_place_of_an_open_one_is_not_overwritten(tmp_path, model, saved):
    with opened(tmp_path, model) as session:
        prefill(session, model, longer(600))
        shutil.copytree(tmp_path / "one", tmp_path / "copy")
        (tmp_path / "one").rename(tmp_path / "two")
        (tmp_path / "copy").rename(tmp_path / "one")
        with opened(tmp_path, model) as other:
            prefill(other, model, longer(700))
            other.save()
            expected = state(other)
        with pytest.raises(SessionError, match="Put it back and try again"):
            session.save()
    assert state_of(tmp_path, model) == expected and state_of(tmp_path, model, "two") == saved


@pytest.mark.parametrize("write", [lambda session: session.save(), lambda session: session.fork("three")])
def test_a_moved_session_that_is_put_back_can_be_saved(tmp_path, model, saved, write: Callable[[Any], None]):
    with opened(tmp_path, model) as session:
        prefill(session, model, longer(600))
        (tmp_path / "one").rename(tmp_path / "two")
        with pytest.raises(SessionError, match="moved, replaced or removed"):
            write(session)
        assert [path.name for path in tmp_path.iterdir()] == ["two"]
        (tmp_path / "two").rename(tmp_path / "one")
        write(session)
        session.save()
        expected = state(session)
    assert state_of(tmp_path, model) == expected


def test_a_closed_session_that_was_never_saved_removes_no_folder_of_another(tmp_path, model):
    first = opened(tmp_path, model, settings())
    prefill(first, model, prompt(300))
    (tmp_path / "one").rename(tmp_path / "two")
    with opened(tmp_path, model, settings()) as other:
        prefill(other, model, longer(400))
        first.close()
        other.save()
        expected = state(other)
    assert state_of(tmp_path, model) == expected
