"""The manifest of a session on disk, `session.json`. Putting a new one in its place is what saves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from specache.errors import SessionError, SpeCacheError
from specache.sessions.files import PrivateFile, new_digest, plain_file
from specache.sessions.lock import LOCK_FILE
from specache.sessions.manifest import Manifest
from specache.sessions.schema import is_data_file, parse
from specache.tiers import aligned_io
from specache.tiers.row_layout import LAYOUT_VERSION
from specache.tiers.scratch import PROBE_PREFIX, SCRATCH_PREFIX
from specache.tiers.system_errors import reason

FILE = "session.json"
TEMPORARY = "session.json.new"
VERSION = 1  # of the manifest, of what its files hold and of the pages' layout
LONGEST = 64 << 20  # bytes
_ADVICE = "Use another copy of the session, or remove it and start again from the prompt."


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
    return name in (FILE, TEMPORARY, LOCK_FILE) or is_data_file(name) or name.startswith((SCRATCH_PREFIX, PROBE_PREFIX))


def encode(manifest: Manifest) -> bytes:
    body = json.loads(json.dumps(dataclasses.asdict(manifest)))  # keys as text, so that they sort as they will when it is read
    text = json.dumps(body, sort_keys=True)
    document = {"specache_session": VERSION, "rows_layout": LAYOUT_VERSION, "digest": _digest(text), "body": body}
    return json.dumps(document, sort_keys=True, indent=1).encode()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a manifest in the place of the one before, at once: after a crash there is one of them, whole.

    Raises:
        OSError: it cannot be written; the one before is there, or (only if the folder cannot be synced) the new one.
    """
    temporary = folder / TEMPORARY
    try:
        temporary.unlink(missing_ok=True)
        with PrivateFile(temporary) as file:
            file.write(encode(manifest))
            file.finish()
        aligned_io.sync_folder(folder)  # the files that it refers to
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(folder / FILE)
    aligned_io.sync_folder(folder)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a session; `None` if it was never saved.

    Raises:
        SessionError: it cannot be read, is damaged, or was written by a newer version.
    """
    path = folder / FILE
    try:
        with plain_file(path) as fd, open(fd, "rb", closefd=False) as file:
            data = file.read(LONGEST + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {reason(error)}") from error
    return decode(data, str(path))


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
        raise SessionError(f"{origin} is not the manifest of a session: {_said(error)}. {_ADVICE}") from None
    for what, there, known in (("version", version, VERSION), ("layout of rows", layout, LAYOUT_VERSION)):
        if there != known:
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
        raise SessionError(f"{origin} is damaged: {_said(error)}. {_ADVICE}") from None


def _said(error: Exception) -> str:
    return f"{type(error).__name__} {error}"[:200] if isinstance(error, KeyError | TypeError) else str(error)[:300].rstrip(".")


def _digest(text: str) -> str:
    digest = new_digest()
    digest.update(text.encode())
    return digest.hexdigest()
