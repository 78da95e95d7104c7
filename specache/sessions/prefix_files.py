"""One stored prefix in a folder of its own, in the form of a session.

It is written once, under a name that its content determines, and appears whole or not at all
(`names.building`). Rows that another prefix on the disk shares are hard links to its files.
"""

from __future__ import annotations

import os
import re
import stat
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import torch

from specache.attention.dense import KEY_BLOCK
from specache.cache.prefixes import Tokens, common_tokens, tokens_of
from specache.cache.sequence import Sequence
from specache.cache.window_checkpoints import MemoryCheckpoints, Spacing
from specache.config import SpeCacheConfig
from specache.errors import SessionError
from specache.sessions import names, state
from specache.sessions.checkpoints import DiskCheckpoints
from specache.sessions.manifest import Identity, Manifest
from specache.sessions.manifest_file import FILE, read_manifest
from specache.sessions.saving import blank_manifest, write_state
from specache.sessions.snapshot import Snapshot
from specache.sessions.store import link_file
from specache.tiers.disk.disk_tier import DiskTier
from specache.tiers.disk.extents import Extent
from specache.tiers.disk.row_file import RowFile
from specache.tiers.disk.row_layout import BLOCK_TOKENS

MOST_SEGMENTS = 8  # files of rows per layer: a prefix with as many is copied instead of linked to
_NAME = re.compile(r"[0-9a-f]{32}-[0-9a-f]{32}")

Stop = Callable[[], bool]


class Stopped(Exception):
    """Writing was stopped on purpose. Nothing is left of it."""


@dataclass(eq=False)
class SavedPrefix:
    """A prefix on the disk.

    Attributes:
        owner: digest of its owner's name.
        text: token ids, int32 [n].
        files: bytes on the disk by the number of each file; linked files have one number.
        used: time of the last use, in seconds since 1970.
        intact_tokens: tokens whose rows were read and verified since the process began.
        gone: it was removed, or is ignored because it is damaged.
        readers: open files of rows of sequences that were brought back and share them. It is
            replaced, never changed: any thread may look at it (two that iterate over one `WeakSet`
            may fail when an element goes).
    """

    folder: Path
    owner: str
    text: Tokens
    manifest: Manifest
    files: dict[int, int]
    used: float
    intact_tokens: int = 0
    gone: bool = False
    readers: tuple[weakref.ref[RowFile], ...] = ()

    @property
    def is_read(self) -> bool:
        """Return whether a sequence still reads rows from the files."""
        return any((file := reader()) is not None and file.is_open for reader in self.readers)

    def read_by(self, files: Iterable[RowFile]) -> None:
        """Count open files among the readers. One thread at a time may call this."""
        self.readers = (*(one for one in self.readers if one() is not None), *map(weakref.ref, files))

    def kept(self, length: int) -> int:
        """Return how many of the first `length` tokens the sliding windows can go back to."""
        windows = [shape.window or 0 for shape in self.manifest.windows.values()]
        length = min(length, len(self.text))
        if length >= len(self.text) - 1 or len(self.text) <= min(windows, default=length):
            return length
        if not windows:
            return length
        spacing, lengths = Spacing.of(windows), [checkpoint.tokens for checkpoint in self.manifest.checkpoints]
        index = spacing.best(lengths, length)
        return 0 if index is None else spacing.reach(lengths[index], length) or 0


def is_prefix_name(name: str) -> bool:
    """Return whether a folder of this name may be a stored prefix."""
    return _NAME.fullmatch(name) is not None


def owner_digest(owner: str) -> str:
    """Return the digest by which the disk knows an owner."""
    return blake2b(owner.encode(errors="surrogatepass"), digest_size=16, person=b"specache owner").hexdigest()


def prefix_name(owner: str, identity: Identity, config: SpeCacheConfig, text: Tokens) -> str:
    """Return the name of a prefix: its owner's digest, and one of model, settings and tokens."""
    digest = blake2b(digest_size=16, person=b"specache prefix")
    noted = [str(value) for name, value in vars(identity).items() if value or name != "code"]
    for part in (owner, *noted, str(config.layout)):
        digest.update(part.encode() + b"\0")
    digest.update(text.astype("<i4").tobytes())
    return f"{owner}-{digest.hexdigest()}"


def write_prefix(
    root: Path, name: str, sequence: Sequence, config: SpeCacheConfig, identity: Identity, base: SavedPrefix | None, stop: Stop
) -> None:
    """Write a sequence, which nothing else changes meanwhile, as the prefix `name`.

    Args:
        base: a prefix whose first rows are the sequence's. Its files are linked to, not changed.
        stop: asked between blocks of rows; True ends it with `Stopped`.

    Raises:
        SessionError, SlowTierError, OSError: it cannot be written; nothing is left.
        Stopped: as `stop` said.
    """
    with names.building(root, name) as folder:
        blocks = shared_blocks(base, tokens_of(sequence.token_ids))
        tier = _tier_over(base, blocks, sequence, folder)
        try:
            first = blocks * BLOCK_TOKENS
            for index, layer in sequence.compressed.items():
                for start in range(first, layer.length, KEY_BLOCK):
                    if stop():
                        raise Stopped
                    rows = sequence.tier.read(index, start, min(start + KEY_BLOCK, layer.length))
                    tier.write(index, start, *rows)
            tier.sync()
            checkpoints = _write_checkpoints(folder, sequence)
            write_state(folder, blank_manifest(identity, config, None, (), None), None, sequence, tier, checkpoints)
        finally:
            tier.close()


