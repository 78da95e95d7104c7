"""A converted model is complete or absent, whatever happens while it is made."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from specache.cli import convert
from specache.cli.convert import CacheFolderError, ConversionError, converted_model

fork = multiprocessing.get_context("fork")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@dataclass
class Converting:
    """A process in the middle of a conversion, and what lets it go on."""

    child: Any
    go_on: Any


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file whose conversion copies it slowly, in two steps."""
    monkeypatch.setenv("SPECACHE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(convert, "write_safetensors", slow_copy)
    file = tmp_path / "some model.gguf"
    file.write_bytes(b"weights")
    return file


def slow_copy(gguf: Path, folder: Path, *_: Any) -> None:
    half_a_copy(gguf, folder)
    time.sleep(0.3)
    (folder / "config.json").write_text("{}")


def half_a_copy(gguf: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())
    with open(gguf.parent / "conversions", "a") as log:
        log.write("x")


@pytest.fixture
def converting(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Converting]:
    """Start another process that converts the file, and has written half of it.

    It writes the rest when it is told to `go_on`.
    """
    go_on = fork.Event()

    def held_copy(gguf: Path, folder: Path, *_: Any) -> None:
        half_a_copy(gguf, folder)
        go_on.wait()
        (folder / "config.json").write_text("{}")

    child = fork.Process(target=converted_model, args=(gguf,))
    with monkeypatch.context() as patch:
        patch.setattr(convert, "write_safetensors", held_copy)
        child.start()
    while child.is_alive() and not conversions(gguf):
        time.sleep(0.01)
    assert child.is_alive()
    yield Converting(child, go_on)
    child.kill()
    child.join()


def conversions(gguf: Path) -> int:
    log = gguf.parent / "conversions"
    return len(log.read_text()) if log.exists() else 0


def is_complete(folder: Path) -> bool:
    return {file.name for file in folder.iterdir()} == {"model.safetensors", "config.json"}


def temporary_folders() -> list[Path]:
    return [path for path in (convert.cache_folder() / "models").iterdir() if path.is_dir() and ".tmp-" in path.name]


def test_a_model_is_converted_once_wherever_it_lies(gguf, tmp_path):
    messages: list[str] = []
    folder = converted_model(gguf, messages.append)
    assert is_complete(folder) and folder.parent == tmp_path / "cache" / "models"
    assert messages == ["Converting some model.gguf to safetensors (once)"]
    os.utime(gguf, (0, 0))
    assert converted_model(gguf, messages.append) == folder
    assert len(messages) == 1 and conversions(gguf) == 1 and not temporary_folders()


def test_another_content_is_another_model(gguf):
    first = converted_model(gguf)
    gguf.write_bytes(b"other weights")
    assert converted_model(gguf) != first


@needs_fork
def test_two_at_once_convert_once(gguf):
    def convert_in_child(results) -> None:
        results.put(is_complete(converted_model(gguf)))

    results = fork.Queue()
    children = [fork.Process(target=convert_in_child, args=(results,)) for _ in range(2)]
    for child in children:
        child.start()
    assert [results.get(timeout=30) for _ in children] == [True, True]
    for child in children:
        child.join()
    assert conversions(gguf) == 1 and not temporary_folders()


@needs_fork
def test_a_killed_conversion_is_not_used(gguf, converting):
    converting.child.kill()
    converting.child.join()
    assert len(temporary_folders()) == 1  # half a model, which nobody takes for one
    assert is_complete(converted_model(gguf))
    assert not temporary_folders()


def test_an_interrupted_conversion_leaves_no_files(gguf, monkeypatch):
    def interrupted(gguf: Path, folder: Path, *_: Any) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert, "write_safetensors", interrupted)
        converted_model(gguf)
    assert not temporary_folders()
    assert is_complete(converted_model(gguf))


@needs_fork
def test_who_waits_is_told_and_goes_on_when_the_other_is_killed(gguf, converting):
    messages: list[str] = []

    def told(message: str) -> None:
        messages.append(message)
        if "Waiting" in message:
            converting.child.kill()

    assert is_complete(converted_model(gguf, told)) and not temporary_folders()
    assert messages[0] == "Waiting for another process that is converting the same model"


@needs_fork
def test_an_interrupted_wait_leaves_the_other_to_finish(gguf, converting):
    def interrupted(message: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted_model(gguf, interrupted)
    converting.go_on.set()
    converting.child.join()
    assert is_complete(converted_model(gguf)) and conversions(gguf) == 1


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_the_second_to_finish_discards_its_copy(gguf, monkeypatch, reason):
    def no_locks(*_: Any) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    original = convert.write_safetensors
    inner: list[Path] = []

    def overtaken(gguf: Path, folder: Path, *more: Any) -> None:
        original(gguf, folder)
        if not inner:
            inner.append(folder)
            inner[0] = converted_model(gguf)

    monkeypatch.setattr(convert, "write_safetensors", overtaken)
    folder = converted_model(gguf)
    assert [folder] == inner and is_complete(folder) and not temporary_folders()


def test_a_cache_that_cannot_be_written_is_named(gguf, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SPECACHE_CACHE", str(blocked))
    with pytest.raises(CacheFolderError, match="set SPECACHE_CACHE to another folder"):
        converted_model(gguf)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 100])
def test_a_broken_file_is_refused_and_leaves_nothing(tmp_path, monkeypatch, content):
    monkeypatch.setenv("SPECACHE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    with pytest.raises(ConversionError, match=r"cannot read .*broken\.gguf as a GGUF model"):
        converted_model(file)
    assert not temporary_folders()
