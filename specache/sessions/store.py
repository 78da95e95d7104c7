"""Manage sessions that are not open: list, show, fork and remove them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from specache.config import SpeCacheConfig
from specache.errors import SessionError
from specache.sessions import names
from specache.sessions.files import BLOCK, PrivateFile, plain_file
from specache.sessions.lock import FolderLock
from specache.sessions.manifest import Manifest
from specache.sessions.manifest_file import check_ours, read_manifest, write_manifest
from specache.tiers.disk.system_errors import reason

Root = str | os.PathLike[str] | None


@dataclass(frozen=True)
class SessionSummary:
    """Facts about a session that do not need its model.

    Attributes:
        bytes: bytes of the files in use; files shared by forks count in each of them.
        messages: number of messages, if it is a conversation.
        decode_steps, compiled_steps: steps that decoded its tokens, and those that ran compiled;
            None in older sessions.
        problem: what is wrong with it; all fields but the name and folder are None then.
    """

    name: str
    folder: str
    tokens: int | None = None
    bytes: int | None = None
    created: float | None = None
    saved: float | None = None
    finish_reason: str | None = None
    messages: int | None = None
    decode_steps: int | None = None
    compiled_steps: int | None = None
    model: str | None = None
    dtype: str | None = None
    config: dict[str, Any] | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON. Keys are stable."""
        return asdict(self)


def stored(root: Root = None) -> list[SessionSummary]:
    """Return all sessions of a root that were saved at least once, by name.

    Raises:
        SessionError: the folder cannot be read.
    """
    roots = names.default_roots() if root is None else [names.session_root(root)]
    folders: dict[str, Path] = {}
    for path in reversed(roots):  # the first root's session of a name hides the others
        try:
            folders |= {folder.name: folder for folder in path.iterdir()}
        except FileNotFoundError:
            continue
        except OSError as error:
            raise SessionError(f"The folder {path} cannot be read: {reason(error)}") from error
    found = []
    for folder in (folders[name] for name in sorted(folders)):
        if names.is_name(folder.name) and names.is_folder(folder):
            try:
                manifest = read_manifest(folder)
            except SessionError as error:
                found.append(SessionSummary(folder.name, str(folder), problem=str(error)))
            else:
                found += [] if manifest is None else [_summary(folder, manifest)]
    return found


def show(name: str, root: Root = None) -> SessionSummary:
    """Return the summary of one session.

    Raises:
        SessionError: there is no such session, or it is damaged.
    """
    folder = names.existing_folder(names.root_of(name, root), name)
    return _summary(folder, saved_manifest(folder, name))


def stored_config(name: str, root: Root = None) -> SpeCacheConfig | None:
    """Return the settings that a session was saved with; None if it does not exist.

    Raises:
        SessionError: it is damaged.
    """
    folder = names.root_of(name, root) / names.check_name(name)
    manifest = read_manifest(folder) if names.is_folder(folder) else None
    return None if manifest is None else manifest.config(folder)


def remove(name: str, root: Root = None) -> None:
    """Remove a session. Files shared with forks remain.

    Raises:
        SessionError: there is no such session, it is in use, its folder has foreign files, or the
            system refuses.
    """
    path = names.root_of(name, root)
    folder = names.existing_folder(path, name)
    check_ours(folder)
    with FolderLock(folder):
        try:
            names.discard(path, folder)
            names.remove_unfinished(path)
        except OSError as error:
            raise SessionError(f"{folder} cannot be removed: {reason(error)}") from error


def fork(name: str, new_name: str, root: Root = None) -> None:
    """Create session `new_name` from the saved state of `name`.

    They share files and write new ones of their own.

    Raises:
        SessionError: there is no `name`, it is in use or damaged, `new_name` is taken, or the
            system refuses.
    """
    path = names.root_of(name, root)
    names.check_free(names.root_of(new_name, root), new_name)
    with locked(path, name) as (_, manifest):
        fork_folder(path, name, manifest, new_name)


@contextmanager
def locked(root: Path, name: str) -> Iterator[tuple[Path, Manifest]]:
    """Yield a session's folder, locked inside the block, and its saved manifest.

    Raises:
        SessionError: there is no such session, it is in use, or damaged.
    """
    folder = names.existing_folder(root, name)
    with FolderLock(folder):
        yield folder, saved_manifest(folder, name)


def saved_manifest(folder: Path, name: str) -> Manifest:
    """Return the manifest, which must exist.

    Raises:
        SessionError: it does not exist, or is damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise SessionError(f"Nothing was saved in the session {name!r} ({folder}) yet.")
    return manifest


def fork_folder(root: Path, name: str, manifest: Manifest | None, new_name: str) -> None:
    """See `fork`. The caller holds the lock of `name`."""
    if manifest is None:
        raise SessionError(f"Nothing was saved in the session {name!r} yet. Save it before you fork it.")
    with names.building(root, new_name) as folder:
        for file in (*manifest.files, *manifest.row_files()):
            link_file(root / name / file, folder / file)
        now = time.time()
        write_manifest(folder, replace(manifest, created=now, saved=now))


def link_file(source: Path, target: Path) -> None:
    """Create a hard link, or a copy if the file system has no links.

    Raises:
        OSError: neither can be created.
    """
    try:
        os.link(source, target, follow_symlinks=False)
        return
    except FileNotFoundError:
        raise
    except OSError:
        target.unlink(missing_ok=True)
    with PrivateFile(target) as file, plain_file(source) as fd:
        while block := os.read(fd, BLOCK):
            file.write(block)
        file.finish()


def _summary(folder: Path, manifest: Manifest) -> SessionSummary:
    return SessionSummary(
        name=folder.name,
        folder=str(folder),
        tokens=manifest.tokens,
        bytes=manifest.nbytes,
        created=manifest.created,
        saved=manifest.saved,
        finish_reason=manifest.finish_reason,
        messages=len(manifest.messages),
        decode_steps=manifest.decode_steps,
        compiled_steps=manifest.compiled_steps,
        model=manifest.identity.model,
        dtype=manifest.identity.dtype,
        config=manifest.settings,
    )
