"""The cache folder is where a user of this system expects it, and an earlier one is still used."""

from __future__ import annotations

from pathlib import Path

import pytest

from specache import ConfigError, SessionError, sessions
from specache.platform.folders import cache_folder, earlier_cache_folder
from tests.sessions.sequences import llama, opened, prefill, prompt, settings


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("SPECACHE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_cache_folder_is_specache_cache_then_xdg_then_home(home, tmp_path, monkeypatch):
    assert cache_folder() == home / ".cache" / "specache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "specache"
    monkeypatch.setenv("SPECACHE_CACHE", "~/mine")
    assert cache_folder() == home / "mine"


@pytest.mark.parametrize("value", ["", "relative/folder", "."])
def test_a_relative_xdg_folder_does_not_count(home, monkeypatch, value):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_folder() == home / ".cache" / "specache"


def test_without_a_home_folder_the_error_names_the_variable_to_set(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # nobody's
    with pytest.raises(ConfigError, match="Set SPECACHE_CACHE"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/specache") and earlier_cache_folder() is None


def test_sessions_of_the_earlier_folder_are_listed_opened_forked_and_removed(home, tmp_path, monkeypatch):
    def saved(name: str, tokens: int, folder: Path | None = None) -> None:
        with opened(folder, llama(), settings(), name=name) as session:
            prefill(session, llama(), prompt(tokens))
            session.save()

    saved("old", 100)
    assert (home / ".cache" / "specache" / "sessions" / "old").is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    saved("new", 70)
    assert (tmp_path / "xdg" / "specache" / "sessions" / "new").is_dir()
    assert [(one.name, one.tokens) for one in sessions.stored()] == [("new", 70), ("old", 100)]
    with opened(None, llama(), settings(), name="old") as session:
        assert len(session.token_ids) == 100
    sessions.fork("old", "branch")
    assert sessions.show("branch").tokens == 100
    with pytest.raises(SessionError, match="'old'"):
        sessions.fork("new", "old")
    with opened(None, llama(), name="branch") as session, pytest.raises(SessionError, match="'new'"):
        session.fork("new")
    tail = next((home / ".cache" / "specache" / "sessions" / "branch").glob("tail-*"))
    tail.write_bytes(tail.read_bytes()[:-1])
    assert sessions.repair("branch", llama()).mended
    assert sessions.show("branch").tokens == 100
    sessions.remove("old")
    assert [one.name for one in sessions.stored()] == ["branch", "new"]
    monkeypatch.setenv("SPECACHE_CACHE", str(tmp_path / "named"))
    assert sessions.stored() == []
