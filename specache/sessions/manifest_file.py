"""The manifest of a session on disk, `session.json`. Putting a new one in its place is what saves.

A copy of it, which nothing but repairing reads, is written behind it. After a crash between the two it is the one before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path

from specache.errors import SessionError, SpeCacheError
from specache.sessions.files import REPAIR, PrivateFile, new_digest, plain_file
from specache.sessions.lock import LOCK_FILE
from specache.sessions.manifest import Manifest
from specache.sessions.schema import is_data_file, parse
from specache.tiers.disk import aligned_io
from specache.tiers.disk.row_layout import LAYOUT_VERSION
from specache.tiers.disk.scratch import PROBE_PREFIX, SCRATCH_PREFIX
from specache.tiers.disk.system_errors import reason

FILE = "session.json"
COPY = "session.json.copy"
TEMPORARY = "session.json.new"
VERSION = 2  # of the manifest, of what its files hold and of the pages' layout
OLDEST = 1  # that can be read: it had no copy of the tokens
LONGEST = 64 << 20  # bytes
_ADVICE = f"{REPAIR}; else use another copy of the session, or remove it and start again from the prompt."


def check_ours(folder: Path) -> None:
    """Refuse a folder with anything in it that no session puts there, before something of it is removed.

    Raises:
        SessionError: it has.
    """
    try:
        strangers = sorted(path.name for path in folder.iterdir() if not _is_ours(path.name))
    except OSError as error:
        raise SessionError(f"{folder} cannot be read: {reason(error)}") from error
    if strangers:
        raise SessionError(f"{folder} is no session: there is {strangers[0]!r} in it. Choose another name or folder.")


def _is_ours(name: str) -> bool:
    return name in (FILE, COPY, TEMPORARY, LOCK_FILE) or is_data_file(name) or name.startswith((SCRATCH_PREFIX, PROBE_PREFIX))


def encode(manifest: Manifest) -> bytes:
    body = json.loads(json.dumps(dataclasses.asdict(manifest)))  # keys as text, so that they sort as they will when it is read
    text = json.dumps(body, sort_keys=True)
    document = {"specache_session": VERSION, "rows_layout": LAYOUT_VERSION, "digest": _digest(text), "body": body}
    return json.dumps(document, sort_keys=True, indent=1).encode()


def check_readable(manifest: Manifest) -> None:
    """Refuse a manifest that could not be read again.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError, SpeCacheError: it could not.
    """
    parse(json.loads(encode(manifest))["body"])


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a manifest in the place of the one before, at once: after a crash there is one of them, whole.

    Raises:
        OSError: it cannot be written; the one before is there, or (only if the folder cannot be synced) the new one.
    """
    data = encode(manifest)
    _put(folder, FILE, data)
    _put_copy(folder, data)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a session; `None` if it was never saved.

    Raises:
        SessionError: it cannot be read, is damaged, is gone while its copy is there, or was written by a newer version.
    """
    data = _read(folder / FILE)
    if data is None:
        if os.path.lexists(folder / COPY):
            raise SessionError(f"{folder / FILE} is gone, and its copy is there. {_ADVICE}")
        return None
    return decode(data, str(folder / FILE))


def read_copy(folder: Path) -> Manifest | None:
    """The copy of the manifest; `None` where there is none (sessions of the first version).

    Raises:
        SessionError: as `read_manifest`.
    """
    data = _read(folder / COPY)
    return None if data is None else decode(data, str(folder / COPY))


def is_saved(folder: Path) -> bool:
    """Whether there is a manifest or its copy, readable or not."""
    return any(os.path.lexists(folder / name) for name in (FILE, COPY))


def refresh_copy(folder: Path) -> None:
    """Make the copy what the manifest is, where a crash came between the two or there was none. Not being able to harms nothing."""
    with contextlib.suppress(SessionError, OSError):
        data = _read(folder / FILE)
        if data is not None and _read(folder / COPY) != data:
            _put_copy(folder, data)


def _put(folder: Path, name: str, data: bytes) -> None:
    temporary = folder / TEMPORARY
    try:
        temporary.unlink(missing_ok=True)
        with PrivateFile(temporary) as file:
            file.write(data)
            file.finish()
        aligned_io.sync_folder(folder)  # the files that it refers to
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(folder / name)
    aligned_io.sync_folder(folder)


def _put_copy(folder: Path, data: bytes) -> None:
    """A copy that cannot be written is none: an old one would refer to files that are gone."""
    try:
        _put(folder, COPY, data)
    except OSError:
        with contextlib.suppress(OSError):
            (folder / COPY).unlink(missing_ok=True)


def _read(path: Path) -> bytes | None:
    """A file's bytes; `None` if there is none."""
    try:
        with plain_file(path) as fd, open(fd, "rb", closefd=False) as file:
            return file.read(LONGEST + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {reason(error)}") from error


def decode(data: bytes, origin: str) -> Manifest:
    """A manifest from the bytes of its file, which `origin` names in messages.

    Raises:
        SessionError: see `read_manifest`.
    """
    try:
        if len(data) > LONGEST:
            raise ValueError("it is too long")
        document = json.loads(data)
        version, layout = int(document["specache_session"]), int(document["rows_layout"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise SessionError(f"{origin} is not the manifest of a session: {said(error)}. {_ADVICE}") from None
    for what, there, oldest, known in (
        ("version", version, OLDEST, VERSION),
        ("layout of rows", layout, LAYOUT_VERSION, LAYOUT_VERSION),
    ):
        if not oldest <= there <= known:
            age = "a newer" if there > known else "an older"
            raise SessionError(
                f"{origin} has {what} {there} and this specache knows {known}: it was written by {age} specache. Use that one, "
                "or start again from the prompt."
            )
    try:
        body = document["body"]
        if _digest(json.dumps(body, sort_keys=True)) != document["digest"]:
            raise ValueError("its digest differs from what it says")
        return parse(body)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, SpeCacheError) as error:
        raise SessionError(f"{origin} is damaged: {said(error)}. {_ADVICE}") from None


def said(error: Exception) -> str:
    """What a manifest is refused for."""
    return f"{type(error).__name__} {error}"[:200] if isinstance(error, KeyError | TypeError) else str(error)[:300].rstrip(".")


def _digest(text: str) -> str:
    digest = new_digest()
    digest.update(text.encode())
    return digest.hexdigest()
