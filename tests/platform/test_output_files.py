"""A file that a command writes at its end is looked at before it begins."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from specache.errors import ConfigError
from specache.platform.output_files import check_output_file, write_whole


@pytest.mark.parametrize("before", [None, "an earlier result"])
def test_a_file_that_can_be_written_is_left_as_it_is(tmp_path, before):
    path = tmp_path / "rows.json"
    if before is not None:
        path.write_text(before)
    check_output_file(path, "--json")
    assert (path.read_text() if path.exists() else None) == before


@pytest.mark.parametrize("path", ["/dev/null", "~", "~/rows.json"])
def test_devices_and_the_home_folder(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    if path == "~":
        with pytest.raises(ConfigError, match="this is a folder"):
            check_output_file(path, "--json")
    else:
        check_output_file(path, "--json")


@pytest.mark.parametrize("path", ["", ".", Path(""), Path("..")])
def test_a_folder_is_refused(path):
    with pytest.raises(ConfigError, match=r"--json \.\.?: this is a folder. Name a file in it"):
        check_output_file(path, "--json")


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--plot .*nowhere/a\.png: there is no folder .*nowhere"):
        check_output_file(tmp_path / "nowhere" / "a.png", "--plot")


@pytest.mark.parametrize("exists", [False, True])
def test_what_this_user_may_not_write_is_refused(tmp_path, monkeypatch, exists):
    path = tmp_path / "rows.json"
    if exists:
        path.touch()
    forbidden = path if exists else tmp_path
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != forbidden)  # root may write everywhere
    with pytest.raises(ConfigError, match="it cannot be written there"):
        check_output_file(path, "--json")


def test_a_file_is_replaced_and_keeps_its_mode(tmp_path):
    path = tmp_path / "rows.json"
    write_whole(path, b"first")
    path.chmod(0o600)
    write_whole(path, b"second")
    assert path.read_bytes() == b"second" and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["rows.json"]


def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "rows.json"
    path.write_bytes(b"first")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"second")
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["rows.json"]


def test_a_link_is_followed(tmp_path):
    target, link = tmp_path / "there.json", tmp_path / "rows.json"
    target.write_bytes(b"first")
    link.symlink_to(target)
    write_whole(link, b"second")
    assert link.is_symlink() and target.read_bytes() == b"second"


def test_a_pipe_is_written_to(tmp_path):
    path, read = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()), daemon=True)
    reader.start()
    write_whole(path, b"rows")
    reader.join(timeout=10)
    assert read == [b"rows"] and stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize("operation", ["open", "replace"])
def test_a_file_that_cannot_be_replaced_is_written_to(tmp_path, monkeypatch, operation):
    """As in a folder of somebody else, or mounted by itself into a container."""

    def refused(*_: object) -> None:
        raise OSError({"open": errno.EACCES, "replace": errno.EBUSY}[operation], "refused")

    path = tmp_path / "rows.json"
    path.write_bytes(b"the first")
    with monkeypatch.context() as patched:
        patched.setattr(os, operation, refused)
        write_whole(path, b"second")
        with pytest.raises(OSError, match="refused"):
            write_whole(tmp_path / "other.json", b"second")
    assert path.read_bytes() == b"second" and os.listdir(tmp_path) == ["rows.json"]