def shared_blocks(base: SavedPrefix | None, text: Tokens) -> int:
    """Return the full blocks of rows of `base` that a text can link to."""
    if base is None or any(len({e.segment for e in each}) >= MOST_SEGMENTS for each in base.manifest.rows.values()):
        return 0
    return common_tokens(base.text, text) // BLOCK_TOKENS


def read_record(folder: Path, identity: Identity, config: SpeCacheConfig) -> SavedPrefix:
    """Return the prefix of a folder, without reading its rows, pages and windows.

    Raises:
        SessionError: it is damaged, or of another model or other settings.
    """
    manifest = read_manifest(folder)
    if manifest is None or manifest.tail is None or manifest.token_copy is None:
        raise SessionError(f"{folder} holds no prefix.")
    if manifest.identity != identity:
        raise SessionError(f"{folder} belongs to another model.")
    if manifest.config(folder).layout != config.layout:
        raise SessionError(f"{folder} was made with other settings of the low-bit copy.")
    copy = Snapshot(folder / manifest.token_copy, manifest.files[manifest.token_copy], state.token_specs(manifest))
    text = tokens_of(copy.read(["token_ids"])["token_ids"].numpy())
    owner = folder.name.partition("-")[0]
    if folder.name != prefix_name(owner, identity, config, text):
        raise SessionError(f"{folder} does not hold what its name says.")
    for file, size in (*((file, one.bytes) for file, one in manifest.files.items()), *manifest.row_files().items()):
        found = _stat(folder / file)
        if found.st_size < size or not stat.S_ISREG(found.st_mode):
            raise SessionError(f"{folder / file} was cut short.")
    return SavedPrefix(folder, owner, text, manifest, disk_usage(folder), _stat(folder / FILE).st_mtime)


def disk_usage(folder: Path) -> dict[int, int]:
    """Return the bytes on the disk of a folder's files, by their number.

    Raises:
        SessionError: the folder cannot be read.
    """
    usage = {}
    try:
        for path in folder.iterdir():
            found = path.lstat()
            usage[found.st_ino] = max(found.st_blocks * 512, found.st_size)
    except OSError as error:
        raise SessionError(f"{folder} cannot be read: {error.strerror}.") from error
    return usage


def planned_bytes(sequence: Sequence, shared: int) -> int:
    """Return the most bytes that writing a sequence takes, `shared` blocks of rows apart."""
    size = 1 << 16
    for layer in sequence.compressed.values():
        heads, _, dim = layer.residual_keys.shape
        row = heads * 2 * dim * layer.dtype.itemsize
        block = BLOCK_TOKENS * (row + 8 * heads) + 4096
        size += (layer.length // BLOCK_TOKENS - shared) * block + (layer.table.nbytes + BLOCK_TOKENS * row)
        size += 2 * layer.residual_keys.nbytes + 8 * heads * dim + (1 << 14)
        size += sum(tensor.nbytes for tensor in (layer.key_scales.observed, layer.next_positions) if tensor is not None)
    copies = 1 + (0 if sequence.checkpoints is None else len(sequence.checkpoints.lengths))
    return size + copies * sum(layer.ring.nbytes + 8192 for layer in sequence.sliding.values()) + 16 * sequence.length


def _tier_over(base: SavedPrefix | None, blocks: int, sequence: Sequence, folder: Path) -> DiskTier:
    """Return a tier in `folder` that begins with the first `blocks` blocks of `base`."""
    if base is None or not blocks:
        return DiskTier(folder, temporary=False)
    tables = {layer: _first_blocks(extents, blocks) for layer, extents in base.manifest.rows.items()}
    for file in replace(base.manifest, rows=tables).row_files():
        link_file(base.folder / file, folder / file)
    tails = {
        index: torch.empty(layer.residual_keys.shape[0], 0, 2 * layer.residual_keys.shape[2], dtype=layer.dtype)
        for index, layer in sequence.compressed.items()
    }
    return DiskTier.open(folder, tables, tails)


def _first_blocks(extents: tuple[Extent, ...], blocks: int) -> tuple[Extent, ...]:
    """Return where the first `blocks` blocks lie."""
    kept = []
    for extent in extents:
        if blocks > 0:
            kept.append(replace(extent, count=min(extent.count, blocks)))
            blocks -= extent.count
    return tuple(kept)


def _write_checkpoints(folder: Path, sequence: Sequence) -> DiskCheckpoints:
    """Write a sequence's checkpoints of its sliding windows."""
    windows = [layer.window for layer in sequence.sliding.values()]
    written = DiskCheckpoints(Spacing.of(windows or [1]), folder, None)
    if isinstance(sequence.checkpoints, MemoryCheckpoints):
        for length, rings in sequence.checkpoints.copies():
            written.add(length, rings, sequence.sliding)
    return written


def _stat(path: Path) -> os.stat_result:
    try:
        return path.lstat()
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror}.") from error
