"""Find damage in a session by reading all its files."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from specache.errors import SessionError
from specache.sessions import state
from specache.sessions.files import check_file
from specache.sessions.manifest import Manifest
from specache.sessions.manifest_file import COPY, FILE, read_copy, read_manifest
from specache.sessions.row_blocks import RowBlocks
from specache.sessions.snapshot import Snapshot
from specache.tiers.disk.row_layout import BLOCK_TOKENS


@dataclass(frozen=True)
class Damage:
    """One damaged part of a session.

    Attributes:
        file: name of the file; for rows, the layer and tokens of the block.
        kind: `manifest`, `manifest copy`, `tail`, `tokens`, `pages`, `windows` or `rows`.
        problem: what is wrong.
    """

    file: str
    kind: str
    problem: str


@dataclass(frozen=True)
class Inspection:
    """The result of reading a session's folder.

    Attributes:
        manifest: the valid manifest; the copy if the manifest is damaged.
        damages: all damage found.
        blocks: damaged blocks of rows, by full-attention layer.
        token_ids: the sequence; None if no intact file has it.
    """

    manifest: Manifest
    damages: tuple[Damage, ...]
    blocks: dict[int, list[int]]
    token_ids: list[int] | None

    @property
    def damaged_kinds(self) -> set[str]:
        """Return the kinds of damaged parts."""
        return {damage.kind for damage in self.damages}

    @property
    def damaged_files(self) -> set[str]:
        """Return the names of damaged files."""
        return {damage.file for damage in self.damages}


def inspect(folder: Path, name: str) -> Inspection:
    """Read everything that the saved state refers to, and change nothing.

    Raises:
        SessionError: nothing was saved, or neither the manifest nor its copy can be read.
    """
    manifest, damages = _manifest(folder, name)
    for file, expected in manifest.files.items():
        try:
            check_file(folder / file, expected)
        except SessionError as error:
            damages.append(Damage(file, file.partition("-")[0], _first_sentence(error)))
    damaged_files = {damage.file for damage in damages}
    blocks = _damaged_blocks(folder, manifest, damages)
    return Inspection(manifest, tuple(damages), blocks, _token_ids(folder, manifest, damaged_files))


def _manifest(folder: Path, name: str) -> tuple[Manifest, list[Damage]]:
    """Return the manifest, or its copy if the manifest is unreadable, and the damage found."""
    damages: list[Damage] = []
    manifest: Manifest | None = None
    copy: Manifest | None = None
    problem: SessionError | None = None
    try:
        manifest = read_manifest(folder)
    except SessionError as error:
        problem = error
        damages.append(Damage(FILE, "manifest", _first_sentence(error)))
    try:
        copy = read_copy(folder)
    except SessionError as error:
        if problem is None:
            damages.append(Damage(COPY, "manifest copy", _first_sentence(error)))
    found = manifest or copy
    if found is not None:
        return found, damages
    if problem is None:
        raise SessionError(f"Nothing was saved in the session {name!r} ({folder}) yet.")
    raise SessionError(
        f"The session {name!r} cannot be mended: neither its manifest nor the copy of it can be read ({_first_sentence(problem)}). "
        "Use another copy of the session, or remove it. Nothing was changed."
    )


def _damaged_blocks(folder: Path, manifest: Manifest, damages: list[Damage]) -> dict[int, list[int]]:
    rows, found = RowBlocks(folder, manifest), {}
    for layer in manifest.full_layers:
        blocks = rows.damaged(layer)
        if blocks:
            found[layer] = blocks
        for block in blocks:
            first = block * BLOCK_TOKENS
            what = f"layer {layer}, tokens {first:,} to {first + BLOCK_TOKENS - 1:,}"
            damages.append(Damage(what, "rows", "a row is not what was written there, or is missing"))
    return found


def _token_ids(folder: Path, manifest: Manifest, damaged_files: set[str]) -> list[int] | None:
    if manifest.tail is None:
        return []
    for file, specs in ((manifest.tail, state.tail_specs(manifest)), (manifest.token_copy, state.token_specs(manifest))):
        if file is not None and file not in damaged_files:
            with suppress(SessionError):
                ids: list[int] = Snapshot(folder / file, manifest.files[file], specs).read(["token_ids"])["token_ids"].tolist()
                return ids
    return None


def _first_sentence(error: Exception) -> str:
    """Return an error's message without its advice."""
    return str(error).partition(". ")[0].rstrip(".")
