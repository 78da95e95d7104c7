"""Export a session to one file and import it.

The file is a tar archive of the manifest and the files that it refers to. An import trusts nothing.
It checks names, kinds and sizes of the members, the manifest, the digests of all snapshots and the
checksum of every row before the session appears.
"""

from __future__ import annotations

import os
import secrets
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from specache.attention.dense import KEY_BLOCK
from specache.errors import SessionError, SpeCacheError
from specache.sessions import names, state, store
from specache.sessions.files import BLOCK, PrivateFile, check_file, plain_file
from specache.sessions.manifest import Manifest
from specache.sessions.manifest_file import FILE, LONGEST, decode, encode, write_manifest
from specache.sessions.store import Root
from specache.tiers.disk import aligned_io
from specache.tiers.disk.system_errors import reason


def export_session(name: str, target: str | os.PathLike[str], root: Root = None) -> int:
    """Write a session's saved state into a new file and return the file's size in bytes.

    Raises:
        SessionError: the session does not exist, is in use or damaged; or the file exists already
            or cannot be written.
    """
    path = Path(target).expanduser().absolute()
    with store.locked(names.root_of(name, root), name) as (folder, manifest):
        for part, expected in manifest.files.items():
            check_file(folder / part, expected)
        if os.path.lexists(path):
            raise SessionError(f"{path} is there already. Choose another file, or remove it first.")
        if not path.parent.is_dir():
            raise SessionError(f"There is no folder {path.parent}. Make it first, or choose another file.")
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with PrivateFile(temporary) as file:
                _write_archive(file, folder, manifest)
                size = file.finish().bytes
            _put_in_place(temporary, path)
            aligned_io.sync_folder(path.parent)
        except OSError as error:
            raise SessionError(f"The session {name!r} cannot be written to {path}: {reason(error)}") from error
        finally:
            temporary.unlink(missing_ok=True)
    return size


def _put_in_place(temporary: Path, path: Path) -> None:
    """Give a file its name, unless there is one of that name.

    Raises:
        OSError: the system refuses, or the file was created meanwhile.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links, as on many memory sticks
        with PrivateFile(path):  # fails if the file was created meanwhile
            pass
        try:
            temporary.replace(path)
        except OSError:
            path.unlink(missing_ok=True)
            raise


def import_session(source: str | os.PathLike[str], name: str, root: Root = None) -> None:
    """Create session `name` from a file that `export_session` wrote.

    Raises:
        SessionError: the file is damaged or not an export, the name is taken, or the system
            refuses.
        SlowTierError: a row's checksum differs.
    """
    path = Path(source).expanduser().absolute()
    names.check_free(names.root_of(name, root), name)
    with names.building(names.private_root(root), name) as folder:
        with _opened(path) as archive:
            manifest = _unpack(archive, folder, path)
        for part, expected in manifest.files.items():
            check_file(folder / part, expected)
        try:
            _check_rows(folder, manifest)
        except SpeCacheError as error:
            raise SessionError(f"{path} is damaged, and was not imported. {error}") from error
        write_manifest(folder, manifest)


def _write_archive(file: PrivateFile, folder: Path, manifest: Manifest) -> None:
    writer: Any = _Writer(file)
    with tarfile.open(fileobj=writer, mode="w|", format=tarfile.GNU_FORMAT) as archive:
        text = encode(manifest)
        archive.addfile(_member(FILE, len(text)), BytesIO(text))
        sizes = {**{name: one.bytes for name, one in manifest.files.items()}, **manifest.row_files()}
        for name, size in sizes.items():
            with plain_file(folder / name) as fd, open(fd, "rb", closefd=False) as data:
                archive.addfile(_member(name, size), data)


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o600
    return member


class _Writer:
    """The file object that `tarfile` writes to."""

    def __init__(self, file: PrivateFile) -> None:
        self._file = file

    def write(self, data: bytes) -> int:
        self._file.write(data)
        return len(data)


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    """Yield an archive opened for reading. Any problem with it raises `SessionError`."""
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            yield archive
    except FileNotFoundError:
        raise SessionError(f"There is no file {path}. Give one that 'specache session export' wrote.") from None
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {reason(error)}") from error
    except SpeCacheError:
        raise
    except Exception as error:  # `tarfile` raises many types on bytes that are not an archive
        raise SessionError(f"{path} is not the export of a session: {str(error)[:200] or type(error).__name__}.") from error


def _unpack(archive: tarfile.TarFile, folder: Path, path: Path) -> Manifest:
    """Extract the members into `folder` and return the manifest, which comes first.

    Only members that the manifest refers to, in the sizes it states, are accepted.
    """
    first = archive.next()
    if first is None or first.name != FILE or not _is_plain(first) or first.size > LONGEST:
        raise SessionError(f"{path} is not the export of a session: it does not begin with {FILE}.")
    manifest = decode(_data(archive, first).read(), f"{path}: {FILE}")
    expected = {**{name: one.bytes for name, one in manifest.files.items()}, **manifest.row_files()}
    while (member := archive.next()) is not None:
        if expected.pop(member.name, None) != member.size or not _is_plain(member):
            raise SessionError(
                f"{path} holds {member.name[:100]!r}, which is no part of the session or not of the size it should be."
            )
        with PrivateFile(folder / member.name) as file:
            data, left = _data(archive, member), member.size
            while left:
                block = data.read(min(BLOCK, left))
                if not block:
                    raise SessionError(f"{path} ends in the middle of {member.name}: it was cut short.")
                file.write(block)
                left -= len(block)
            file.finish()
    if expected:
        raise SessionError(f"{path} lacks {next(iter(expected))}: it was cut short.")
    return manifest


def _is_plain(member: tarfile.TarInfo) -> bool:
    return member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()


def _data(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    data = archive.extractfile(member)
    assert data is not None, "plain files have data"
    return data


def _check_rows(folder: Path, manifest: Manifest) -> None:
    """Read every row with its checksum, and verify the headers of the snapshots.

    Raises:
        SpeCacheError: a file differs from what was written.
    """
    if manifest.tail is None:
        return
    tail = state.open_tail(folder, manifest)
    state.check_snapshots(folder, manifest)
    tier = state.open_tier(folder, manifest, tail)
    try:
        for layer in manifest.full_layers:
            for start in range(0, manifest.tokens, KEY_BLOCK):
                tier.read(layer, start, min(start + KEY_BLOCK, manifest.tokens))
    finally:
        tier.close()
