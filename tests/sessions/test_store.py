"""Forking, removing, listing, exporting and importing sessions; their names and their locks."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from specache import sessions
from specache.errors import ConfigError, SessionError, SlowTierError, SpeCacheError
from specache.sessions.session import MOST_SEGMENTS
from specache.tiers.disk.disk_tier import DiskTier
from tests.sessions.sequences import answer, checkpoints_every, gemma, opened, prefill, prompt, settings, state

BAD_NAMES = [
    "",
    ".",
    "..",
    ".hidden",
    "a/b",
    "../x",
    "/etc",
    "a\\b",
    "a b",
    "a\n",
    "ä",
    "x" * 101,
    "a\0b",
    "*",
    "specache-scratch-0",
]


@pytest.fixture
def saved(tmp_path: Path, model: Any) -> str:
    """Create session `one` of 300 tokens in `tmp_path` and return its state."""
    return make(tmp_path, model)


def make(root: Path, model: Any, name: str = "one", seed: int = 0) -> str:
    with opened(root, model, settings(), name) as session:
        prefill(session, model, prompt(300, seed))
        session.save()
        return state(session)


def state_of(root: Path, model: Any, name: str) -> str:
    with opened(root, model, name=name) as session:
        return state(session)


# Forks


@pytest.mark.parametrize("while_open", [False, True])
def test_forks_share_files_until_they_differ(tmp_path, model, saved, while_open):
    before = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.rows")}
    if while_open:
        with opened(tmp_path, model) as session:
            session.fork("two")
            prefill(session, model, torch.cat([prompt(300), prompt(200, 1)], dim=1))
            session.save()
            longer = state(session)
    else:
        sessions.fork("one", "two", tmp_path)
    shared = [path for path in (tmp_path / "two").glob("*.rows") if path.stat().st_nlink == 2]
    assert {path.name for path in shared} == set(before)
    assert state_of(tmp_path, model, "two") == saved
    with opened(tmp_path, model, name="two") as session:
        prefill(session, model, torch.cat([prompt(300), prompt(200, 2)], dim=1))
        session.save()
        other = state(session)
    if not while_open:
        with opened(tmp_path, model) as session:
            prefill(session, model, torch.cat([prompt(300), prompt(200, 1)], dim=1))
            session.save()
            longer = state(session)
    assert {path.name: path.read_bytes() for path in shared} == before
    assert (state_of(tmp_path, model, "one"), state_of(tmp_path, model, "two")) == (longer, other)


@pytest.mark.parametrize("removed", ["one", "two"])
def test_removing_a_session_leaves_its_fork_intact(tmp_path, model, saved, removed):
    sessions.fork("one", "two", tmp_path)
    sessions.remove(removed, tmp_path)
    (left,) = {"one", "two"} - {removed}
    assert [summary.name for summary in sessions.stored(tmp_path)] == [left]
    assert state_of(tmp_path, model, left) == saved
    with opened(tmp_path, model, name=left) as session:
        answer(model, session.cache, prompt(310))
        session.save()
    assert [path.name for path in tmp_path.iterdir()] == [left]


def chain_of_forks(root: Path, model: Any, count: int) -> torch.Tensor:
    """Create sessions `one` to `fork<count>`, each a fork of the previous one and a block longer.

    Return the last tokens.
    """
    ids, name = prompt(300), "one"
    for i in range(1, count + 1):
        sessions.fork(name, f"fork{i}", root)
        name = f"fork{i}"
        ids = torch.cat([ids, prompt(70, seed=i)], dim=1)
        with opened(root, model, name=name) as session:
            prefill(session, model, ids)
            session.save()
    return ids


def test_a_long_chain_of_forks_has_few_files(tmp_path, model, saved):
    """All of them are open as long as a session is: one per fork and layer would exceed the limit
    of open files.
    """
    ids = chain_of_forks(tmp_path, model, 20)
    with opened(tmp_path, model, settings(), "steady") as session:
        for length in range(300, ids.shape[1] + 1, 70):
            prefill(session, model, ids[:, :length])
        steady = state(session)
    assert state_of(tmp_path, model, "fork20") == steady
    for i in range(1, 21):
        assert len(list((tmp_path / f"fork{i}").glob("*.rows"))) <= MOST_SEGMENTS * 3  # layers
    for i in (19, 8, 7):
        with opened(tmp_path, model, name=f"fork{i}") as session:
            assert session.token_ids == ids[0, : 300 + 70 * i].tolist()
    assert state_of(tmp_path, model, "one") == saved


def test_a_session_is_saved_even_if_its_files_cannot_be_merged(tmp_path, model, saved, monkeypatch):
    ids = chain_of_forks(tmp_path, model, MOST_SEGMENTS - 1)
    sessions.fork(f"fork{MOST_SEGMENTS - 1}", "last", tmp_path)
    ids = torch.cat([ids, prompt(70, seed=99)], dim=1)
    read = DiskTier.read
    with opened(tmp_path, model, name="last") as session:
        prefill(session, model, ids)
        expected = state(session)

        def fails_in_the_last_layer(tier: DiskTier, layer: int, start: int, stop: int) -> Any:
            if layer == 2:
                raise SlowTierError("unreadable")
            return read(tier, layer, start, stop)

        with monkeypatch.context() as patch:
            patch.setattr(DiskTier, "read", fails_in_the_last_layer)
            session.save()
        assert state(session) == expected
    assert state_of(tmp_path, model, "last") == expected
    rows = {layer: len(list((tmp_path / "last").glob(f"*-L00{layer}.rows"))) for layer in range(3)}
    assert rows[2] == MOST_SEGMENTS + 1 and rows[0] == rows[1] == 2


def test_without_links_a_fork_is_a_copy(tmp_path, model, saved, monkeypatch):
    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(1, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    sessions.fork("one", "two", tmp_path)
    assert {path.stat().st_nlink for path in (tmp_path / "two").iterdir()} == {1}
    sessions.remove("one", tmp_path)
    assert state_of(tmp_path, model, "two") == saved


def test_a_fork_refuses_an_existing_name(tmp_path, model, saved):
    make(tmp_path, model, "two", seed=1)
    before = state_of(tmp_path, model, "two")
    with pytest.raises(SessionError, match=r"'two' .* already"):
        sessions.fork("one", "two", tmp_path)
    assert state_of(tmp_path, model, "two") == before


def test_leftovers_of_a_killed_fork_are_removed(tmp_path, model, saved):
    left = tmp_path / ".specache-unfinished-0123456789abcdef"
    left.mkdir()
    (left / "half").write_bytes(b"x")
    sessions.fork("one", "two", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


# Listing


def test_list_and_show_describe_saved_sessions(tmp_path, model, saved):
    make(tmp_path, model, "two", seed=1)
    (tmp_path / "two" / "session.json").write_text("{}")
    (tmp_path / "no session").mkdir()
    (tmp_path / "file").write_text("")
    good, bad = sessions.stored(tmp_path)
    assert (good.name, good.tokens, good.model, good.dtype, good.problem) == ("one", 300, "LlamaForCausalLM", "float32", None)
    assert good == sessions.show("one", tmp_path)
    used = sum(path.stat().st_size for path in (tmp_path / "one").iterdir() if path.name[:12] not in ("lock", "session.json"))
    assert good.bytes == used
    assert bad.name == "two" and "not the manifest" in str(bad.problem)
    json.dumps([good.to_dict(), bad.to_dict()])


def test_a_missing_folder_has_no_sessions(tmp_path):
    assert sessions.stored(tmp_path / "none") == []
    with pytest.raises(SessionError, match="no session 'one'"):
        sessions.show("one", tmp_path / "none")


# Names


@pytest.mark.parametrize("name", BAD_NAMES)
def test_an_invalid_session_name_is_refused(tmp_path, model, saved, name):
    everything = sorted(tmp_path.parent.rglob("*"))
    uses: list[Callable[[], Any]] = [
        lambda: opened(tmp_path, model, name=name),
        lambda: sessions.fork("one", name, tmp_path),
        lambda: sessions.fork(name, "two", tmp_path),
        lambda: sessions.remove(name, tmp_path),
        lambda: sessions.show(name, tmp_path),
        lambda: sessions.export_session(name, tmp_path / "x.tar", tmp_path),
        lambda: sessions.import_session(tmp_path / "x.tar", name, tmp_path),
    ]
    for use in uses:
        with pytest.raises(ConfigError, match="cannot name a session"):
            use()
    assert sorted(tmp_path.parent.rglob("*")) == everything


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "x" * 100, "-", "0"])
def test_a_valid_session_name_is_accepted(tmp_path, model, name):
    make(tmp_path, model, name)
    assert sessions.show(name, tmp_path).tokens == 300


def test_links_are_not_followed(tmp_path, model):
    elsewhere = tmp_path / "elsewhere"
    make(elsewhere, model)
    root = tmp_path / "root"
    root.mkdir()
    (root / "one").symlink_to(elsewhere / "one")
    for use in (lambda: opened(root, model), lambda: sessions.show("one", root), lambda: sessions.remove("one", root)):
        with pytest.raises(SessionError):
            use()
    assert sessions.stored(root) == []
    (root / "two").mkdir()
    (root / "two" / "session.json").symlink_to(elsewhere / "one" / "session.json")
    with pytest.raises(SessionError, match="symbolic link"):
        opened(root, model, name="two")
    assert sessions.stored(elsewhere)[0].problem is None


# Locks


def test_the_second_user_is_refused_until_the_first_is_killed(tmp_path, model, saved):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        session = opened(tmp_path, model)
        os.write(tell, b"x")
        time.sleep(600)  # it is killed before
        os._exit(session.saved_tokens)
    os.read(ready, 1)
    uses: list[Callable[[], Any]] = [
        lambda: opened(tmp_path, model),
        lambda: sessions.fork("one", "two", tmp_path),
        lambda: sessions.remove("one", tmp_path),
        lambda: sessions.export_session("one", tmp_path / "x.tar", tmp_path),
    ]
    for use in uses:
        with pytest.raises(SessionError, match=f"in use by process {child} on "):
            use()
    assert sessions.show("one", tmp_path).tokens == 300
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert state_of(tmp_path, model, "one") == saved
    os.close(ready)
    os.close(tell)


def test_a_process_that_was_forked_meanwhile_does_not_keep_a_closed_session(tmp_path, model, saved):
    """As workers of a data loader are, which live on."""
    session = opened(tmp_path, model)
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(tell)
        os.read(ready, 1)  # until the parent has closed it
        os._exit(0)
    try:
        with pytest.raises(SessionError, match=f"process {os.getpid()}"):
            opened(tmp_path, model)  # the lock is held as long as the session is open
        session.close()
        opened(tmp_path, model).close()
    finally:
        os.close(tell)
        os.waitpid(child, 0)
        os.close(ready)


def test_a_forked_process_that_ends_leaves_the_lock_to_its_parent(tmp_path, model, saved):
    with opened(tmp_path, model) as session:
        child = os.fork()
        if child == 0:
            session._lock.release()
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(SessionError, match=f"process {os.getpid()}"):
            opened(tmp_path, model)


@pytest.mark.parametrize("last", ["", "session.save()", "session.close()"])
def test_a_program_that_ends_with_a_session_in_a_variable_prints_nothing(tmp_path, last):
    lines = [
        "import sys, specache",
        "from tests.sessions.sequences import llama, opened, prefill, prompt, settings",
        "model = llama()",
        "session = opened(sys.argv[1], model, settings())",
        "prefill(session, model, prompt(20))",
        last,
    ]
    ended = subprocess.run([sys.executable, "-c", "\n".join(lines), tmp_path], capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_one_process_cannot_open_a_session_twice(tmp_path, model, saved):
    with opened(tmp_path, model), pytest.raises(SessionError, match=f"process {os.getpid()}"):
        opened(tmp_path, model)
    opened(tmp_path, model).close()


# Export and import


def test_an_imported_session_equals_the_exported_one(tmp_path, monkeypatch):
    checkpoints_every(monkeypatch, 100)
    model = gemma()
    saved = make(tmp_path / "here", model)
    size = sessions.export_session("one", tmp_path / "one.tar", tmp_path / "here")
    assert size == (tmp_path / "one.tar").stat().st_size
    assert (tmp_path / "one.tar").stat().st_mode & 0o777 == 0o600
    sessions.import_session(tmp_path / "one.tar", "other", tmp_path / "there")
    assert state_of(tmp_path / "there", model, "other") == saved
    with opened(tmp_path / "there", model, name="other") as session:
        assert prefill(session, model, prompt(300)[:, :220]) == [200, 220]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "one.tar", "there"]


def test_without_links_an_export_overwrites_nothing_either(tmp_path, saved, monkeypatch):
    """As on the FAT file system of a memory stick."""

    def no_links(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    sessions.export_session("one", tmp_path / "one.tar", tmp_path)
    sessions.import_session(tmp_path / "one.tar", "other", tmp_path)
    assert (tmp_path / "one.tar").stat().st_mode & 0o777 == 0o600

    def made_meanwhile(*_: Any, **__: Any) -> None:
        (tmp_path / "x.tar").write_text("mine")
        no_links()

    monkeypatch.setattr(os, "link", made_meanwhile)
    with pytest.raises(SessionError, match="cannot be written"):
        sessions.export_session("one", tmp_path / "x.tar", tmp_path)
    assert (tmp_path / "x.tar").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "one.tar", "other", "x.tar"]


def test_an_export_overwrites_nothing(tmp_path, saved):
    (tmp_path / "x.tar").write_text("mine")
    with pytest.raises(SessionError, match="there already"):
        sessions.export_session("one", tmp_path / "x.tar", tmp_path)
    with pytest.raises(SessionError, match="There is no folder"):
        sessions.export_session("one", tmp_path / "no folder" / "x.tar", tmp_path)
    assert (tmp_path / "x.tar").read_text() == "mine"


Edit = Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]


def rewritten(source: Path, target: Path, edit: Edit) -> None:
    """Write a tar archive with its members changed."""
    with tarfile.open(source) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    edit(members)
    with tarfile.open(target, "w") as archive:
        for member, data in members:
            if member.isreg():
                member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def renamed(name: str, index: int = -1) -> Edit:
    def edit(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[index][0].name = name

    return edit


def linked(kind: bytes, target: str) -> Edit:
    def edit(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        member = tarfile.TarInfo(members[-1][0].name)
        member.type, member.linkname = kind, target
        members[-1] = (member, b"")

    return edit


def resized(index: int, change: int) -> Edit:
    def edit(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        member, data = members[index]
        members[index] = (member, data[:change] if change < 0 else data + bytes(change))

    return edit


def flipped(index: int) -> Edit:
    def edit(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        member, data = members[index]
        members[index] = (member, data[:700] + bytes([data[700] ^ 4]) + data[701:])

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        renamed("../escaped.rows"),
        renamed("/tmp/sessions-test-escaped.rows"),
        renamed("a/b.rows"),
        renamed("lock"),
        renamed("session.json"),
        renamed("other.json", 0),
        linked(tarfile.SYMTYPE, "/etc/passwd"),
        linked(tarfile.LNKTYPE, "session.json"),
        linked(tarfile.FIFOTYPE, ""),
        linked(tarfile.DIRTYPE, ""),
        resized(-1, -4096),
        resized(-1, 4096),
        resized(1, -8),
        resized(1, 8),
        flipped(0),
        flipped(1),
        flipped(2),
        flipped(-1),
        lambda members: members.pop(),
        lambda members: members.append(members[-1]),
        lambda members: members.reverse(),
        lambda members: members.clear(),
    ],
)
def test_an_archive_that_was_tampered_with_is_refused(tmp_path, saved, edit):
    good, bad = tmp_path / "good.tar", tmp_path / "bad.tar"
    sessions.export_session("one", good, tmp_path)
    rewritten(good, bad, edit)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SessionError):
        sessions.import_session(bad, "two", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_truncated_archive_or_another_file_is_refused(tmp_path, saved):
    good, bad = tmp_path / "good.tar", tmp_path / "bad.tar"
    sessions.export_session("one", good, tmp_path)
    data = good.read_bytes()
    for broken in (data[: len(data) // 2], data[:1000], data[:513], b"", b"x" * 5000, bytes(10240)):
        bad.write_bytes(broken)
        with pytest.raises(SpeCacheError):
            sessions.import_session(bad, "two", tmp_path)
    with pytest.raises(SessionError, match=r"There is no file .*none\.tar"):
        sessions.import_session(tmp_path / "none.tar", "two", tmp_path)
    assert not (tmp_path / "two").exists()


# Folders that are something else


def test_a_folder_with_foreign_files_is_left_alone(tmp_path, model, saved):
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "letter.txt").write_text("dear")
    (tmp_path / "one" / "letter.txt").write_text("dear")
    for name in ("documents", "one"):
        for use in (lambda name=name: opened(tmp_path, model, name=name), lambda name=name: sessions.remove(name, tmp_path)):
            with pytest.raises(SessionError, match=r"is no session: there is 'letter\.txt'"):
                use()
    assert [path.name for path in documents.iterdir()] == ["letter.txt"]
    (tmp_path / "one" / "letter.txt").unlink()
    assert state_of(tmp_path, model, "one") == saved
