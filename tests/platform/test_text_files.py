"""Bytes decode to the text that an editor shows, or are refused with their position."""

from __future__ import annotations

import codecs
import io
import os
import threading
from pathlib import Path

import pytest

from specache.platform.text_files import TextError, check_text, decode_text, line_reader, read_stream, read_text, utf8_lines

TEXT = "first line\nsecond: ä € 你好 😀\n"
MARKED = {
    "UTF-8": TEXT.encode(),
    "UTF-8 with a mark": codecs.BOM_UTF8 + TEXT.encode(),
    "UTF-16 of Windows": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "UTF-16, big-endian": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "UTF-32": codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
    "UTF-32, big-endian": codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
}


@pytest.mark.parametrize("data", MARKED.values(), ids=MARKED)
def test_a_text_is_the_same_in_every_marked_encoding(tmp_path, data):
    (tmp_path / "text").write_bytes(data)
    assert read_text(tmp_path / "text") == TEXT
    assert read_stream(io.BytesIO(data), "a pipe") == TEXT
    assert b"".join(utf8_lines(io.BytesIO(data))).decode() == TEXT
    assert "".join(line_reader(io.BytesIO(data))) == TEXT


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_ends_the_same_way_whatever_system_wrote_it(end):
    data = f"one{end}two{end}{end}three".encode()
    assert decode_text(data, "x") == "one\ntwo\n\nthree"
    assert list(line_reader(io.BytesIO(data))) == ["one\n", "two\n", "\n", "three"]


def test_a_mark_inside_a_text_is_a_character_of_it():
    assert decode_text("a\ufeffb".encode(), "x") == "a\ufeffb"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"abc\ndef\xe9", r"f is not UTF-8 text \(byte 0xE9 at byte 7, line 2: .*iconv"),
        (b"\x7fELF\x02\x01\x00", "not UTF-8 text: it has a NUL byte at byte 6"),
        ("text".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        (b"x" * 3_000_000 + b"\0", "NUL byte at byte 3000000"),
        (codecs.BOM_UTF16_LE, "a byte order mark of UTF-16 with nothing after it"),
        (codecs.BOM_UTF16_LE + b"a", "mark of UTF-16, and is not UTF-16 either"),
        (codecs.BOM_UTF16_LE + b"a\0\0\0", "NUL"),
        (b"\xed\xa0\x80", "not UTF-8 text"),
    ],
)
def test_bytes_that_are_not_text_are_refused_with_their_position(tmp_path, data, message):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(TextError, match=message):
        read_text(tmp_path / "f")
    with pytest.raises(TextError, match=message.replace("f is", "pipe is")):
        read_stream(io.BytesIO(data), "a pipe")


@pytest.mark.parametrize("name", ["missing", ".", "~nobody-of-this-name/x"])
def test_an_unreadable_file_is_named(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextError, match=f"cannot read {name}"):
        read_text(Path(name))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_read_to_its_end(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(codecs.BOM_UTF8 + b"piped"))
    writer.start()
    assert read_text(tmp_path / "pipe") == "piped"
    writer.join()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero here")
def test_a_device_without_end_is_refused():
    with pytest.raises(TextError, match="NUL byte at byte 0"):
        read_text(Path("/dev/zero"))


def test_endless_input_is_refused(monkeypatch):
    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            return b"y\n" * 1000

    monkeypatch.setattr("specache.platform.text_files.LARGEST_TEXT", 100_000)
    with pytest.raises(TextError, match="a pipe is longer than 100,000 bytes"):
        read_stream(Endless(), "a pipe")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caf\udce9", "byte 0xE9 after 3 characters"),
        ("a\ud83d", "half a character"),
        ("\0", "NUL"),
    ],
)
def test_an_argument_that_is_no_text_is_refused(text, message):
    with pytest.raises(TextError, match=message):
        check_text(text, "--prompt")
    assert check_text(TEXT, "--prompt") == TEXT
