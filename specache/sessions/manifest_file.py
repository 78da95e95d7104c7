"""Read and write the manifest file `session.json`. Replacing it is what commits a save.

A copy, read only for repair, is written after it. A crash between the two leaves the previous
manifest as copy.
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
VERSION = 2  # version of the manifest, the content of its files and the page layout
OLDEST = 1  # oldest version that can be read; it had no copy of the tokens
LONGEST = 64 << 20  # bytes
_ADVICE = f"{REPAIR}; else use another copy of the session, or remove it and start again from the prompt."


def check_ours(folder: Path) -> None:
    """Check that a folder holds only files of a session, before any of them is removed.

    Raises:
        SessionError: there is another file.
    """
    try:
        foreign = sorted(path.name for path in folder.iterdir() if not _is_ours(path.name))
    except OSError as error:
        raise SessionError(f"{folder} cannot be read: {reason(error)}") from error
    if foreign:
        raise SessionError(f"{folder} is no session: there is {foreign[0]!r} in it. Choose another name or folder.")


def _is_ours(name: str) -> bool:
    return name in (FILE, COPY, TEMPORARY, LOCK_FILE) or is_data_file(name) or name.startswith((SCRATCH_PREFIX, PROBE_PREFIX))


def encode(manifest: Manifest) -> bytes:
    body = json.loads(json.dumps(dataclasses.asdict(manifest)))  # keys as text, so that they sort as after reading
    text = json.dumps(body, sort_keys=True)
    document = {"specache_session": VERSION, "rows_layout": LAYOUT_VERSION, "digest": _digest(text), "body": body}
    return json.dumps(document, sort_keys=True, indent=1).encode()


def check_readable(manifest: Manifest) -> None:
    """Check that a manifest can be read again.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError, SpeCacheError: it cannot.
    """
    parse(json.loads(encode(manifest))["body"])


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest atomically: after a crash the folder has either the old or the new one.

    Raises:
        OSError: the manifest cannot be written. The old one remains, or (if only the folder's sync
            failed) the new one.
    """
    data = encode(manifest)
    _put(folder, FILE, data)
    _put_copy(folder, data)


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a session; None if it was never saved.

    Raises:
        SessionError: the manifest cannot be read, is damaged, is missing beside its copy, or comes
            from a newer version.
    """
    data = _read(folder / FILE)
    if data is None:
        if os.path.lexists(folder / COPY):
            raise SessionError(f"{folder / FILE} is gone, and its copy is there. {_ADVICE}")
        return None
    return decode(data, str(folder / FILE))


def read_copy(folder: Path) -> Manifest | None:
    """Return the copy of the manifest; None if there is none (first version).

    Raises:
        SessionError: as `read_manifest`.
    """
    data = _read(folder / COPY)
    return None if data is None else decode(data, str(folder / COPY))


def is_saved(folder: Path) -> bool:
    """Return True if the manifest or its copy exists, readable or not."""
    return any(os.path.lexists(folder / name) for name in (FILE, COPY))


def refresh_copy(folder: Path) -> None:
    """Update the copy if a crash prevented it or there was none. Failures are ignored."""
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
        aligned_io.sync_folder(folder)  # syncs the files that it refers to
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(folder / name)
    aligned_io.sync_folder(folder)


def _put_copy(folder: Path, data: bytes) -> None:
    """Write the copy. Remove it on failure, since an old one would refer to removed files."""
    try:
        _put(folder, COPY, data)
    except OSError:
        with contextlib.suppress(OSError):
            (folder / COPY).unlink(missing_ok=True)


def _read(path: Path) -> bytes | None:
    """Return a file's bytes; None if there is none."""
    try:
        with plain_file(path) as fd, open(fd, "rb", closefd=False) as file:
            return file.read(LONGEST + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {reason(error)}") from error


def decode(data: bytes, origin: str) -> Manifest:
    """Return a manifest from the bytes of its file, which `origin` names in messages.

    Raises:
        SessionError: see `read_manifest`.
    """
    try:
        if len(data) > LONGEST:
            raise ValueError("it is too long")
        document = json.loads(data)
        version, layout = int(document["specache_session"]), int(document["rows_layout"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise SessionError(f"{origin} is not the manifest of a session: {refusal_reason(error)}. {_ADVICE}") from None
    for what, number, oldest, known in (
        ("version", version, OLDEST, VERSION),
        ("layout of rows", layout, LAYOUT_VERSION, LAYOUT_VERSION),
    ):
        if not oldest <= number <= known:
            age = "a newer" if number > known else "an older"
            raise SessionError(
                f"{origin} has {what} {number} and this specache knows {known}: it was written by {age} specache. Use that one, "
                "or start again from the prompt."
            )
    try:
        body = document["body"]
        if _digest(json.dumps(body, sort_keys=True)) != document["digest"]:
            raise ValueError("its digest differs from what it says")
        return parse(body)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, SpeCacheError) as error:
        raise SessionError(f"{origin} is damaged: {refusal_reason(error)}. {_ADVICE}") from None


def refusal_reason(error: Exception) -> str:
    """Return the reason for which a manifest was refused."""
    return f"{type(error).__name__} {error}"[:200] if isinstance(error, KeyError | TypeError) else str(error)[:300].rstrip(".")


def _digest(text: str) -> str:
    digest = new_digest()
    digest.update(text.encode())
    return digest.hexdigest()
