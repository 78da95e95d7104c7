"""A file that a command writes at its end is looked at before it begins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from specache.errors import ConfigError
from specache.platform.output_files import check_output_file


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
