"""Decode text from files and pipes: the one place where bytes become text, for prompts, documents,
data sets and messages.

Accepted are UTF-8, with or without a byte order mark, and UTF-16 and UTF-32 with one, as Windows
writes them. The mark is removed. CRLF and a lone CR become LF. Bytes that are not text are refused
with their position and advice, never replaced.
"""

from __future__ import annotations

import codecs
import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from specache.errors import SpeCacheError

LARGEST_TEXT = 2**30  # bytes; no model reads more, and a device may never end
_BLOCK = 2**20
_LONGEST_MARK = 4
_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SAVE_AS_UTF8 = "Save it as UTF-8 (an editor's 'Save as', or iconv -f ENCODING -t UTF-8)."


class TextError(SpeCacheError):
    """Input that is not text, or cannot be read."""


def read_text(path: Path, error: type[SpeCacheError] = TextError) -> str:
    """Return the text of a file, pipe or device.

    Args:
        error: exception type to raise if it is not text.
    """
    try:
        with path.expanduser().open("rb") as file:
            return decode_text(_read_bytes(file, str(path), error), str(path), error)
    except (OSError, RuntimeError) as reason:  # RuntimeError: `~name` of an unknown user
        raise error(f"cannot read {path}: {getattr(reason, 'strerror', None) or reason}.") from None


def read_stream(stream: BinaryIO, origin: str, error: type[SpeCacheError] = TextError) -> str:
    """Return the text of an open binary stream. `origin` names it in messages."""
    try:
        return decode_text(_read_bytes(stream, origin, error), origin, error)
    except OSError as reason:
        raise error(f"cannot read {origin}: {reason.strerror or reason}.") from None


def decode_text(data: bytes, origin: str, error: type[SpeCacheError] = TextError) -> str:
    """Decode bytes, without a byte order mark and with LF as line ending."""
    encoding = encoding_of(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as reason:
        raise error(_not_text(data, reason, encoding, origin)) from None
    if not text and encoding not in ("utf-8", "utf-8-sig"):
        raise error(f"{origin} is not UTF-8 text: it is a byte order mark of {encoding.upper()} with nothing after it.")
    if (nul := text.find("\0")) >= 0:
        raise error(_binary(origin, nul if encoding == "utf-8" else None))
    return _line_ends(text)


def utf8_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a data set as UTF-8 without a byte order mark, one at a time (UTF-16 and
    UTF-32: after reading all).

    Invalid UTF-8 is passed on, so that the parser of a line can name the line.
    """
    rest = iter(lines)
    first = next(rest, b"")
    encoding = encoding_of(first)
    if encoding in ("utf-8", "utf-8-sig"):
        yield from itertools.chain([first.removeprefix(codecs.BOM_UTF8)], rest)
        return
    data = b"".join([first, *rest])
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        yield data
        return
    yield from (line.encode() for line in io.StringIO(text, newline=None))


def encoding_of(data: bytes) -> str:
    """Return the encoding that a byte order mark names; without one, UTF-8."""
    return next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8")


def line_reader(stream: BinaryIO) -> io.TextIOWrapper:
    """Return a text stream that decodes lines as they come.

    Invalid bytes become lone surrogates (see `check_text`).
    """
    peekable = stream if hasattr(stream, "peek") else io.BufferedReader(stream)  # type: ignore[type-var]
    encoding = encoding_of(peekable.peek(_LONGEST_MARK)[:_LONGEST_MARK])
    errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
    return io.TextIOWrapper(peekable, encoding, errors=errors, newline=None)


def check_text(text: str, origin: str, error: type[SpeCacheError] = TextError) -> str:
    """Return text that came as characters (an argument, a line) if it is valid.

    Raises:
        SpeCacheError (`error`): it contains invalid UTF-8 (lone surrogates) or a NUL.
    """
    if "\0" in text:
        raise error(_binary(origin, text.index("\0")))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as reason:
        code = ord(text[reason.start])
        found = f"byte 0x{code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else f"half a character (U+{code:04X})"
        raise error(f"{origin} is not UTF-8 text: {found} after {reason.start:,} characters. Write it in UTF-8.") from None
    return text


def typed_text(text: str, origin: str, error: type[SpeCacheError] = TextError) -> str:
    """Return text for the model that came as characters if it is valid, with LF as line ending.

    Raises:
        SpeCacheError (`error`): see `check_text`.
    """
    return _line_ends(check_text(text, origin, error))


def _line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_bytes(stream: BinaryIO, origin: str, error: type[SpeCacheError]) -> bytes:
    """Read to the end. Stop early if the data is not text or has no end."""
    data = bytearray()
    while block := stream.read(_BLOCK):
        data += block
        if encoding_of(bytes(data[:_LONGEST_MARK])) == "utf-8" and (nul := block.find(b"\0")) >= 0:
            raise error(_binary(origin, len(data) - len(block) + nul))
        if len(data) > LARGEST_TEXT:
            raise error(f"{origin} is longer than {LARGEST_TEXT:,} bytes. Pass a part of it.")
    return bytes(data)


def _not_text(data: bytes, reason: UnicodeDecodeError, encoding: str, origin: str) -> str:
    line = data.count(b"\n", 0, reason.start) + 1
    where = f"byte 0x{data[reason.start]:02X} at byte {reason.start}, line {line}: {reason.reason}"
    if encoding.startswith("utf-8"):
        return f"{origin} is not UTF-8 text ({where}). {_SAVE_AS_UTF8}"
    name = encoding.upper()
    return f"{origin} is not UTF-8 text: it begins with a byte order mark of {name}, and is not {name} either ({where})."


def _binary(origin: str, position: int | None) -> str:
    where = "" if position is None else f" at byte {position}"
    return (
        f"{origin} is not UTF-8 text: it has a NUL byte{where}, as binary files and UTF-16 without a byte order mark do. "
        f"Pass a text file. {_SAVE_AS_UTF8}"
    )
